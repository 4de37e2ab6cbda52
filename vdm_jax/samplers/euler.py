"""Euler's method for the probability-flow ODE, with optional churn."""

from collections.abc import Callable

import jax

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.samplers.chain import Prediction, Samples, check_snapshots, noise, predict, run, warn_of_amplification
from vdm_jax.samplers.churn import Churn, add_noise
from vdm_jax.types import Batch, Denoiser, Key, PredictionType

__all__ = ["euler", "integrate"]


@compiled(static=("s_churn", "s_tmin", "s_tmax", "s_noise", "clip", "snapshots"), check=warn_of_amplification)
def euler(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    full_schedule: DiscreteSchedule | None = None,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """dy/dn = eps_hat for y = x / alpha and n = sigma / alpha, with a first-order step from level to level.

    Every schedule has the same ODE in y and n. Without churn this is `ddim` with eta = 0. With churn, a step first adds
    noise, to n (1 + min(s_churn / T, sqrt(2) - 1)), and then integrates from there; the x_hat of the snapshots is
    predicted from the state with the added noise.

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        key: for the churn; may be None if s_churn is 0.
        x_T: samples of the prior, shape (B, *x).
        schedule: a discrete schedule; `discrete_schedules.karras_steps` has the noise levels of Karras et al.
        prediction_type: what the denoiser predicts.
        s_churn: S_churn, at least 0.
        s_tmin, s_tmax: S_tmin and S_tmax, the n between which noise is added.
        s_noise: S_noise, the standard deviation of the added noise.
        full_schedule: the schedule that `schedule` is a subsequence of. The t of a level between two others, which the
            network is conditioned on, is interpolated there (at most T). None interpolates in `schedule`, where the
            error of t increases with the distance between its levels.
        clip: bound on the absolute value of every predicted x_0; None does not clip.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, s_churn below 0 or above 0 without a key, or snapshots not in 0..T.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    return integrate(denoiser, key, x_T, schedule, churn, full_schedule, prediction_type, clip, snapshots)


def integrate(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: DiscreteSchedule,
    churn: Churn,
    full_schedule: DiscreteSchedule | None,
    prediction_type: PredictionType,
    clip: float | None,
    snapshots: int,
    correct: Callable[[Batch, Prediction, NoiseLevel, NoiseLevel], Batch] | None = None,
) -> Samples:
    """Euler steps, each corrected if wanted, except the last one, to clean data; args and errors as in `euler`.

    Args:
        churn: its parameters.
        correct: (x_s, prediction at x_t, level of x_t, level of x_s) -> the corrected x_s.
    """
    churn.check(key)
    check_snapshots(snapshots, schedule)

    def update(x_t, carry, step, t):
        level = step.t
        if churn.s_churn > 0.0:
            z = noise(key, t, x_t)
            x_t, level = add_noise(x_t, level, z, churn, schedule.num_steps, full_schedule or schedule)
        prediction = predict(denoiser, x_t, level, prediction_type, clip)
        # alpha_s x_hat + sigma_s eps equals y + (n_s - n_t) eps, and rounds less where n is large
        x_s = (step.s.alpha * prediction.x_hat + step.s.sigma * prediction.eps).astype(x_T.dtype)
        if correct is not None:
            x_s = jax.lax.cond(t > 1, correct, lambda x_s, *_: x_s, x_s, prediction, level, step.s)
        return x_s, prediction.x_hat, carry

    return run(update, x_T, schedule, snapshots)
