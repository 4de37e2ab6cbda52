"""The variational autoencoder's functions; their theorems are in `derivations/test_vae.py`."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

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

    keys = jax.random.split(jax.random.key(0), 4000)
    slopes = {
        (gradient, sampled): jax.jit(jax.vmap(lambda k, g=gradient, s=sampled: slope(k, gradient=g, sampled_kl=s)))(
            keys
        )
        for gradient in ("reparameterized", "score_function")
        for sampled in (False, True)
    }
    reference = np.mean(slopes["reparameterized", False])
    for name, values in slopes.items():
        if name != ("reparameterized", False):
            assert_mean(values - reference, 0.0)
    assert np.abs(reference) > 0.3


def test_score_function_has_the_value_of_its_cost():
    cost, log_q = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 3.0])
    np.testing.assert_array_equal(vae.reinforce_surrogate(cost, log_q), cost)
    gradient = jax.grad(lambda log_q: vae.reinforce_surrogate(cost, log_q).sum())(log_q)
    np.testing.assert_array_equal(gradient, cost)


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


def test_information_of_codes_that_never_overlap_is_log_n():
    q = Normal(100.0 * jnp.arange(6.0)[:, None], var=jnp.ones((6, 1)))
    split = vae.kl_decomposition(q, jax.random.key(0), samples=3)
    np.testing.assert_allclose(split.mutual_information, np.log(6.0), rtol=1e-5)
    one = Normal(jnp.zeros((6, 1)), var=jnp.ones((6, 1)))
    np.testing.assert_allclose(vae.kl_decomposition(one, jax.random.key(0)).mutual_information, 0.0, atol=1e-6)


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
    unwrapped = inspect.unwrap(vae.bound)
    with pytest.raises(ValueError, match="gradient 'straight': choose"):
        unwrapped(*ARGUMENTS, jax.random.key(0), X, gradient="straight")
