"""How the times of a batch are drawn: uniformly, spread evenly, in pairs, or where the loss is large.

    (1/T) sum_t L_t = E_{t ~ p} L_t / (T p_t),   of least variance for  p_t ~ sqrt(E L_t^2)                  (TIME-2)

`uniforms` places numbers u in [0, 1); `to_steps` makes steps of them, `warp` steps or times of any density. What p
should be is learned from the losses by `LossSecondMoments`, or known beforehand: `step_proposal`, `variance_proposal`.
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

TimeSampling = Literal["independent", "low_discrepancy", "antithetic"]


def uniform_times(key: Key, batch: int, time_sampling: TimeSampling = "independent") -> Float[Array, " b"]:
    """Numbers u in [0, 1), each uniform, in one of three arrangements (TIME-1).

        independent: each by itself
        low_discrepancy: u_i = (u_0 + i / B) mod 1, one random start and even gaps
        antithetic: pairs u and 1 - u, B/2 places apart; of an odd batch the one in the middle has no partner

    Args:
        key: for the draw.
        batch: B, how many.
        time_sampling: one of the three.

    Returns:
        Shape (B,), below 1 after rounding too.

    Raises:
        ValueError: unknown time_sampling.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (low discrepancy).
    """
    match time_sampling:
        case "independent":
            return jax.random.uniform(key, (batch,))
        case "low_discrepancy":
            return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
        case "antithetic":
            u = jax.random.uniform(key, ((batch + 1) // 2,))
            return jnp.concatenate([u, (1.0 - u) % 1.0])[:batch]  # 0 is its own partner: 1 would be no time
    raise ValueError(
        f"unknown time_sampling {time_sampling!r}: choose 'independent', 'low_discrepancy' or 'antithetic'"
    )


def to_timesteps(u: Real, num_steps: int) -> Int[Array, "..."]:
    """The steps 1 + floor(u T) in 1..T of numbers u in [0, 1): uniform if u is."""
    return jnp.minimum(1 + jnp.floor(u * num_steps).astype(jnp.int32), num_steps)


def sample_timesteps(
    key: Key, batch: int, num_steps: int, *, time_sampling: TimeSampling = "independent"
) -> Int[Array, " b"]:
    """Steps t, each uniform on 1..T (ELBO-10).

    Args:
        key: for the draw.
        batch: how many.
        num_steps: T.
        time_sampling: as in `uniform_times`. With "low_discrepancy" the mean over a batch has less variance.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (the low-discrepancy draw).
    """
    return to_timesteps(uniform_times(key, batch, time_sampling), num_steps)


class WeightedTime(NamedTuple):
    """Where a number u went in [0, 1) cut into K equal bins, drawn with unequal probabilities; one shape for all.

    Fields:
        time: in [0, 1), uniform within its bin.
        bin: 0..K - 1; for K = T steps, the step is bin + 1.
        weight: 1 / (K P(bin)), so that E[weight f(time)] is the mean of f over [0, 1).
    """

    time: Real
    bin: Int[Array, "..."]
    weight: Real


def importance_sample(u: Real, probabilities: Float[Array, " K"]) -> WeightedTime:
    """Uniform numbers u as importance-sampled times: the inverse CDF of a piecewise constant density (TIME-2).

        bin = max{k : c_k <= u},   time = (bin + (u - c_bin) / (c_bin+1 - c_bin)) / K,   c_k = p_0 + .. + p_k-1

    Elementwise, in the dtype of u, at least float32; numbers spread evenly become times spread evenly under the density
    (stratified sampling).

    Args:
        u: in [0, 1), any shape, as `uniforms` makes them.
        probabilities: p of each of K bins, not negative; they are divided by their sum. A bin of p = 0 is never drawn.

    Returns:
        `Draw`. The c_k are rounded to the numbers that `uniforms` gives, multiples of 2^-23 in float32, and the weight
        is by them: without bias, and near 1 / (K p). A bin of p far below 2^-23 is not drawn either.

    Raises:
        ValueError: probabilities that are no vector, or that are none (negative, not finite, or all zero) and concrete;
            traced, the weight is NaN.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3 (importance-sampled t).
    """
    if len(probabilities.shape) != 1 or probabilities.shape[0] < 1:
        raise ValueError(f"probabilities has shape {probabilities.shape}: it must be (K,), one for each of K >= 1 bins")
    u, count = jnp.asarray(u, at_least_float32(u.dtype)), probabilities.shape[0]
    dtype = u.dtype
    p, scale = _distribution(probabilities.astype(dtype)), 2.0 ** jnp.finfo(dtype).nmant
    grains = jnp.round(jnp.nan_to_num(p) * (128 * scale)).astype(int)
    ends = jnp.cumsum(grains).astype(dtype)  # integers add up exactly, so that c rises, and stays where p = 0
    edges = jnp.concatenate([jnp.zeros_like(ends[:1]), jnp.round(ends / ends[-1] * scale) / scale])
    index = jnp.clip(jnp.searchsorted(edges, u, side="right") - 1, 0, count - 1)
    width = edges[index + 1] - edges[index]
    time = (index.astype(dtype) + (u - edges[index]) / width) / count
    weight = jnp.where(jnp.isnan(p[0]), jnp.nan, 1.0 / (count * width))
    return WeightedTime(jnp.minimum(time, 1.0 - jnp.finfo(dtype).epsneg), index, weight)


class LossSecondMoments(NamedTuple):
    """The last losses seen at each step, from which p_t ~ sqrt(E L_t^2) is estimated (TIME-2).

    A pytree, changed by making another: `moments = moments.update(t, losses)`.

    Fields:
        losses: the last H of each step 1..T, in no order, shape (T, H).
        counts: how many each step has had, shape (T,).
    """

    losses: Float[Array, "T H"]
    counts: Int[Array, " T"]

    @classmethod
    def init(cls, num_steps: int, history: int = 10) -> "LossSecondMoments":
        """Nothing seen yet, of T steps; H losses will be kept of each.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3.
        """
        return cls(jnp.zeros((num_steps, history)), jnp.zeros(num_steps, jnp.int32))

    def update(self, t: Int[Array, " b"], losses: PerExample) -> "LossSecondMoments":
        """With the losses of a batch noted in order, of which each step keeps the last H.

        Args:
            t: steps 1..T, shape (B,); others are ignored.
            losses: L_t, *not* times the importance weight, finite, shape (B,).

        Raises:
            ValueError: t and losses are not of one shape (B,).
        """
        if t.ndim != 1 or t.shape != losses.shape:
            raise ValueError(f"t has shape {t.shape} and losses {losses.shape}: both must be (B,)")
        history = self.losses.shape[1]
        same = t[:, None] == t[None, :]  # how many at the same step come before and after, in this batch
        before, after = (part.sum(1, dtype=jnp.int32) for part in (jnp.tril(same, -1), jnp.triu(same, 1)))
        row = jnp.where((t >= 1) & (t <= self.counts.size), t - 1, self.counts.size)
        slot = (self.counts.at[row].get(mode="fill", fill_value=0) + before) % history
        row_kept = jnp.where(after < history, row, self.counts.size)  # what this batch itself pushes out goes nowhere
        noted = self.losses.at[row_kept, slot].set(losses.astype(self.losses.dtype), mode="drop")
        return LossSecondMoments(noted, self.counts.at[row].add(1, mode="drop"))

    def probabilities(self, uniform: float = 1e-3) -> Float[Array, " T"]:
        """p_t ~ sqrt(mean of L_t^2), mixed with a little of the uniform law; uniform until every step has H losses.

        Args:
            uniform: the uniform law's part.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3.
        """
        num_steps, history = self.losses.shape
        largest = jnp.max(jnp.abs(self.losses))
        ready = jnp.all(self.counts >= history) & (largest > 0)
        scaled = self.losses / jnp.where(ready, largest, 1.0)  # no square overflows
        root = _root(jnp.where(ready, jnp.mean(scaled**2, axis=1), 1.0))
        return (1.0 - uniform) * root / root.sum() + uniform / num_steps


def timestep_proposal(levels: NoiseLevel) -> Float[Array, " T"]:
    """p_t ~ sigma_t^2 / sigma_t-1^2 - 1: the best proposal for the bound's steps, of N(0, I) data (TIME-3).

    Such data and their exact denoiser have E ||eps - eps_hat||^2 = D alpha^2 where variance is preserved, so that the
    bound's term L_t = 1/2 (SNR(s)/SNR(t) - 1) ||eps - eps_hat||^2 has the mean D/2 (sigma_t^2 / sigma_s^2 - 1), and
    sqrt(E L_t^2) is that times sqrt(1 + 2/D).

    Args:
        levels: T + 1 of them, noise rising, fields (T + 1,): `schedule(jnp.arange(T + 1))`.

    Returns:
        Probabilities of steps 1..T, shape (T,). A step from clean data gets 0: its term is the decoder's.

    Source: the optimum of Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3, in closed form.
    """
    rise = jnp.expm1(2.0 * _log_rise(levels))
    return rise / rise.sum()


def geometric_variance_proposal(levels: NoiseLevel) -> Float[Array, " K"]:
    """p_k ~ log sigma_k+1^2 - log sigma_k^2: `step_proposal` in continuous time, for K bins of it (TIME-3).

    The integrand 1/2 gamma' E ||eps - eps_hat||^2 of N(0, I) data is D/2 d log sigma^2/dt. For a table's steps it is
    the first order of the best.

    Args:
        levels: K + 1 of them, noise rising, fields (K + 1,): `schedule(jnp.linspace(t_0, 1, K + 1))`.

    Returns:
        Probabilities, shape (K,). A bin that begins with clean data, where the integral diverges, gets 0.

    Source: Vahdat et al. 2021, arXiv:2106.05931, who make the variance geometric in u so.
    """
    rise = _log_rise(levels)
    return rise / rise.sum()


def _log_rise(levels):
    """log sigma_k+1 - log sigma_k, 0 from clean data."""
    start, end = levels.log_sigma[:-1], levels.log_sigma[1:]
    return end - jnp.where(jnp.isneginf(start), end, start)


def _distribution(probabilities):
    """Probabilities whose sum is 1; NaN where traced ones are none: see `warp`."""
    total = probabilities.sum()
    valid = jnp.all(probabilities >= 0) & jnp.isfinite(total) & (total > 0)
    if not isinstance(valid, Tracer) and not np.asarray(valid):
        values = np.asarray(probabilities).tolist()
        raise ValueError(f"probabilities must be finite, not negative and not all zero, got {values}")
    return jnp.where(valid, probabilities / jnp.where(valid, total, 1.0), jnp.nan)
