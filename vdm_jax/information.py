"""Information of closed-form distributions: entropy, mutual information, MMSE, and the bound of the optimal model.

    I(x_0; x_t) = h(x_t) - h(x_t | x_0)                      d I / d SNR = mmse / 2               (I-MMSE)
    E bound_T   = prior + H(x_0 | x_1) + sum_{t=2..T} (SNR(t-1) - SNR(t)) mmse(t) / 2             (ELBO-3, ELBO-7)
    T -> inf      prior + H(x_0 | x_1) + I(x_0; x_1) - I(x_0; x_T)                                (ELBO-12)

Every result is an `Estimate` with its error: 0 if there is a closed form, otherwise the error of `quadrature` (in low
dimensions) or `monte_carlo` (in high dimensions). All values are in nats.

Source: Guo, Shamai & Verdu 2005, arXiv:cs/0412108 (I-MMSE); Kingma et al. 2021, arXiv:2107.00630 (the bound).
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.closed_form import Distribution, Empirical, Gaussian, Independent, Mixture, marginal, matmul
from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.elbo import diffusion_weight, prior_kl
from vdm_jax.gaussian import LOG_2PI, STANDARD_NORMAL, Prior, _root
from vdm_jax.noise_levels import NoiseLevel, check_positive
from vdm_jax.types import Key, Real, Scalar, X

__all__ = [
    "Estimate",
    "Expectation",
    "OptimalBound",
    "entropy",
    "mmse",
    "monte_carlo",
    "mutual_information",
    "optimal_bound",
    "optimal_bound_limit",
    "quadrature",
]

_HALF_WIDTH = 9.0  # of the grid, in standard deviations; the mass outside is below float64 precision


class Estimate(NamedTuple):
    """A scalar with its error.

    Fields:
        value: the estimate.
        standard_error: of `monte_carlo`; for `quadrature` a bound on the error, and 0 for a closed form.
    """

    value: Real
    standard_error: Real


@runtime_checkable
class Expectation(Protocol):
    """`expect(function, distribution)`: the expectation of a scalar function of x, as an `Estimate`."""

    def __call__(self, function: Callable[[X], Scalar], distribution: Any, /) -> Estimate: ...


def quadrature(function: Callable[[X], Scalar], distribution: Any, nodes: int = 201) -> Estimate:
    """E function(x) by the trapezoidal rule, with nodes^D points for each component of a mixture.

    For smooth functions the error decreases exponentially with the number of nodes. The reported error is the
    difference from the rule with every second node, which is much larger than the actual error.

    Args:
        function: of one example, shape (*x); finite within nine standard deviations of the mean.
        distribution: a Gaussian or Mixture of at most three dimensions, or an Empirical distribution of any dimension
            (an exact sum).
        nodes: number of nodes in each dimension, odd.

    Raises:
        ValueError: more than three dimensions, or an even number of nodes.
    """
    if isinstance(distribution, Empirical):
        values = jax.lax.map(function, distribution.points)
        return Estimate(jnp.sum(jnp.exp(distribution.log_weights) * values), jnp.zeros((), values.dtype))
    if distribution.mean.size > 3 or nodes % 2 == 0:
        raise ValueError(
            f"nodes is {nodes} in {distribution.mean.size} dimensions: quadrature needs an odd number of nodes and at "
            "most 3 dimensions; use monte_carlo for more"
        )
    if isinstance(distribution, Gaussian):
        distribution = Mixture(
            jnp.zeros_like(distribution.mean, shape=(1,)), jax.tree.map(lambda leaf: leaf[None], distribution)
        )
    z, fine, coarse = _grid(distribution.mean, nodes)

    def component(normal):
        values = jax.lax.map(lambda node: function(normal.reparameterize(node)), z, batch_size=4096)
        return matmul(fine, values), matmul(coarse, values)

    full, half = jax.lax.map(component, distribution.components)
    weights = jnp.exp(distribution.log_weights)
    return Estimate(matmul(weights, full), jnp.abs(matmul(weights, full - half)))


def _grid(like: X, nodes: int):
    """Standard normal nodes (N, *x), their weights, and the weights of the rule with every second node."""
    dims = like.size
    line = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, nodes)
    every_second = np.arange(nodes) % 2 == 0
    rules = []
    for use in (np.ones(nodes, bool), every_second):
        weights = np.where(use, np.exp(-0.5 * line**2), 0.0)
        rules.append(reduce(np.multiply.outer, [weights / weights.sum()] * dims).ravel())
    z = np.stack([axis.ravel() for axis in np.meshgrid(*[line] * dims, indexing="ij")], -1)
    return tuple(jnp.asarray(a, like.dtype) for a in (z.reshape(-1, *like.shape), *rules))


def monte_carlo(function: Callable[[X], Scalar], distribution: Any, key: Key, num_samples: int = 10_000) -> Estimate:
    """E function(x) as the mean over independent samples, with its standard error.

    Args:
        function: of one example, shape (*x).
        distribution: any distribution with `sample`.
        key: for the samples; `functools.partial(monte_carlo, key=key)` is an `Expectation`.
        num_samples: number of samples, at least 2.
    """
    keys = jax.random.split(key, num_samples)
    values = jax.lax.map(lambda k: function(distribution.sample(k)), keys, batch_size=1024)
    return Estimate(values.mean(), _root(values.var(ddof=1) / num_samples))


def entropy(distribution: Distribution, expect: Expectation = quadrature) -> Estimate:
    """-E log p(x); the differential entropy if the distribution has a density.

    Args:
        distribution: Gaussian and Empirical have a closed form; for Independent the entropies of the entries are added.
        expect: how to compute expectations for a Mixture.
    """
    if isinstance(distribution, Independent):
        return _sum(distribution.map_entries(lambda scalar: entropy(scalar, expect)))
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
    h_t = entropy(marginal(distribution, level), expect)
    return h_t._replace(value=h_t.value - 0.5 * distribution.mean.size * (1.0 + LOG_2PI + 2.0 * level.log_sigma))


def mmse(distribution: Distribution, level: NoiseLevel, expect: Expectation = quadrature) -> Estimate:
    """E ||x_0 - E[x_0 | x_t]||^2, the minimum mean squared error of any denoiser at this level (PAR-3).

    Args:
        distribution: of x_0; Gaussian has a closed form.
        level: scalars, sigma > 0.
        expect: over x_t.

    Source: Guo, Shamai & Verdu 2005, arXiv:cs/0412108.
    """
    if isinstance(distribution, Independent):
        return _sum(distribution.map_entries(lambda scalar: mmse(scalar, level, expect)))
    if isinstance(distribution, Gaussian):
        value = jnp.sum(distribution.posterior(distribution.mean, level).variance)  # the same for every x_t
        return Estimate(value, jnp.zeros_like(value))
    return expect(lambda x_t: jnp.sum(distribution.posterior(x_t, level).variance), marginal(distribution, level))


class OptimalBound(NamedTuple):
    """The expected bound on -log p(x_0) with the exact denoiser and decoder; each term is an `Estimate`."""

    prior: Estimate
    reconstruction: Estimate
    diffusion: Estimate

    @property
    def total(self) -> Estimate:
        """The bound: the sum of all terms; the errors are added."""
        return jax.tree.map(lambda *terms: jnp.sum(jnp.stack(terms)), *self)


@compiled()
def optimal_bound(
    distribution: Distribution,
    schedule: DiscreteSchedule,
    expect: Expectation = quadrature,
    *,
    prior: Prior = STANDARD_NORMAL,
) -> OptimalBound:
    """The expected bound of the model with the exact denoiser and decoder, for T steps (ELBO-3, ELBO-7).

    Its excess over the entropy of the data is the error of approximating q(x_s | x_t) by a normal distribution.

    Args:
        distribution: of x_0.
        schedule: a discrete schedule.
        expect: over x_t.
        prior: p(x_T), with scalar fields, as in `elbo.prior_kl`.
    """
    first, last = schedule(1), schedule(schedule.num_steps)

    def term(t):
        step = schedule.step(t - 1, t)
        weight = diffusion_weight(step, "x_0")
        return jax.tree.map(lambda value: weight * value, mmse(distribution, step.t, expect))

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
    """`optimal_bound` for T -> infinity. It depends on the schedule only through its end points (ELBO-12).

    The diffusion term is the integral of mmse / 2 over the SNR, by I-MMSE equal to I(x_0; x_first) - I(x_0; x_last).
    The bound exceeds the entropy of the data by KL(q(x_T) || p(x_T)).

    Args:
        distribution: of x_0.
        first, last: the least noisy and the noisiest level, scalars.
        expect, prior: as in `optimal_bound`.

    Raises:
        ValueError: a level without noise.
    """
    low, high = mutual_information(distribution, last, expect), mutual_information(distribution, first, expect)
    diffusion = Estimate(high.value - low.value, high.standard_error + low.standard_error)
    return OptimalBound(_prior(distribution, last, prior), _reconstruction(distribution, first, expect), diffusion)


def _prior(distribution, level, prior) -> Estimate:
    """E KL(q(x_T | x_0) || p(x_T)): quadratic in x_0, so the value at the mean plus a term with the variance."""
    variance_term = 0.5 * level.alpha**2 * jnp.sum(distribution.variance) / prior.astype(distribution.mean.dtype).var
    value = prior_kl(distribution.mean, level, prior) + variance_term
    return Estimate(value, jnp.zeros_like(value))


def _reconstruction(distribution, level, expect) -> Estimate:
    """H(x_0 | x_1) = H(x_0) - I(x_0; x_1)."""
    if isinstance(distribution, Gaussian):
        return entropy(distribution.posterior(distribution.mean, level))
    if isinstance(distribution, Independent):
        return _sum(distribution.map_entries(lambda scalar: _reconstruction(scalar, level, expect)))
    if isinstance(distribution, Empirical):  # a difference of entropies would cancel at low noise
        return expect(lambda x_1: distribution.posterior(x_1, level).entropy(), marginal(distribution, level))
    h, mutual = entropy(distribution, expect), mutual_information(distribution, level, expect)
    return Estimate(h.value - mutual.value, h.standard_error + mutual.standard_error)


def _sum(estimates: Estimate) -> Estimate:
    """The sum of an array of estimates; the errors are added."""
    return jax.tree.map(jnp.sum, estimates)
