"""The probability-flow ODE in steps of first or second order, with noise stirred in if wanted."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.samplers.chain import Prediction, Samples, check_snapshots, noise, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real


@compiled(static=("order", "churn", "churn_range", "churn_noise", "clip", "snapshots"), check=warn_of_amplification)
def heun(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    order: Literal[1, 2] = 2,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, float("inf")),
    churn_noise: float = 1.0,
    whole: DiscreteSchedule | None = None,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """dy/dn = eps_hat for y = x / alpha and n = sigma / alpha, from level to level, by Euler's or Heun's rule.

    Every schedule has the same ODE in y and n. Euler's step takes eps_hat where it begins; Heun's the mean with that at
    its end, and so asks twice, but for the last step. With churn a step first goes back to more noise,
    n (1 + min(churn / T, sqrt 2 - 1)), and all that follows is of the state stirred, x_hat of the snapshots too.

    Args:
        denoiser: predicts `prediction_type`; called once or twice a step, with the whole batch.
        key: for the churn; may be None without.
        x_T: draws of the prior, shape (B, *x).
        schedule: the schedule; `discrete_schedules.karras_steps` has Karras et al.'s places.
        prediction_type: what the denoiser predicts.
        order: 1 is Euler's rule, 2 Heun's.
        churn: S_churn, at least 0.
        churn_range: S_min and S_max, the n between which it is used.
        churn_noise: S_noise, the standard deviation of the noise stirred in.
        whole: the table that `schedule` is a stride of, where t of a level between two others is looked up to tell the
            network (at most T); None is `schedule`, between whose levels t would be off the more they are apart.
        clip: bound on the size of every predicted x_0, and of the one that Heun's mean amounts to; None leaves them.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, order neither 1 nor 2, churn below 0 or without a key, or snapshots not in 0..T.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}: choose 1, Euler's rule, or 2, Heun's")
    if not churn >= 0.0:
        raise ValueError(f"churn is {churn}: it must be at least 0")
    if churn > 0.0 and key is None:
        raise ValueError(f"key is None and churn is {churn}: a chain with noise needs a key")
    check_snapshots(snapshots, schedule)
    stirring = (churn, *churn_range, churn_noise)

    def visit(x_t, memory, step, t):
        level = step.t
        if churn > 0.0:
            x_t, level = _stir(x_t, level, whole or schedule, stirring, schedule.num_steps, noise(key, t, x_t))
        found = predict(denoiser, x_t, level, prediction_type, clip)
        # not y + (n_s - n_t) eps, which is the same but for its rounding where n is large
        x_s = (step.s.alpha * found.x_hat + step.s.sigma * found.eps).astype(x_T.dtype)
        if order == 2:
            mend = partial(
                _mend, denoiser, level=level, s=step.s, found=found, prediction_type=prediction_type, clip=clip
            )
            x_s = jax.lax.cond(t > 1, mend, lambda x_s: x_s, x_s)
        return x_s, found.x_hat, memory

    return run(visit, x_T, schedule, snapshots)


def _mend(denoiser, x_s, *, level: NoiseLevel, s: NoiseLevel, found: Prediction, prediction_type, clip) -> Batch:
    """Heun's step from Euler's, x_s = alpha_s x_hat + sigma_s eps: eps becomes the mean of both ends'.

    With x_hat' predicted at x_s that is a step by x_hat + 1/2 (n_t / n_s - 1) (x_hat' - x_hat) in the place of x_hat,
    which a clip bounds too: where n falls by a large factor, two clipped predictions lead far out.
    """
    there, n_t = predict(denoiser, x_s, s, prediction_type, clip), level.sigma / level.alpha
    if clip is None:
        mended = x_s + 0.5 * (s.sigma - s.alpha * level.sigma / level.alpha) * (there.eps - found.eps)
    else:
        x_hat = found.x_hat + 0.5 * (n_t * s.alpha / s.sigma - 1.0) * (there.x_hat - found.x_hat)
        mended = x_s + s.alpha * (jnp.clip(x_hat, -clip, clip) - found.x_hat)
    return mended.astype(x_s.dtype)


def _stir(x_t, level: NoiseLevel, whole, stirring, num_steps, fresh) -> tuple[Batch, NoiseLevel]:
    """More noise on x_t, and the level it then has; where none is wanted, both as they were."""
    churn, least, most, size = stirring
    n = level.sigma / level.alpha
    gamma = jnp.where((n >= least) & (n <= most), min(churn / num_steps, 2**0.5 - 1), 0.0)
    there = jax.tree.map(partial(jnp.where, gamma > 0), _level(whole, n * (1.0 + gamma), level), level)
    return there.alpha * (x_t / level.alpha + n * jnp.sqrt(gamma * (2.0 + gamma)) * size * fresh), there


def _level(whole, n: Real, near: NoiseLevel) -> NoiseLevel:
    """The level of n = sigma / alpha: on a variance-preserving schedule one such, else with the signal of `near`."""
    levels = whole(jnp.arange(1, whole.num_steps + 1))
    last, log_n = whole(whole.num_steps), jnp.log(n)
    preserving = jnp.abs(jnp.logaddexp(2 * last.log_alpha, 2 * last.log_sigma)) < 1e-4
    log_alpha = jnp.where(preserving, -0.5 * jnp.logaddexp(0.0, 2 * log_n), near.log_alpha)
    t = jnp.interp(log_n, levels.log_sigma - levels.log_alpha, jnp.broadcast_to(levels.t, levels.log_sigma.shape))
    return NoiseLevel(jnp.exp(log_alpha), n * jnp.exp(log_alpha), log_alpha, log_n + log_alpha, t)
