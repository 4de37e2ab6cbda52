"""Numbers on [-1, 1] as pixel values, for the pictures that every recipe draws."""

import jax.numpy as jnp
from jax import Array

from vdm_jax import samplers
from vdm_jax.likelihoods import from_unit
from vdm_jax.training.contract import NO_VALUE, Samples


def pixels(x, levels: int) -> Array:
    """The nearest pixel values 0..levels - 1 of numbers on [-1, 1]; NO_VALUE where one is not finite."""
    return jnp.where(jnp.isfinite(x), from_unit(x, levels), NO_VALUE)


def pictures(drawn: samplers.Samples, levels: int, labels=None) -> Samples:
    """The samples, and along the chain x_t (left half of a row) beside the x_0 predicted from it (right half)."""
    images = pixels(drawn.x_0, levels)
    if not len(drawn.trajectory.t):
        return Samples(images, labels=labels)
    few = min(len(images), 8)
    rows = jnp.concatenate([drawn.trajectory.x_t[:, :few], drawn.trajectory.x_hat[:, :few]], axis=1)
    last = jnp.concatenate([images[:few], images[:few]])[None]
    return Samples(images, jnp.concatenate([pixels(rows, levels), last]), labels)
