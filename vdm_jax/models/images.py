"""Numbers on [-1, 1] as pixel values, for the pictures that every recipe draws."""

import jax.numpy as jnp
from jax import Array

from vdm_jax import samplers
from vdm_jax.likelihoods import denormalize
from vdm_jax.training.experiment import NO_VALUE, SampleBatch


def pixels(x, levels: int) -> Array:
    """The nearest pixel values 0..levels - 1 of numbers on [-1, 1]; NO_VALUE where one is not finite."""
    return jnp.where(jnp.isfinite(x), denormalize(x, levels), NO_VALUE)


def pictures(drawn: samplers.Samples, levels: int, labels=None) -> SampleBatch:
    """The samples, and along the chain x_t (left half of a row) beside the x_0 predicted from it (right half)."""
    images = pixels(drawn.x_0, levels)
    if not len(drawn.trajectory.t):
        return SampleBatch(images, labels=labels)
    few = min(len(images), 8)
    rows = jnp.concatenate([drawn.trajectory.x_t[:, :few], drawn.trajectory.x_hat[:, :few]], axis=1)
    last = jnp.concatenate([images[:few], images[:few]])[None]
    return SampleBatch(images, jnp.concatenate([pixels(rows, levels), last]), labels)
