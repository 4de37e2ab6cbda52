"""TW: moments of the clean data by derivatives of the noisy density. Known posteriors, and cumulants."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.scipy.special import gammaln
from scipy import integrate, special, stats

from tests.derivations.algebra import log_normal
from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from vdm_jax import closed_form, forward, information, tweedie
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.schedules import VarianceExploding

a, g, v = sp.symbols("alpha sigma v", positive=True)
x, y, m = sp.symbols("x y m", real=True)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# Distributions of different shapes, and levels of three schedules: preserving, neither, exploding
DISTRIBUTIONS = {
    "gaussian": lambda: closed_form.gaussian([[0.3, -0.2]], [[0.5, 0.2], [0.2, 0.3]]),
    "low rank": lambda: closed_form.low_rank(np.linspace(-1, 1, 5), np.arange(10.0).reshape(5, 2) / 10 - 0.5, 0.01),
    "mixture": lambda: closed_form.mixture(
        [0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [[[0.1, 0.05], [0.05, 0.2]], np.eye(2)]
    ),
    "points": lambda: closed_form.empirical([[[-1.0], [0.5]], [[0.2], [-0.3]], [[1.0], [1.0]]], [0.5, 0.2, 0.3]),
    "pixels": lambda: closed_form.independent_pixels(np.arange(1.0, 25.0).reshape(2, 3, 4) % 7),
}


@cache
def _levels():
    one = jnp.asarray(1.5)
    return [
        level_from_log_snr(jnp.asarray(0.5)),
        NoiseLevel(one, one / 3, jnp.log(one), jnp.log(one / 3)),
        VarianceExploding(0.1, 5.0)(jnp.asarray(0.6))._replace(t=None),
    ]


def _noisy(distribution, count=4):
    return jax.random.normal(jax.random.key(0), (count, *distribution.mean.shape))


def _score(distribution, level):
    return jax.vmap(closed_form.marginal(distribution, level).score)


POINTS = sp.symbols("c_1 c_2", real=True)
SHARE = sp.Symbol("w", positive=True)


def _two_points(order):
    """d^k log q / dy^k of two clean points, and the posterior's moment of any order, by Bayes' rule."""
    kernels = [sp.Function(f"N_{i}", positive=True)(y) for i in (1, 2)]
    terms = [SHARE * kernels[0], (1 - SHARE) * kernels[1]]
    slopes = {sp.diff(kernel, y): (a * c - y) / g**2 * kernel for kernel, c in zip(kernels, POINTS, strict=True)}
    derivative = sp.log(sum(terms))
    for _ in range(order):
        derivative = sp.diff(derivative, y).subs(slopes)
    return derivative, lambda k: sum(t * c**k for t, c in zip(terms, POINTS, strict=True)) / sum(terms)


# TW-1


def test_TW_1_by_differentiating_under_the_integral():
    # d/dy N(y; a x, g^2) = N (a x - y) / g^2, for every x: the integral over any p(x) is (a E[x|y] - y) / g^2 q(y)
    q = sp.exp(log_normal(y, a * x, g**2))
    assert_proved(sp.diff(q, y), (a * x - y) / g**2 * q)
    # two points, whose posterior is Bayes' rule
    slope, moment = _two_points(1)
    assert_proved((y + g**2 * slope) / a, moment(1))
    # a normal distribution, whose posterior is a completed square
    log_q = log_normal(y, a * m, a**2 * v + g**2)
    joint = log_normal(x, m, v) + log_normal(y, a * x, g**2)
    mean = sp.solve(sp.diff(joint, x), x)[0]
    assert_proved((y + g**2 * sp.diff(log_q, y)) / a, mean)


@pytest.mark.parametrize(
    "name",
    ["mixture", *(pytest.param(n, marks=pytest.mark.slow) for n in ("low rank", "gaussian", "points", "pixels"))],
)
def test_TW_1_and_2_posterior_of_every_distribution(name):
    # conjugacy on one side, derivatives of q(x_t) on the other
    distribution = DISTRIBUTIONS[name]()
    x_t = _noisy(distribution)

    @jax.jit
    def claims(level):
        score, given = _score(distribution, level), jax.vmap(lambda x: distribution.posterior(x, level))(x_t)
        covariance = tweedie.posterior_covariance(score, x_t, level)
        variance = tweedie.posterior_variance(score, None, x_t, level, trace="exact")
        push = tweedie.covariance_operator(score, x_t, level)
        return (
            (tweedie.posterior_mean(score, x_t, level), jax.vmap(lambda distribution: distribution.mean)(given)),
            (covariance, jax.vmap(lambda distribution: distribution.covariance())(given)),
            (variance, jax.vmap(lambda distribution: distribution.variance)(given)),
            (push(x_t).reshape(4, -1), jnp.einsum("bij,bj->bi", covariance, x_t.reshape(4, -1))),
        )

    levels = jax.tree.map(lambda *parts: jnp.stack(parts), *[level._replace(t=None) for level in _levels()])
    for ours, truth in jax.jit(lambda: jax.lax.map(claims, levels))():
        assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_TW_1_and_2_of_a_distribution_outside_the_library():
    # x uniform on [-1, 1]: q(x_t) is a difference of normal integrals, and the posterior a truncated normal
    y = np.linspace(-2.0, 2.0, 9)
    for level in _levels():
        alpha, sigma = float(level.alpha), float(level.sigma)

        def log_q(x_t, alpha=alpha, sigma=sigma):
            ends = jax.scipy.special.ndtr((x_t + alpha) / sigma) - jax.scipy.special.ndtr((x_t - alpha) / sigma)
            return jnp.sum(jnp.log(ends))

        center, width = y / alpha, sigma / alpha
        posterior = stats.truncnorm((-1 - center) / width, (1 - center) / width, center, width)
        score, x_t = jax.jit(jax.vmap(jax.grad(log_q))), jnp.asarray(y)[:, None]
        assert_close(tweedie.posterior_mean(score, x_t, level)[:, 0], posterior.mean(), rtol=1e-7, atol=1e-9)
        assert_close(tweedie.posterior_covariance(score, x_t, level)[:, 0, 0], posterior.var(), rtol=1e-7)


@pytest.mark.slow
def test_TW_1_and_2_need_the_marginal_score():
    # the conditional score depends on x_0 and returns it, with variance 0
    distribution, level = DISTRIBUTIONS["mixture"](), _levels()[0]
    x_0, x_t = _noisy(distribution)[:2], jnp.asarray([[0.4, -0.3], [1.0, 0.2]])

    @jax.jit
    def conditional(x_t):
        return jax.vmap(jax.grad(lambda y, x: forward.marginal(x, level).log_prob(y)))(x_t, x_0)

    ours = tweedie.posterior_mean(conditional, x_t, level)
    assert_close(ours, x_0, rtol=1e-12)
    assert_close(tweedie.posterior_covariance(conditional, x_t, level), np.zeros((2, 2, 2)), atol=1e-12)
    with refuted():
        assert_close(ours, jax.vmap(lambda x: distribution.posterior(x, level).mean)(x_t), rtol=0.1)


# TW-2


def test_TW_2_by_differentiating_twice():
    q = sp.exp(log_normal(y, a * x, g**2))
    assert_proved(sp.diff(q, y, 2), (((a * x - y) / g**2) ** 2 - 1 / g**2) * q)
    bend, moment = _two_points(2)
    assert_proved((g**2 + g**4 * bend) / a**2, moment(2) - moment(1) ** 2)
    log_q = log_normal(y, a * m, a**2 * v + g**2)
    joint = log_normal(x, m, v) + log_normal(y, a * x, g**2)
    assert_proved((g**2 + g**4 * sp.diff(log_q, y, 2)) / a**2, -1 / sp.diff(joint, x, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace", ["rademacher", *(pytest.param(t, marks=pytest.mark.slow) for t in ("gaussian", "sphere"))]
)
def test_TW_2_diagonal_has_no_bias(trace):
    distribution, level = DISTRIBUTIONS["low rank"](), _levels()[2]
    x_t = jnp.broadcast_to(_noisy(distribution)[:1], (20_000, 5))
    ours = jax.jit(partial(tweedie.posterior_variance, trace=trace), static_argnums=0)(
        _score(distribution, level), jax.random.key(1), x_t, level
    )
    truth = np.diag(np.linalg.inv(np.linalg.inv(distribution.covariance()) + np.eye(5) / level.sigma**2))  # alpha = 1
    assert_mean(ours, truth, resolution=0.05 * truth)


def test_TW_2_rademacher_probes_are_exact_for_a_diagonal():
    distribution, level = DISTRIBUTIONS["pixels"](), _levels()[0]
    x_t, key = _noisy(distribution), jax.random.key(2)

    @jax.jit
    def claims():
        ours = partial(tweedie.posterior_variance, _score(distribution, level), key, x_t, level)
        return jax.vmap(lambda x: distribution.posterior(x, level).variance)(x_t), ours(), ours(trace="gaussian")

    truth, by_signs, by_normals = claims()
    assert_close(by_signs, truth, rtol=1e-10)
    with refuted():
        assert_close(by_normals, truth, rtol=0.05)


@pytest.mark.slow
def test_TW_2_total_variance():
    # Cov[x_0] = E Cov[x_0|x_t] + Cov E[x_0|x_t], and E tr Cov is the least squared error
    distribution, level = DISTRIBUTIONS["mixture"](), _levels()[0]
    score = _score(distribution, level)
    noisy = closed_form.marginal(distribution, level)

    @jax.jit
    def moments():
        def each(x_t):
            mean = tweedie.posterior_mean(score, x_t[None], level)[0]
            within = tweedie.posterior_covariance(score, x_t[None], level)[0]
            return jnp.concatenate([mean, jnp.outer(mean, mean).reshape(-1), within.reshape(-1)])

        def one(i):
            return information.quadrature(lambda x_t: each(x_t)[i], noisy, 61).value

        return jax.lax.map(one, jnp.arange(10)), information.mmse(distribution, level).value

    found, mmse = moments()
    mean, square, within = found[:2], found[2:6].reshape(2, 2), found[6:].reshape(2, 2)
    assert_close(mean, distribution.mean, rtol=1e-9)
    assert_close(within + square - np.outer(mean, mean), distribution.covariance(), rtol=1e-9)
    assert_close(np.trace(within), mmse, rtol=1e-9)


# TW-3


def test_TW_3_derivatives_of_the_log_partition():
    # p(eta|x) is proportional to w exp(eta x): its log-partition differentiated is its cumulants. Of two values, here
    # 0 and 1: others are a shift and a scale of them, that of x.
    terms = [SHARE, (1 - SHARE) * sp.exp(x)]
    mean = terms[1] / sum(terms)
    central = {k: mean * (1 - mean) ** k + (1 - mean) * (0 - mean) ** k for k in (2, 3, 4)}
    log_partition = sp.log(sum(terms))
    assert_proved(sp.diff(log_partition, x), mean)
    assert_proved(sp.diff(log_partition, x, 2), central[2])
    assert_proved(sp.diff(log_partition, x, 3), central[3])
    assert_proved(sp.diff(log_partition, x, 4), central[4] - 3 * central[2] ** 2)


def test_TW_3_bases_give_normalized_densities():
    # log h + eta x - psi(eta) is the density of each family
    x, mu, var, rate, shape = 3.0, 0.7, 0.4, 1.3, 2.5
    at = jnp.asarray([x])
    normal = tweedie.normal_base(at, jnp.asarray(var)) + mu / var * x - mu**2 / (2 * var)
    assert_close(normal, stats.norm(mu, var**0.5).logpdf(x), rtol=1e-13)
    poisson = tweedie.poisson_base(at) + np.log(rate) * x - rate
    assert_close(poisson, stats.poisson(rate).logpmf(3), rtol=1e-13)
    gamma = tweedie.gamma_base(at, jnp.asarray(shape)) - rate * x + shape * np.log(rate)
    assert_close(gamma, stats.gamma(shape, scale=1 / rate).logpdf(x), rtol=1e-13)


@pytest.mark.slow
def test_TW_3_of_normal_noise():
    # points in the plane: the posterior is finite, its cumulants are sums over points; tensors up to fourth order
    distribution, var = (
        closed_form.empirical([[-1.0, 0.5], [0.2, -0.3], [1.0, 1.0]], [0.5, 0.2, 0.3]),
        jnp.asarray(0.36),
    )
    noisy = distribution.pushforward(jnp.ones(()), jnp.zeros(2), var)
    x_t = jnp.asarray([0.3, 0.2])
    base = partial(tweedie.normal_base, var=var)
    ours = jax.jit(lambda x: tweedie.cumulants(noisy.log_prob, base, x, 4))(x_t)
    weights = np.array([0.5, 0.2, 0.3]) * np.exp(-np.sum((np.asarray(distribution.points) - [0.3, 0.2]) ** 2, 1) / 0.72)
    weights /= weights.sum()
    eta = np.asarray(distribution.points) / 0.36
    off = eta - weights @ eta
    second = np.einsum("n,ni,nj->ij", weights, off, off)
    fourth = np.einsum("n,ni,nj,nk,nl->ijkl", weights, off, off, off, off)
    for pairs in ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl"):
        fourth = fourth - np.einsum(pairs, second, second)
    truth = weights @ eta, second, np.einsum("n,ni,nj,nk->ijk", weights, off, off, off), fourth
    for found, known in zip(ours, truth, strict=True):
        assert_close(found, known, rtol=1e-8, atol=1e-8)
    # the first two are TW-1 and TW-2, in units of var
    level = NoiseLevel(jnp.ones(()), jnp.asarray(0.6), jnp.zeros(()), jnp.log(jnp.asarray(0.6)))
    score = jax.vmap(noisy.score)
    assert_close(var * ours[0], tweedie.posterior_mean(score, x_t[None], level)[0], rtol=1e-11)
    assert_close(var**2 * ours[1], tweedie.posterior_covariance(score, x_t[None], level)[0], rtol=1e-10)


def test_TW_3_of_counts():
    # rate ~ Gamma(shape, prior): the counts are negative binomial, log rate | x has polygammas for cumulants
    shape, prior = 1.7, 0.8

    def log_prob(x):
        return jnp.sum(gammaln(x + shape) - gammaln(x + 1) - x * np.log1p(prior))  # up to a constant

    ours = jax.jit(jax.vmap(lambda x: tweedie.cumulants(log_prob, tweedie.poisson_base, x, 4)))(jnp.asarray(COUNTS))
    assert_close(ours[0], special.digamma(COUNTS + shape) - np.log1p(prior), rtol=1e-12)
    for k in (1, 2, 3):
        assert_close(ours[k], special.polygamma(k, COUNTS + shape), rtol=1e-12)
    # that log_prob is the distribution of the counts, up to its constant
    known = stats.nbinom(shape, prior / (1 + prior)).logpmf(COUNTS)
    off = jax.vmap(log_prob)(jnp.asarray(COUNTS)) - known
    assert_close(off, np.full(3, off[0]), rtol=1e-12)
    with refuted():  # the factorial belongs to h
        bare = tweedie.cumulants(log_prob, jnp.zeros_like, jnp.asarray(4.0), 1)[0]
        assert_close(bare, special.digamma(4 + shape) - np.log1p(prior), rtol=0.1)


COUNTS = np.array([0.0, 1.0, 6.0])


@pytest.mark.slow
def test_TW_3_of_gamma_noise():
    # rate ~ Gamma(a, b): x has a beta-prime distribution, and the rate given x is Gamma(a + shape, b + x); eta is -rate
    shape, a, b = 2.5, 1.4, 0.6
    x = np.array([0.3, 1.0, 4.0])

    def log_prob(x):
        return jnp.sum((shape - 1) * jnp.log(x) - (a + shape) * jnp.log(b + x))  # up to a constant

    known = stats.betaprime(shape, a, scale=b).logpdf(x)
    off = jax.vmap(log_prob)(jnp.asarray(x)) - known
    assert_close(off, np.full(3, off[0]), rtol=1e-12)
    base = partial(tweedie.gamma_base, shape=jnp.asarray(shape))
    ours = jax.jit(jax.vmap(lambda x: tweedie.cumulants(log_prob, base, x, 4)))(jnp.asarray(x))
    posterior = stats.gamma(a + shape, scale=1 / (b + x))
    mean, var, skew, kurtosis = posterior.stats("mvsk")
    for found, known in zip(ours, (-mean, var, -skew * var**1.5, kurtosis * var**2), strict=True):
        assert_close(found, known, rtol=1e-11)
    with refuted():  # eta is *minus* the rate
        assert_close(ours[0], mean, rtol=0.5)


@pytest.mark.slow
def test_TW_3_for_any_prior():
    # A non-conjugate prior of the log-rate with two bumps: the posterior's moments by scipy's quadrature.
    def prior(eta):
        return np.exp(-((eta + 1) ** 2)) + 0.5 * np.exp(-2 * (eta - 1.5) ** 2)

    nodes = np.linspace(-8.0, 8.0, 801)
    log_weights = jnp.asarray(np.log(prior(nodes)))

    def log_prob(x):
        return -gammaln(x + 1) + jax.nn.logsumexp(log_weights + nodes * x - np.exp(nodes))

    ours = jax.jit(lambda x: tweedie.cumulants(log_prob, tweedie.poisson_base, x, 4))(jnp.asarray(2.0))

    def integral(f):
        weigh = partial(lambda eta, f: f(eta) * prior(eta) * np.exp(2 * eta - np.exp(eta)), f=f)
        return integrate.quad(weigh, -8, 8, points=[0.0], epsabs=0, epsrel=1e-11)[0]

    whole = integral(lambda eta: 1.0)
    mean = integral(lambda eta: eta) / whole
    second, third, fourth = (integral(lambda eta, k=k: (eta - mean) ** k) / whole for k in (2, 3, 4))
    for found, known in zip(ours, (mean, second, third, fourth - 3 * second**2), strict=True):
        assert_close(found, known, rtol=1e-8)
