"""The probability-flow ODE by diffrax, with steps as long as the tolerance allows."""

import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.probability_flow import check_nonsingular, sample
from vdm_jax.samplers.chain import Samples, Trajectory, predict
from vdm_jax.schedules import Schedule
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Scalar, at_least_float32


def _check(schedule: Schedule, prediction_type: PredictionType) -> None:
    check_nonsingular(schedule, prediction_type)


@compiled(static=("clip", "max_steps"), check=_check)
def adaptive(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: Schedule,
    *,
    prediction_type: PredictionType = "eps",
    tolerance: Scalar | float = 1e-4,
    clip: float | None = None,
    max_steps: int = 4096,
) -> Samples:
    """`probability_flow.sample` down to the schedule's first level, and the x_0 predicted there (LIK-2).

    Args:
        denoiser: predicts `prediction_type`, of each example by itself; asked with the whole batch, as often as the ODE needs.
        key: unused, and may be None; the other samplers have one.
        x_T: draws of the prior, shape (B, *x).
        schedule: continuous, with noise at t = 0; `discrete_schedules.InterpolatedSchedule(table)` makes one of a table.
        prediction_type: what the denoiser predicts.
        tolerance: of the solver a step, relative and absolute; a dimension.
        clip: bound on the size of the predicted x_0; None leaves it.
        max_steps: of the solver.

    Returns:
        `Samples`, without snapshots; NaN if the solver needed more than max_steps.

    Raises:
        ValueError: as `probability_flow.sample`.

    Source: Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.
    """
    del key
    first = sample(denoiser, x_T, schedule, prediction_type=prediction_type, tolerance=tolerance, max_steps=max_steps)
    x_0 = predict(
        denoiser, first, schedule(jnp.zeros((), at_least_float32(x_T.dtype))), prediction_type, clip
    ).x_hat.astype(x_T.dtype)
    none = jnp.zeros((0, *x_T.shape), x_T.dtype)
    return Samples(x_0, Trajectory(jnp.zeros(0, jnp.int32), none, none))
