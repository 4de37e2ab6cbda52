"""The normal distribution: its density, entropy and divergence against numerical integration, scipy and 50 digits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import integrate, stats

from tests.derivations.check import assert_mean, assert_moments
from vdm_jax.gaussian import Normal, kl, variance_kl

_kl = jax.jit(kl)
_variance_kl = jax.jit(variance_kl)
_log_probs = jax.jit(jax.vmap(Normal.log_prob, (None, 0)))
MEAN, VAR = np.array([0.3, -2.0, 5.0]), np.array([0.01, 1.0, 30.0])


def _normal(mean, var):
    return Normal(jnp.asarray(mean), var=jnp.asarray(var))


def test_sample_has_the_moments():
    p = _normal(MEAN.astype(np.float32), VAR.astype(np.float32))
    x = np.asarray(jax.vmap(p.sample)(jax.random.split(jax.random.key(0), 100_000)), np.float64)
    assert_moments(x, MEAN.astype(np.float32), VAR.astype(np.float32))
    centered = x - MEAN
    assert_mean(centered[:, 0] * centered[:, 1], 0.0)  # independent dimensions
    assert_mean(centered[:, 1] * centered[:, 2], 0.0)


def test_sample_of_a_scalar_variance_has_the_shape_of_the_mean():
    x = _normal(jnp.zeros((2, 50_000)), 4.0).sample(jax.random.key(1))
    assert x.shape == (2, 50_000)
    assert_moments(x.reshape(-1), 0.0, 4.0)


def test_sample_has_the_distribution_function():
    # a test of moments alone passes for a distribution without moments, since it measures its own standard error
    p = Normal(jnp.full((20_000,), 0.3), var=jnp.asarray(4.0))
    assert stats.kstest(p.sample(jax.random.key(2)), stats.norm(0.3, 2.0).cdf).pvalue > 1e-3


def test_sample_of_a_point_mass_is_the_point():
    mean = jnp.asarray([1.5, -0.2])
    assert np.array_equal(Normal(mean, var=jnp.asarray(0.0)).sample(jax.random.key(0)), mean)


@pytest.mark.parametrize("var", [0.04, 1.0, 9.0])
def test_density_integrates_to_one_and_has_the_entropy(var):
    with jax.enable_x64(True):
        p = _normal(0.7, var)
        reach = 12 * np.sqrt(var)
        grid = np.linspace(0.7 - reach, 0.7 + reach, 4001)  # the trapezium rule is exponentially accurate here
        log_p = np.asarray(_log_probs(p, grid))
        assert integrate.trapezoid(np.exp(log_p), grid) == pytest.approx(1.0, rel=1e-12)
        assert integrate.trapezoid(-log_p * np.exp(log_p), grid) == pytest.approx(float(p.entropy()), rel=1e-11)


def test_sums_are_in_float32_where_the_numbers_have_fewer_digits():
    random = np.random.RandomState(0)
    p, q, x = (Normal(jnp.asarray(random.randn(2000), jnp.bfloat16), var=jnp.bfloat16(v)) for v in (0.5, 0.7, 1.0))
    wide_p, wide_q, wide_x = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), distribution) for distribution in (p, q, x)
    )
    for ours, same in (
        (p.log_prob(x.mean), wide_p.log_prob(wide_x.mean)),
        (p.entropy(), wide_p.entropy()),
        (kl(p, q), kl(wide_p, wide_q)),
    ):
        assert ours.dtype == jnp.float32
        assert float(ours) == float(same)


def test_log_prob_and_entropy_sum_over_dimensions():
    with jax.enable_x64(True):
        x = np.array([0.2, 0.1, -3.0])
        expected = stats.norm(MEAN, np.sqrt(VAR))
        assert float(_normal(MEAN, VAR).log_prob(jnp.asarray(x))) == pytest.approx(expected.logpdf(x).sum(), rel=1e-13)
        assert float(_normal(MEAN, VAR).entropy()) == pytest.approx(expected.entropy().sum(), rel=1e-13)
        # one variance for all dimensions counts once for each
        assert float(_normal(MEAN, 4.0).entropy()) == pytest.approx(3 * stats.norm(0, 2).entropy(), rel=1e-13)
        assert float(_normal(MEAN, 4.0).log_prob(jnp.asarray(x))) == pytest.approx(
            stats.norm(MEAN, 2.0).logpdf(x).sum(), rel=1e-13
        )


PAIRS = [(0.0, 1.0, 0.0, 1.3), (0.5, 0.2, -1.0, 2.0), (1.0, 3.0, 0.0, 0.5), (0.0, 1.0, 0.1, 1.0)]


@pytest.mark.parametrize(("mean_p", "var_p", "mean_q", "var_q"), PAIRS)
def test_kl_is_the_integral(mean_p, var_p, mean_q, var_q):
    with jax.enable_x64(True):
        grid = np.linspace(mean_p - 12 * np.sqrt(var_p), mean_p + 12 * np.sqrt(var_p), 4001)
        p, q = stats.norm(mean_p, np.sqrt(var_p)), stats.norm(mean_q, np.sqrt(var_q))
        expected = integrate.trapezoid(p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid)), grid)
        assert float(_kl(_normal(mean_p, var_p), _normal(mean_q, var_q))) == pytest.approx(expected, rel=1e-11)


def test_kl_sums_over_dimensions_with_scalar_or_own_variances():
    with jax.enable_x64(True):
        q = _normal(MEAN[::-1].copy(), VAR[::-1].copy())
        parts = [_kl(_normal(m, v), _normal(n, w)) for m, v, n, w in zip(MEAN, VAR, MEAN[::-1], VAR[::-1], strict=True)]
        assert float(_kl(_normal(MEAN, VAR), q)) == pytest.approx(float(sum(parts)), rel=1e-14)
        full = _kl(_normal(MEAN, np.full(3, 2.0)), _normal(MEAN + 1, np.full(3, 5.0)))
        assert float(_kl(_normal(MEAN, 2.0), _normal(MEAN + 1, 5.0))) == pytest.approx(float(full), rel=1e-14)


def test_kl_vanishes_only_at_equality_and_is_asymmetric():
    p, q = _normal(MEAN.astype(np.float32), VAR.astype(np.float32)), _normal(jnp.zeros(3), jnp.ones(3))
    assert float(_kl(p, p)) == 0.0
    assert float(_kl(p, q)) > 0.0
    assert float(_kl(q, p)) > 0.0
    assert abs(float(_kl(p, q)) - float(_kl(q, p))) > 1.0


@pytest.mark.parametrize("tiny", [1e-3, 1e-6, 1e-9, 1e-12])
def test_kl_of_tiny_differences(tiny):
    with jax.enable_x64(True), mpmath.workdps(50):
        base = _normal(0.0, 1.0)
        assert float(_kl(_normal(tiny, 1.0), base)) == pytest.approx(tiny**2 / 2, rel=1e-14)
        for var in (1.0, 0.7):  # 0.7 (1 + tiny) / 0.7 is rounded, 0.7 (1 + tiny) - 0.7 is not
            ratio = mpmath.mpf(var * (1.0 + tiny)) / mpmath.mpf(var)
            expected = (ratio - 1 - mpmath.log(ratio)) / 2
            p, q = _normal(0.0, var * (1.0 + tiny)), _normal(0.0, var)
            assert float(_kl(p, q)) == pytest.approx(float(expected), rel=1e-13, abs=0)


YS = [-60.0, -3.0, -1.4, -0.6, -0.5, -0.499, -1e-5, 0.0, 1e-10, 0.1, 0.499, 0.5, 0.51, 1.4, 5.0, 30.0]


@pytest.mark.parametrize("y", YS)
def test_variance_kl_is_the_kl_of_two_variances(y):
    with jax.enable_x64(True), mpmath.workdps(50):
        expected = float((mpmath.exp(y) - 1 - mpmath.mpf(y)) / 2)
        assert float(_variance_kl(y)) == pytest.approx(expected, rel=1e-14, abs=0)
        if abs(y) > 1e-3:  # below, rounding e^y itself moves y
            p = _normal(2.0, np.exp(y))
            assert float(_kl(p, _normal(2.0, 1.0))) == pytest.approx(expected, rel=1e-12)


def test_kl_of_monte_carlo():
    with jax.enable_x64(True):
        p, q = _normal(MEAN, VAR), _normal(MEAN + 0.5, 2 * VAR)
        x = MEAN + np.sqrt(VAR) * np.random.RandomState(3).normal(size=(50_000, 3))
        assert_mean(_log_probs(p, x) - _log_probs(q, x), _kl(p, q))


def test_the_gradient_of_a_sample_is_finite_without_variance():
    """The square root has no derivative at 0, where the sample is the mean."""
    total = lambda mean, var: Normal(mean, var=var).sample(jax.random.key(0)).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.ones(3), jnp.zeros(()))
    np.testing.assert_array_equal(gradients[0], 1.0)
    assert gradients[1] == 0.0
