"""Linear models as functions, against NumPy and by quadrature-free identities; theorems are in `derivations`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vdm_jax import closed_form, linear_gaussian
from vdm_jax.gaussian import Normal

RNG = np.random.RandomState(0)
DATA = RNG.normal(size=(50, 4)) @ RNG.normal(size=(4, 4)) + 1.0


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def model():
    return linear_gaussian.LinearGaussianModel(jnp.asarray(RNG.normal(size=(4, 2))), jnp.arange(4.0), jnp.asarray(0.3))


def test_principal_components_by_the_singular_values():
    principal = linear_gaussian.principal_components(jnp.asarray(DATA))
    _, singular, rows = np.linalg.svd(DATA - DATA.mean(0))
    np.testing.assert_allclose(principal.variances, singular**2 / 50, rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(principal.directions.T * rows, 1)), 1.0, rtol=1e-10)
    np.testing.assert_allclose(principal.mean, DATA.mean(0), rtol=1e-12)
    whole = principal.decode(principal.encode(jnp.asarray(DATA), 4))
    np.testing.assert_allclose(whole, DATA, rtol=1e-10)
    half = principal.decode(principal.encode(jnp.asarray(DATA), 2))
    np.testing.assert_allclose(np.square(half - DATA).sum(1).mean(), principal.reconstruction_error(2), rtol=1e-10)


def test_evidence_is_the_low_rank_gaussian_s():
    m, x = model(), jnp.asarray([0.3, -1.0, 2.0, 0.1])
    distribution = closed_form.low_rank(m.bias, m.weights, 0.3)
    np.testing.assert_allclose(m.log_prob(x), distribution.log_prob(x), rtol=1e-12)


def test_posterior_by_bayes_rule_pointwise():
    m, x = model(), jnp.asarray([[0.3, -1.0, 2.0, 0.1]])
    mean, covariance = jax.tree.map(np.asarray, m.posterior(x))
    zs = RNG.normal(size=(5, 2))
    log_likelihoods = jax.jit(lambda z: jax.vmap(lambda mean: m.likelihood(mean).log_prob(x[0]))(m.decode(z)))(zs)
    joint = log_likelihoods + stats.norm.logpdf(zs).sum(1)
    log_q = stats.multivariate_normal(mean[0], covariance).logpdf(zs)
    np.testing.assert_allclose(log_q, joint - m.log_prob(x[0]), rtol=1e-10)


def test_best_independent_encoder_is_the_least_divergence():
    """Any other variances, or another mean, are further from the posterior."""
    m, x = model(), jnp.asarray([[0.3, -1.0, 2.0, 0.1]])
    mean, covariance = m.posterior(x)
    precision = np.linalg.inv(covariance)

    def divergence(mu, var):
        off = mu - mean[0]
        return 0.5 * (precision.diagonal() @ var + off @ precision @ off - jnp.log(var).sum())

    q = m.encoder(x)
    slopes = jax.grad(divergence, (0, 1))(q.mean[0], q.var[0])
    np.testing.assert_allclose(np.concatenate(slopes), 0.0, atol=1e-12)


def test_decoder_of_pairs_is_least_squares():
    z = jnp.asarray(RNG.normal(size=(50, 2)))
    ours = linear_gaussian.maximum_likelihood_decoder(Normal(z, var=jnp.zeros(())), jnp.asarray(DATA))
    fit, residual, *_ = np.linalg.lstsq(np.column_stack([z, np.ones(50)]), DATA, rcond=None)
    np.testing.assert_allclose(ours.weights.T, fit[:2], rtol=1e-9)
    np.testing.assert_allclose(ours.bias, fit[2], rtol=1e-9)
    np.testing.assert_allclose(ours.var, residual.sum() / DATA.size, rtol=1e-9)


def test_probabilistic_pca_has_the_greatest_likelihood():
    # no slope in any parameter, and more likelihood than with its directions exchanged
    def log_likelihood(m):
        return jax.vmap(m.log_prob)(jnp.asarray(DATA)).mean()

    value_and_slope = jax.jit(jax.value_and_grad(log_likelihood))
    ours = jax.jit(linear_gaussian.probabilistic_pca, static_argnums=1)(DATA, 2)
    value, slopes = value_and_slope(ours)
    for slope in slopes:
        np.testing.assert_allclose(slope, 0.0, atol=1e-10)
    assert value > value_and_slope(ours._replace(weights=ours.weights[::-1]))[0]
    assert ours.weights.shape == (4, 2)
    np.testing.assert_allclose(ours.var, np.linalg.eigvalsh(np.cov(DATA.T, bias=True))[:2].mean(), rtol=1e-10)


def test_decoder_of_distributions_has_the_greatest_expected_likelihood():
    z, spread, data = RNG.normal(size=(50, 2)), RNG.uniform(0.1, 1.0, (50, 2)), jnp.asarray(DATA)

    def expected_log_likelihood(m):  # E |x - W z - b|^2 = |x - W mu - b|^2 + sum_j var_j |W_j|^2
        square = jnp.square(data - m.decode(jnp.asarray(z))).sum(1) + spread @ jnp.square(m.weights).sum(0)
        return -0.5 * jnp.mean(square / m.var + 4 * jnp.log(m.var))

    ours = linear_gaussian.maximum_likelihood_decoder(Normal(jnp.asarray(z), var=jnp.asarray(spread)), data)
    for slope in jax.jit(jax.grad(expected_log_likelihood))(ours):
        np.testing.assert_allclose(slope, 0.0, atol=1e-10)


@pytest.mark.parametrize("k", [0, 4])
def test_number_of_codes_must_leave_noise(k):
    with pytest.raises(ValueError, match=rf"k is {k}: .*1\.\.3"):
        linear_gaussian.probabilistic_pca(jnp.asarray(DATA), k)


def test_the_number_of_latents_is_between_1_and_the_dimensions():
    x = jnp.asarray(DATA)
    for k in (1, 3):
        assert linear_gaussian.probabilistic_pca(x, k).weights.shape == (4, k)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k is {k}: it must be in 1\.\.3"):
            linear_gaussian.probabilistic_pca(x, k)
