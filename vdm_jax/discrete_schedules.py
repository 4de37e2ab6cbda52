"""Discrete noise schedules: a `TabulatedSchedule` of T steps, levels 0..T, where step 0 is clean data and steps 1..T are noisy.

`tabulate` makes one of any continuous schedule; `from_betas`, `from_standard_deviations` and `from_gammas` read the
field's three conventions, and `to_betas`, `to_standard_deviations` and `to_gammas` write them (FWD-6). All are computed
in float64 on the host: a float32 product of 1 - beta has lost 2e-4 by T = 1,000.
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


@runtime_checkable
class DiscreteSchedule(Protocol):
    """Levels 0..T, level 0 clean: a `TabulatedSchedule`, or a `DiscretizedSchedule` on a continuous schedule."""

    @property
    def num_steps(self) -> int: ...

    def __call__(self, t: Steps) -> NoiseLevel: ...

    def step(self, s: Steps, t: Steps) -> Step: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)  # hashed by identity, so that `jax.jit(table)` works
class TabulatedSchedule:
    """A discrete schedule of T steps: levels 0..T, level 0 clean.

    Fields:
        levels: `Level` of arrays, shape (T + 1,); its t is what a network is told, kept by sub-schedules.
        log_snr, log_snr_low: lambda rounded, and what rounding left over, shape (T + 1,): together they give the drop
            between *any* two levels to the last digit.
    """

    levels: NoiseLevel
    log_snr: Any  # arrays; JAX itself rebuilds a pytree with whatever it likes in their place
    log_snr_low: Any

    @property
    def num_steps(self) -> int:
        """T."""
        return self.log_snr.shape[0] - 1

    def __call__(self, t: Steps) -> NoiseLevel:
        """The level of step t in 0..T; NaN outside when t is traced.

        Raises:
            TypeError: t is no integer. ValueError: t is concrete and outside 0..T.
        """
        t = self._checked(t)
        return jax.tree.map(lambda field: _take(field, t), self.levels)

    def step(self, s: Steps, t: Steps) -> Step:
        """The levels of steps s < t and the drop between them; times and errors as in a call."""
        s, t = self._checked(s), self._checked(t)
        drop = (_take(self.log_snr, s) - _take(self.log_snr, t)) + (
            _take(self.log_snr_low, s) - _take(self.log_snr_low, t)
        )
        return Step(self(s), self(t), drop)

    def subsequence(self, steps: ArrayLike | Sequence[int]) -> "TabulatedSchedule":
        """The same levels, fewer of them: the exact sub-schedule through the given steps.

        Args:
            steps: rising step numbers that begin with 0, shape (n + 1,); `uniform_steps` spaces them evenly.

        Raises:
            ValueError: they do not rise from 0, or leave 0..T.
        """
        steps = np.asarray(steps)
        if steps.ndim != 1 or steps.size < 2 or steps[0] != 0 or np.any(np.diff(steps) <= 0):
            raise ValueError(f"a sub-schedule needs rising step numbers that begin with 0, got {steps.tolist()}")
        index = self._checked(steps)
        return jax.tree.map(lambda field: field[index], self)

    def _checked(self, t: Steps) -> jax.Array:
        return _whole(t, self.num_steps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiscretizedSchedule:
    """T levels of a continuous schedule that begins with noise, asked for when needed; level 0 is clean.

    Levels 1..T are the schedule's t = 0, 1/(T - 1), ..., 1, as in `tabulate`; but the schedule may be one that is being
    learned, and a level's t is the schedule's own time. Kingma et al.'s model of T steps is a
    grid of T + 1: they count the step from z_0 to the data apart.

    Fields:
        schedule: continuous.
        num_steps: T >= 2.

    Raises:
        ValueError: T too small.
    """

    schedule: Any
    num_steps: int = field(metadata={"static": True})

    def __post_init__(self):
        if self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}: a grid has at least 2 levels, the schedule's two ends")

    def __call__(self, t: Steps) -> NoiseLevel:
        """The level of step t in 0..T; NaN outside. Raises TypeError: t is no integer."""
        t = self._checked(t)
        level, clean = self.schedule(self._time(t)), t == 0
        values = (1.0, 0.0, 0.0, -jnp.inf, 0.0)
        return NoiseLevel(*(jnp.where(clean, value, x) for value, x in zip(values, level, strict=True)))

    def step(self, s: Steps, t: Steps) -> Step:
        """The levels of steps s < t and the drop between them; errors as in a call."""
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
    """The continuous schedule through levels 1..T of a table, lambda linear between them, variance preserved.

    t = 0 is level 1, t = 1 level T; a level's t is the step number in between, 1 + t (T - 1), so that a network told
    step numbers can be asked anywhere: for the bound at another T or as T -> infinity, or along an ODE.

    Fields:
        schedule: variance-preserving, T >= 2.

    Raises:
        ValueError: T is 1.
    """

    schedule: TabulatedSchedule

    def __post_init__(self):
        # Of leaves that JAX puts in their place there is no shape to check.
        if getattr(getattr(self.schedule, "log_snr", None), "shape", None) == (2,):
            raise ValueError("the table has num_steps=1: a continuous schedule needs two levels, num_steps=2 or more")

    def _level(self, t):
        cell, part = self._cell(t)
        drop = self.schedule.step(cell, cell + 1).log_snr_drop
        return level_from_log_snr(self.schedule.log_snr[cell] - part * drop, 1 + t * (self.schedule.num_steps - 1))

    def _drop(self, s, t):
        (cell_s, part_s), (cell_t, part_t) = self._cell(s), self._cell(t)
        drop_s, drop_t = (self.schedule.step(cell, cell + 1).log_snr_drop for cell in (cell_s, cell_t))
        apart = self.schedule.step(cell_s, cell_t).log_snr_drop + part_t * drop_t - part_s * drop_s
        return jnp.where(cell_s == cell_t, (part_t - part_s) * drop_s, apart)

    def _cell(self, t):
        """The last level at or before t, and how far t is on the way to the next."""
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
            "discrete_schedules.discretize(schedule, num_steps) makes a discrete one of it",
        )
    elif hasattr(value, "shape") or isinstance(value, (list, tuple)):
        found, remedy = (
            "an array",
            "discrete_schedules.from_betas(betas) makes a discrete schedule of one-step variances",
        )
    raise TypeError(f"{name} is {found}: {remedy}")


ARGUMENT_CHECKS[DiscreteSchedule] = _check_discrete
ARGUMENT_CHECKS[TabulatedSchedule] = _check_discrete


def discretize(schedule: Schedule, num_steps: int, max_beta: float = 0.999) -> TabulatedSchedule:
    """The table of T steps of a continuous schedule, computed in float64.

    Level 0 is clean. Where the schedule itself begins clean, level i is its t = i / T; where it begins with noise
    (`LinearLogSNR`, `VarianceExploding`), levels 1..T are its t = 0, 1/(T - 1), ..., 1.

    Args:
        schedule: a continuous schedule.
        num_steps: T >= 1 (>= 2 where the schedule begins with noise).
        max_beta: bound on every one-step variance 1 - alpha_t^2 / alpha_{t-1}^2, so that the last step of a schedule
            that ends without signal keeps some; Nichol & Dhariwal's 0.999.

    Raises:
        ValueError: T too small.
    """
    with np.errstate(divide="ignore"):
        begins_clean = bool(np.all(np.asarray(schedule(np.zeros(1)).sigma) == 0.0))
    if num_steps < (1 if begins_clean else 2):
        raise ValueError(
            f"num_steps is {num_steps}: a table of this schedule needs at least {1 if begins_clean else 2}"
        )
    with np.errstate(divide="ignore"):
        times = np.arange(1, num_steps + 1) / num_steps if begins_clean else np.linspace(0.0, 1.0, num_steps)
        level = schedule(times)
    log_alpha, log_sigma = np.asarray(level.log_alpha), np.asarray(level.log_sigma)
    log_keep = 0.5 * np.log1p(-max_beta)
    log_steps = np.diff(log_alpha, prepend=0.0)
    if log_steps.min() < log_keep:
        first = int(np.argmax(log_steps < log_keep))
        log_alpha = np.cumsum(np.maximum(log_steps, log_keep))
        log_sigma = np.concatenate([log_sigma[:first], _complement(log_alpha[first:])])
    return _table(log_alpha, log_sigma)


def from_betas(betas: ArrayLike | Sequence[float]) -> TabulatedSchedule:
    """The table of Ho et al.'s one-step variances: abar_t = prod (1 - beta_k), alpha_t^2 = abar_t (FWD-1, FWD-6).

    Args:
        betas: beta_1 .. beta_T, shape (T,), *variances* in (0, 1).

    Raises:
        ValueError: a beta outside (0, 1), or so much noise that float32 has no signal left.

    Source: Ho et al. 2020, arXiv:2006.11239.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("betas must be a vector of one-step variances, each strictly between 0 and 1")
    log_alpha = 0.5 * np.cumsum(np.log1p(-betas))
    return _table(log_alpha, _complement(log_alpha))


def linear_betas(num_steps: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> TabulatedSchedule:
    """Ho et al.'s table: betas evenly spaced from beta_1 to beta_T (FWD-7). For another T keep T beta: 0.1/T to 20/T.

    Raises:
        ValueError: as `from_betas`; or num_steps is 1 and the two betas differ.

    Source: Ho et al. 2020, arXiv:2006.11239, section 4.
    """
    if num_steps == 1 and beta_1 != beta_T:
        raise ValueError(f"num_steps is 1: one step has one beta, but beta_1 is {beta_1} and beta_T is {beta_T}")
    return from_betas(np.linspace(beta_1, beta_T, num_steps))


class Betas(NamedTuple):
    """One-step noise in the words of Ho et al.: beta_t a *variance*, alpha_t = 1 - beta_t, abar_t their product.

    In the words of *The Principles of Diffusion Models* (`to_standard_deviations`) beta_t is a *standard deviation*,
    alpha_t = sqrt(1 - beta_t^2), abar_t their product; each is the square root of the other's. Shapes (T,), t = 1..T.
    """

    beta: Float[jax.Array, " T"]
    alpha: Float[jax.Array, " T"]
    abar: Float[jax.Array, " T"]


def from_standard_deviations(betas: ArrayLike | Sequence[float]) -> TabulatedSchedule:
    """The table of *The Principles of Diffusion Models*' betas, which are standard deviations (FWD-6).

    Args:
        betas: beta_1 .. beta_T, shape (T,), in (0, 1): x_t = sqrt(1 - beta_t^2) x_{t-1} + beta_t eps.

    Raises:
        ValueError: as `from_betas`.

    Source: Lai et al. 2025, arXiv:2510.21890.
    """
    return from_betas(np.square(np.asarray(betas, np.float64)))


def from_gammas(gammas: ArrayLike | Sequence[float]) -> TabulatedSchedule:
    """The variance-preserving table of Kingma et al.'s gamma_t = -log SNR(t) (FWD-6).

    Args:
        gammas: gamma_1 .. gamma_T, shape (T,), rising; level 0 is clean data, gamma_0 = -inf.

    Raises:
        ValueError: gammas that do not rise, or are not finite.

    Source: Kingma et al. 2021, arXiv:2107.00630.
    """
    gammas = np.asarray(gammas, np.float64)
    if gammas.ndim != 1 or gammas.size == 0 or not np.all(np.isfinite(gammas)) or not np.all(np.diff(gammas) > 0):
        raise ValueError("gammas must be a rising vector of finite numbers: noise grows with t")
    return _table(-0.5 * np.logaddexp(0.0, gammas), -0.5 * np.logaddexp(0.0, -gammas))


def to_betas(schedule: TabulatedSchedule) -> Betas:
    """A variance-preserving table in Ho et al.'s convention (FWD-6)."""
    step = schedule.step(jnp.arange(schedule.num_steps), jnp.arange(1, schedule.num_steps + 1))
    beta = step.t.sigma**2 * step.one_minus_ratio
    return Betas(beta, (step.t.alpha / step.s.alpha) ** 2, step.t.alpha**2)


def to_standard_deviations(schedule: TabulatedSchedule) -> Betas:
    """A variance-preserving table in the convention of *The Principles of Diffusion Models* (FWD-6)."""
    step = schedule.step(jnp.arange(schedule.num_steps), jnp.arange(1, schedule.num_steps + 1))
    beta = step.t.sigma * jnp.sqrt(step.one_minus_ratio)
    return Betas(beta, step.t.alpha / step.s.alpha, step.t.alpha)


def to_gammas(schedule: TabulatedSchedule) -> Float[jax.Array, " T"]:
    """gamma_1 .. gamma_T of a table, Kingma et al.'s convention (FWD-6)."""
    return -schedule.log_snr[1:]


def uniform_steps(num_steps: int, count: int) -> np.ndarray:
    """`count` + 1 step numbers from 0 to T, as evenly spaced as integers can be.

    Raises:
        ValueError: count is not in 1..T.
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"{count} steps cannot be taken from a table of {num_steps}: choose 1..{num_steps}")
    return np.round(np.linspace(0, num_steps, count + 1)).astype(np.int32)


def log_snr_uniform_steps(schedule: TabulatedSchedule, count: int) -> np.ndarray:
    """`count` + 1 step numbers from 0 to T whose log-SNRs are as even as the table's levels allow, for `subsequence`.

    Step 0 is clean; the others go from level 1 to level T, none twice.

    Raises:
        ValueError: count is not in 1..T.
    """
    return _nearest(schedule, count, lambda log_snr: log_snr)


def karras_steps(schedule: TabulatedSchedule, count: int, rho: float = 7.0) -> np.ndarray:
    """The same with Karras et al.'s places: n = sigma / alpha is even in n^(1/rho), so most steps have little noise.

    Raises:
        ValueError: count is not in 1..T, or rho not positive.

    Source: Karras et al. 2022, arXiv:2206.00364, equation 5.
    """
    if not rho > 0.0:
        raise ValueError(f"rho is {rho}: it must be positive")
    return _nearest(schedule, count, lambda log_snr: np.exp(-0.5 / rho * log_snr))


def _nearest(schedule: TabulatedSchedule, count: int, place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """0, and `count` steps whose places, a function of log-SNR, are as even as can be, none twice."""
    last = schedule.num_steps
    if not 1 <= count <= last:
        raise ValueError(f"{count} steps cannot be taken from a table of {last}: choose 1..{last}")
    places = place(np.asarray(schedule.log_snr, np.float64)[1:])  # on the host, while tracing too
    wanted = np.linspace(places[-1], places[0], count)[::-1]
    steps = 1 + np.abs(places[None, :] - wanted[:, None]).argmin(1)
    rank = np.arange(count)
    steps = np.maximum.accumulate(steps - rank) + rank  # up from the one before,
    return np.concatenate([[0], np.minimum(steps, last - rank[::-1])]).astype(np.int32)  # and room for those to come


def _table(log_alpha: np.ndarray, log_sigma: np.ndarray) -> TabulatedSchedule:
    """A table from float64 logarithms of levels 1..T."""
    log_alpha, log_sigma = np.concatenate([[0.0], log_alpha]), np.concatenate([[-np.inf], log_sigma])
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    if log_alpha[-1] < np.log(np.finfo(dtype).tiny):
        raise ValueError(f"the last level keeps a signal of e^{log_alpha[-1]:.0f}, below {dtype}: lower the noise or T")
    log_snr = 2 * (log_alpha - log_sigma)
    high = log_snr.astype(dtype)
    low = np.where(np.isinf(log_snr), 0.0, log_snr - np.where(np.isinf(log_snr), 0.0, high))
    time = np.arange(log_snr.size)
    fields = (np.exp(log_alpha), np.exp(log_sigma), log_alpha, log_sigma, time, high, low)
    *level, high, low = (jnp.asarray(field, dtype) for field in fields)
    return TabulatedSchedule(NoiseLevel(*level), high, low)


def _complement(log_alpha: np.ndarray) -> np.ndarray:
    """log sigma where sigma^2 = 1 - alpha^2."""
    quiet = np.minimum(2 * log_alpha, -np.log(2))  # below 1/2, alpha^2 is what has the digits
    return 0.5 * np.where(2 * log_alpha > quiet, np.log(-np.expm1(2 * log_alpha)), np.log1p(-np.exp(quiet)))


def _whole(t: Steps, num_steps: int) -> jax.Array:
    """t as an array of integers 0..T; see `TabulatedSchedule.__call__`."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(f"a table takes step numbers 0..{num_steps} as integers, got dtype {t.dtype}")
    if not isinstance(t, Tracer) and (np.any(np.asarray(t) < 0) or np.any(np.asarray(t) > num_steps)):
        raise ValueError(f"step {np.asarray(t).tolist()} is out of range: this table has steps 0..{num_steps}")
    return t


def _take(field: jax.Array, t: jax.Array) -> jax.Array:
    """field[t], NaN outside: an index that jit cannot check must not give a wrong level silently."""
    return field.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
