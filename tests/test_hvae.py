"""Hierarchies as functions; their theorems are in `derivations/test_hvae.py`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

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


A, B, VAR = 0.6, 1.5, 0.5  # z_2 ~ N(0, 1), z_1 | z_2 ~ N(A z_2, 1 - A^2), x | z_1 ~ N(B z_1, VAR)


def _normal(mean, var):
    return Normal(mean, var=jnp.full(mean.shape[:1], var, mean.dtype))


def _exact(upward):
    """Two layers with the exact posterior, inferred from the bottom up or from the top down."""
    total, down, decode = B**2 + VAR, lambda z: _normal(A * z, 1 - A**2), lambda z: B * z
    if upward:
        encode = lambda x: _normal(B / total * x, VAR / total)  # noqa: E731
        return hvae.bottom_up((2,), [encode, down], [down], decode)
    var = 1 / (1 / (1 - A**2) + B**2 / VAR)
    top = lambda z, x: _normal(A * B / total * x, 1 - (A * B) ** 2 / total)  # noqa: E731
    below = lambda z, x: _normal(var * (A / (1 - A**2) * z + B / VAR * x), var)  # noqa: E731
    return hvae.top_down((2,), [top, below], [down], decode)


@pytest.mark.parametrize("upward", [True, False])
def test_the_bound_with_the_exact_posterior_is_the_evidence_at_every_sample(upward):
    key, hierarchy = jax.random.key(0), _exact(upward)

    @jax.jit
    def bounds(x):
        sampled, closed = (hvae.bound(hierarchy, _likelihood, key, x, sampled_kl=s) for s in (True, False))
        weighted = hvae.importance_weighted_bound(hierarchy, _likelihood, key, x, samples=2)
        return sampled, sampled.total, closed, weighted, hvae.reconstruct(hierarchy, key, x, keep=2)

    sampled, total, closed, weighted, output = bounds(X)
    evidence = -stats.norm(0, np.sqrt(B**2 + VAR)).logpdf(X).sum(1)
    np.testing.assert_allclose(total, evidence, rtol=1e-5)
    np.testing.assert_allclose(weighted, evidence, rtol=1e-5)
    np.testing.assert_allclose(sampled.reconstruction, -stats.norm(output, VAR**0.5).logpdf(X).sum(1), rtol=1e-5)
    if upward:  # the KL of the top layer alone has a closed form: of N(A z_1, 1 - A^2)
        z, x = np.asarray(output) / B, np.asarray(X)
        np.testing.assert_array_equal(closed.kl[0], sampled.kl[0])
        np.testing.assert_allclose(closed.kl[1], 0.5 * ((A * z) ** 2 - A**2 - np.log(1 - A**2)).sum(1), rtol=1e-4)
    else:
        x, var = np.asarray(X), 1 - (A * B) ** 2 / (B**2 + VAR)
        mean = A * B / (B**2 + VAR) * x
        np.testing.assert_allclose(closed.kl[0], 0.5 * (mean**2 + var - 1 - np.log(var)).sum(1), rtol=1e-4)


def test_the_upper_layers_are_kept_and_the_lower_ones_are_means():
    key, hierarchy = jax.random.key(0), _three_levels()
    sampled = np.asarray(hvae.reconstruct(_one_layer(), key, X, keep=1))  # z_3, of the same q and key
    for keep, expected in ((0, 0.0 * sampled), (1, 0.25 * sampled)):
        np.testing.assert_allclose(hvae.reconstruct(hierarchy, key, X, keep=keep), expected, rtol=1e-5)


def _one_layer(mean=lambda x: x):
    return hvae.top_down((2,), [lambda z, x: _unit(mean(x))], [], lambda z: z)


def test_collapse_diagnostics_by_hand():
    # posteriors that do not overlap: log N nats; active is a variance of the mean over that of p above 0.01
    x = jnp.asarray(100.0 * np.arange(4.0)[:, None] * np.array([[1.0, -1.0]]), jnp.float32)
    posteriors = [lambda z, x, k=k: _unit(k * x) for k in (0.0, 1.0, 0.0)]  # the second alone has information
    found = hvae.collapse_diagnostics(
        hvae.top_down((2,), posteriors, [lambda z: _unit(0 * z)] * 2, lambda z: z), jax.random.key(0), x
    )
    np.testing.assert_allclose(found.mutual_information, [0.0, np.log(4.0), np.log(4.0)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.kl, [0.0, 0.5 * float(jnp.square(x).sum(1).mean()), 0.0], rtol=1e-5, atol=1e-6)
    unit = np.array([[-1.0, 1.0], [1.0, -1.0]], np.float32)  # of variance 1
    near = jnp.asarray(unit * np.float32([[0.11, 0.09]]))
    twice = hvae.top_down(
        (2,), [lambda z, x: _unit(x), lambda z, x: _unit(1.0 + 2 * x)], [lambda z: _normal(jnp.ones_like(z), 4.0)],
        lambda z: z,
    )  # fmt: skip
    found = hvae.collapse_diagnostics(twice, jax.random.key(0), near)
    np.testing.assert_array_equal(found.active_units, [1, 1])


def test_rows_are_levels_in_sampling_order():
    # with equal variances KL = ||a x||^2 / 2, for any samples of the levels above
    terms = hvae.bound(_three_levels((0.1, 2.0, 0.5)), _likelihood, jax.random.key(0), X)
    squares = jnp.square(X).sum(1)
    np.testing.assert_allclose(terms.kl, 0.5 * jnp.asarray([0.1, 2.0, 0.5])[:, None] ** 2 * squares[None], rtol=1e-5)
    np.testing.assert_allclose(terms.total, terms.reconstruction + terms.kl.sum(0), rtol=1e-6)


@pytest.mark.slow
def test_a_level_that_ignores_x_is_diagnosed_as_collapsed():
    key, data = jax.random.key(0), jnp.asarray(np.random.RandomState(1).normal(size=(200, 2)), jnp.float32)
    found = hvae.collapse_diagnostics(_three_levels((1.0, 0.0, 1.0)), key, data)
    np.testing.assert_allclose(found.kl[1], 0.0, atol=1e-6)
    np.testing.assert_array_equal(found.active_units, [2, 0, 2])
    assert found.mutual_information[1] == pytest.approx(float(found.mutual_information[0]), abs=1e-5)
    assert found.mutual_information[2] > found.mutual_information[1] + 0.3
    assert np.all(found.mutual_information < np.log(200))


def test_bottom_up_reconstruction_refuses_a_partial_keep():
    chain = hvae.bottom_up((2,), [_unit, _unit], [_unit], lambda z: z)
    assert hvae.reconstruct(chain, jax.random.key(0), X, keep=2).shape == X.shape
    with pytest.raises(ValueError, match=r"keep is 1: bottom-up .*top_down"):
        hvae.reconstruct(hvae.bottom_up((2,), [_unit] * 3, [_unit] * 2, lambda z: z), jax.random.key(0), X, keep=1)


def test_temperature_shrinks_every_level_and_the_prior_has_its_moments():
    # z_1 = N(0, 1) + N(0, 1) / 2 + N(0, 1) / 4: variance 1.3125
    for temperature in (1.0, 0.5, 0.0):
        x = hvae.sample(_three_levels(), _likelihood, jax.random.key(2), 20_000, temperature=temperature)
        np.testing.assert_allclose(np.var(x, axis=0), 1.3125 * temperature**2 + 0.5, rtol=0.05)


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
    with pytest.raises(ValueError, match="n is 0"):
        hvae.sample(_three_levels(), _likelihood, jax.random.key(0), 0)
    key = jax.random.key(0)  # one sample is enough
    jax.eval_shape(lambda x: hvae.importance_weighted_bound(_three_levels(), _likelihood, key, x, samples=1), X)
    jax.eval_shape(lambda: hvae.sample(_three_levels(), _likelihood, key, 1))


def test_data_without_a_posterior_are_refused():
    def generator(x, choose):
        n = x if isinstance(x, int) else x.shape[0]
        p = _unit(jnp.zeros((n, 2)))
        z = choose(0, None, p)
        return [hvae.Latent(z, None, p)], z

    assert hvae.sample_decoder_output(generator, jax.random.key(0), 3).shape == (3, 2)
    with pytest.raises(ValueError, match="q = None for a layer"):
        hvae.bound(generator, _likelihood, jax.random.key(0), X)
