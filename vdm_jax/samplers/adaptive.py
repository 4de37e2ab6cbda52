"""The probability-flow ODE with adaptive step sizes, solved by diffrax."""

import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.probability_flow import check_nonsingular, sample
from vdm_jax.samplers.chain import Samples, Trajectory, predict
from vdm_jax.schedules import Schedule
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Scalar, at_least_float32

__all__ = ["adaptive"]


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
    """`probability_flow.sample` to t = 0, followed by the x_0 predicted there (LIK-2).

    Args:
        denoiser: predicts `prediction_type` for each example independently; evaluated on the whole batch, as often as
            the solver needs.
        key: unused, may be None; present because all samplers have the same signature.
        x_T: samples of the prior, shape (B, *x).
        schedule: a continuous schedule with noise at t = 0. For a discrete schedule pass
            `discrete_schedules.InterpolatedSchedule(schedule)`.
        prediction_type: what the denoiser predicts.
        tolerance: relative and absolute tolerance of a solver step, for each dimension.
        clip: bound on the absolute value of the predicted x_0; None does not clip.
        max_steps: maximum number of solver steps.

    Returns:
        `Samples` without snapshots; NaN if the solver needs more than max_steps.

    Raises:
        ValueError: as `probability_flow.sample`.

    Source: Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.
    """
    del key
    first = sample(denoiser, x_T, schedule, prediction_type=prediction_type, tolerance=tolerance, max_steps=max_steps)
    level = schedule(jnp.zeros((), at_least_float32(x_T.dtype)))
    x_0 = predict(denoiser, first, level, prediction_type, clip).x_hat.astype(x_T.dtype)
    empty = jnp.zeros((0, *x_T.shape), x_T.dtype)
    return Samples(x_0, Trajectory(jnp.zeros(0, jnp.int32), empty, empty))
