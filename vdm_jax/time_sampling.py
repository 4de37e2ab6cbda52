"""Sampling the times of a batch: independent, low-discrepancy, antithetic, or importance-sampled.

    (1/T) sum_t L_t = E_{t ~ p} L_t / (T p_t),   with the least variance for  p_t ~ sqrt(E L_t^2)            (TIME-2)

`sample_times` samples numbers u in [0, 1). `to_timesteps` converts them to steps, and `importance_sample` to steps or
times of any density. `LossSecondMomentSampler` estimates p from the losses; `timestep_proposal` and
`geometric_variance_proposal` are closed forms of it.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from vdm_jax.gaussian import _root
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.types import Key, PerExample, Real, at_least_float32

__all__ = [
    "LossSecondMomentSampler",
    "TimeSampling",
    "WeightedTime",
    "antithetic_times",
    "geometric_variance_proposal",
    "importance_sample",
    "independent_times",
    "low_discrepancy_times",
    "sample_times",
    "sample_timesteps",
    "timestep_proposal",
    "to_timesteps",
]

TimeSampling = Literal["independent", "low_discrepancy", "antithetic"]


def independent_times(key: Key, batch: int) -> Float[Array, " b"]:
    """B independent numbers u, uniform on [0, 1) (TIME-1)."""
    return jax.random.uniform(key, (batch,))


def low_discrepancy_times(key: Key, batch: int) -> Float[Array, " b"]:
    """u_i = (u_0 + i / B) mod 1, evenly spaced from one random start; each is uniform on [0, 1) (TIME-1).

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """
    return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def antithetic_times(key: Key, batch: int) -> Float[Array, " b"]:
    """Pairs u and 1 - u, B/2 places apart; in an odd batch the middle one has no partner (TIME-1)."""
    u = jax.random.uniform(key, ((batch + 1) // 2,))
    return jnp.concatenate([u, (1.0 - u) % 1.0])[:batch]  # 0 is its own partner, since 1 is outside


_SAMPLERS = {
    "independent": independent_times,
    "low_discrepancy": low_discrepancy_times,
    "antithetic": antithetic_times,
}


def sample_times(key: Key, batch: int, time_sampling: TimeSampling = "independent") -> Float[Array, " b"]:
    """Numbers u in [0, 1), each uniform, sampled jointly in one of three ways (TIME-1).

    Args:
        key: for the numbers.
        batch: B, how many.
        time_sampling: "independent", "low_discrepancy" or "antithetic", as in the three functions above.

    Returns:
        Shape (B,), below 1 also after rounding.

    Raises:
        ValueError: unknown time_sampling.
    """
    if time_sampling not in _SAMPLERS:
        raise ValueError(
            f"unknown time_sampling {time_sampling!r}: choose 'independent', 'low_discrepancy' or 'antithetic'"
        )
    return _SAMPLERS[time_sampling](key, batch)


def to_timesteps(u: Real, num_steps: int) -> Int[Array, "..."]:
    """The steps 1 + floor(u T) in 1..T of numbers u in [0, 1): uniform if u is."""
    return jnp.minimum(1 + jnp.floor(u * num_steps).astype(jnp.int32), num_steps)


def sample_timesteps(
    key: Key, batch: int, num_steps: int, *, time_sampling: TimeSampling = "independent"
) -> Int[Array, " b"]:
    """Steps t, each uniform on 1..T (ELBO-10).

    Args:
        key: for the steps.
        batch: how many.
        num_steps: T.
        time_sampling: as in `sample_times`. "low_discrepancy" reduces the variance of the mean over a batch.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (low discrepancy).
    """
    return to_timesteps(sample_times(key, batch, time_sampling), num_steps)


class WeightedTime(NamedTuple):
    """An importance-sampled time in [0, 1), from K equal bins of unequal probabilities; all fields have one shape.

    Fields:
        time: in [0, 1), uniform within its bin.
        bin: 0..K - 1. With K = T bins, the step is bin + 1.
        weight: 1 / (K P(bin)), so that E[weight f(time)] is the mean of f over [0, 1).
    """

    time: Real
    bin: Int[Array, "..."]
    weight: Real


def importance_sample(u: Real, probabilities: Float[Array, " K"]) -> WeightedTime:
    """Convert uniform numbers u to importance-sampled times: the inverse CDF of a piecewise constant density (TIME-2).

        bin = max{k : c_k <= u},   time = (bin + (u - c_bin) / (c_bin+1 - c_bin)) / K,   c_k = p_0 + .. + p_k-1

    Elementwise, in the dtype of u, at least float32. Evenly spaced u give stratified samples of the density.

    Args:
        u: in [0, 1), any shape, from `sample_times`.
        probabilities: p of each of K bins, nonnegative; they are divided by their sum. A bin with p = 0 is never
            sampled.

    Returns:
        `WeightedTime`. The c_k are rounded to the grid of `sample_times`, multiples of 2^-23 in float32. The weight is
        computed from the rounded ones, so it is unbiased and close to 1 / (K p). A bin with p far below 2^-23 is never
        sampled.

    Raises:
        ValueError: probabilities is not a vector, or is concrete and negative, not finite or all zero. Traced
            probabilities of that kind give a weight of NaN.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3 (importance-sampled t).
    """
    if len(probabilities.shape) != 1 or probabilities.shape[0] < 1:
        raise ValueError(f"probabilities has shape {probabilities.shape}: it must be (K,), one for each of K bins")
    u, count = jnp.asarray(u, at_least_float32(u.dtype)), probabilities.shape[0]
    dtype = u.dtype
    p, scale = _distribution(probabilities.astype(dtype)), 2.0 ** jnp.finfo(dtype).nmant
    grains = jnp.round(jnp.nan_to_num(p) * (128 * scale)).astype(int)
    ends = jnp.cumsum(grains).astype(dtype)  # sums of integers are exact: c increases, and is constant if p = 0
    edges = jnp.concatenate([jnp.zeros_like(ends[:1]), jnp.round(ends / ends[-1] * scale) / scale])
    index = jnp.clip(jnp.searchsorted(edges, u, side="right") - 1, 0, count - 1)
    width = edges[index + 1] - edges[index]
    time = (index.astype(dtype) + (u - edges[index]) / width) / count
    weight = jnp.where(jnp.isnan(p[0]), jnp.nan, 1.0 / (count * width))
    return WeightedTime(jnp.minimum(time, 1.0 - jnp.finfo(dtype).epsneg), index, weight)


class LossSecondMomentSampler(NamedTuple):
    """The last losses of each step, from which p_t ~ sqrt(E L_t^2) is estimated (TIME-2).

    An immutable pytree: `moments = moments.update(t, losses)`.

    Fields:
        losses: the last H losses of each step 1..T, unordered, shape (T, H).
        counts: the number of losses that each step has received, shape (T,).
    """

    losses: Float[Array, "T H"]
    counts: Int[Array, " T"]

    @classmethod
    def init(cls, num_steps: int, history: int = 10) -> "LossSecondMomentSampler":
        """An empty history of H losses for each of T steps.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3.
        """
        return cls(jnp.zeros((num_steps, history)), jnp.zeros(num_steps, jnp.int32))

    def update(self, t: Int[Array, " b"], losses: PerExample) -> "LossSecondMomentSampler":
        """Add the losses of a batch in order; each step keeps its last H.

        Args:
            t: steps 1..T, shape (B,); steps outside 1..T are ignored.
            losses: L_t *without* the importance weight, finite, shape (B,).

        Raises:
            ValueError: t and losses do not have one shape (B,).
        """
        if t.ndim != 1 or t.shape != losses.shape:
            raise ValueError(f"t has shape {t.shape} and losses {losses.shape}: both must be (B,)")
        history = self.losses.shape[1]
        same = t[:, None] == t[None, :]  # counts earlier and later losses of the same step in this batch
        before, after = (part.sum(1, dtype=jnp.int32) for part in (jnp.tril(same, -1), jnp.triu(same, 1)))
        row = jnp.where((t >= 1) & (t <= self.counts.size), t - 1, self.counts.size)
        slot = (self.counts.at[row].get(mode="fill", fill_value=0) + before) % history
        row_kept = jnp.where(after < history, row, self.counts.size)  # drop what this batch itself overwrites
        noted = self.losses.at[row_kept, slot].set(losses.astype(self.losses.dtype), mode="drop")
        return LossSecondMomentSampler(noted, self.counts.at[row].add(1, mode="drop"))

    def probabilities(self, uniform: float = 1e-3) -> Float[Array, " T"]:
        """p_t ~ sqrt(mean of L_t^2) mixed with the uniform distribution; uniform until every step has H losses.

        Args:
            uniform: the weight of the uniform distribution in the mixture.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3.
        """
        num_steps, history = self.losses.shape
        largest = jnp.max(jnp.abs(self.losses))
        ready = jnp.all(self.counts >= history) & (largest > 0)
        scaled = self.losses / jnp.where(ready, largest, 1.0)  # no square overflows
        root = _root(jnp.where(ready, jnp.mean(scaled**2, axis=1), 1.0))
        return (1.0 - uniform) * root / root.sum() + uniform / num_steps


def timestep_proposal(levels: NoiseLevel) -> Float[Array, " T"]:
    """p_t ~ sigma_t^2 / sigma_t-1^2 - 1: the optimal proposal for the steps of the bound, for N(0, I) data (TIME-3).

    With the exact denoiser of such data and a variance-preserving schedule, E ||eps - eps_hat||^2 = D alpha^2. The
    bound's term L_t = 1/2 (SNR(s)/SNR(t) - 1) ||eps - eps_hat||^2 then has the mean D/2 (sigma_t^2 / sigma_s^2 - 1),
    and sqrt(E L_t^2) is sqrt(1 + 2/D) times that.

    Args:
        levels: T + 1 levels of increasing noise, fields (T + 1,): `schedule(jnp.arange(T + 1))`.

    Returns:
        Probabilities of steps 1..T, shape (T,). A step from clean data gets 0: the decoder replaces its term.

    Source: the optimum of Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3, in closed form.
    """
    rise = jnp.expm1(2.0 * _log_rise(levels))
    return rise / rise.sum()


def geometric_variance_proposal(levels: NoiseLevel) -> Float[Array, " K"]:
    """p_k ~ log sigma_k+1^2 - log sigma_k^2: `timestep_proposal` in continuous time, for K bins of time (TIME-3).

    The integrand 1/2 gamma' E ||eps - eps_hat||^2 for N(0, I) data is D/2 d log sigma^2/dt. For the steps of a discrete
    schedule it is the optimal proposal to first order.

    Args:
        levels: K + 1 levels of increasing noise, fields (K + 1,): `schedule(jnp.linspace(t_0, 1, K + 1))`.

    Returns:
        Probabilities, shape (K,). A bin that starts at clean data, where the integral diverges, gets 0.

    Source: Vahdat et al. 2021, arXiv:2106.05931, whose variance is then geometric in u.
    """
    rise = _log_rise(levels)
    return rise / rise.sum()


def _log_rise(levels):
    """log sigma_k+1 - log sigma_k; 0 if level k is clean."""
    start, end = levels.log_sigma[:-1], levels.log_sigma[1:]
    return end - jnp.where(jnp.isneginf(start), end, start)


def _distribution(probabilities):
    """Probabilities divided by their sum; NaN if they are traced and invalid, see `importance_sample`."""
    total = probabilities.sum()
    valid = jnp.all(probabilities >= 0) & jnp.isfinite(total) & (total > 0)
    if not isinstance(valid, Tracer) and not np.asarray(valid):
        values = np.asarray(probabilities).tolist()
        raise ValueError(f"probabilities must be finite, nonnegative and not all zero, got {values}")
    return jnp.where(valid, probabilities / jnp.where(valid, total, 1.0), jnp.nan)
