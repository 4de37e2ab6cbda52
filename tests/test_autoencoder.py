"""Autoencoders as functions; their theorems are in `derivations/test_autoencoder.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax import autoencoder

X = jnp.asarray(np.random.RandomState(0).normal(size=(4, 2, 3)), jnp.float32)


def test_error_is_summed_over_the_example():
    error = autoencoder.reconstruction_error(lambda x: x, lambda z: z + 0.5, X)
    np.testing.assert_allclose(error, np.full(4, 6 * 0.25), rtol=1e-6)


def test_without_noise_the_denoising_error_is_the_plain_one():
    maps = (lambda x: 0.3 * x, lambda z: jnp.tanh(z))
    noisy = autoencoder.denoising_reconstruction_error(*maps, jax.random.key(0), X, 0.0)
    np.testing.assert_array_equal(noisy, autoencoder.reconstruction_error(*maps, X))


def test_the_noise_is_in_what_the_encoder_sees_and_not_in_the_target():
    key, sigma = jax.random.key(0), 0.7
    error = autoencoder.denoising_reconstruction_error(lambda x: x, lambda z: z, key, X, sigma)
    noise = sigma * jax.random.normal(key, X.shape)
    np.testing.assert_allclose(error, jnp.square(noise).reshape(4, -1).sum(1), rtol=1e-5)


def test_a_decoder_that_ends_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"the decoder gives \(4, 2, 2\) where the data are \(4, 2, 3\)"):
        autoencoder.reconstruction_error(lambda x: x, lambda z: z[..., :2], X)


def test_nearest_distance_by_a_search():
    data = jnp.asarray(np.random.RandomState(1).normal(size=(7, 2, 3)), jnp.float32)
    every = np.linalg.norm((np.asarray(X)[:, None] - np.asarray(data)[None]).reshape(4, 7, -1), axis=-1)
    np.testing.assert_allclose(autoencoder.nearest_distance(X, data), every.min(1), rtol=1e-6)
    np.testing.assert_array_equal(autoencoder.nearest_distance(data, data), 0.0)
