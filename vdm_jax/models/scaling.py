"""How the examples of a data set become x_0, and the units of -log p: pixel values, or standardized real numbers."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from vdm_jax import elbo, samplers
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import DiscretizedGaussian, normalize
from vdm_jax.models.images import to_pixels
from vdm_jax.training.experiment import DataSpec, SampleBatch

__all__ = ["PixelScaling", "Standardization", "scaling"]


@dataclass(frozen=True)
class PixelScaling:
    """Pixel values 0 .. levels - 1 on [-1, 1]; -log P in bits per dimension.

    Fields:
        data: the images.
    """

    data: DataSpec
    clip = 1.0  # bound on the predicted x_0

    def scale(self, images: Array) -> Array:
        """x_0 of images."""
        return normalize(images, self.data.levels)

    def decoder(self, x_hat, x_1, level):
        """Ho et al.'s p(x_0 | x_1): a discretized Gaussian at the predicted x_0 with the standard deviation of x_1."""
        del x_1
        return DiscretizedGaussian(x_hat, scale=level.sigma, levels=self.data.levels)

    def report(self, bound: elbo.DiffusionBound) -> dict[str, Array]:
        """A bound and its terms in bits per dimension, by name."""
        nats = {"bits_per_dim": bound.total, **bound._asdict()}
        return {name: elbo.bits_per_dim(value, math.prod(self.data.shape)) for name, value in nats.items()}

    def samples(self, samples: samplers.Samples, labels: Array | None = None) -> SampleBatch:
        """Samples as images, with their trajectory: x_t in the left half of a row, the predicted x_0 in the right."""
        levels, trajectory = self.data.levels, samples.trajectory
        images = to_pixels(samples.x_0, levels)
        if not len(trajectory.t):
            return SampleBatch(images, labels=labels)
        shown = min(len(images), 8)
        rows = jnp.concatenate([trajectory.x_t[:, :shown], trajectory.x_hat[:, :shown]], axis=1)
        last = jnp.concatenate([images[:shown], images[:shown]])[None]
        return SampleBatch(images, jnp.concatenate([to_pixels(rows, levels), last]), labels)


@dataclass(frozen=True)
class Standardization:
    """Real numbers minus their mean, divided by their standard deviation; -log p in nats.

    A density depends on the units of the data: in those of the data, -log p(x) is larger by `data.log_volume` than that
    of x_0, whose entries have unit variance.

    Fields:
        data: the vectors or series, with the mean and the standard deviation of each entry or channel.
    """

    data: DataSpec
    clip = None  # the data may be unbounded

    def scale(self, x: Array) -> Array:
        """x_0 of examples."""
        return (x - self._entries(self.data.mean)) / self._entries(self.data.std)

    def unscale(self, x_0: Array) -> Array:
        """Examples from x_0."""
        return self._entries(self.data.mean) + self._entries(self.data.std) * x_0

    def decoder(self, x_hat, x_1, level):
        """p(x_0 | x_1): a normal distribution around the predicted x_0 with the standard deviation of x_1."""
        del x_1
        return Normal(x_hat, var=level.sigma**2)

    def report(self, bound: elbo.DiffusionBound) -> dict[str, Array]:
        """A bound in nats, in the units of the data; the same and its terms in nats per dimension, standardized."""
        terms = {"nats_per_dim": bound.total, **bound._asdict()}
        per_dim = {name: value / math.prod(self.data.shape) for name, value in terms.items()}
        return {"nats": bound.total + self.data.log_volume, **per_dim}

    def samples(self, samples: samplers.Samples, labels: Array | None = None) -> SampleBatch:
        """Samples in the units of the data, for points in the plane with their trajectory."""
        x, states = self.unscale(samples.x_0), samples.trajectory.x_t
        if self.data.shape != (2,) or not len(states):
            return SampleBatch(x, labels=labels)
        chains = jax.vmap(self.unscale)(states)
        return SampleBatch(x, jnp.concatenate([chains, x[None]])[:, :40], labels)

    def _entries(self, numbers: tuple[float, ...]) -> Array:
        return jnp.asarray(numbers, jnp.float32).reshape((1,) * len(self.data.shape) + (-1,))


def scaling(data: DataSpec) -> PixelScaling | Standardization:
    """The scaling of a data set's examples."""
    return PixelScaling(data) if data.levels else Standardization(data)
