"""A rising function of time, to be learned: the shape of a noise schedule."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SHARPNESS = 10.0  # of a sigmoid at first: a tenth of [0, 1] wide
BEND = 0.1  # of the whole rise, the sigmoids' part at first


class MonotoneNetwork(nn.Module):
    """f(t) - f(s) of a rising f: a line and many sigmoids, every slope and height positive.

        f(t) = a t + sum_k h_k sigmoid(w_k (t - c_k))

    Nearly a line at first, for any key: nothing is drawn. Without features it is a line, whose slope is the only
    parameter. A difference of sigmoids is taken as a product, so that it is exact as s -> t.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix H, whose hidden layer has 1,024 units.
    """

    features: int = 1024

    @nn.compact
    def __call__(self, s: Float[Array, "*t"], t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """f(t) - f(s) for s <= t, elementwise."""

        def parameter(name, shape, start):
            return self.param(name, nn.initializers.zeros, shape) + start  # so that decay leads back to the line

        slope = jnp.exp(parameter("log_slope", (), np.log(1.0 - BEND)))
        if not self.features:  # arrays of size zero are no parameters: Orbax cannot save them
            return slope * (t - s)
        k = (self.features,)
        centre = parameter("centre", k, jnp.linspace(0.0, 1.0, self.features))
        width = jnp.exp(parameter("log_sharpness", k, np.log(SHARPNESS)))
        height = jnp.exp(parameter("log_height", k, np.log(BEND / self.features)))

        def one(s, t):
            # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - e^(v - u))
            rise = jax.nn.sigmoid(width * (t - centre)) * jax.nn.sigmoid(width * (centre - s))
            return slope * (t - s) - jnp.sum(height * rise * jnp.expm1(-width * (t - s)))

        for _ in range(jnp.ndim(t)):
            one = jax.vmap(one)
        return one(s, t)
