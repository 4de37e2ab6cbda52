"""DDIM: the same denoiser with less noise in the chain, down to none; and without noise, backwards (SAM-2)."""

import jax.numpy as jnp
from jax.core import Tracer

from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real


def _check(
    schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None, eta: Real | float, key: Key | None
) -> None:
    warn_of_amplification(schedule, prediction_type, clip)
    if not isinstance(eta, Tracer) and not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}: it must be in [0, 1], from no noise to all of it")
    if key is None and (isinstance(eta, Tracer) or eta > 0.0):
        raise ValueError(f"key is None and eta is {eta}: a chain with noise needs a key")


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

    sigma_q^2 is the posterior's variance: eta = 1 is `ancestral`, eta = 0 has no noise, and is Euler's step of the
    probability-flow ODE in x / alpha. All have the same marginals for one x_0, whatever eta.

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        key: for the noise; may be None where eta is 0.
        x_T: draws of the prior, shape (B, *x).
        schedule: the schedule; `schedule.subsequence(...)` takes fewer steps.
        prediction_type: what the denoiser predicts.
        eta: how much of the noise, in [0, 1].
        clip: bound on the size of every predicted x_0; None leaves it.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, eta not in [0, 1] or above 0 without a key, or snapshots not in 0..T.

    Source: Song, Meng & Ermon 2020, arXiv:2010.02502, equations 12 and 16.
    """
    check_snapshots(snapshots, schedule)

    def visit(x_t, memory, step, t):
        found = predict(denoiser, x_t, step.t, prediction_type, clip)
        kept = (1.0 - eta**2) + eta**2 * step.snr_ratio  # sigma_s^2 - eta^2 sigma_q^2 over sigma_s^2
        noisy = step.s.sigma > 0
        direction, scale = (jnp.sqrt(jnp.where(noisy, part, 1.0)) for part in (kept, step.one_minus_ratio))
        fresh = 0.0 if key is None else eta * scale * noise(key, t, x_t)
        x_s = step.s.sigma * (direction * found.eps + fresh)
        return step.s.alpha * found.x_hat + x_s, found.x_hat, memory

    return run(visit, x_T, schedule, snapshots)


@compiled()
def ddim_inverse(
    denoiser: Denoiser, x_0: Batch, schedule: DiscreteSchedule, *, prediction_type: PredictionType = "eps"
) -> Batch:
    """`ddim` without noise, backwards: from data to the latent x_T that it came from, or would have.

        x_t = alpha_t x_hat(x_s) + sigma_t eps_hat(x_s)

    Euler's step the other way: its inverse up to an error that falls as 1/T. The first step takes what the denoiser
    says of alpha_1 x_0 at level 1, since clean data have no noise to be asked about.

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        x_0: data, shape (B, *x).
        table, prediction_type: as in `ddim`.

    Returns:
        x_T, shape (B, *x).

    Raises:
        ValueError: unknown prediction_type.

    Source: Song, Meng & Ermon 2020, arXiv:2010.02502, section 4.3.
    """
    first = schedule(1)
    x_1 = (first.alpha * x_0).astype(x_0.dtype)
    x_1 = (x_1 + first.sigma * predict(denoiser, x_1, first, prediction_type).eps).astype(x_0.dtype)

    def move(x_s, t):
        found, level = predict(denoiser, x_s, schedule(t - 1), prediction_type), schedule(t)
        return level.alpha * found.x_hat + level.sigma * found.eps, None

    return scan(move, x_1, jnp.arange(2, schedule.num_steps + 1))[0]
