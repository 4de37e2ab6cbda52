"""Samples of an image model as pixel values, for the pictures that every recipe draws."""

import jax.numpy as jnp

from vdm_jax import samplers
from vdm_jax.likelihoods import from_unit
from vdm_jax.training.contract import Samples


def pictures(drawn: samplers.Samples, levels: int, labels=None) -> Samples:
    """The samples, and along the chain x_t (left half of a row) beside the x_0 predicted from it (right half)."""
    images = from_unit(drawn.x_0, levels)
    if not len(drawn.trajectory.t):
        return Samples(images, labels=labels)
    few = min(len(images), 8)
    rows = jnp.concatenate([drawn.trajectory.x_t[:, :few], drawn.trajectory.x_hat[:, :few]], axis=1)
    last = jnp.concatenate([images[:few], images[:few]])[None]
    return Samples(images, jnp.concatenate([from_unit(rows, levels), last]), labels)
