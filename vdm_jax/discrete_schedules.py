"""Discrete noise schedules of T steps: levels 0..T, where level 0 is clean data and levels 1..T are noisy.

`discretize` converts any continuous schedule. `from_betas`, `from_standard_deviations` and `from_gammas` read the
three conventions of the literature; `to_betas`, `to_standard_deviations` and `to_gammas` write them (FWD-6). All
compute in float64 on the host: a cumulative product of 1 - beta in float32 is off by 2e-4 at T = 1,000.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike, Float

from vdm_jax.compilation import ARGUMENT_CHECKS
from vdm_jax.noise_levels import NoiseLevel, Step, level_from_log_snr
from vdm_jax.schedules import ContinuousSchedule, Schedule, check_noise_at_start
from vdm_jax.types import Steps

__all__ = [
    "Betas",
    "DiscreteSchedule",
    "DiscretizedSchedule",
    "InterpolatedSchedule",
    "TabulatedSchedule",
    "discretize",
    "from_betas",
    "from_gammas",
    "from_standard_deviations",
    "karras_steps",
    "linear_betas",
    "log_snr_uniform_steps",
    "to_betas",
    "to_gammas",
    "to_standard_deviations",
    "uniform_steps",
]


@runtime_checkable
class DiscreteSchedule(Protocol):
    """Levels 0..T, level 0 clean: a `TabulatedSchedule` of arrays or a `DiscretizedSchedule` of a continuous one."""

    @property
    def num_steps(self) -> int: ...

    def __call__(self, t: Steps) -> NoiseLevel: ...

    def step(self, s: Steps, t: Steps) -> Step: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)  # hashed by identity, so that `jax.jit(schedule)` works
class TabulatedSchedule:
    """A discrete schedule of T steps, stored as arrays: levels 0..T, level 0 clean.

    Fields:
        levels: `NoiseLevel` of arrays, shape (T + 1,). Its t is the network's conditioning; a subsequence keeps it.
        log_snr, log_snr_low: lambda rounded, and its rounding error, shape (T + 1,). Together they give the accurate
            drop between *any* two levels.
    """

    levels: NoiseLevel
    log_snr: Any  # arrays; JAX may put other objects in their place when it rebuilds a pytree
    log_snr_low: Any

    @property
    def num_steps(self) -> int:
        """T."""
        return self.log_snr.shape[0] - 1

    def __call__(self, t: Steps) -> NoiseLevel:
        """The level of step t in 0..T; NaN outside when t is traced.

        Raises:
            TypeError: t is not an integer.
            ValueError: t is concrete and outside 0..T.
        """
        t = self._checked(t)
        return jax.tree.map(lambda field: _take(field, t), self.levels)

    def step(self, s: Steps, t: Steps) -> Step:
        """The levels of steps s < t and the drop between them; times and errors as in `__call__`."""
        s, t = self._checked(s), self._checked(t)
        drop = (_take(self.log_snr, s) - _take(self.log_snr, t)) + (
            _take(self.log_snr_low, s) - _take(self.log_snr_low, t)
        )
        return Step(self(s), self(t), drop)

    def subsequence(self, steps: ArrayLike | Sequence[int]) -> "TabulatedSchedule":
        """The schedule of n steps that keeps the levels of the given steps, for sampling with fewer steps.

        Args:
            steps: increasing step numbers that start at 0, shape (n + 1,), such as `uniform_steps(T, n)`.

        Raises:
            ValueError: they do not start at 0, do not increase, or exceed T.
        """
        steps = np.asarray(steps)
        if steps.ndim != 1 or steps.size < 2 or steps[0] != 0 or np.any(np.diff(steps) <= 0):
            raise ValueError(f"steps is {steps.tolist()}: a subsequence needs increasing step numbers that start at 0")
        index = self._checked(steps)
        return jax.tree.map(lambda field: field[index], self)

    def _checked(self, t: Steps) -> jax.Array:
        return _whole(t, self.num_steps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiscretizedSchedule:
    """T levels of a continuous schedule that has noise at t = 0, evaluated on demand; level 0 is clean.

    Levels 1..T are at t = 0, 1/(T - 1), ..., 1, as in `discretize`. Unlike there, the schedule may be traced, such as
    a `LearnedSchedule` in training, and the t of a level is the time in [0, 1]. Kingma et al.'s model of T steps has
    num_steps = T + 1 here, since they do not count the step from z_0 to the data.

    Fields:
        schedule: continuous.
        num_steps: T >= 2.

    Raises:
        ValueError: num_steps is too small.
    """

    schedule: Any
    num_steps: int = field(metadata={"static": True})

    def __post_init__(self):
        if self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}: it must be at least 2, for the two ends of the schedule")

    def __call__(self, t: Steps) -> NoiseLevel:
        """The level of step t in 0..T; NaN outside if t is traced. Errors as in `TabulatedSchedule.__call__`."""
        t = self._checked(t)
        level, clean = self.schedule(self._time(t)), t == 0
        values = (1.0, 0.0, 0.0, -jnp.inf, 0.0)
        return NoiseLevel(*(jnp.where(clean, value, x) for value, x in zip(values, level, strict=True)))

    def step(self, s: Steps, t: Steps) -> Step:
        """The levels of steps s < t and the drop between them; errors as in `__call__`."""
        s, t = self._checked(s), self._checked(t)
        drop = self.schedule.step(self._time(s), self._time(t)).log_snr_drop
        return Step(self(s), self(t), jnp.where(s == 0, jnp.inf, drop))

    def _checked(self, t: Steps) -> jax.Array:
        return _whole(t, self.num_steps)

    def _time(self, t: jax.Array) -> jax.Array:
        time = jnp.maximum(t - 1, 0).astype(jnp.result_type(float)) / (self.num_steps - 1)
        return jnp.where((t >= 0) & (t <= self.num_steps), time, jnp.nan)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InterpolatedSchedule(ContinuousSchedule):
    """The continuous schedule through levels 1..T of a discrete one, with lambda linear in between.

    t = 0 is level 1 and t = 1 is level T. The t of a level is the fractional step number 1 + t (T - 1), so a network
    conditioned on step numbers can be evaluated at any time: for the bound at another T or as T -> infinity, or along
    an ODE. Between the levels of a subsequence it is interpolated from the step numbers that they keep.

    Fields:
        schedule: variance-preserving, T >= 2.

    Raises:
        ValueError: T is 1.
    """

    schedule: TabulatedSchedule

    def __post_init__(self):
        # JAX may put objects without a shape in the place of the arrays.
        if getattr(getattr(self.schedule, "log_snr", None), "shape", None) == (2,):
            raise ValueError("the schedule has num_steps=1: interpolation needs two levels, num_steps=2 or more")

    def _level(self, t):
        cell, part = self._cell(t)
        drop, number = self.schedule.step(cell, cell + 1).log_snr_drop, jnp.asarray(self.schedule.levels.t)
        between = number[cell] + part * (number[cell + 1] - number[cell])
        return level_from_log_snr(self.schedule.log_snr[cell] - part * drop, between)

    def _drop(self, s, t):
        (cell_s, part_s), (cell_t, part_t) = self._cell(s), self._cell(t)
        drop_s, drop_t = (self.schedule.step(cell, cell + 1).log_snr_drop for cell in (cell_s, cell_t))
        apart = self.schedule.step(cell_s, cell_t).log_snr_drop + part_t * drop_t - part_s * drop_s
        return jnp.where(cell_s == cell_t, (part_t - part_s) * drop_s, apart)

    def _cell(self, t):
        """The last level at or before t, and the position of t between it and the next in [0, 1]."""
        position = jnp.asarray(t) * (self.schedule.num_steps - 1)
        cell = jnp.clip(jnp.floor(position), 0, self.schedule.num_steps - 2)
        return 1 + cell.astype(jnp.int32), position - cell


def _check_discrete(name: str, value: Any) -> None:
    if isinstance(value, DiscretizedSchedule):
        check_noise_at_start(value.schedule, 0.0, jnp.float32)
    if isinstance(value, DiscreteSchedule):
        return
    found, remedy = (
        f"a {type(value).__name__}",
        "it must be a discrete schedule, such as discrete_schedules.linear_betas(1000)",
    )
    if isinstance(value, Schedule):
        found, remedy = (
            "a continuous schedule",
            "convert it by discrete_schedules.discretize(schedule, num_steps)",
        )
    elif hasattr(value, "shape") or isinstance(value, (list, tuple)):
        found, remedy = (
            "an array",
            "for one-step variances use discrete_schedules.from_betas(betas)",
        )
    raise TypeError(f"{name} is {found}: {remedy}")


ARGUMENT_CHECKS[DiscreteSchedule] = _check_discrete
ARGUMENT_CHECKS[TabulatedSchedule] = _check_discrete


def discretize(schedule: Schedule, num_steps: int, max_beta: float = 0.999) -> TabulatedSchedule:
    """The discrete schedule of T steps of a continuous schedule, computed in float64.

    Level 0 is clean. If the continuous schedule is clean at t = 0, level i is at t = i / T. If it has noise at t = 0
    (`LinearLogSNR`, `VarianceExploding`), levels 1..T are at t = 0, 1/(T - 1), ..., 1.

    Args:
        schedule: a continuous schedule.
        num_steps: T >= 1, or T >= 2 if the schedule has noise at t = 0.
        max_beta: upper bound on every one-step variance 1 - alpha_t^2 / alpha_{t-1}^2, so that some signal is left in
            the last step of a schedule that ends without signal. Nichol & Dhariwal use 0.999.

    Raises:
        ValueError: num_steps is too small.
    """
    with np.errstate(divide="ignore"):
        clean_at_0 = bool(np.all(np.asarray(schedule(np.zeros(1)).sigma) == 0.0))
    if num_steps < (1 if clean_at_0 else 2):
        raise ValueError(f"num_steps is {num_steps}: it must be at least {1 if clean_at_0 else 2} for {schedule}")
    with np.errstate(divide="ignore"):
        times = np.arange(1, num_steps + 1) / num_steps if clean_at_0 else np.linspace(0.0, 1.0, num_steps)
        level = schedule(times)
    log_alpha, log_sigma = np.asarray(level.log_alpha), np.asarray(level.log_sigma)
    log_keep = 0.5 * np.log1p(-max_beta)
    log_steps = np.diff(log_alpha, prepend=0.0)
    if log_steps.min() < log_keep:
        first = int(np.argmax(log_steps < log_keep))
        log_alpha = np.cumsum(np.maximum(log_steps, log_keep))
        log_sigma = np.concatenate([log_sigma[:first], _complement(log_alpha[first:])])
    return _from_logarithms(log_alpha, log_sigma)


def from_betas(betas: ArrayLike | Sequence[float]) -> TabulatedSchedule:
    """The schedule of Ho et al.'s one-step variances: abar_t = prod (1 - beta_k), alpha_t^2 = abar_t (FWD-1, FWD-6).

    Args:
        betas: beta_1 .. beta_T, shape (T,), *variances* in (0, 1).

    Raises:
        ValueError: a beta is outside (0, 1), or the last alpha underflows.

    Source: Ho et al. 2020, arXiv:2006.11239.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas has shape {betas.shape}: it must be (T,), one variance for each step")
    if not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"betas goes from {betas.min()} to {betas.max()}: variances must be strictly between 0 and 1")
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    return _from_logarithms(log_alpha, _complement(log_alpha))


def linear_betas(num_steps: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> TabulatedSchedule:
    """Ho et al.'s schedule: betas evenly spaced from beta_1 to beta_T (FWD-7).

    The defaults are theirs for T = 1000. For another T, use beta_1 = 0.1 / T and beta_T = 20 / T.

    Raises:
        ValueError: as in `from_betas`, or num_steps is 1 and the two betas differ.

    Source: Ho et al. 2020, arXiv:2006.11239, section 4.
    """
    if num_steps == 1 and beta_1 != beta_T:
        raise ValueError(
            f"num_steps is 1, but beta_1 is {beta_1} and beta_T is {beta_T}: one step has one beta, make them equal"
        )
    return from_betas(np.linspace(beta_1, beta_T, num_steps))


class Betas(NamedTuple):
    """One-step noise in the notation of Ho et al.: beta_t a *variance*, alpha_t = 1 - beta_t, abar_t their product.

    In the notation of *The Principles of Diffusion Models* (`to_standard_deviations`) beta_t is a *standard deviation*,
    alpha_t = sqrt(1 - beta_t^2), and abar_t their product: the square roots of Ho et al.'s. Shapes (T,), t = 1..T.
    """

    beta: Float[jax.Array, " T"]
    alpha: Float[jax.Array, " T"]
    abar: Float[jax.Array, " T"]


def from_standard_deviations(betas: ArrayLike | Sequence[float]) -> TabulatedSchedule:
    """The schedule of the betas of *The Principles of Diffusion Models*, which are standard deviations (FWD-6).

    Args:
        betas: beta_1 .. beta_T, shape (T,), in (0, 1): x_t = sqrt(1 - beta_t^2) x_{t-1} + beta_t eps.

    Raises:
        ValueError: as in `from_betas`.

    Source: Lai et al. 2025, arXiv:2510.21890.
    """
    return from_betas(np.square(np.asarray(betas, np.float64)))


def from_gammas(gammas: ArrayLike | Sequence[float]) -> TabulatedSchedule:
    """The variance-preserving schedule of Kingma et al.'s gamma_t = -log SNR(t) (FWD-6).

    Args:
        gammas: gamma_1 .. gamma_T, shape (T,), increasing; level 0 is clean data, gamma_0 = -inf.

    Raises:
        ValueError: gammas do not increase, or are not finite.

    Source: Kingma et al. 2021, arXiv:2107.00630.
    """
    gammas = np.asarray(gammas, np.float64)
    if gammas.ndim != 1 or gammas.size == 0:
        raise ValueError(f"gammas has shape {gammas.shape}: it must be (T,), one gamma for each step")
    if not np.all(np.isfinite(gammas)) or not np.all(np.diff(gammas) > 0):
        raise ValueError("gammas must be finite and increasing, since noise grows with t")
    return _from_logarithms(-0.5 * np.logaddexp(0.0, gammas), -0.5 * np.logaddexp(0.0, -gammas))


def to_betas(schedule: TabulatedSchedule) -> Betas:
    """The betas of a variance-preserving schedule in Ho et al.'s convention (FWD-6)."""
    step = schedule.step(jnp.arange(schedule.num_steps), jnp.arange(1, schedule.num_steps + 1))
    beta = step.t.sigma**2 * step.one_minus_ratio
    return Betas(beta, (step.t.alpha / step.s.alpha) ** 2, step.t.alpha**2)


def to_standard_deviations(schedule: TabulatedSchedule) -> Betas:
    """The betas of a variance-preserving schedule in the convention of *The Principles of Diffusion Models* (FWD-6)."""
    step = schedule.step(jnp.arange(schedule.num_steps), jnp.arange(1, schedule.num_steps + 1))
    beta = step.t.sigma * jnp.sqrt(step.one_minus_ratio)
    return Betas(beta, step.t.alpha / step.s.alpha, step.t.alpha)


def to_gammas(schedule: TabulatedSchedule) -> Float[jax.Array, " T"]:
    """gamma_1 .. gamma_T of a schedule, Kingma et al.'s convention (FWD-6)."""
    return -schedule.log_snr[1:]


def uniform_steps(num_steps: int, count: int) -> np.ndarray:
    """`count` + 1 step numbers from 0 to T, evenly spaced up to rounding, for `TabulatedSchedule.subsequence`.

    Raises:
        ValueError: count is not in 1..T.
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"count is {count}: a schedule of {num_steps} steps has subsequences of 1..{num_steps} steps")
    return np.round(np.linspace(0, num_steps, count + 1)).astype(np.int32)


def log_snr_uniform_steps(schedule: TabulatedSchedule, count: int) -> np.ndarray:
    """`count` + 1 step numbers from 0 to T whose log-SNRs are as evenly spaced as the levels of the schedule allow.

    Step 0 is clean; the others run from level 1 to level T without repetition. Pass them to `subsequence`.

    Raises:
        ValueError: count is not in 1..T.
    """
    return _nearest(schedule, count, lambda log_snr: log_snr)


def karras_steps(schedule: TabulatedSchedule, count: int, rho: float = 7.0) -> np.ndarray:
    """Step numbers as in `log_snr_uniform_steps`, spaced as by Karras et al.: n^(1/rho) is uniform, n = sigma / alpha.

    Most steps are at low noise.

    Raises:
        ValueError: count is not in 1..T, or rho is not positive.

    Source: Karras et al. 2022, arXiv:2206.00364, equation 5.
    """
    if not rho > 0.0:
        raise ValueError(f"rho is {rho}: it must be positive")
    return _nearest(schedule, count, lambda log_snr: np.exp(-0.5 / rho * log_snr))


def _nearest(schedule: TabulatedSchedule, count: int, place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """0, and `count` different steps at which `place`, a function of the log-SNR, is as evenly spaced as possible."""
    last = schedule.num_steps
    if not 1 <= count <= last:
        raise ValueError(f"count is {count}: a schedule of {last} steps has subsequences of 1..{last} steps")
    places = place(np.asarray(schedule.log_snr, np.float64)[1:])  # on the host, while tracing too
    wanted = np.linspace(places[-1], places[0], count)[::-1]
    steps = 1 + np.abs(places[None, :] - wanted[:, None]).argmin(1)
    rank = np.arange(count)
    steps = np.maximum.accumulate(steps - rank) + rank  # each above the one before,
    return np.concatenate([[0], np.minimum(steps, last - rank[::-1])]).astype(np.int32)  # with room for the later ones


def _from_logarithms(log_alpha: np.ndarray, log_sigma: np.ndarray) -> TabulatedSchedule:
    """A schedule from float64 logarithms of levels 1..T."""
    log_alpha, log_sigma = np.concatenate([[0.0], log_alpha]), np.concatenate([[-np.inf], log_sigma])
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    if log_alpha[-1] < np.log(np.finfo(dtype).tiny):
        raise ValueError(
            f"alpha_T is e^{log_alpha[-1]:.0f}, which underflows in {dtype}: use smaller betas or fewer steps"
        )
    log_snr = 2 * (log_alpha - log_sigma)
    high = log_snr.astype(dtype)
    low = np.where(np.isinf(log_snr), 0.0, log_snr - np.where(np.isinf(log_snr), 0.0, high))
    time = np.arange(log_snr.size)
    fields = (np.exp(log_alpha), np.exp(log_sigma), log_alpha, log_sigma, time, high, low)
    *level, high, low = (jnp.asarray(field, dtype) for field in fields)
    return TabulatedSchedule(NoiseLevel(*level), high, low)


def _complement(log_alpha: np.ndarray) -> np.ndarray:
    """log sigma for sigma^2 = 1 - alpha^2."""
    quiet = np.minimum(2 * log_alpha, -np.log(2))  # below 1/2, alpha^2 keeps the digits
    return 0.5 * np.where(2 * log_alpha > quiet, np.log(-np.expm1(2 * log_alpha)), np.log1p(-np.exp(quiet)))


def _whole(t: Steps, num_steps: int) -> jax.Array:
    """t as an array of integers 0..T; see `TabulatedSchedule.__call__`."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(f"t has dtype {t.dtype}: a discrete schedule takes integer step numbers 0..{num_steps}")
    if not isinstance(t, Tracer) and (np.any(np.asarray(t) < 0) or np.any(np.asarray(t) > num_steps)):
        raise ValueError(f"t = {np.asarray(t).tolist()} is out of range: this schedule has steps 0..{num_steps}")
    return t


def _take(field: jax.Array, t: jax.Array) -> jax.Array:
    """field[t], NaN outside, since jit cannot check the index."""
    return field.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
