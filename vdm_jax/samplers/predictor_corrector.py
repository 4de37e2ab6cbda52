"""Predictor-corrector sampling: an ancestral step to the next level, then Langevin steps at that level."""

import jax
import numpy as np
from jax.core import Tracer

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.langevin import langevin_corrector
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, posterior_step, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real

__all__ = ["predictor_corrector"]


def _check(schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None, snr: Real | float) -> None:
    warn_of_amplification(schedule, prediction_type, clip)
    if not isinstance(snr, Tracer) and not np.asarray(snr) > 0.0:
        raise ValueError(f"snr must be positive, got {snr}")


@compiled(static=("corrector_steps", "clip", "snapshots"), check=_check)
def predictor_corrector(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    snr: Real | float = 0.16,
    corrector_steps: int = 1,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """An ancestral step to level s, then `langevin.langevin_corrector` at s, unless s is clean (SAM-2, LAN-2).

    Args:
        denoiser: predicts `prediction_type`; evaluated 1 + corrector_steps times a step, on the whole batch.
        key: for the noise.
        x_T: samples of the prior, shape (B, *x).
        schedule: a discrete schedule.
        prediction_type: what the denoiser predicts.
        snr: signal-to-noise ratio of a corrector step, as in `langevin.langevin_corrector`.
        corrector_steps: Langevin steps at each level, at least 1.
        clip: bound on the absolute value of the predictor's x_0; None does not clip. The corrector does not clip.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, snr not positive, corrector_steps below 1, or snapshots not in 0..T.

    Source: Song et al. 2021, arXiv:2011.13456, section 4.2.
    """
    if corrector_steps < 1:
        raise ValueError(f"corrector_steps must be at least 1, got {corrector_steps}; for no corrector use `ancestral`")
    check_snapshots(snapshots, schedule)
    key_predictor, key_corrector = jax.random.split(key)

    def update(x_t, carry, step, t):
        x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
        x_s = posterior_step(x_t, x_hat, step, noise(key_predictor, t, x_t)).astype(x_T.dtype)

        def correct(x_s):
            key_t = jax.random.fold_in(key_corrector, t)
            return langevin_corrector(
                denoiser, key_t, x_s, schedule(t - 1), prediction_type=prediction_type, snr=snr, steps=corrector_steps
            )

        return jax.lax.cond(t > 1, correct, lambda x_s: x_s, x_s), x_hat, carry

    return run(update, x_T, schedule, snapshots)
