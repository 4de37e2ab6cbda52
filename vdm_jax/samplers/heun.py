"""Heun's method for the probability-flow ODE, with optional churn: the sampler of EDM."""

import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.samplers.chain import Prediction, Samples, predict, warn_of_amplification
from vdm_jax.samplers.churn import Churn
from vdm_jax.samplers.euler import integrate
from vdm_jax.types import Batch, Denoiser, Key, PredictionType

__all__ = ["heun"]


@compiled(static=("s_churn", "s_tmin", "s_tmax", "s_noise", "clip", "snapshots"), check=warn_of_amplification)
def heun(
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
    """dy/dn = eps_hat for y = x / alpha and n = sigma / alpha, with a second-order step from level to level.

    A step of `euler`, then the same step again with the mean of the eps at both of its ends. The last step, to clean
    data, stays an Euler step.

    Args:
        denoiser: predicts `prediction_type`; evaluated on the whole batch, twice a step and once in the last.
        key, x_T, schedule, prediction_type: as in `euler`.
        s_churn, s_tmin, s_tmax, s_noise, full_schedule: as in `euler`.
        clip: bound on the absolute value of every predicted x_0, and of the x_0 that the mean of both eps corresponds
            to; None does not clip.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, s_churn below 0 or above 0 without a key, or snapshots not in 0..T.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """

    def correct(x_s, at_start, level, s):
        at_end = predict(denoiser, x_s, s, prediction_type, clip)
        return _corrected(x_s, at_start, at_end, level, s, clip)

    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    return integrate(denoiser, key, x_T, schedule, churn, full_schedule, prediction_type, clip, snapshots, correct)


def _corrected(x_s: Batch, at_start: Prediction, at_end: Prediction, t: NoiseLevel, s: NoiseLevel, clip) -> Batch:
    """Heun's step from Euler's x_s = alpha_s x_hat + sigma_s eps: the mean of both eps replaces eps.

    That equals a step with x_hat + 1/2 (n_t / n_s - 1) (x_hat' - x_hat) in place of x_hat, where x_hat' is predicted at
    x_s. This value is clipped too: if n decreases by a large factor it is far outside of the range of x_hat and x_hat'.
    """
    if clip is None:
        corrected = x_s + 0.5 * (s.sigma - s.alpha * t.sigma / t.alpha) * (at_end.eps - at_start.eps)
    else:
        n_t = t.sigma / t.alpha
        x_hat = at_start.x_hat + 0.5 * (n_t * s.alpha / s.sigma - 1.0) * (at_end.x_hat - at_start.x_hat)
        corrected = x_s + s.alpha * (jnp.clip(x_hat, -clip, clip) - at_start.x_hat)
    return corrected.astype(x_s.dtype)
