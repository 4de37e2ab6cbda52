"""DDIM: steps with a fraction eta of the ancestral noise, deterministic at eta = 0; and its inversion (SAM-2)."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real

__all__ = ["ddim", "ddim_inverse"]


def _check(
    schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None, eta: Real | float, key: Key | None
) -> None:
    warn_of_amplification(schedule, prediction_type, clip)
    if not isinstance(eta, Tracer) and not 0.0 <= np.asarray(eta) <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta} (0 is deterministic, 1 is ancestral)")
    if key is None and (isinstance(eta, Tracer) or np.asarray(eta) > 0.0):
        raise ValueError("key must not be None when eta > 0: pass a key, or eta=0.0 for deterministic sampling")


@compiled(static=("clip", "snapshots"), check=_check)
def ddim(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    eta: Real | float = 0.0,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """x_s = alpha_s x_hat + sqrt(sigma_s^2 - eta^2 sigma_q^2) eps_hat + eta sigma_q z for t = T..1.

    sigma_q^2 is the variance of the posterior. eta = 1 is `ancestral`. eta = 0 is deterministic: a step of `euler` on
    the probability-flow ODE. The marginals q(x_t | x_0) are the same for every eta.

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        key: for the noise; may be None if eta is 0.
        x_T: samples of the prior, shape (B, *x).
        schedule: a discrete schedule; for fewer steps pass `schedule.subsequence(...)`.
        prediction_type: what the denoiser predicts.
        eta: scale of the noise, in [0, 1].
        clip: bound on the absolute value of every predicted x_0; None does not clip.
        snapshots: number of evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, eta not in [0, 1] or above 0 without a key, or snapshots not in 0..T.

    Source: Song, Meng & Ermon 2020, arXiv:2010.02502, equations 12 and 16.
    """
    check_snapshots(snapshots, schedule)

    def update(x_t, carry, step, t):
        prediction = predict(denoiser, x_t, step.t, prediction_type, clip)
        remaining = (1.0 - eta**2) + eta**2 * step.snr_ratio  # sigma_s^2 - eta^2 sigma_q^2 over sigma_s^2
        noisy = step.s.sigma > 0
        direction, scale = (jnp.sqrt(jnp.where(noisy, part, 1.0)) for part in (remaining, step.one_minus_ratio))
        z = 0.0 if key is None else eta * scale * noise(key, t, x_t)
        x_s = step.s.sigma * (direction * prediction.eps + z)
        return step.s.alpha * prediction.x_hat + x_s, prediction.x_hat, carry

    return run(update, x_T, schedule, snapshots)


@compiled()
def ddim_inverse(
    denoiser: Denoiser, x_0: Batch, schedule: DiscreteSchedule, *, prediction_type: PredictionType = "eps"
) -> Batch:
    """DDIM inversion: the deterministic `ddim` run backwards, from data x_0 to the latent x_T that generates it.

        x_t = alpha_t x_hat(x_s) + sigma_t eps_hat(x_s)

    These are Euler steps in the other direction, the inverse of `ddim` up to an error of O(1/T). Clean data have no
    noise level to evaluate the denoiser at, so the first step evaluates it on alpha_1 x_0 at level 1.

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        x_0: data, shape (B, *x).
        schedule, prediction_type: as in `ddim`.

    Returns:
        x_T, shape (B, *x).

    Raises:
        ValueError: unknown prediction_type.

    Source: Song, Meng & Ermon 2020, arXiv:2010.02502, section 4.3.
    """
    first = schedule(1)
    x_1 = (first.alpha * x_0).astype(x_0.dtype)
    x_1 = (x_1 + first.sigma * predict(denoiser, x_1, first, prediction_type).eps).astype(x_0.dtype)

    def body(x_s, t):
        prediction, level = predict(denoiser, x_s, schedule(t - 1), prediction_type), schedule(t)
        return level.alpha * prediction.x_hat + level.sigma * prediction.eps, None

    return scan(body, x_1, jnp.arange(2, schedule.num_steps + 1))[0]
