"""Churn of `euler` and `heun`: a step first adds noise, then integrates the ODE from the higher level (EDM)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.types import Batch, Key, Real

__all__ = ["Churn", "add_noise"]


class Churn(NamedTuple):
    """Parameters of the stochastic sampler, in the units n = sigma / alpha.

    Fields:
        s_churn: amount of noise; 0 adds none.
        s_tmin, s_tmax: noise is added only at levels with n in this interval.
        s_noise: standard deviation of the noise relative to the increase of the level.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """

    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def check(self, key: Key | None) -> None:
        """Check the parameters.

        Raises:
            ValueError: s_churn below 0, or above 0 without a key.
        """
        if not self.s_churn >= 0.0:
            raise ValueError(f"s_churn must be at least 0, got {self.s_churn}")
        if self.s_churn > 0.0 and key is None:
            raise ValueError("key must not be None when s_churn > 0: pass a key, or s_churn=0.0")


def add_noise(
    x_t: Batch, level: NoiseLevel, z: Batch, churn: Churn, num_steps: int, schedule: DiscreteSchedule
) -> tuple[Batch, NoiseLevel]:
    """Increase n to n (1 + gamma), gamma = min(s_churn / num_steps, sqrt(2) - 1).

    Args:
        x_t: shape (B, *x).
        level: level of x_t, scalars.
        z: standard normal noise, shape (B, *x).
        churn: the parameters.
        num_steps: number of sampling steps.
        schedule: where t of the new level is interpolated.

    Returns:
        The state and its level; both unchanged if n is outside of [s_tmin, s_tmax].

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    n = level.sigma / level.alpha
    gamma = jnp.where((n >= churn.s_tmin) & (n <= churn.s_tmax), min(churn.s_churn / num_steps, 2**0.5 - 1), 0.0)
    new = jax.tree.map(partial(jnp.where, gamma > 0), _interpolated_level(schedule, n * (1.0 + gamma), level), level)
    return new.alpha * (x_t / level.alpha + n * jnp.sqrt(gamma * (2.0 + gamma)) * churn.s_noise * z), new


def _interpolated_level(schedule: DiscreteSchedule, n: Real, near: NoiseLevel) -> NoiseLevel:
    """The level with sigma / alpha = n. Variance-preserving if the schedule is, otherwise with the alpha of `near`."""
    levels = schedule(jnp.arange(1, schedule.num_steps + 1))
    last, log_n = schedule(schedule.num_steps), jnp.log(n)
    preserving = jnp.abs(jnp.logaddexp(2 * last.log_alpha, 2 * last.log_sigma)) < 1e-4
    log_alpha = jnp.where(preserving, -0.5 * jnp.logaddexp(0.0, 2 * log_n), near.log_alpha)
    t = jnp.interp(
        log_n, levels.log_sigma - levels.log_alpha, jnp.broadcast_to(jnp.asarray(levels.t), levels.log_sigma.shape)
    )
    return NoiseLevel(jnp.exp(log_alpha), n * jnp.exp(log_alpha), log_alpha, log_n + log_alpha, t)
