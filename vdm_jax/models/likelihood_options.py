"""The laws of an image that a decoder can have, read from its last features."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import Bernoulli, DiscretizedGaussian, Likelihood, LogisticMixture, normalize
from vdm_jax.models.images import pixels

LEAST_SCALE = 1e-2  # of a pixel on [-1, 1]: a flat patch of the training set must not be worth any number of nats


@dataclass(frozen=True)
class LikelihoodOptions:
    """p(x|z) of an image."""

    distribution: Literal["bernoulli", "gaussian", "discretized", "mixture"] = "mixture"
    """Of a pixel: of two values; a density; its mass in the value's bin; the mass of a mixture of logistics. A density
    is evaluated by its mass, so that all are numbers of the same kind."""
    scale: float = 0.0
    """Standard deviation of gaussian and discretized, on [-1, 1]; 0 learns one for every pixel."""
    components: int = 5
    """Logistics in a mixture."""
    binarize: bool = False
    """Make images black and white, at half of the grey levels."""

    def levels(self, levels: int) -> int:
        """Values a pixel has, of so many in the data.

        Raises:
            ValueError: more than two values for a Bernoulli law.
        """
        if self.distribution == "bernoulli" and levels != 2 and not self.binarize:
            raise ValueError(
                f"a Bernoulli law is one of two values, and these pixels have {levels}: add --observation.binarize, "
                "or take --observation.law mixture"
            )
        if self.components < 1 or not (self.scale == 0.0 or 1e-6 <= self.scale <= 1e6):
            raise ValueError("--observation.components must be at least 1, --observation.scale 0 or within 1e-6..1e6")
        return 2 if self.binarize else levels

    def x(self, images, levels: int) -> jax.Array:
        """Pixel values 0..levels - 1 as numbers on [-1, 1]."""
        return (
            normalize((2 * images.astype(jnp.int32) >= levels).astype(jnp.int32), 2)
            if self.binarize
            else normalize(images, levels)
        )

    def values(self, x, levels: int) -> jax.Array:
        """Numbers on [-1, 1] as pixel values 0..levels - 1, whatever the law's number of values."""
        return pixels(x, levels)

    def features(self, channels: int) -> int:
        """Numbers a pixel that the law is read from."""
        match self.distribution:
            case "bernoulli":
                return channels
            case "mixture":
                return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)
            case _:
                return channels if self.scale else 2 * channels

    def read(self, output, levels: int, *, density: bool = False) -> Likelihood:
        """The law of one image, from features (H, W, features); a Gaussian one as a density if asked."""
        match self.distribution:
            case "bernoulli":
                return Bernoulli(output)
            case "mixture":
                return self._mixture(output, levels)
            case _:
                mean, scale = self._normal(output)
                gaussian = density and self.distribution == "gaussian"
                return Normal(mean, var=scale**2) if gaussian else DiscretizedGaussian(mean, scale=scale, levels=levels)

    def picture(self, output, levels: int) -> jax.Array:
        """The image in the middle of its law, on [-1, 1]: every pixel's mean, given its earlier channels' means."""
        match self.distribution:
            case "bernoulli":
                return Bernoulli(output).mean()
            case "mixture":
                return _centre(self._mixture(output, levels))
            case _:
                return self._normal(output)[0]

    def _normal(self, output):
        if self.scale:
            return output, jnp.full((), self.scale, output.dtype)
        mean, scale = jnp.split(output, 2, axis=-1)
        return mean, LEAST_SCALE + jax.nn.softplus(scale)

    def _mixture(self, output, levels: int) -> LogisticMixture:
        # features = K (1 + 2 C + C (C - 1) / 2): count the channels back
        count = output.shape[-1] // self.components
        channels = next(c for c in range(1, count + 1) if 1 + 2 * c + c * (c - 1) // 2 == count)
        parts = output.reshape(*output.shape[:-1], count, self.components)
        logits, means, scales, coefficients = jnp.split(parts, (1, 1 + channels, 1 + 2 * channels), axis=-2)
        # Salimans et al. keep log scales above -7, for 256 values; here in half bins, for any number of them
        least = -7.0 + jnp.log(255.0 / (levels - 1)) if levels > 2 else jnp.asarray(-2.0)
        return LogisticMixture(logits[..., 0, :], means, jnp.maximum(scales, least), levels, jnp.tanh(coefficients))


def _centre(distribution: LogisticMixture) -> jax.Array:
    weights, coefficients, x, pair = jax.nn.softmax(distribution.logits), jnp.asarray(distribution.coefficients), [], 0
    for c in range(distribution.means.shape[-2]):
        mean = distribution.means[..., c, :]
        for earlier in x:
            mean, pair = mean + coefficients[..., pair, :] * earlier[..., None], pair + 1
        x.append(jnp.clip(jnp.sum(weights * mean, axis=-1), -1.0, 1.0))
    return jnp.stack(x, axis=-1)
