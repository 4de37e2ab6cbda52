"""The variational autoencoder's functions; their theorems are in `derivations/test_vae.py`."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.check import assert_mean
from vdm_jax import vae
from vdm_jax.gaussian import Normal
from vdm_jax.linear_gaussian import LinearGaussianModel

RNG = np.random.RandomState(0)
MODEL = LinearGaussianModel(*(jnp.asarray(a, jnp.float32) for a in (RNG.normal(size=(3, 2)), RNG.normal(size=3), 0.4)))
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
ARGUMENTS = MODEL.encoder, MODEL.decode, MODEL.likelihood


def test_gradients_agree_in_expectation_with_either_kl():
    """Four estimators of one gradient, by the mean of q."""

    def slope(key, **options):
        def total(shift):
            q = MODEL.encoder(X)
            return vae.bound(
                lambda _: Normal(q.mean + shift, var=q.var), *ARGUMENTS[1:], key, X, **options
            ).total.mean()

        return jax.grad(total)(jnp.float32(0.3))

    keys = jax.random.split(jax.random.key(0), 3000)
    kinds = [(gradient, sampled) for gradient in ("reparameterized", "score_function") for sampled in (False, True)]
    every = jax.jit(jax.vmap(lambda key: [slope(key, gradient=g, sampled_kl=s) for g, s in kinds]))(keys)
    slopes = dict(zip(kinds, every, strict=True))
    reference = np.mean(slopes["reparameterized", False])
    for name, values in slopes.items():
        if name != ("reparameterized", False):
            assert_mean(values - reference, 0.0)
    assert np.abs(reference) > 0.3


def test_the_bound_with_the_exact_posterior_is_the_evidence_at_every_sample():
    # orthogonal columns of W: the posterior is diagonal, N(S W^T (x - b) / v, S), S = (I + W^T W / v)^-1
    weights, bias, var = np.array([[1.0, 0.5], [-1.0, 0.5], [0.0, 2.0]]), np.array([0.3, -0.2, 1.0]), 0.4
    model = LinearGaussianModel(*(jnp.asarray(a, jnp.float32) for a in (weights, bias, var)))
    arguments, key = (model.encoder, model.decode, model.likelihood), jax.random.key(0)
    x = np.asarray(X, np.float64)
    spread = 1 / (1 + (weights**2).sum(0) / var)
    mean = (x - bias) @ weights / var * spread
    evidence = stats.multivariate_normal(bias, weights @ weights.T + var * np.eye(3)).logpdf(x)

    @jax.jit
    def bounds(x):
        sampled, closed = (vae.bound(*arguments, key, x, sampled_kl=s) for s in (True, False))
        return (
            sampled,
            sampled.total,
            closed,
            closed.total,
            vae.importance_weighted_bound(*arguments, key, x, samples=3),
        )

    sampled, total, closed, closed_total, weighted = bounds(X)
    np.testing.assert_allclose(total, -evidence, rtol=1e-4)
    np.testing.assert_allclose(weighted, -evidence, rtol=1e-4)
    np.testing.assert_allclose(closed.kl, 0.5 * (mean**2 + spread - 1 - np.log(spread)).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(closed.reconstruction, sampled.reconstruction)
    np.testing.assert_allclose(closed_total, closed.reconstruction + closed.kl, rtol=1e-6)


def test_the_aggregated_posterior_and_its_decoder_by_hand():
    mean, var, data, z = RNG.normal(size=(4, 2)), RNG.uniform(0.5, 2.0, (4, 2)), RNG.normal(size=(4, 3)), [0.3, -0.4]
    log_q = stats.norm(mean, np.sqrt(var)).logpdf(z).sum(1)
    q = Normal(*map(jnp.asarray, [mean.astype(np.float32)]), var=jnp.asarray(var, jnp.float32))
    ours = vae.aggregated_posterior_log_prob(q, jnp.asarray(z))
    np.testing.assert_allclose(ours, np.log(np.mean(np.exp(log_q))), rtol=1e-5)
    weights = np.exp(log_q) / np.exp(log_q).sum()
    decoded = vae.optimal_mean_decoder(q, jnp.asarray(data, jnp.float32), jnp.asarray(z))
    np.testing.assert_allclose(decoded, weights @ data, rtol=1e-4, atol=1e-6)


def test_kl_decomposition_by_hand():
    mean, var = RNG.normal(size=(4, 2)).astype(np.float32), RNG.uniform(0.5, 2.0, (4, 2)).astype(np.float32)
    q, key = Normal(jnp.asarray(mean), var=jnp.asarray(var)), jax.random.key(5)
    split, zs = jax.jit(
        lambda q: (
            vae.kl_decomposition(q, key, samples=2),
            jax.vmap(lambda key: vae.reparameterized_sample(q, key))(jax.random.split(key, 2)),
        )
    )(q)
    np.testing.assert_allclose(split.kl, 0.5 * (mean**2 + var - 1 - np.log(var)).sum(1), rtol=1e-5)
    zs = np.asarray(zs, np.float64)
    each = stats.norm(mean[None, None], np.sqrt(var)[None, None]).logpdf(zs[:, :, None]).sum(-1)  # (K, N, N)
    own, log_q = np.einsum("knn->kn", each), np.log(np.exp(each).mean(-1))
    np.testing.assert_allclose(split.mutual_information, (own - log_q).mean(0), rtol=1e-3, atol=1e-5)
    log_p = stats.norm.logpdf(zs).sum(-1)
    np.testing.assert_allclose(split.marginal_kl, (log_q - log_p).mean(0), rtol=1e-3, atol=1e-5)


def test_variational_em_alternates():
    theta, path = vae.variational_em(lambda theta: 2 * theta, lambda phi: phi + 1, jnp.float32(1.0), iterations=3)
    assert (float(theta), path.tolist()) == (15.0, [1.0, 3.0, 7.0])


def test_score_function_has_the_value_of_its_cost():
    cost, log_q = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 3.0])
    np.testing.assert_array_equal(vae.reinforce_surrogate(cost, log_q), cost)
    gradient = jax.grad(lambda log_q: vae.reinforce_surrogate(cost, log_q).sum())(log_q)
    np.testing.assert_array_equal(gradient, cost)


@pytest.mark.slow
def test_one_sample_is_the_bound_with_its_sampled_kl():
    key = jax.random.key(3)
    one = vae.importance_weighted_bound(*ARGUMENTS, key, X, samples=1)
    plain = vae.bound(*ARGUMENTS, jax.random.split(key, 1)[0], X, sampled_kl=True).total
    np.testing.assert_allclose(one, plain, rtol=1e-5)


def test_importance_weights_are_averaged_and_not_summed():
    ratios = jnp.log(jnp.asarray([[0.2, 1.0], [0.4, 3.0], [0.6, 2.0]]))
    np.testing.assert_allclose(jnp.exp(-vae.importance_weighted_average(ratios)), [0.4, 2.0], rtol=1e-6)
    far = ratios - 1e4  # no underflow
    np.testing.assert_allclose(
        vae.importance_weighted_average(far) - 1e4, vae.importance_weighted_average(ratios), atol=2e-3
    )


@pytest.mark.slow
def test_information_of_codes_that_never_overlap_is_log_n():
    q = Normal(100.0 * jnp.arange(6.0)[:, None], var=jnp.ones((6, 1)))
    split = vae.kl_decomposition(q, jax.random.key(0), samples=3)
    np.testing.assert_allclose(split.mutual_information, np.log(6.0), rtol=1e-5)
    one = Normal(jnp.zeros((6, 1)), var=jnp.ones((6, 1)))
    np.testing.assert_allclose(vae.kl_decomposition(one, jax.random.key(0)).mutual_information, 0.0, atol=1e-6)


@pytest.mark.slow
def test_traced_once_and_a_learned_likelihood_has_a_gradient():
    likelihood = chex.assert_max_traces(lambda var, mean: Normal(mean, var=var), n=1)

    def total(var, key):
        return vae.bound(*ARGUMENTS[:2], Partial(likelihood, var), key, X).total.mean()

    for i in range(3):
        total(jnp.float32(0.4 + 0.1 * i), jax.random.key(i))
    chex.clear_trace_counter()  # a gradient is another program
    assert np.isfinite(jax.grad(total)(jnp.float32(0.4), jax.random.key(0)))


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="samples is 0"):
        vae.importance_weighted_bound(*ARGUMENTS, jax.random.key(0), X, samples=0)
    q = Normal(jnp.zeros((5, 2)), var=jnp.ones(5))
    with pytest.raises(ValueError, match="samples is 0"):
        vae.kl_decomposition(q, jax.random.key(0), samples=0)
    # one sample is enough
    jax.eval_shape(lambda q: vae.kl_decomposition(q, jax.random.key(0), samples=1), q)
    jax.eval_shape(lambda x: vae.importance_weighted_bound(*ARGUMENTS, jax.random.key(0), x, samples=1), X)
    with pytest.raises(ValueError, match=r"decoder returned shapes \[\(4, 3\)\]: the leading axis .* batch, 5"):
        vae.output_nll(MODEL.likelihood, jnp.zeros((4, 3)), X)
    with pytest.raises(TypeError, match=r"the encoder returned tuple: it must return a gaussian\.Normal"):
        vae.check_posterior((1, 2), 5, "encoder")
    assert vae.check_posterior(Normal(q.mean, var=q.mean), 5, "encoder").var.shape == (5, 2)
    for mean, var in (((4, 2), (4, 2)), ((5, 2), (2,)), ((5, 2), ())):
        with pytest.raises(ValueError, match=r"the encoder returned mean .* for a batch of 5"):
            vae.check_posterior(Normal(jnp.zeros(mean), var=jnp.ones(var)), 5, "encoder")
    with pytest.raises(ValueError, match=r"z has shape \(3,\) and q\.mean \(5, 2\)"):
        inspect.unwrap(vae.aggregated_posterior_log_prob)(q, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"data has shape \(4, 3\) and q\.mean \(5, 2\)"):
        inspect.unwrap(vae.optimal_mean_decoder)(q, jnp.zeros((4, 3)), jnp.zeros(2))
    unwrapped = inspect.unwrap(vae.bound)
    with pytest.raises(ValueError, match="gradient 'straight': choose"):
        unwrapped(*ARGUMENTS, jax.random.key(0), X, gradient="straight")
