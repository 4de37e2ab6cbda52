"""Likelihoods p(x|z) of images, with parameters from the output of a decoder network."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from vdm_jax import likelihoods
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import Bernoulli, DiscretizedGaussian, DiscretizedLogisticMixture, Likelihood

__all__ = ["PixelLikelihood"]

MIN_SCALE = 1e-2  # of a pixel on [-1, 1]: a constant patch of the training set must not get unbounded density


@dataclass(frozen=True)
class PixelLikelihood:
    """p(x|z) of an image."""

    distribution: Literal["bernoulli", "gaussian", "discretized", "mixture"] = "mixture"
    """Distribution of a pixel: Bernoulli; Gaussian density; Gaussian discretized to pixel values; mixture of
    discretized logistics. Gaussian is trained as a density and evaluated discretized, so that all are comparable."""
    scale: float = 0.0
    """Standard deviation of gaussian and discretized, on [-1, 1]; 0 learns one for every pixel."""
    components: int = 5
    """Logistics in the mixture."""
    binarize: bool = False
    """Threshold images to black and white at half of the gray levels."""

    def num_values(self, levels: int) -> int:
        """Number of values of a pixel after binarization, for data with this many levels.

        Raises:
            ValueError: names the option and its remedy.
        """
        if self.distribution == "bernoulli" and levels != 2 and not self.binarize:
            raise ValueError(
                f"--likelihood.distribution bernoulli needs pixels with two values, these have {levels}: "
                "add --likelihood.binarize, or set --likelihood.distribution mixture"
            )
        if self.components < 1:
            raise ValueError(f"--likelihood.components {self.components} must be at least 1")
        if not (self.scale == 0.0 or 1e-6 <= self.scale <= 1e6):
            raise ValueError(f"--likelihood.scale {self.scale:g} must be 0 or within 1e-6..1e6")
        return 2 if self.binarize else levels

    def normalize(self, images, levels: int) -> jax.Array:
        """Pixel values 0..levels - 1 as numbers on [-1, 1], binarized if asked."""
        if self.binarize:
            return likelihoods.normalize((2 * images.astype(jnp.int32) >= levels).astype(jnp.int32), 2)
        return likelihoods.normalize(images, levels)

    def num_features(self, channels: int) -> int:
        """Number of decoder outputs per pixel."""
        match self.distribution:
            case "bernoulli":
                return channels
            case "mixture":
                return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)
            case _:
                return channels if self.scale else 2 * channels

    def distribution_of(self, output, levels: int, *, density: bool = False) -> Likelihood:
        """p(x|z) of one image, from a decoder output of shape (H, W, num_features).

        Args:
            output: the decoder's output.
            levels: number of values of a pixel.
            density: return `gaussian` as a density instead of discretized.
        """
        match self.distribution:
            case "bernoulli":
                return Bernoulli(output)
            case "mixture":
                return self._mixture(output, levels)
            case _:
                mean, scale = self._normal(output)
                gaussian = density and self.distribution == "gaussian"
                return Normal(mean, var=scale**2) if gaussian else DiscretizedGaussian(mean, scale=scale, levels=levels)

    def mean_image(self, output, levels: int) -> jax.Array:
        """The mean of p(x|z) on [-1, 1]; for a mixture, every channel's mean given the means of earlier channels."""
        match self.distribution:
            case "bernoulli":
                return Bernoulli(output).mean()
            case "mixture":
                return _mean_of_mixture(self._mixture(output, levels))
            case _:
                return self._normal(output)[0]

    def _normal(self, output):
        if self.scale:
            return output, jnp.full((), self.scale, output.dtype)
        mean, scale = jnp.split(output, 2, axis=-1)
        return mean, MIN_SCALE + jax.nn.softplus(scale)

    def _mixture(self, output, levels: int) -> DiscretizedLogisticMixture:
        # features = K (1 + 2 C + C (C - 1) / 2): solve for the number of channels C
        count = output.shape[-1] // self.components
        channels = next(c for c in range(1, count + 1) if 1 + 2 * c + c * (c - 1) // 2 == count)
        parts = output.reshape(*output.shape[:-1], count, self.components)
        logits, means, scales, coefficients = jnp.split(parts, (1, 1 + channels, 1 + 2 * channels), axis=-2)
        # Salimans et al. bound the log scales by -7 for 256 values; this is the same in units of half a bin
        lowest = -7.0 + jnp.log(255.0 / (levels - 1)) if levels > 2 else jnp.asarray(-2.0)
        return DiscretizedLogisticMixture(
            logits[..., 0, :], means, jnp.maximum(scales, lowest), levels, jnp.tanh(coefficients)
        )


def _mean_of_mixture(distribution: DiscretizedLogisticMixture) -> jax.Array:
    weights, coefficients, x, pair = jax.nn.softmax(distribution.logits), jnp.asarray(distribution.coefficients), [], 0
    for c in range(distribution.means.shape[-2]):
        mean = distribution.means[..., c, :]
        for earlier in x:
            mean, pair = mean + coefficients[..., pair, :] * earlier[..., None], pair + 1
        x.append(jnp.clip(jnp.sum(weights * mean, axis=-1), -1.0, 1.0))
    return jnp.stack(x, axis=-1)
