"""Predictor-corrector: a step down to the next level, and Langevin steps there that mend its law."""

import jax
from jax.core import Tracer

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.langevin import langevin_corrector
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, posterior_step, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real


def _check(
    schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None, ratio: Real | float
) -> None:
    warn_of_amplification(schedule, prediction_type, clip)
    if not isinstance(ratio, Tracer) and not ratio > 0.0:
        raise ValueError(f"ratio is {ratio}: it must be positive")


@compiled(static=("corrections", "clip", "snapshots"), check=_check)
def predictor_corrector(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    ratio: Real | float = 0.16,
    corrections: int = 1,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """An ancestral step to level s, then `langevin.langevin_corrector` steps at s; none at clean data (SAM-2, LAN-2).

    Args:
        denoiser: predicts `prediction_type`; called 1 + corrections times a step, with the whole batch.
        key: for the noise.
        x_T: draws of the prior, shape (B, *x).
        schedule: the schedule.
        prediction_type: what the denoiser predicts.
        ratio: of the corrector's steps, as in `langevin.langevin_corrector`.
        corrections: Langevin steps a level, at least 1.
        clip: bound on the size of the x_0 that the predictor is given; None leaves it.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, ratio not positive, corrections below 1, or snapshots not in 0..T.

    Source: Song et al. 2021, arXiv:2011.13456, section 4.2.
    """
    if corrections < 1:
        raise ValueError(f"corrections is {corrections}: at least one, or take `ancestral`")
    check_snapshots(snapshots, schedule)
    key_down, key_along = jax.random.split(key)

    def visit(x_t, memory, step, t):
        x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
        x_s = posterior_step(x_t, x_hat, step, noise(key_down, t, x_t)).astype(x_T.dtype)

        def mend(x_s):
            key_t = jax.random.fold_in(key_along, t)
            return langevin_corrector(
                denoiser, key_t, x_s, schedule(t - 1), prediction_type=prediction_type, ratio=ratio, steps=corrections
            )

        return jax.lax.cond(t > 1, mend, lambda x_s: x_s, x_s), x_hat, memory

    return run(visit, x_T, schedule, snapshots)
