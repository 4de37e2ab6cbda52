"""Tweedie's formula as a function: float32 at every level, every shape, operators, batches, the bases by scipy.

The formula itself is in `derivations`.
"""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import special, stats

from tests.derivations.worlds import draws
from tests.test_divergence import SHAPES, batch, matrix, mixing
from vdm_jax import closed_form, tweedie
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.parameterization import ScoreFromDenoiser

KEY = jax.random.key(0)
PREDICTION_TYPES = ("x_0", "eps", "v", "score")
LOG_SNRS = np.linspace(-20.0, 20.0, 17)
LEVEL = level_from_log_snr(jnp.float32(0.4))
EXPLODING = NoiseLevel(*(jnp.float32(f) for f in (1.0, 2.0, 0.0, np.log(2.0))))


def as64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


def correlated(shape):
    """A Gaussian distribution with a full covariance."""
    size = math.prod(shape)
    return closed_form.gaussian(np.full(shape, 0.3), matrix(size) @ matrix(size).T + 0.1 * np.eye(size))


def score_of(distribution, level):
    return jax.vmap(closed_form.marginal(distribution, level).score)


def assert_rounded(function, *args):
    """function of float32 numbers is right to 1e-6 of what rounding its own arguments would change."""
    ours = function(*args)
    with jax.enable_x64(True):
        args = [as64(arg) for arg in args]
        expected = function(*args)
        condition = sum(
            np.abs(np.asarray(jax.jvp(lambda a, i=i: function(*args[:i], a, *args[i + 1 :]), (arg,), (arg,))[1]))
            for i, arg in enumerate(args)
        )
    assert ours.dtype == jnp.float32
    error = np.abs(np.asarray(ours, np.float64) - np.asarray(expected)) / condition
    assert error.max() < 1e-6, f"off by {error.max():.1e} of the condition"


def test_posterior_mean_in_float32():
    def evaluate(value, x_t):
        def at(log_snr):
            level = level_from_log_snr(log_snr)
            return tweedie.posterior_mean(lambda x: value, x_t, level)

        return jax.jit(jax.vmap(at))(jnp.asarray(LOG_SNRS, x_t.dtype))

    value, x_t = batch((3,)), batch((3,), count=10)[5:]
    assert_rounded(evaluate, value, x_t)


def _normal_score(precision, center, x):
    return (center[None] - x) @ precision


def test_moments_of_normal_data_by_hand():
    # data N(m, C): the posterior has the precision C^-1 + (alpha / sigma)^2 I
    root = matrix(3)
    mean, covariance = np.array([0.3, -1.0, 2.0]), root @ root.T + 0.1 * np.eye(3)
    x_t = np.asarray(batch((3,)), np.float64)

    @jax.jit
    def moments(precision, center, x_t, level):
        score = Partial(_normal_score, precision, center)
        variance = tweedie.posterior_variance(score, None, x_t, level, trace="exact")
        mean, covariance = tweedie.posterior_mean(score, x_t, level), tweedie.posterior_covariance(score, x_t, level)
        return mean, covariance, variance

    with jax.enable_x64(True):
        for alpha, sigma in ((0.6, 0.8), (1.0, 2.0)):
            level = NoiseLevel(*map(jnp.asarray, (alpha, sigma, np.log(alpha), np.log(sigma))))
            precision = np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(3))
            ours = moments(precision, alpha * mean, x_t, level)
            after = np.linalg.inv(np.linalg.inv(covariance) + (alpha / sigma) ** 2 * np.eye(3))
            expected = mean + (alpha / sigma**2) * (x_t - alpha * mean) @ after
            np.testing.assert_allclose(ours[0], expected, rtol=1e-10)
            np.testing.assert_allclose(ours[1], np.broadcast_to(after, (5, 3, 3)), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(ours[2], np.broadcast_to(after.diagonal(), (5, 3)), rtol=1e-10)


def test_variance_along_random_signs_is_exact_for_a_diagonal_covariance():
    x_t = batch((3,))
    ours = tweedie.posterior_variance(lambda x: -(x**3), KEY, x_t, LEVEL, probes=2)
    ratio, sigma = float(LEVEL.sigma / LEVEL.alpha), float(LEVEL.sigma)
    np.testing.assert_allclose(ours, ratio**2 * (1 - sigma**2 * 3 * x_t**2), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("log_snr", [1.0, 8.0, 20.0])
def test_a_whole_mean_in_float32(log_snr):
    # where there is signal the score is as accurate
    def evaluate(dtype):
        distribution = closed_form.gaussian([0.3, -0.2], [[0.5, 0.1], [0.1, 0.3]])
        level = level_from_log_snr(jnp.asarray(log_snr, dtype))
        return tweedie.posterior_mean(score_of(distribution, level), batch((2,), dtype), level)

    ours = evaluate(jnp.float32)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours, evaluate(jnp.float64), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_score_of_in_float32(prediction_type):
    def evaluate(value, x_t):
        levels = [level_from_log_snr(jnp.asarray(log_snr, x_t.dtype)) for log_snr in LOG_SNRS]
        return jnp.stack(
            [
                ScoreFromDenoiser(Partial(lambda v, x_t, level: v, value), level, prediction_type)(x_t)
                for level in levels
            ]
        )

    value, x_t = batch((3,)), batch((3,), count=10)[5:]
    assert_rounded(evaluate, value, x_t)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_score_of_the_optimal_denoiser_is_the_score_of_the_noisy_distribution(shape, prediction_type):
    distribution, x_t = correlated(shape), batch(shape)
    for level in (LEVEL, EXPLODING):
        ours = ScoreFromDenoiser(closed_form.OptimalDenoiser(distribution, prediction_type), level, prediction_type)(
            x_t
        )
        np.testing.assert_allclose(ours, score_of(distribution, level)(x_t), rtol=1e-4, atol=1e-5)


def test_score_of_passes_one_level_per_example_to_the_denoiser():
    levels_seen = []
    levels = level_from_log_snr(jnp.float32(0.4), t=0.25)
    ScoreFromDenoiser(lambda x_t, level: levels_seen.append(level) or x_t, levels)(batch((2, 3)))
    assert {jnp.shape(field) for field in levels_seen[0]} == {(5,)}
    np.testing.assert_array_equal(levels_seen[0].t, np.full(5, 0.25, np.float32))
    np.testing.assert_array_equal(levels_seen[0].sigma, np.full(5, LEVEL.sigma))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_moments_of_every_shape(shape, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        distribution, x_t = correlated(shape), batch(shape, dtype)
        rtol = 1e-4 if dtype == jnp.float32 else 1e-11
        for level in (LEVEL, EXPLODING):
            level = jax.tree.map(lambda field: jnp.asarray(field, dtype), level)
            score, expected = score_of(distribution, level), distribution.posterior(x_t[0], level)
            mean = tweedie.posterior_mean(score, x_t, level)
            covariance = tweedie.posterior_covariance(score, x_t, level)
            variance = tweedie.posterior_variance(score, None, x_t, level, trace="exact")
            assert mean.dtype == covariance.dtype == variance.dtype == dtype
            assert variance.shape == mean.shape == x_t.shape
            np.testing.assert_allclose(mean[0], expected.mean, rtol=rtol, atol=rtol)
            np.testing.assert_allclose(covariance, jnp.stack([expected.covariance()] * 5), rtol=rtol, atol=rtol)
            np.testing.assert_allclose(variance[4], expected.variance, rtol=rtol, atol=rtol)


def test_rows_of_the_covariance_are_the_output_indices():
    # with a field that is not a gradient they differ from the columns
    # the operator multiplies by the matrix, is linear, and can be passed to compiled code
    x_t, v = batch((2, 3)), batch((2, 3), count=10)[5:]
    times = tweedie.covariance_operator(mixing, x_t, LEVEL)
    whole = tweedie.posterior_covariance(mixing, x_t, LEVEL)
    assert np.abs(whole - jnp.swapaxes(whole, 1, 2)).max() > 0.1
    product = np.einsum("bij,bj->bi", whole, np.asarray(v).reshape(5, 6)).reshape(v.shape)
    np.testing.assert_allclose(times(v), product, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(times(2.0 * v + x_t), 2.0 * times(v) + times(x_t), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda times, v: times(v))(times, v), times(v), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_variances_along_random_directions():
    x_t = jnp.broadcast_to(batch((3,))[:1], (20_000, 3))
    score = score_of(correlated((3,)), LEVEL)
    expected = tweedie.posterior_variance(score, None, x_t[:1], LEVEL, trace="exact")[0]
    for trace in ("rademacher", "gaussian"):
        ours = np.asarray(tweedie.posterior_variance(score, KEY, x_t, LEVEL, trace=trace, probes=2), np.float64)
        error = ours.std(0) / np.sqrt(20_000)
        assert np.all(np.abs(ours.mean(0) - expected) < 4 * error)
        assert np.all(error < 0.01)
    diagonal = tweedie.posterior_variance(lambda x: -(x**3), KEY, batch((3,)), LEVEL)  # signs: no error
    exactly = tweedie.posterior_variance(lambda x: -(x**3), None, batch((3,)), LEVEL, trace="exact")
    np.testing.assert_allclose(diagonal, exactly, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_examples_do_not_depend_on_each_other():
    x_t = batch((3,))
    for evaluate in (
        lambda x_t: tweedie.posterior_mean(mixing, x_t, LEVEL),
        lambda x_t: tweedie.posterior_covariance(mixing, x_t, LEVEL),
        lambda x_t: tweedie.posterior_variance(mixing, KEY, x_t, LEVEL, trace="gaussian"),
    ):
        np.testing.assert_allclose(evaluate(x_t[:1]), evaluate(x_t)[:1], rtol=2e-6, atol=1e-6)


def test_bases_are_the_distributions_without_their_parameters():
    x = np.abs(np.asarray(batch((2, 3)), np.float64))[0] + 0.5
    x_32 = jnp.asarray(x, jnp.float32)
    normal = stats.norm(0.0, np.sqrt(0.7)).logpdf(x).sum()  # eta = 0
    gamma = (stats.gamma(2.5).logpdf(x) + x).sum()  # rate 1: psi = 0, eta x = -x
    counts = np.array([[0, 1, 5], [20, 3, 2]])
    poisson = -sum(math.log(math.factorial(n)) for n in counts.ravel())
    np.testing.assert_allclose(tweedie.normal_base(x_32, jnp.float32(0.7)), normal, rtol=1e-6)
    np.testing.assert_allclose(tweedie.gamma_base(x_32, jnp.float32(2.5)), gamma, rtol=2e-6)
    np.testing.assert_allclose(tweedie.poisson_base(jnp.asarray(counts, jnp.float32)), poisson, rtol=1e-6)


def _counts(x):
    """Counts at a rate from Gamma(2, 1), up to a constant: (x + 1) 2^-x."""
    return jnp.sum(jnp.log1p(x) - x * jnp.log(jnp.asarray(2.0, x.dtype)))


@pytest.mark.parametrize("shape", [(3,), *(pytest.param(s, marks=pytest.mark.slow) for s in ((), (2, 3, 1)))])
def test_cumulants_of_independent_counts(shape):
    # the rate given x is Gamma(2 + x, 2), whose logarithm has polygamma cumulants
    x = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    ours = jax.jit(lambda x: tweedie.cumulants(_counts, tweedie.poisson_base, x, 3))(x)
    assert [cumulant.shape for cumulant in ours] == [shape, shape * 2, shape * 3]
    flat, size = np.arange(math.prod(shape)), math.prod(shape)
    for order, cumulant in enumerate(ours, 1):
        each = special.polygamma(order - 1, 2.0 + flat) - (np.log(2.0) if order == 1 else 0.0)
        expected = np.zeros((size,) * order)
        expected[(np.arange(size),) * order] = each
        np.testing.assert_allclose(cumulant, expected.reshape(shape * order), rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_cumulants_of_a_mixture_are_its_posterior_moments():
    # mu ~ a mixture, x ~ N(mu, 0.5 I): eta = mu / 0.5
    with jax.enable_x64(True):
        distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
        half = jnp.asarray(0.5)
        level = NoiseLevel(jnp.ones(()), jnp.sqrt(half), jnp.zeros(()), 0.5 * jnp.log(half))
        x = jnp.asarray([0.2, 0.1])
        base = Partial(lambda var, x: tweedie.normal_base(x, var), half)
        ours = tweedie.cumulants(closed_form.marginal(distribution, level).log_prob, base, x, 3)
        given = distribution.posterior(x, level)
        np.testing.assert_allclose(ours[0], given.mean / 0.5, rtol=1e-11)
        np.testing.assert_allclose(ours[1], given.covariance() / 0.25, rtol=1e-11)
        apart = np.asarray(draws(given, KEY, 200_000) - given.mean[None])
        third = np.einsum("ni,nj,nk->nijk", apart, apart, apart) / 0.125
        error = third.std(0) / np.sqrt(len(third))
        assert np.all(np.abs(third.mean(0) - ours[2]) < 4 * error)
        assert np.all(error < 0.05 * np.abs(ours[2]).max())


def test_refusals(monkeypatch):
    x = batch((3,))
    silent = NoiseLevel(*(jnp.float32(f) for f in (0.0, 1.0, -np.inf, 0.0)))
    for call in (
        lambda: tweedie.posterior_mean(mixing, x, silent),
        lambda: tweedie.covariance_operator(mixing, x, silent),
        lambda: tweedie.posterior_covariance(mixing, x, silent),
        lambda: tweedie.posterior_variance(mixing, KEY, x, silent),
    ):
        with pytest.raises(ValueError, match=r"alpha = 0\.0: use a level with signal"):
            call()
    for order in (0, -1):
        with pytest.raises(ValueError, match=f"order is {order}: "):
            tweedie.cumulants(_counts, tweedie.poisson_base, x[0], order)
    with pytest.raises(ValueError, match="probes is 0: "):
        tweedie.posterior_variance(mixing, KEY, x, LEVEL, probes=0)
    with pytest.raises(ValueError, match=r"key is None .*trace='exact'"):
        tweedie.posterior_variance(mixing, None, x, LEVEL)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would raise first
    with pytest.raises(ValueError, match="unknown trace 'all'"):
        tweedie.posterior_variance(mixing, KEY, x, LEVEL, trace="all")
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        ScoreFromDenoiser(lambda x_t, level: x_t, LEVEL, "noise")(x)
