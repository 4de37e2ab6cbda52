"""Images between two images, through the latents of a model's probability-flow ODE."""

import jax
import jax.numpy as jnp
from jax import Array

from vdm_jax import probability_flow
from vdm_jax.noise_levels import broadcast_to_batch
from vdm_jax.parameterization import to_x_0
from vdm_jax.training.experiment import DiffusionModel

__all__ = ["interpolate_images"]


def interpolate_images(
    model: DiffusionModel, x_a: Array, x_b: Array, weights: Array, *, tolerance: float = 1e-4
) -> Array:
    """Clean images on paths from x_a to x_b, shape (W, B, H, W, C) on [-1, 1].

    The ODE starts at t = 0 from the mean alpha_0 x of q(z_0 | x). Its ends are denoised once, as every sampler ends.

    Args:
        model: the diffusion model.
        x_a, x_b: pairs of images on [-1, 1], shape (B, H, W, C).
        weights: of x_b, shape (W,).
        tolerance: of the solver.
    """
    level, kind = model.schedule(jnp.zeros(())), model.prediction_type
    paths = probability_flow.interpolate(
        model.denoiser,
        level.alpha * x_a,
        level.alpha * x_b,
        model.schedule,
        weights,
        prediction_type=kind,
        tolerance=tolerance,
    )
    flat = paths.reshape(-1, *x_a.shape[1:])
    predicted = model.denoiser(flat, broadcast_to_batch(level, flat))
    return jax.vmap(lambda p, z: to_x_0(p, z, level, kind))(predicted, flat).reshape(paths.shape)
