"""Stein's unbiased risk estimate (SURE): the mean squared error of a denoiser, estimated without clean data.

    y = x + sigma eps:   E ||D(y) - x||^2 = E [ ||D(y) - y||^2 - sigma^2 dim + 2 sigma^2 div D(y) ]      (SURE-1)

for *every* x, so a denoiser can be evaluated, selected and trained with noisy data only. The optimal denoiser is
Tweedie's formula (SURE-2), and with D(y) = y + sigma^2 s(y) SURE is implicit score matching of s (SURE-3).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.compilation import compiled
from vdm_jax.divergence import Trace, hutchinson_probes, value_and_divergence
from vdm_jax.types import Batch, Key, PerExample, Real, Scalar, Score, X, at_least_float32, per_example

__all__ = ["soft_threshold", "sure", "sure_threshold"]


@compiled(static=("probes",))
def sure(
    denoiser: Score, key: Key | None, y: Batch, sigma: Scalar | float, *, trace: Trace = "rademacher", probes: int = 1
) -> PerExample:
    """An unbiased estimate of ||D(y) - x||^2 from y alone (SURE-1).

    Args:
        denoiser: D, (B, *x) -> (B, *x), for each example independently; continuous, not necessarily differentiable.
        key: for the directions; may be None if trace is `exact`.
        y: noisy data, shape (B, *x).
        sigma: standard deviation of the noise, a scalar.
        trace: how the divergence is computed, as in `divergence.hutchinson_probes`.
        probes: number of random directions.

    Returns:
        Shape (B,), summed over the example; may be negative.

    Raises:
        ValueError: unknown trace, probes below 1, no key for random directions, or D(y) of another shape than y.

    Source: Stein 1981, "Estimation of the mean of a multivariate normal distribution"; Ramani et al. 2008,
        "Monte-Carlo SURE" (the estimated divergence).
    """
    sigma = jnp.asarray(sigma, at_least_float32(y.dtype))
    x_hat, div = value_and_divergence(denoiser, y, hutchinson_probes(key, y, trace, probes))
    return per_example(jnp.square(x_hat - y)) + sigma**2 * (2.0 * div - math.prod(y.shape[1:]))


def soft_threshold(y: Batch, threshold: Real | float) -> Batch:
    """sign(y) max(|y| - threshold, 0): a denoiser for sparse signals, elementwise.

    Source: Donoho & Johnstone 1995, "Adapting to unknown smoothness via wavelet shrinkage".
    """
    return jnp.where(jnp.abs(y) > threshold, y - jnp.sign(y) * threshold, 0.0)  # its derivative at the threshold is 0


def sure_threshold(y: X, sigma: Scalar | float) -> tuple[Scalar, Scalar]:
    """SureShrink: the threshold that minimizes `sure` for one example, and its estimate.

        SURE(t) = sum_i min(|y_i|, t)^2 + sigma^2 (dim - 2 #{|y_i| <= t})

    SURE increases with t between consecutive |y_i|, so the minimum is at 0 or at one of them; all are evaluated after
    one sort.

    Args:
        y: a noisy example, shape (*x).
        sigma: standard deviation of the noise, a scalar.

    Returns:
        The threshold and the estimate, scalars.

    Source: Donoho & Johnstone 1995, section 2.
    """
    y = jnp.asarray(y, at_least_float32(y.dtype))
    candidates = jnp.concatenate([jnp.zeros(1, y.dtype), jnp.sort(jnp.abs(y).reshape(-1))])
    risks = _risks(candidates, jnp.asarray(sigma, y.dtype))
    best = jnp.argmin(risks)
    return candidates[best], risks[best]


def _risks(candidates: Float[Array, " k"], sigma: Scalar) -> Float[Array, " k"]:
    """SURE at 0 and at each of the sorted absolute values."""
    dims = candidates.size - 1
    count = jnp.arange(dims + 1, dtype=candidates.dtype)
    return jnp.cumsum(candidates**2) + (dims - count) * candidates**2 + sigma**2 * (dims - 2.0 * count)
