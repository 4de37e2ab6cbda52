"""A monotone network: the shape of a learned noise schedule."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["MonotoneNetwork"]

SHARPNESS = 10.0  # of the sigmoids at initialization: a width of 1/10
BEND = 0.1  # share of the sigmoids in f(1) - f(0) at initialization


class MonotoneNetwork(nn.Module):
    """f(t) - f(s) of an increasing f: a line plus sigmoids, with positive slope and heights.

        f(t) = a t + sum_k h_k sigmoid(w_k (t - c_k))

    Initialization is deterministic and close to a line. With features=0 it is a line, whose slope is the only
    parameter. Differences of sigmoids are computed as products, so that they are exact as s -> t.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix H, whose hidden layer has 1,024 units.
    """

    features: int = 1024

    @nn.compact
    def __call__(self, s: Float[Array, "*t"], t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """f(t) - f(s) for s <= t, elementwise."""

        def parameter(name, shape, start):
            return self.param(name, nn.initializers.zeros, shape) + start  # weight decay then pulls towards the line

        slope = jnp.exp(parameter("log_slope", (), np.log(1.0 - BEND)))
        if not self.features:  # Orbax cannot save arrays of size zero
            return slope * (t - s)
        k = (self.features,)
        center = parameter("center", k, jnp.linspace(0.0, 1.0, self.features))
        width = jnp.exp(parameter("log_sharpness", k, np.log(SHARPNESS)))
        height = jnp.exp(parameter("log_height", k, np.log(BEND / self.features)))

        def one(s, t):
            # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - e^(v - u))
            rise = jax.nn.sigmoid(width * (t - center)) * jax.nn.sigmoid(width * (center - s))
            return slope * (t - s) - jnp.sum(height * rise * jnp.expm1(-width * (t - s)))

        for _ in range(jnp.ndim(t)):
            one = jax.vmap(one)
        return one(s, t)
