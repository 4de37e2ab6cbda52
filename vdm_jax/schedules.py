"""Continuous noise schedules: a time t in [0, 1] gives a `NoiseLevel`, and a pair s < t gives a `Step`.

Each formula is written once for NumPy and JAX arrays (the array namespace of t decides), so that
`discrete_schedules.discretize` in float64 and a jitted call share it. Every schedule computes the log-SNR drop between
two close times without cancellation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jaxtyping import ArrayLike

from vdm_jax.compilation import ARGUMENT_CHECKS, compiled, scan
from vdm_jax.noise_levels import NoiseLevel, Step, level_from_log_snr
from vdm_jax.types import Real, at_least_float32

__all__ = [
    "ContinuousSchedule",
    "Cosine",
    "LearnedSchedule",
    "LinearBeta",
    "LinearLogSNR",
    "Schedule",
    "Sigmoid",
    "VarianceExploding",
    "check_noise_at_start",
    "time_from_log_snr",
]


@runtime_checkable
class Schedule(Protocol):
    """A callable from times to noise levels, and from pairs of times to steps; scalars, or arrays elementwise."""

    def __call__(self, t) -> NoiseLevel: ...

    def step(self, s, t) -> Step: ...


class ContinuousSchedule:
    """Base class of the continuous schedules: it checks t and adds `step` and `log_snr` to `_level` and `_drop`."""

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """The level at t in [0, 1]; NaN outside when t is traced.

        Raises:
            TypeError: t is an integer.
            ValueError: t is concrete and outside [0, 1].
        """
        return self._level(_unit_time(t))

    def step(self, s: ArrayLike, t: ArrayLike) -> Step:
        """The levels at s < t and the drop between them; times and errors as in `__call__`."""
        s, t = _unit_time(s), _unit_time(t)
        return Step(self._level(s), self._level(t), self._drop(s, t))

    def log_snr(self, t: ArrayLike) -> Real:
        """lambda(t); `jax.grad` of it is lambda'(t) = -gamma'(t)."""
        return self(t).log_snr

    def _level(self, t) -> NoiseLevel:
        raise NotImplementedError

    def _drop(self, s, t):
        raise NotImplementedError


@dataclass_transform(frozen_default=True)
def _static(cls):
    """A frozen dataclass whose fields are static under jit."""
    cls = dataclass(frozen=True)(cls)
    fields = list(cls.__dataclass_fields__)
    return jax.tree_util.register_dataclass(cls, data_fields=[], meta_fields=fields)


@_static
class LinearBeta(ContinuousSchedule):
    """beta(t) = beta_min + t (beta_max - beta_min), the continuous limit of Ho et al.'s betas (FWD-7).

        alpha^2 = exp(-B),  B(t) = t beta_min + t^2 (beta_max - beta_min) / 2

    Source: Song et al. 2021, arXiv:2011.13456, appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _level(self, t):
        xp = t.__array_namespace__()
        slope = 0.5 * (self.beta_max - self.beta_min)
        b = t * (self.beta_min + slope * t)
        high = _coarse(t, 10)  # its square is exact: e^-B/2 becomes a product of two accurate factors
        rest = (t - high) * (self.beta_min + slope * (t + high)) + self.beta_min * high
        alpha = _exp_linear(-0.5 * slope, high * high) * (1 + xp.expm1(-0.5 * rest))
        noise = -xp.expm1(-b)
        return _preserving(alpha, xp.sqrt(noise), t, noise=noise)

    def _drop(self, s, t):
        xp = t.__array_namespace__()
        slope = 0.5 * (self.beta_max - self.beta_min)
        difference = (t - s) * (self.beta_min + slope * (t + s))
        return _log_ratio(xp.expm1(difference), xp.ones_like(t), -xp.expm1(-s * (self.beta_min + slope * s)))


@_static
class Cosine(ContinuousSchedule):
    """abar(t) = cos^2(a_t) / cos^2(a_0),  a_t = pi/2 (t + offset) / (1 + offset) (FWD-7). The signal at t = 1 is 0.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17.
    """

    offset: float = 0.008

    def _level(self, t):
        xp = t.__array_namespace__()
        # cos a_t from the distance to pi/2, and 1 - abar as a product: neither cancels at its end.
        noise = xp.sin(self._angle(t)) * xp.sin(self._angle(t + 2 * self.offset)) / self._cos_0**2
        return _preserving(xp.sin(self._angle(1 - t)) / self._cos_0, xp.sqrt(noise), t, noise=noise)

    def _drop(self, s, t):
        xp = t.__array_namespace__()
        both = xp.minimum(t + s + 2 * self.offset, (1 - t) + (1 - s))  # a_t + a_s, or its distance to pi
        gain = self._cos_0**2 * xp.sin(self._angle(t - s)) * xp.sin(self._angle(both))
        noise = xp.sin(self._angle(s)) * xp.sin(self._angle(s + 2 * self.offset))
        return _log_ratio(gain, xp.sin(self._angle(1 - t)) ** 2, noise)

    def _angle(self, t):
        return t * (0.5 * np.pi / (1 + self.offset))

    @property
    def _cos_0(self) -> float:
        return float(np.cos(self._angle(self.offset)))


@_static
class Sigmoid(ContinuousSchedule):
    """abar(t) = (f(1) - f(t)) / (f(1) - f(0)),  f(t) = sigmoid((start + t (end - start)) / tau) (FWD-7).

    The signal at t = 1 is 0.

    Source: Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def _level(self, t):
        xp = t.__array_namespace__()
        # A difference of sigmoids is sinh(half the difference) / (2 cosh cosh): no cancellation.
        u = (self.start + t * (self.end - self.start)) / self.tau
        scale = np.sinh(self._half) * xp.cosh(0.5 * u)
        signal = xp.sinh((1 - t) * self._half) * float(np.cosh(0.5 * self.start / self.tau)) / scale
        noise = xp.sinh(t * self._half) * float(np.cosh(0.5 * self.end / self.tau)) / scale
        return _preserving(xp.sqrt(signal), xp.sqrt(noise), t, signal=signal, noise=noise)

    def _drop(self, s, t):
        xp = t.__array_namespace__()
        gain = float(np.sinh(self._half)) * xp.sinh((t - s) * self._half)
        return _log_ratio(gain, xp.sinh((1 - t) * self._half), xp.sinh(s * self._half))

    @property
    def _half(self) -> float:
        return 0.5 * (self.end - self.start) / self.tau


@_static
class LinearLogSNR(ContinuousSchedule):
    """lambda(t) falls linearly from log_snr_max to log_snr_min (FWD-7). Variance-preserving; t = 0 is *not* clean.

    Source: Kingma et al. 2021, arXiv:2107.00630 (the end points are its initial values).
    """

    log_snr_max: float = 13.3
    log_snr_min: float = -5.0

    def _level(self, t):
        xp = t.__array_namespace__()
        noise_to_signal = float(np.exp(-self.log_snr_max)) * _exp_linear(self._range, t)
        alpha = 1 / xp.sqrt(1 + noise_to_signal)
        return _preserving(alpha, xp.sqrt(noise_to_signal) * alpha, t)

    def _drop(self, s, t):
        return (t - s) * self._range

    @property
    def _range(self) -> float:
        return self.log_snr_max - self.log_snr_min


@_static
class VarianceExploding(ContinuousSchedule):
    """alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t (FWD-7). t = 0 is *not* clean.

    The prior is N(0, sigma_max^2 I): `prior=Normal(0.0, var=sigma_max**2)`.

    Source: Song & Ermon 2019, arXiv:1907.05600; Song et al. 2021, arXiv:2011.13456.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def _level(self, t):
        xp = t.__array_namespace__()
        sigma = self.sigma_min * _exp_linear(self._rate, t)
        one = xp.where(xp.isnan(t), t, 1.0)  # NaN where t is out of range, as in every other field
        return NoiseLevel(one, sigma, one - 1.0, float(np.log(self.sigma_min)) + self._rate * t, t)

    def _drop(self, s, t):
        return (t - s) * (2 * self._rate)

    @property
    def _rate(self) -> float:
        return float(np.log(self.sigma_max / self.sigma_min))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearnedSchedule(ContinuousSchedule):
    """A learned variance-preserving schedule: a monotone network gives the shape of gamma(t) = -lambda(t) (FWD-7).

        gamma(t) = (1 - u) gamma_0 + u gamma_1,   u = rise(0, t) / rise(0, 1)

    The end points do not depend on the network: gamma(0) = gamma_0 and gamma(1) = gamma_1. t = 0 is *not* clean. The
    schedule is a pytree and can be differentiated with respect to all fields. It accepts JAX arrays only.

    Fields:
        gamma_0, gamma_1: scalars, gamma_0 < gamma_1.
        rise: rise(s, t) = f(t) - f(s) of an increasing f on [0, 1], elementwise and without cancellation as s -> t,
            such as `jax.tree_util.Partial(networks.schedule.MonotoneNetwork().apply, params)`.

    Source: Kingma et al. 2021, arXiv:2107.00630, section 4 and appendix H.
    """

    gamma_0: Any
    gamma_1: Any
    rise: Callable

    def _level(self, t):
        part = self.rise(jnp.zeros_like(t), t) / self.rise(jnp.zeros_like(t), jnp.ones_like(t))
        return level_from_log_snr(-((1 - part) * self.gamma_0 + part * self.gamma_1), t)

    def _drop(self, s, t):
        return (self.gamma_1 - self.gamma_0) * self.rise(s, t) / self.rise(jnp.zeros_like(t), jnp.ones_like(t))


def check_noise_at_start(schedule: Schedule, t_0: Real | float, dtype: Any) -> None:
    """Check that a schedule has noise at t_0, where an integral over time starts. Traced values are not checked.

    Raises:
        ValueError: t_0 is not in [0, 1), or the schedule has no noise there.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((schedule, t_0))):
        return
    if not 0.0 <= float(t_0) < 1.0:
        raise ValueError(f"t_0 is {t_0}: it must be in [0, 1)")
    # The evaluation context also works in a `jax.shard_map` that is not compiled.
    with eval_context(), jax.numpy_dtype_promotion("standard"):
        noisy = bool(schedule(jnp.asarray(t_0, dtype)).sigma > 0.0)
    if not noisy:
        raise ValueError(
            f"{schedule} has no noise at t = {float(t_0)}: choose a schedule with noise at t = 0, such as "
            "LinearLogSNR() or discrete_schedules.InterpolatedSchedule(discrete_schedules.discretize(schedule, 1000)), "
            "or a later t_0 if the function has this argument"
        )


@compiled()
def time_from_log_snr(log_snr: Real, schedule: Schedule) -> Real:
    """The t in [0, 1] at which the schedule has a log-SNR: the inverse of lambda(t), by bisection (FWD-6).

    The result is as precise as the floating-point numbers t of the schedule. Its gradient with respect to `log_snr` and
    to the parameters of the schedule is that of the inverse function.

    Args:
        log_snr: lambda, any shape.
        schedule: continuous, lambda falling.

    Returns:
        t, of the shape of `log_snr`. 0 if lambda is not below lambda(0), 1 if it is not above lambda(1).
    """
    log_snr = log_snr.astype(at_least_float32(log_snr.dtype))
    target = jax.lax.stop_gradient(log_snr)

    def halve(bracket, _):
        low, high = bracket
        middle = 0.5 * (low + high)
        early = schedule(middle).log_snr > target
        return (jnp.where(early, middle, low), jnp.where(early, high, middle)), None

    (low, high), _ = scan(halve, (jnp.zeros_like(target), jnp.ones_like(target)), jnp.arange(80))
    inside = (low > 0) & (high < 1)
    t = jnp.where(inside, 0.5 * (low + high), 0.5)
    slope = jax.jvp(lambda t: schedule(t).log_snr, (t,), (jnp.ones_like(t),))[1]
    # One Newton step of length 0, for its gradient: dt = (d log_snr - d lambda) / lambda'(t).
    residual = jnp.where(inside, log_snr, 0.0) - jnp.where(inside, schedule(t).log_snr, 0.0)
    t = t + (residual - jax.lax.stop_gradient(residual)) / jax.lax.stop_gradient(slope)
    return jnp.where(inside, t, jnp.where(low > 0, 1.0, 0.0))


def _check_schedule(name: str, value: Any) -> None:
    if hasattr(value, "num_steps"):
        raise TypeError(
            f"{name} is a discrete schedule: convert it by discrete_schedules.InterpolatedSchedule(schedule)"
        )
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} is a {type(value).__name__}: it must be a continuous schedule, such as LinearLogSNR()")


ARGUMENT_CHECKS[Schedule] = _check_schedule


def _preserving(alpha, sigma, t, signal=None, noise=None) -> NoiseLevel:
    """A variance-preserving level; each logarithm is computed from the scale that keeps its digits.

    Pass `signal` = alpha^2 or `noise` = sigma^2 if the scale was computed as its root: a root has no finite slope at 0,
    but its square does, and so does the logarithm of the other scale.
    """
    xp = t.__array_namespace__()
    loud = alpha < sigma
    signal, noise = alpha**2 if signal is None else signal, sigma**2 if noise is None else noise
    return NoiseLevel(
        alpha,
        sigma,
        xp.where(loud, xp.log(alpha), 0.5 * xp.log1p(-xp.where(loud, 0.0, noise))),
        xp.where(loud, 0.5 * xp.log1p(-xp.where(loud, signal, 0.0)), xp.log(sigma)),
        t,
    )


def _log_ratio(gain: Any, signal: Any, noise: Any) -> Any:
    """log(1 + gain / (signal noise)): a drop of log-SNR from `noise` at s to `signal` at t.

    Infinite if s is clean or t is pure noise; its gradient is then that of the nonzero factors.
    """
    xp = gain.__array_namespace__()
    finite, logs = signal * noise > 0, [xp.log(xp.where(x == 0, 1.0, x)) for x in (gain, signal, noise)]
    infinite = logs[0] - logs[1] - logs[2] + np.inf
    return xp.where(finite, xp.log1p(gain / xp.where(finite, signal * noise, 1.0)), infinite)


def _exp_linear(rate: float, t: Any) -> Any:
    """e^(rate t), accurate to the last digit: in float32 rounding rate t alone costs up to 2e-6 at rate t = 40."""
    xp = t.__array_namespace__()
    coarse = float(np.round(rate * 2.0**5) / 2.0**5)  # coarse t_high needs at most 24 bits, so it is exact
    t_high = _coarse(t, 11)
    # Not exp times exp: XLA may rewrite that to the exponential of the rounded sum.
    return xp.exp(coarse * t_high) * (1 + xp.expm1(coarse * (t - t_high) + (rate - coarse) * t))


def _coarse(t: Any, bits: int) -> Any:
    """t in [0, 1] rounded to a number of binary places, so that the remainder is small and exact."""
    return t.__array_namespace__().round(t * 2.0**bits) / 2.0**bits


def _unit_time(t):
    """t as a floating-point array in [0, 1]; see `ContinuousSchedule.__call__`."""
    if not isinstance(t, np.ndarray):
        t = jnp.asarray(t)
    xp = t.__array_namespace__()
    if not xp.issubdtype(t.dtype, np.floating):
        raise TypeError(
            f"t has dtype {t.dtype}: a continuous schedule takes floating-point times in [0, 1]; for step numbers, "
            "convert the schedule by discrete_schedules.discretize(schedule, num_steps)"
        )
    inside = (t >= 0) & (t <= 1)
    if not isinstance(t, Tracer) and not np.all((np.asarray(t) >= 0) & (np.asarray(t) <= 1)):
        raise ValueError(f"t = {np.asarray(t).tolist()} is out of range: a continuous schedule takes times in [0, 1]")
    return xp.where(inside, t, xp.nan)
