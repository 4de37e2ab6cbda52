"""Features of the noise level against high precision and their defining properties."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from vdm_jax.networks import embeddings

fourier_features = jax.jit(embeddings.fourier_features, static_argnums=1)
log_snr_embedding = jax.jit(embeddings.log_snr_embedding, static_argnums=1)
sinusoidal = jax.jit(embeddings.sinusoidal, static_argnums=1)


def test_sinusoidal_is_ho_et_al_s():
    # get_timestep_embedding: frequencies exp(-log(10000) i / (half - 1)), all sines before all cosines.
    mpmath.mp.dps = 50
    t, dim = [0.0, 1.0, 17.0, 999.0], 8
    rates = [mpmath.power(10_000, -mpmath.mpf(i) / 3) for i in range(4)]
    want = [[f(s * w) for f in (mpmath.sin, mpmath.cos) for w in rates] for s in t]
    got = sinusoidal(jnp.asarray(t), dim)
    np.testing.assert_allclose(got, np.array(want, float), atol=1e-4)  # float32 angles up to 999: half an ulp is 3e-5
    np.testing.assert_allclose(got[:3], np.array(want, float)[:3], atol=2e-6)


def test_sinusoidal_inner_products_depend_on_the_time_between_only():
    embedding = np.asarray(sinusoidal(jnp.asarray([0.0, 5.0, 100.0, 105.0]), 32))
    gram = embedding @ embedding.T
    np.testing.assert_allclose(gram[0, 1], gram[2, 3], rtol=1e-5)
    np.testing.assert_allclose(np.diag(gram), 16.0, rtol=1e-5)
    assert abs(float(gram[0, 2] - gram[0, 1])) > 1.0


def test_sinusoidal_phase_error_is_as_documented():
    rates = 10_000.0 ** -(np.arange(64) / 63)
    for top, error in ((1_000, 3.1e-5), (100_000, 4e-3)):
        t = np.arange(top - 50, top, dtype=np.float64)
        exact = np.sin(t[:, None] * rates)
        got = np.asarray(sinusoidal(jnp.asarray(t, jnp.float32), 128), np.float64)[:, :64]
        assert np.abs(got - exact).max() < 1.5 * error


@pytest.mark.parametrize("dim", [7, 2])
def test_sinusoidal_refuses_an_odd_or_small_dimension(dim):
    with pytest.raises(ValueError, match=r"dim is \d: set an even number"):
        sinusoidal(jnp.zeros(1), dim)


def test_log_snr_embedding_is_finite_and_distinguishes_levels():
    log_snr = jnp.asarray([jnp.inf, 25.0, 20.0, 0.0, 0.02, -20.0, -jnp.inf])
    embedding = np.asarray(log_snr_embedding(log_snr, 16))
    np.testing.assert_array_equal(embedding[0], embedding[2])
    np.testing.assert_array_equal(embedding[1], embedding[2])
    np.testing.assert_array_equal(embedding[5], embedding[6])
    assert np.abs(embedding[3] - embedding[4]).max() > 0.5  # a difference of 0.02 is resolved
    np.testing.assert_array_equal(embedding[5, :8], 0.0)  # sines of angle 0


def test_fourier_features_keep_x_and_add_waves_of_the_stated_period():
    x = np.random.RandomState(0).uniform(-1.0, 1.0, (2, 3, 3, 2)).astype(np.float32)
    features = np.asarray(fourier_features(x, (0, 3)))
    assert features.shape == (2, 3, 3, 10)
    np.testing.assert_array_equal(features[..., :2], x)
    shifted = np.asarray(fourier_features(x + np.float32(2.0**-2), (0, 3)))  # exponent 3 has period 2^(1-3)
    np.testing.assert_allclose(shifted[..., 6:], features[..., 6:], atol=1e-5)
    assert np.abs(shifted[..., 2:6] - features[..., 2:6]).max() > 0.1
    np.testing.assert_allclose(features[..., 2:4] ** 2 + features[..., 4:6] ** 2, 1.0, atol=1e-6)
    np.testing.assert_allclose(features[0, 0, 0, 6], np.sin(8 * np.pi * float(x[0, 0, 0, 0])), atol=1e-5)
    np.testing.assert_array_equal(fourier_features(x, ()), x)


def test_features_are_float32_for_every_input_type():
    # In bfloat16, with 8 bits, the angle 32 pi x has no phase left.
    x = jnp.asarray([[0.3, -0.7]], jnp.bfloat16)
    waves = np.asarray(fourier_features(x, (5,)))[:, 2:4]
    np.testing.assert_allclose(waves, np.sin(32 * np.pi * np.asarray(x, np.float64)), atol=1e-4)
    step = jnp.asarray([998.0], jnp.bfloat16)
    np.testing.assert_array_equal(sinusoidal(step, 8), sinusoidal(step.astype(jnp.float32), 8))
