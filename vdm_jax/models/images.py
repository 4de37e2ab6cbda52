"""Conversion from numbers on [-1, 1] to pixel values, for samples and image grids."""

import jax.numpy as jnp
from jax import Array

from vdm_jax import samplers
from vdm_jax.likelihoods import denormalize
from vdm_jax.training.experiment import NO_VALUE, SampleBatch

__all__ = ["sample_batch", "to_pixels"]


def to_pixels(x, levels: int) -> Array:
    """Round numbers on [-1, 1] to the nearest pixel values 0..levels - 1; NO_VALUE where a number is not finite."""
    return jnp.where(jnp.isfinite(x), denormalize(x, levels), NO_VALUE)


def sample_batch(samples: samplers.Samples, levels: int, labels=None) -> SampleBatch:
    """Samples as pixel values, with their trajectory: x_t in the left half of a row, the predicted x_0 in the right."""
    images, trajectory = to_pixels(samples.x_0, levels), samples.trajectory
    if not len(trajectory.t):
        return SampleBatch(images, labels=labels)
    shown = min(len(images), 8)
    rows = jnp.concatenate([trajectory.x_t[:, :shown], trajectory.x_hat[:, :shown]], axis=1)
    last = jnp.concatenate([images[:shown], images[:shown]])[None]
    return SampleBatch(images, jnp.concatenate([to_pixels(rows, levels), last]), labels)
