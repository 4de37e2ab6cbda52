"""Inpainting by RePaint: after every step the known part of x_t is replaced by a sample of q(x_t | x_0)."""

import jax
import jax.numpy as jnp

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, posterior_step, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType

__all__ = ["repaint"]


@compiled(static=("resamplings", "clip", "snapshots"), check=warn_of_amplification)
def repaint(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    known: Batch,
    mask: Batch,
    *,
    prediction_type: PredictionType = "eps",
    resamplings: int = 1,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """`ancestral` for the unknown part and q(x_t | x_0) for the known part, combined at every level.

    The unknown part is sampled before the known part of its level is, so the samples do not follow the conditional
    distribution exactly. Resampling reduces this bias: each step is repeated, after adding noise back to its start, and
    the two parts become consistent. Alternatives are `guidance.ReconstructionGuidance` and, with many particles,
    `twisted_smc`, which is asymptotically exact.

    Args:
        denoiser: predicts `prediction_type`; evaluated `resamplings` times a step, on the whole batch.
        key: for the noise.
        x_T: samples of the prior, shape (B, *x).
        schedule: a discrete schedule.
        known: x_0, of which only the part selected by the mask is used, shape (B, *x).
        mask: 1 where x_0 is known, 0 elsewhere, shape (B, *x).
        prediction_type: what the denoiser predicts.
        resamplings: how many times each step is taken, at least 1.
        clip: bound on the absolute value of every predicted x_0; None does not clip.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`, whose known part equals `known`.

    Raises:
        ValueError: unknown prediction_type, resamplings below 1, different shapes, or snapshots not in 0..T.

    Source: Song et al. 2021, arXiv:2011.13456, appendix I.2; Lugmayr et al. 2022, arXiv:2201.09865 (resampling).
    """
    if not known.shape == mask.shape == x_T.shape:
        raise ValueError(f"x_T {x_T.shape}, known {known.shape} and mask {mask.shape} must have the same shape")
    if resamplings < 1:
        raise ValueError(f"resamplings must be at least 1, got {resamplings}")
    check_snapshots(snapshots, schedule)
    key_x, key_known, key_back = jax.random.split(key, 3)

    def replace_known(level, z, x):
        return jnp.where(mask > 0, level.alpha * known + level.sigma * z, x)

    def update(x_t, carry, step, t):
        def resample(x_t, repeat):
            i = t * resamplings + repeat
            x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
            x_s = posterior_step(x_t, x_hat, step, noise(key_x, i, x_t))
            x_s = replace_known(step.s, noise(key_known, i, x_t), x_s)
            back = forward.transition(x_s, step)
            return back.mean + jnp.sqrt(back.var) * noise(key_back, i, x_t), (x_s, x_hat)

        _, (x_s, x_hat) = scan(resample, x_t, jnp.arange(resamplings))
        return x_s[-1], x_hat[-1], carry

    start = replace_known(schedule(schedule.num_steps), noise(key_known, 0, x_T), x_T).astype(x_T.dtype)
    return run(update, start, schedule, snapshots)
