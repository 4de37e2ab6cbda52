"""Distributions within a bin as functions: digits from the narrowest to the widest, gradients, transformations, errors.

The theorems are in `derivations/test_likelihood.py`.
"""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from vdm_jax import closed_form, dequantization
from vdm_jax.dequantization import TruncatedNormal, Uniform
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import normalize
from vdm_jax.noise_levels import level_from_log_snr

HALF = 1 / 256  # half the width of a bin of 257 levels; 0 is one of the levels
# mean and scale in halves of a bin: from a point to uniform, at an edge, and outside
MEANS_AND_SCALES = [(0.0, 1e-3), (0.0, 0.3), (0.4, 1.0), (0.0, 1e5), (1.0, 0.01), (-1.5, 0.2), (3.0, 0.5), (-0.3, 30.0)]


def _distribution(mean, scale, x=0.0, dtype=jnp.float32, count=1):
    x = jnp.full((count,), x, dtype)
    return TruncatedNormal(x, levels=257, mean=jnp.asarray(mean * HALF, dtype), scale=jnp.asarray(scale * HALF, dtype))


def _reference(distribution):
    mean, scale = float(distribution.mean), float(distribution.scale)
    return stats.truncnorm((-HALF - mean) / scale, (HALF - mean) / scale, mean, scale)


@jax.jit
def _log_probs(distribution, y):
    return jax.vmap(lambda each: distribution.log_prob(each))(y[:, None])


@jax.jit
def _samples(distribution):
    return distribution.sample(jax.random.key(0))


@pytest.mark.parametrize(("mean", "scale"), MEANS_AND_SCALES)
def test_log_prob_in_float32(mean, scale):
    distribution = _distribution(mean, scale)
    y = _reference(distribution).ppf(np.linspace(0.01, 0.99, 99)).astype(np.float32)
    expected = _reference(distribution).logpdf(y.astype(np.float64))
    np.testing.assert_allclose(_log_probs(distribution, jnp.asarray(y)), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("mean", "scale"), MEANS_AND_SCALES)
def test_samples_in_float32_have_the_distribution(mean, scale):
    distribution = _distribution(mean, scale, count=20_000)
    y = np.asarray(_samples(distribution), np.float64)
    assert np.all(np.abs(y) <= HALF * (1 + 1e-5))
    assert stats.kstest(y, _reference(distribution).cdf).pvalue > 1e-3
    # and each is the exact quantile of its own uniform number
    u = np.asarray(jax.random.uniform(jax.random.key(0), (20_000,)), np.float64) + 2.0**-24
    width = np.diff(_reference(distribution).ppf([0.1, 0.9]))
    middle = (u > 0.001) & (u < 0.999)
    assert np.abs(y - _reference(distribution).ppf(u))[middle].max() < 1e-4 * width


def test_a_sample_stays_in_the_bin_of_its_value():
    @partial(jax.jit, static_argnames="levels")
    def samples(x, key, levels):
        normal = TruncatedNormal(x, levels=levels, mean=jnp.zeros(()), scale=jnp.asarray(1 / (levels - 1)))
        return Uniform(x, levels).sample(key), normal.sample(key)

    for levels in (2, 256):
        x = np.tile(np.asarray(normalize(np.arange(levels), levels)), (200, 1))
        for y in samples(x, jax.random.key(0), levels):
            off = np.abs(np.asarray(y, np.float64) - np.linspace(-1.0, 1.0, levels))
            assert 0.9 < off.max() * (levels - 1) < 1 + 1e-7 * levels  # to the rounding of y


def test_uniform_has_the_density_of_its_bin():
    # D numbers, each over a width of 2 / (levels - 1)
    @jax.jit
    def sample_and_log_prob(x, key):
        y = Uniform(x, 5).sample(key)
        return y, Uniform(x[:2, :3], 5).log_prob(y[:2, :3])

    y, log_prob = sample_and_log_prob(np.zeros((2000, 6), np.float32), jax.random.key(1))
    assert float(log_prob) == pytest.approx(6 * np.log(2.0), rel=1e-6)
    assert stats.kstest(np.ravel(y), stats.uniform(-0.25, 0.5).cdf).pvalue > 1e-3


def test_samples_have_the_gradient_of_their_quantile():
    # against differences, in float64, of the exact quantile: pathwise, one sample at a time
    with jax.enable_x64(True):
        u = float(jax.random.uniform(jax.random.key(3), (1,))[0])

        @jax.jit
        @partial(jax.grad, argnums=(0, 1))
        def slopes(mean, scale):
            return TruncatedNormal(jnp.zeros(1), levels=257, mean=mean, scale=scale).sample(jax.random.key(3))[0]

        for distribution in (_distribution(mean, scale, dtype=jnp.float64) for mean, scale in MEANS_AND_SCALES):
            ours = np.asarray(slopes(distribution.mean, distribution.scale))
            if float(distribution.scale) > 1e3 * HALF:  # nearly uniform: the reference loses its digits first
                assert np.all(np.abs(ours) < 1e-9)
                continue
            for number, which in enumerate(("mean", "scale")):
                h = 1e-4 * min(float(distribution.scale), HALF)
                ends = [
                    _reference(replace(distribution, **{which: float(getattr(distribution, which)) + step})).ppf(u)
                    for step in (h, -h)
                ]
                np.testing.assert_allclose(ours[number], (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-6)


def test_float32_gradients_are_finite():
    @jax.jit
    @jax.vmap
    @partial(jax.grad, argnums=(0, 1))
    def slopes(mean, scale):
        distribution = TruncatedNormal(jnp.zeros(2000), levels=257, mean=mean, scale=scale)
        y = distribution.sample(jax.random.key(0))
        return jnp.sum(y) + distribution.log_prob(y)

    parameters = np.float32([*MEANS_AND_SCALES, (0.0, 1e-6), (1.0, 1e-5)]).T * np.float32(HALF)
    for gradient in slopes(*parameters):
        assert np.all(np.isfinite(gradient))


def _log_prob(y):
    return jax.vmap(Normal(jnp.zeros(y.shape[1:]), var=jnp.asarray(0.3)).log_prob)(y)


def _wide(params, x):
    return TruncatedNormal(x, levels=5, mean=params[0], scale=jnp.exp(params[1]))


X_0 = normalize(jnp.asarray([[0, 3], [2, 2], [4, 1]]), 5)


def _bound(params, key, x_0=X_0, **options):
    return dequantization.dequantized_bound(_log_prob, key, x_0, Partial(_wide, params), **options)


@pytest.mark.slow
def test_more_samples_are_the_mean_of_the_ratios():
    # K = 3 from the three bounds of one sample each, whose keys are the split one's
    params, key = jnp.asarray([0.05, -1.0]), jax.random.key(0)
    ones = []
    for k in jax.random.split(key, 3):
        y = jax.vmap(lambda x, k: _wide(params, x).sample(k))(X_0, jax.random.split(k, 3))
        ones.append(_log_prob(y) - jax.vmap(lambda x, y: _wide(params, x).log_prob(y))(X_0, y))
    np.testing.assert_allclose(_bound(params, key, samples=3), -np.log(np.mean(np.exp(ones), 0)), rtol=1e-6)


def test_mean_and_scale_may_be_of_every_number():
    @jax.jit
    def evaluate(x, mean, scale, key):
        each = TruncatedNormal(x, levels=5, mean=mean, scale=scale)
        y = each.sample(key)
        one = jax.vmap(lambda x, m, s, y: TruncatedNormal(x[None], levels=5, mean=m, scale=s).log_prob(y[None]))
        return each.log_prob(y), one(x, mean, scale, y)

    mean, scale = np.float32([0.1, -0.2]), np.float32([0.05, 2.0])
    together, apart = evaluate(X_0[0], mean, scale, jax.random.key(0))
    assert float(together) == pytest.approx(float(np.sum(apart)), rel=1e-6)


@pytest.mark.slow
def test_same_jitted_mapped_on_many_devices_and_traced_once():
    keys, params = jax.random.split(jax.random.key(0), 8), jnp.stack([jnp.asarray([0.05, -1.0 - i]) for i in range(8)])
    alone = jnp.stack([_bound(p, k, samples=2) for p, k in zip(params, keys, strict=True)])
    for many in (jax.vmap, jax.pmap):
        np.testing.assert_allclose(many(partial(_bound, samples=2))(params, keys), alone, rtol=1e-5)
    counted = chex.assert_max_traces(lambda y: _log_prob(y), n=1)
    for p, k in zip(params, keys, strict=True):
        dequantization.dequantized_bound(counted, k, X_0, Partial(_wide, p))


@pytest.mark.slow
def test_gradient_of_the_bound_is_its_slope():
    with jax.enable_x64(True):
        x_0, params, h = X_0.astype(jnp.float64), jnp.asarray([0.05, -1.0]), 1e-5
        total = lambda p: _bound(p, jax.random.key(0), x_0, samples=3).sum()  # noqa: E731
        for i, along in enumerate(jnp.eye(2)):
            slope = (total(params + h * along) - total(params - h * along)) / (2 * h)
            np.testing.assert_allclose(jax.grad(total)(params)[i], slope, rtol=1e-6)


def test_latent_bound_evaluates_the_decoder_at_z_0_with_the_prediction():
    # the three parts, with the same z_0 sampled again
    distribution = closed_form.gaussian([0.1, 0.2], [[0.5, 0.1], [0.1, 0.3]])
    decoder = lambda x_hat, z, level: Normal(x_hat + 0.1 * z, var=level.sigma)  # noqa: E731

    @partial(jax.jit, static_argnames="prediction_type")
    def bound_and_parts(key, level, prediction_type):
        denoiser = closed_form.OptimalDenoiser(distribution, prediction_type)
        ours = dequantization.latent_dequantization_bound(
            _log_prob, denoiser, key, X_0, level, decoder, prediction_type=prediction_type
        )
        eps = jax.vmap(lambda k: jax.random.normal(k, (2,)))(jax.random.split(key, 3))
        z = level.alpha * X_0 + level.sigma * eps
        x_hat = jax.vmap(lambda z: closed_form.optimal_prediction(distribution, z, level, "x_0"))(z)
        return ours, z, x_hat

    level = level_from_log_snr(jnp.float32(2.0))
    alpha, sigma, x_0 = float(level.alpha), float(level.sigma), np.asarray(X_0)
    for prediction_type in ("x_0", "eps"):
        ours, z, x_hat = map(np.asarray, bound_and_parts(jax.random.key(0), level, prediction_type))
        prior, noisy = stats.norm(0, np.sqrt(0.3)).logpdf(z), stats.norm(alpha * x_0, sigma).logpdf(z)
        decoded = stats.norm(x_hat + 0.1 * z, np.sqrt(sigma)).logpdf(x_0)
        np.testing.assert_allclose(ours, (noisy - prior - decoded).sum(-1), rtol=1e-4)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="samples is 0"):
        _bound(jnp.zeros(2), jax.random.key(0), samples=0)
