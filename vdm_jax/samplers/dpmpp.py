"""DPM-Solver++ (2M), multistep and of second order: exponential integrators of the ODE and of the SDE."""

import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.samplers.chain import (
    Samples,
    check_key,
    check_snapshots,
    noise,
    predict,
    run,
    warn_of_amplification,
)
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, at_least_float32

__all__ = ["dpmpp_2m", "dpmpp_2m_sde"]


@compiled(static=("clip", "snapshots"), check=warn_of_amplification)
def dpmpp_2m(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """DPM-Solver++(2M), in the half log-SNR: h = 1/2 (lambda_s - lambda_t).

        D   = x_hat + h / (2 h_previous) (x_hat - x_hat_previous)
        x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D

    One evaluation of the denoiser a step; the prediction of the previous step makes it second order. The first step has
    no previous prediction and the last leads to clean data: both are first-order steps, those of `ddim` with eta = 0.

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        key: unused, may be None; present because all samplers have the same signature.
        x_T: samples of the prior, shape (B, *x).
        schedule: a discrete schedule; for fewer steps pass `schedule.subsequence(...)`. 10 to 20 steps are enough.
        prediction_type: what the denoiser predicts.
        clip: bound on the absolute value of every predicted x_0; None does not clip.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, or snapshots not in 0..T.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    del key

    def x_s(x_t, target, step, t):
        return step.s.sigma / step.t.sigma * x_t - step.s.alpha * jnp.expm1(-0.5 * step.log_snr_drop) * target

    return _multistep(denoiser, x_T, schedule, x_s, prediction_type, clip, snapshots)


def _check(schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None, key: Key | None) -> None:
    warn_of_amplification(schedule, prediction_type, clip)
    check_key(key)


@compiled(static=("clip", "snapshots"), check=_check)
def dpmpp_2m_sde(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` for the reverse SDE, with the same D.

        x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z

    The first and the last step are those of `ancestral`.

    Args:
        key: for the noise.
        denoiser, x_T, schedule, prediction_type, clip, snapshots: as in `dpmpp_2m`.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, or snapshots not in 0..T.

    Source: Lu et al. 2022, arXiv:2211.01095, appendix on the SDE.
    """

    def x_s(x_t, target, step, t):
        scale = jnp.sqrt(jnp.where(t > 1, step.one_minus_ratio, 1.0))
        mean = jnp.exp(-0.5 * step.log_snr_drop) * (step.s.sigma / step.t.sigma * x_t)
        mean = mean + step.s.alpha * step.one_minus_ratio * target
        return mean + step.s.sigma * scale * noise(key, t, x_t)

    return _multistep(denoiser, x_T, schedule, x_s, prediction_type, clip, snapshots)


def _multistep(denoiser, x_T, schedule, x_s, prediction_type, clip, snapshots) -> Samples:
    """Scan the step `x_s(x_t, D, step, t)`, with D extrapolated from the last two predictions of x_0."""
    check_snapshots(snapshots, schedule)

    def update(x_t, carry, step, t):
        (previous, previous_drop), drop = carry, step.log_snr_drop
        x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
        finite, second_order = jnp.where(t > 1, drop, 1.0), (t > 1) & (t < schedule.num_steps)
        target = x_hat + jnp.where(second_order, 0.5 * finite / previous_drop, 0.0) * (x_hat - previous)
        return x_s(x_t, target, step, t), x_hat, (x_hat, finite)

    return run(update, x_T, schedule, snapshots, (jnp.zeros_like(x_T), jnp.ones((), at_least_float32(x_T.dtype))))
