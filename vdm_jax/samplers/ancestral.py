"""Ancestral sampling: every step samples the reverse transition p(x_{t-1} | x_t) of the bound (SAM-2)."""

from typing import Literal

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import broadcast_to_batch
from vdm_jax.reverse_variance import PerStep, VarianceDenoiser, evaluate_variance, interpolated_variance
from vdm_jax.samplers.chain import (
    Samples,
    check_snapshots,
    noise,
    posterior_step,
    run,
    to_prediction,
    transition_variance,
    warn_of_amplification,
)
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, evaluate

__all__ = ["ancestral", "ancestral_learned"]


@compiled(static=("clip", "snapshots"), check=warn_of_amplification)
def ancestral(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    variance: Literal["fixed_small", "fixed_large"] | PerStep = "fixed_small",
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """x_{t-1} ~ p(x_{t-1} | x_t) for t = T..1, without noise in the last step (SAM-2).

    The mean is that of the posterior q(x_{t-1} | x_t, x_0) at the predicted x_0. The variance is one of

        "fixed_small"   the posterior's, optimal if the data are a single point
        "fixed_large"   beta_t of the forward step, optimal for data from N(0, I)
        an array        a value for every step, such as `reverse_variance.analytic_dpm_variance`

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        key: for the noise.
        x_T: samples of the prior, shape (B, *x).
        schedule: a discrete schedule; for n steps pass `schedule.subsequence(uniform_steps(T, n))`.
        prediction_type: what the denoiser predicts.
        variance: see above. An array holds the variance of the step t -> t - 1 at index t - 1; its shape is (T,), or
            (T, *x) with a variance for each dimension. The value for t = 1 is not used.
        clip: bound on the absolute value of every predicted x_0 (1 for data in [-1, 1]); None does not clip, as in the
            bound.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type or variance, an array of variances of another shape, or snapshots not in
            0..T.

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2 and section 3.2; Bao et al. 2022, arXiv:2201.06503 (analytic).
    """
    fixed = transition_variance(variance, schedule, x_T)
    check_snapshots(snapshots, schedule)
    return _ancestral(denoiser, key, x_T, schedule, fixed, prediction_type, clip, snapshots)


@compiled(static=("clip", "snapshots"), check=warn_of_amplification)
def ancestral_learned(
    denoiser: VarianceDenoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """`ancestral` with a predicted variance, `reverse_variance.interpolated_variance` (SAM-2, VAR-1).

    Args:
        denoiser: predicts `prediction_type` and the fraction; evaluated once a step, on the whole batch.
        schedule: a discrete schedule. With fewer steps (`schedule.subsequence`) the fraction stays the same and
            interpolates between the variances of the longer step.
        key, x_T, prediction_type, clip, snapshots: as in `ancestral`.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, or snapshots not in 0..T.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, sections 3.1 and 4.
    """
    check_snapshots(snapshots, schedule)
    return _ancestral(denoiser, key, x_T, schedule, None, prediction_type, clip, snapshots)


def _ancestral(denoiser, key, x_T, schedule, fixed, prediction_type, clip, snapshots) -> Samples:
    """With a variance that is a function of the step, or else predicted by the denoiser."""

    def update(x_t, carry, step, t):
        level = broadcast_to_batch(step.t, x_t)
        if fixed is None:
            prediction, fraction = evaluate_variance(denoiser, x_t, level)
            var = interpolated_variance(fraction, step)
        else:
            prediction, var = evaluate(denoiser, x_t, level), fixed(step, t)
        x_hat = to_prediction(prediction, x_t, step.t, prediction_type, clip).x_hat
        return posterior_step(x_t, x_hat, step, noise(key, t, x_t), var), x_hat, carry

    return run(update, x_T, schedule, snapshots)
