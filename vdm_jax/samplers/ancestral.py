"""Ancestral sampling: every step a draw of the learned reverse kernel, as the bound has it (SAM-2)."""

from typing import Literal

from vdm_jax import forward
from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import Step, broadcast_to_batch
from vdm_jax.reverse_variance import PerStep, VarianceDenoiser, evaluate_variance, interpolated_variance
from vdm_jax.samplers.chain import (
    Samples,
    check_snapshots,
    noise,
    posterior_step,
    run,
    to_prediction,
    warn_of_amplification,
)
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real, evaluate


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

    The mean is the posterior's at the predicted x_0. The variance is the posterior's (`fixed_small`, exact for data that is
    one point), the forward step's beta_t (`fixed_large`, exact for data from N(0, I)), or what is given for every step, such
    as `reverse_variance.analytic_variance`.

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        key: for the noise.
        x_T: draws of the prior, shape (B, *x).
        schedule: the schedule; `schedule.subsequence(uniform_steps(T, n))` takes n steps only.
        prediction_type: what the denoiser predicts.
        variance: see above; as an array that of the step t -> t - 1 at index t - 1, shape (T,), or (T, *x) for one of
            each dimension. What it has for t = 1 is not used.
        clip: bound on the size of every predicted x_0 (1 for data on [-1, 1]); None leaves it, as the bound assumes.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type or variance, variances of another shape, or snapshots not in 0..T.

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2 and section 3.2; Bao et al. 2022, arXiv:2201.06503 (analytic).
    """
    given = None if isinstance(variance, str) else variance
    if given is None and variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"unknown variance {variance!r}: choose 'fixed_small' or 'fixed_large', or give an array")
    if given is not None and given.shape not in ((schedule.num_steps,), (schedule.num_steps, *x_T.shape[1:])):
        raise ValueError(f"variance has shape {given.shape}: a chain of T = {schedule.num_steps} takes (T,) or (T, *x)")
    check_snapshots(snapshots, schedule)
    if given is not None and given.ndim > 1:
        given = given[:, None]  # one for all of the batch
    name = variance if isinstance(variance, str) else "given"
    return _ancestral(denoiser, key, x_T, schedule, given, prediction_type, name, clip, snapshots)


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
    """`ancestral` with the variance that the denoiser gives itself, `reverse_variance.interpolated_variance` (SAM-2, VAR-1).

    Args:
        denoiser: predicts `prediction_type` and the fraction; called once a step, with the whole batch.
        schedule: the schedule; fewer steps (`schedule.subsequence`) have another range for the variance, and the same fraction.
        key, x_T, prediction_type, clip, snapshots: as in `ancestral`.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, or snapshots not in 0..T.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, sections 3.1 and 4.
    """
    check_snapshots(snapshots, schedule)
    return _ancestral(denoiser, key, x_T, schedule, None, prediction_type, "learned", clip, snapshots)


def _ancestral(denoiser, key, x_T, schedule, given, prediction_type, variance, clip, snapshots) -> Samples:
    def visit(x_t, memory, step, t):
        if variance == "learned":
            prediction, fraction = evaluate_variance(denoiser, x_t, broadcast_to_batch(step.t, x_t))
        else:
            prediction, fraction = evaluate(denoiser, x_t, broadcast_to_batch(step.t, x_t)), None
        x_hat = to_prediction(prediction, x_t, step.t, prediction_type, clip).x_hat
        var = _variance(step, variance, fraction if given is None else given[t - 1])
        return posterior_step(x_t, x_hat, step, noise(key, t, x_t), var), x_hat, memory

    return run(visit, x_T, schedule, snapshots)


def _variance(step: Step, variance, value) -> Real:
    """The variance of a step by its name, given a fraction or the variance itself."""
    match variance:
        case "fixed_small":
            return forward.posterior_variance(step)
        case "fixed_large":
            return step.t.sigma**2 * step.one_minus_ratio
        case "learned":
            return interpolated_variance(value, step)
        case _:
            return value
