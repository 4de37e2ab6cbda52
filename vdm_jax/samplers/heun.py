"""The probability-flow ODE in steps of first or second order, with noise stirred in if wanted."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from vdm_jax.levels import Level
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, predict, run
from vdm_jax.tables import Discrete
from vdm_jax.types import Batch, Denoiser, Key, Parameterization, Real, pytree_callable


def heun(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    table: Discrete,
    *,
    kind: Parameterization = "eps",
    order: Literal[1, 2] = 2,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, float("inf")),
    churn_noise: float = 1.0,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """dy/dn = eps_hat for y = x / alpha and n = sigma / alpha, from level to level, by Euler's or Heun's rule.

    Every schedule has the same ODE in y and n. Euler's step takes eps_hat where it begins; Heun's the mean with that at
    its end, and so asks twice, but for the last step. With churn a step first goes back to more noise,
    n (1 + min(churn / T, sqrt 2 - 1)).

    Args:
        denoiser: predicts `kind`; called once or twice a step, with the whole batch.
        key: for the churn; not looked at without.
        x_T: draws of the prior, shape (B, *x).
        table: the schedule; `tables.karras_steps` has Karras et al.'s places.
        kind: what the denoiser predicts.
        order: 1 is Euler's rule, 2 Heun's.
        churn: S_churn, at least 0.
        churn_range: S_min and S_max, the n between which it is used.
        churn_noise: S_noise, the standard deviation of the noise stirred in.
        clip: bound on the size of every predicted x_0; None leaves it.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown kind, order neither 1 nor 2, churn below 0, or snapshots not in 0..T.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}: choose 1, Euler's rule, or 2, Heun's")
    if not churn >= 0.0:
        raise ValueError(f"churn is {churn}: it must be at least 0")
    check_snapshots(snapshots, table)
    stirring = (float(churn), float(churn_range[0]), float(churn_range[1]), float(churn_noise))
    return _heun(pytree_callable(denoiser), key, x_T, table, kind, order, stirring, clip, snapshots)


@partial(jax.jit, static_argnames=("kind", "order", "stirring", "clip", "snapshots"))
def _heun(denoiser, key, x_T, table, kind, order, stirring, clip, snapshots) -> Samples:
    def visit(x_t, memory, step, t):
        level = step.t
        if stirring[0] > 0.0:
            x_t, level = _stir(x_t, level, table, stirring, noise(key, t, x_t))
        found = predict(denoiser, x_t, level, kind, clip)
        y, change = x_t / level.alpha, step.s.sigma / step.s.alpha - level.sigma / level.alpha

        def mean(_):
            there = predict(denoiser, step.s.alpha * (y + change * found.eps), table(t - 1), kind, clip)
            return 0.5 * (found.eps + there.eps)

        slope = jax.lax.cond(t > 1, mean, lambda _: found.eps, None) if order == 2 else found.eps
        ends = step.s.alpha * (y + change * slope)
        # clean data are x_hat itself, which y - n eps is but for rounding
        return jnp.where(t > 1, ends, step.s.alpha * found.x_hat), found.x_hat, memory

    return run(visit, x_T, table, snapshots)


def _stir(x_t, level: Level, table, stirring, fresh) -> tuple[Batch, Level]:
    """More noise on x_t, and the level it then has."""
    churn, least, most, size = stirring
    n = level.sigma / level.alpha
    gamma = jnp.where((n >= least) & (n <= most), min(churn / table.num_steps, 2**0.5 - 1), 0.0)
    there = _level(table, n * (1.0 + gamma), level)
    y = x_t / level.alpha + n * jnp.sqrt(gamma * (2.0 + gamma)) * size * fresh
    return there.alpha * y, there


def _level(table, n: Real, near: Level) -> Level:
    """The level of n = sigma / alpha: on a variance-preserving schedule one such, else with the signal of `near`."""
    levels = table(jnp.arange(1, table.num_steps + 1))
    log_n, log_power = jnp.log(n), jnp.logaddexp(2 * near.log_alpha, 2 * near.log_sigma)
    preserving = jnp.abs(log_power) < 1e-4
    log_alpha = jnp.where(preserving, -0.5 * jnp.logaddexp(0.0, 2 * log_n), near.log_alpha)
    t = jnp.interp(log_n, levels.log_sigma - levels.log_alpha, jnp.broadcast_to(levels.t, levels.log_sigma.shape))
    return Level(jnp.exp(log_alpha), n * jnp.exp(log_alpha), log_alpha, log_n + log_alpha, t)
