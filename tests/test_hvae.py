"""Hierarchies as functions; their theorems are in `derivations/test_hvae.py`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax import hvae
from vdm_jax.gaussian import Normal

X = jnp.asarray(np.random.RandomState(0).normal(size=(6, 2)), jnp.float32)


def _unit(mean):
    return Normal(mean, var=jnp.ones(mean.shape[:1]))


def _likelihood(mean):
    return Normal(mean, var=jnp.float32(0.5))


def _three_levels(weights=(1.0, 1.0, 1.0)):
    """The mean of q(z_i|z_{i+1}, x) depends on x with these weights; p(z_i|z_{i+1}) = N(z_{i+1} / 2, 1)."""
    posteriors = [lambda z, x, a=a: _unit(a * x + (0.0 if z is None else 0.5 * z)) for a in weights]
    return hvae.top_down((2,), posteriors, [lambda z: _unit(0.5 * z)] * 2, lambda z: z)


def test_rows_are_levels_in_sampling_order():
    # with equal variances KL = ||a x||^2 / 2, for any samples of the levels above
    terms = hvae.bound(_three_levels((0.1, 2.0, 0.5)), _likelihood, jax.random.key(0), X)
    squares = jnp.square(X).sum(1)
    np.testing.assert_allclose(terms.kl, 0.5 * jnp.asarray([0.1, 2.0, 0.5])[:, None] ** 2 * squares[None], rtol=1e-5)
    np.testing.assert_allclose(terms.total, terms.reconstruction + terms.kl.sum(0), rtol=1e-6)


def test_a_level_that_ignores_x_is_diagnosed_as_collapsed():
    key, data = jax.random.key(0), jax.random.normal(jax.random.key(1), (200, 2))
    found = hvae.collapse_diagnostics(_three_levels((1.0, 0.0, 1.0)), key, data)
    np.testing.assert_allclose(found.kl[1], 0.0, atol=1e-6)
    np.testing.assert_array_equal(found.active_units, [2, 0, 2])
    assert found.mutual_information[1] == pytest.approx(float(found.mutual_information[0]), abs=1e-5)
    assert found.mutual_information[2] > found.mutual_information[1] + 0.3
    assert np.all(found.mutual_information < np.log(200))


def test_reconstruction_keeps_levels_from_q_and_takes_the_others_from_the_model():
    key, hierarchy = jax.random.key(0), _three_levels()
    np.testing.assert_array_equal(hvae.reconstruct(hierarchy, key, X, keep=0), jnp.zeros_like(X))
    reconstructed = hvae.reconstruct(hierarchy, key, X, keep=3)
    cost = hvae.bound(hierarchy, _likelihood, key, X).reconstruction
    np.testing.assert_allclose(cost, -jax.vmap(lambda m, x: _likelihood(m).log_prob(x))(reconstructed, X), rtol=1e-6)


def test_bottom_up_reconstruction_refuses_a_partial_keep():
    chain = hvae.bottom_up((2,), [_unit, _unit], [_unit], lambda z: z)
    assert hvae.reconstruct(chain, jax.random.key(0), X, keep=2).shape == X.shape
    with pytest.raises(ValueError, match=r"keep is 1: bottom-up .*top_down"):
        hvae.reconstruct(hvae.bottom_up((2,), [_unit] * 3, [_unit] * 2, lambda z: z), jax.random.key(0), X, keep=1)


def test_temperature_shrinks_every_level_and_the_prior_has_its_moments():
    # z_1 = N(0, 1) + N(0, 1) / 2 + N(0, 1) / 4: variance 1.3125
    for temperature in (1.0, 0.5):
        reconstructed = hvae.sample_decoder_output(_three_levels(), jax.random.key(2), 20_000, temperature=temperature)
        np.testing.assert_allclose(jnp.var(reconstructed, axis=0), 1.3125 * temperature**2, rtol=0.05)
    x = hvae.sample(_three_levels(), _likelihood, jax.random.key(2), 20_000)
    np.testing.assert_allclose(jnp.var(x, axis=0), 1.3125 + 0.5, rtol=0.05)


def test_objective_is_the_bound_by_default():
    terms = hvae.bound(_three_levels((0.1, 2.0, 0.5)), _likelihood, jax.random.key(0), X)
    assert hvae.free_bits_objective(terms) == pytest.approx(float(terms.total.mean()), rel=1e-6)
    silent = hvae.free_bits_objective(terms, beta=0.0)
    assert silent == pytest.approx(float(terms.reconstruction.mean()), rel=1e-6)
    means = np.asarray(terms.kl.mean(1), np.float64)
    free = float(hvae.free_bits_objective(terms, beta=0.5, free_nats=1.0)) - float(silent)
    assert free == pytest.approx(0.5 * np.maximum(means, 1.0).sum(), rel=1e-5)


def test_warm_up_grows_to_one_and_stays():
    assert [float(hvae.kl_warm_up(i, 4)) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert float(hvae.kl_warm_up(0, 0)) == 1.0


def test_traced_once():
    decoder = chex.assert_max_traces(lambda z: z, n=1)
    hierarchy = hvae.top_down((2,), [lambda z, x: _unit(x)], [], decoder)
    for i in range(3):
        hvae.bound(hierarchy, _likelihood, jax.random.key(i), X)


def test_levels_of_incompatible_shapes_are_refused():
    up = lambda x: _unit(x)  # noqa: E731
    with pytest.raises(ValueError, match="2 posteriors and 2 conditionals"):
        hvae.top_down((2,), [lambda z, x: _unit(x)] * 2, [up] * 2, lambda z: z)
    with pytest.raises(ValueError, match="0 encoders and 0 conditionals"):
        hvae.bottom_up((2,), [], [], lambda z: z)
    wrong = hvae.top_down(
        (2,), [lambda z, x: _unit(x), lambda z, x: _unit(x)], [lambda z: _unit(z[:, :1])], lambda z: z
    )
    with pytest.raises(ValueError, match=r"q\(z_1\) has shape \(6, 2\) and p\(z_1\) has shape \(6, 1\)"):
        hvae.bound(wrong, _likelihood, jax.random.key(0), X)
    top = hvae.bottom_up((3,), [up, up], [up], lambda z: z)
    with pytest.raises(ValueError, match=r"q\(z_2\) has shape \(6, 2\) and p\(z_2\) has shape \(6, 3\)"):
        hvae.bound(top, _likelihood, jax.random.key(0), X)
    with pytest.raises(ValueError, match="samples is 0"):
        hvae.importance_weighted_bound(_three_levels(), _likelihood, jax.random.key(0), X, samples=0)


def test_data_without_a_posterior_are_refused():
    def generator(x, choose):
        n = x if isinstance(x, int) else x.shape[0]
        p = _unit(jnp.zeros((n, 2)))
        z = choose(0, None, p)
        return [hvae.Latent(z, None, p)], z

    assert hvae.sample_decoder_output(generator, jax.random.key(0), 3).shape == (3, 2)
    with pytest.raises(ValueError, match="q = None for a layer"):
        hvae.bound(generator, _likelihood, jax.random.key(0), X)
