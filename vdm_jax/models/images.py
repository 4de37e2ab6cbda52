"""Conversion from numbers on [-1, 1] to pixel values, for samples and image grids."""

import jax.numpy as jnp
from jax import Array

from vdm_jax.likelihoods import denormalize
from vdm_jax.training.experiment import NO_VALUE

__all__ = ["to_pixels"]


def to_pixels(x, levels: int) -> Array:
    """Round numbers on [-1, 1] to the nearest pixel values 0..levels - 1; NO_VALUE where a number is not finite."""
    return jnp.where(jnp.isfinite(x), denormalize(x, levels), NO_VALUE)
