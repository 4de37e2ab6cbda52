"""Tweedie's formula: the posterior mean and covariance of clean data from the score of noisy data.

    E[x_0 | x_t]   = (x_t + sigma^2 s(x_t)) / alpha                     (TW-1)
    Cov[x_0 | x_t] = (sigma^2 I + sigma^4 grad s(x_t)) / alpha^2        (TW-2)

where s is the score of the *marginal* distribution q(x_t), at any level of a variance-preserving or exploding process.
The score is a callable that takes and returns a batch; `parameterization.ScoreFromDenoiser` makes one from a denoiser
at a level. For noise of other exponential families, derivatives of a log-partition function replace the score (TW-3).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jax.tree_util import Partial
from jaxtyping import Array, Float

from vdm_jax.compilation import compiled, varying_like
from vdm_jax.divergence import Trace, hutchinson_probes
from vdm_jax.gaussian import LOG_2PI
from vdm_jax.noise_levels import NoiseLevel, check_positive
from vdm_jax.parameterization import to_x_0
from vdm_jax.types import Batch, Key, Real, Scalar, Score, X, at_least_float32, check_values, evaluate

__all__ = [
    "covariance_operator",
    "cumulants",
    "gamma_base",
    "normal_base",
    "poisson_base",
    "posterior_covariance",
    "posterior_mean",
    "posterior_variance",
]


def posterior_mean(score: Score, x_t: Batch, level: NoiseLevel) -> Batch:
    """E[x_0 | x_t] = (x_t + sigma^2 s) / alpha (TW-1).

    Args:
        score: the score of q(x_t), (B, *x) -> (B, *x).
        x_t: shape (B, *x).
        level: scalars, alpha > 0.

    Returns:
        Shape (B, *x).

    Raises:
        ValueError: a level without signal, or a score of another shape than x_t.

    Source: Robbins 1956, "An empirical Bayes approach to statistics"; Efron 2011, "Tweedie's formula and selection
        bias".
    """
    check_positive(level, "alpha")
    return to_x_0(evaluate(score, x_t, name="score"), x_t, level, "score")


def covariance_operator(score: Score, x_t: Batch, level: NoiseLevel) -> Callable[[Batch], Batch]:
    """v -> Cov[x_0 | x_t] v by one Jacobian-vector product of the score, without forming the matrix (TW-2).

    Arguments as in `posterior_mean`; the score treats each example independently.

    Returns:
        A linear map of (B, *x). It is a pytree, so it can be an argument of a compiled function.

    Source: Efron 2011; Meng et al. 2021, arXiv:2111.04726 (second order).
    """
    check_positive(level, "alpha")
    x_t = jnp.asarray(x_t)
    start = x_t.astype(at_least_float32(x_t.dtype))
    _, jvp = jax.linearize(lambda x: evaluate(score, x.astype(x_t.dtype), name="score"), start)
    return Partial(_covariance_times, jvp, level, start)


def _covariance_times(jvp, level: NoiseLevel, x_t: Batch, v: Batch) -> Batch:
    ratio, v = level.sigma / level.alpha, varying_like(v.astype(x_t.dtype), x_t)
    return ratio**2 * (v + level.sigma**2 * jvp(v))


def _check_level(level: NoiseLevel) -> None:
    check_positive(level, "alpha")


@compiled(check=_check_level)
def posterior_covariance(score: Score, x_t: Batch, level: NoiseLevel) -> Float[Array, "b d d"]:
    """The full matrix Cov[x_0 | x_t] of each flattened example, by D Jacobian-vector products (TW-2).

    Arguments and errors as in `covariance_operator`.

    Returns:
        Shape (B, D, D), symmetric if the Jacobian of the score is.
    """
    times = covariance_operator(score, x_t, level)
    dims = math.prod(x_t.shape[1:])
    basis = jnp.eye(dims, dtype=at_least_float32(x_t.dtype)).reshape(dims, 1, *x_t.shape[1:])
    columns = jax.lax.map(lambda v: times(jnp.broadcast_to(v, x_t.shape)), basis)
    return jnp.moveaxis(columns.reshape(dims, x_t.shape[0], dims), 0, -1)


@compiled(static=("probes",), check=_check_level)
def posterior_variance(
    score: Score, key: Key | None, x_t: Batch, level: NoiseLevel, *, trace: Trace = "rademacher", probes: int = 1
) -> Batch:
    """The diagonal of Cov[x_0 | x_t], estimated by the mean of v (Cov v) over random directions (TW-2).

    The estimate is unbiased; with `rademacher` it is exact if the covariance is diagonal. With trace `exact` it is
    exact and costs D products.

    Args:
        score, x_t, level: as in `covariance_operator`.
        key: for v.
        trace, probes: as in `divergence.hutchinson_probes`.

    Returns:
        Shape (B, *x).

    Raises:
        ValueError: unknown trace, probes below 1, or no key for random directions.

    Source: Bekas et al. 2007, "An estimator for the diagonal of a matrix".
    """
    v = hutchinson_probes(key, x_t, trace, probes)
    times = covariance_operator(score, varying_like(x_t, v), level)
    return jax.lax.map(lambda v: v * times(v), v).mean(0)


def cumulants(
    log_prob: Callable[[Any], Scalar], log_base: Callable[[Any], Scalar], x: X, order: int
) -> list[Float[Array, "..."]]:
    """The cumulants of a natural parameter eta given one observation of an exponential family (TW-3).

        q(x | eta) = h(x) exp(eta . x - psi(eta)),  x ~ p(x) = int q(x | eta) p(eta)
        d^k/dx^k [log p(x) - log h(x)] = the k-th cumulant of eta given x

    log p - log h is the log-partition function of p(eta | x), whose natural parameter is x. The first cumulant is the
    mean, the second the covariance, the third the third central moment.

    Args:
        log_prob: log p of one example, differentiable.
        log_base: log h of one example: `normal_base`, `poisson_base`, `gamma_base`, or another function.
        x: one example, shape (*x). Counts are extended to real numbers, as log Gamma extends the factorial.
        order: the highest order, at least 1.

    Returns:
        Arrays of shape (*x), (*x, *x), ...

    Raises:
        ValueError: order below 1.

    Source: Efron 2011, "Tweedie's formula and selection bias", section 2.
    """
    if order < 1:
        raise ValueError(f"order is {order}: it must be at least 1")

    x = jnp.asarray(x, at_least_float32(x.dtype))

    def log_partition(x):
        return check_values(log_prob(x), (), "log_prob") - check_values(log_base(x), (), "log_base")

    results, derivative = [], log_partition
    for _ in range(order):
        derivative = jax.grad(derivative) if derivative is log_partition else jax.jacfwd(derivative)
        results.append(derivative(x))
    return results


def normal_base(x: X, var: Real | float) -> Scalar:
    """log h of N(mu, var) with known var: eta = mu / var (TW-3). x of shape (*x)."""
    x = x.astype(at_least_float32(x.dtype))
    return -0.5 * jnp.sum(x**2 / var + jnp.log(var) + LOG_2PI)


def poisson_base(x: X) -> Scalar:
    """log h of Poisson counts, -log x!: eta is the log of the rate (TW-3). x of shape (*x), above -1."""
    return -jnp.sum(gammaln(x.astype(at_least_float32(x.dtype)) + 1.0))


def gamma_base(x: X, shape: Real | float) -> Scalar:
    """log h of gamma variables with known shape: eta is *minus* the rate (TW-3). x of shape (*x), positive."""
    x = x.astype(at_least_float32(x.dtype))
    return jnp.sum((shape - 1.0) * jnp.log(x) - gammaln(shape))
