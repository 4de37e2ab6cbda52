"""Expectations over the exact worlds: entropy, mutual information, the MMSE curve, and the bound of the best model.

    I(x_0; x_t) = h(x_t) - h(x_t | x_0)                      d I / d SNR = mmse / 2               (I-MMSE)
    E bound_T   = prior + H(x_0 | x_1) + sum_{t=2..T} (SNR(t-1) - SNR(t)) mmse(t) / 2             (ELBO-3, ELBO-7)
    T -> inf      prior + H(x_0 | x_1) + I(x_0; x_1) - I(x_0; x_T)                                (ELBO-12)

Each is closed form where there is one, and else an `Estimate`, whose error is stated: by `quadrature` in few
dimensions, by `monte_carlo` in many. In nats.

Source: Guo, Shamai & Verdu 2005, arXiv:cs/0412108 (I-MMSE); Kingma et al. 2021, arXiv:2107.00630 (the bound).
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.closed_form import Distribution, Empirical, Gaussian, Independent, Mixture, dot, marginal
from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.elbo import diffusion_weight, prior_kl
from vdm_jax.gaussian import LOG_2PI, STANDARD_NORMAL, Prior, _root
from vdm_jax.noise_levels import NoiseLevel, check_positive
from vdm_jax.types import Key, Real, Scalar, X

_REACH = 9.0  # of the grid, in standard deviations: what lies beyond is below float64's rounding


class Estimate(NamedTuple):
    """A scalar, and how far off it may be: `quadrature`'s bound, or `monte_carlo`'s standard error."""

    value: Real
    error: Real


@runtime_checkable
class Expectation(Protocol):
    """`expect(function, law)`: the mean of a scalar function of x under a law, as an `Estimate`."""

    def __call__(self, function: Callable[[X], Scalar], distribution: Any, /) -> Estimate: ...


def quadrature(function: Callable[[X], Scalar], distribution: Any, nodes: int = 201) -> Estimate:
    """E function(x), by the trapezoidal rule in every dimension of every component, nodes^D points each.

    For smooth functions its error falls exponentially with the number of nodes. The error stated is the difference from
    the rule through every second node, which the actual one is far below.

    Args:
        function: of one example, shape (*x); finite within nine standard deviations.
        distribution: a Gaussian or Mixture of at most three dimensions, or a Finite law of any (a sum, whose error is 0).
        nodes: odd.

    Raises:
        ValueError: more than three dimensions, or an even number of nodes.
    """
    if isinstance(distribution, Empirical):
        values = jax.lax.map(function, distribution.points)
        return Estimate(jnp.sum(jnp.exp(distribution.log_weights) * values), jnp.zeros((), values.dtype))
    if distribution.mean.size > 3 or nodes % 2 == 0:
        raise ValueError(
            f"quadrature takes an odd number of nodes and at most 3 dimensions, not {distribution.mean.size}"
        )
    if isinstance(distribution, Gaussian):
        distribution = Mixture(
            jnp.zeros_like(distribution.mean, shape=(1,)), jax.tree.map(lambda leaf: leaf[None], distribution)
        )
    z, fine, coarse = _grid(distribution.mean, nodes)

    def component(normal):
        values = jax.lax.map(lambda node: function(normal.colour(node)), z, batch_size=4096)
        return dot(fine, values), dot(coarse, values)

    whole, half = jax.lax.map(component, distribution.components)
    weights = jnp.exp(distribution.log_weights)
    return Estimate(dot(weights, whole), jnp.abs(dot(weights, whole - half)))


def _grid(like: X, nodes: int):
    """Standard normal nodes (N, *x) with their weights, and those of the rule through every second one."""
    dims = like.size
    line = np.linspace(-_REACH, _REACH, nodes)
    second = np.arange(nodes) % 2 == 0
    rules = []
    for use in (np.ones(nodes, bool), second):
        weights = np.where(use, np.exp(-0.5 * line**2), 0.0)
        rules.append(reduce(np.multiply.outer, [weights / weights.sum()] * dims).ravel())
    z = np.stack([axis.ravel() for axis in np.meshgrid(*[line] * dims, indexing="ij")], -1)
    return tuple(jnp.asarray(a, like.dtype) for a in (z.reshape(-1, *like.shape), *rules))


def monte_carlo(function: Callable[[X], Scalar], distribution: Any, key: Key, draws: int = 10_000) -> Estimate:
    """E function(x), as the mean of independent draws; the error is its standard error.

    Args:
        function: of one example, shape (*x).
        distribution: any.
        key: for the draws; `functools.partial(monte_carlo, key=key)` is an `Expectation`.
        draws: how many, at least 2.
    """
    keys = jax.random.split(key, draws)
    values = jax.lax.map(lambda k: function(distribution.sample(k)), keys, batch_size=1024)
    return Estimate(values.mean(), _root(values.var(ddof=1) / draws))


def entropy(distribution: Distribution, expect: Expectation = quadrature) -> Estimate:
    """-E log p(x) of a law, differential where it has a density.

    Args:
        distribution: closed form for a Gaussian and a Finite law, and per number for an Independent one.
        expect: for a Mixture.
    """
    if isinstance(distribution, Independent):
        return _sum(distribution.each(lambda scalar: entropy(scalar, expect)))
    if isinstance(distribution, (Gaussian, Empirical)):
        value = distribution.entropy()
        return Estimate(value, jnp.zeros_like(value))
    return expect(lambda x: -distribution.log_prob(x), distribution)


def mutual_information(distribution: Distribution, level: NoiseLevel, expect: Expectation = quadrature) -> Estimate:
    """I(x_0; x_t) = h(x_t) - D/2 log(2 pi e sigma^2).

    Args:
        distribution: of x_0.
        level: scalars, sigma > 0.
        expect: for the entropy of x_t.

    Source: Guo, Shamai & Verdu 2005, arXiv:cs/0412108.
    """
    whole = entropy(marginal(distribution, level), expect)
    return whole._replace(value=whole.value - 0.5 * distribution.mean.size * (1.0 + LOG_2PI + 2.0 * level.log_sigma))


def mmse(distribution: Distribution, level: NoiseLevel, expect: Expectation = quadrature) -> Estimate:
    """E ||x_0 - E[x_0 | x_t]||^2, the error that no denoiser undercuts (PAR-3). At all levels it is the MMSE curve.

    Args:
        distribution: of x_0; closed form where it is Gaussian.
        level: scalars, sigma > 0.
        expect: over x_t.

    Source: Guo, Shamai & Verdu 2005, arXiv:cs/0412108.
    """
    if isinstance(distribution, Independent):
        return _sum(distribution.each(lambda scalar: mmse(scalar, level, expect)))
    if isinstance(distribution, Gaussian):
        value = jnp.sum(distribution.posterior(distribution.mean, level).variance)  # whatever x_t is
        return Estimate(value, jnp.zeros_like(value))
    return expect(lambda x_t: jnp.sum(distribution.posterior(x_t, level).variance), marginal(distribution, level))


class OptimalBound(NamedTuple):
    """E bound on -log p(x_0) over the data, of the model with the exact denoiser and decoder; each an `Estimate`."""

    prior: Estimate
    reconstruction: Estimate
    diffusion: Estimate

    @property
    def total(self) -> Estimate:
        """The bound itself; its error is the sum of its terms'."""
        return jax.tree.map(lambda *terms: jnp.sum(jnp.stack(terms)), *self)


@compiled()
def optimal_bound(
    distribution: Distribution,
    schedule: DiscreteSchedule,
    expect: Expectation = quadrature,
    *,
    prior: Prior = STANDARD_NORMAL,
) -> OptimalBound:
    """The bound with the exact denoiser and decoder at T steps, in expectation over the data (ELBO-3, ELBO-7).

    What is left above the entropy of the data is the model's: a normal reverse step where q(x_s | x_t) is none.

    Args:
        distribution: of x_0.
        schedule: the schedule.
        expect: over x_t.
        prior: p(x_T), with scalar fields, as in `elbo.prior_kl`.
    """
    first, last = schedule(1), schedule(schedule.num_steps)

    def term(t):
        step = schedule.step(t - 1, t)
        weight = diffusion_weight(step, "x_0")
        return jax.tree.map(lambda number: weight * number, mmse(distribution, step.t, expect))

    diffusion = _sum(jax.lax.map(term, jnp.arange(2, schedule.num_steps + 1)))
    return OptimalBound(_prior(distribution, last, prior), _reconstruction(distribution, first, expect), diffusion)


def _check_ends(first: NoiseLevel, last: NoiseLevel) -> None:
    check_positive(first, "sigma")
    check_positive(last, "sigma")


@compiled(check=_check_ends)
def optimal_bound_limit(
    distribution: Distribution,
    first: NoiseLevel,
    last: NoiseLevel,
    expect: Expectation = quadrature,
    *,
    prior: Prior = STANDARD_NORMAL,
) -> OptimalBound:
    """`optimal_bound` as T -> infinity between two levels, whatever the schedule's shape between them (ELBO-12).

    The diffusion term is the integral of mmse / 2 over the SNR, and by I-MMSE I(x_0; x_first) - I(x_0; x_last). The
    whole exceeds the data's entropy by KL(q(x_T) || p(x_T)) alone.

    Args:
        distribution: of x_0.
        first, last: the least and the most noisy level, scalars.
        expect, prior: as in `optimal_bound`.

    Raises:
        ValueError: a level without noise.
    """
    low, high = mutual_information(distribution, last, expect), mutual_information(distribution, first, expect)
    diffusion = Estimate(high.value - low.value, high.error + low.error)
    return OptimalBound(_prior(distribution, last, prior), _reconstruction(distribution, first, expect), diffusion)


def _prior(distribution, level, prior) -> Estimate:
    """E KL(q(x_T | x_0) || p(x_T)): quadratic in x_0, so the mean's value and the variance."""
    spread = 0.5 * level.alpha**2 * jnp.sum(distribution.variance) / prior.astype(distribution.mean.dtype).var
    value = prior_kl(distribution.mean, level, prior) + spread
    return Estimate(value, jnp.zeros_like(value))


def _reconstruction(distribution, level, expect) -> Estimate:
    """H(x_0 | x_1) = H(x_0) - I(x_0; x_1)."""
    if isinstance(distribution, Gaussian):
        return entropy(distribution.posterior(distribution.mean, level))
    if isinstance(distribution, Independent):
        return _sum(distribution.each(lambda scalar: _reconstruction(scalar, level, expect)))
    if isinstance(distribution, Empirical):  # not as a difference, which is tiny where little noise leaves no doubt
        return expect(lambda x_1: distribution.posterior(x_1, level).entropy(), marginal(distribution, level))
    whole, shared = entropy(distribution, expect), mutual_information(distribution, level, expect)
    return Estimate(whole.value - shared.value, whole.error + shared.error)


def _sum(estimates: Estimate) -> Estimate:
    """The sum of an array of estimates; errors add up."""
    return jax.tree.map(jnp.sum, estimates)
