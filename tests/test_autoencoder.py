"""Autoencoders as functions; their theorems are in `derivations/test_autoencoder.py`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from vdm_jax import autoencoder

X = jnp.asarray(np.random.RandomState(0).normal(size=(4, 2, 3)), jnp.float32)


def test_error_is_summed_over_the_example():
    error = autoencoder.reconstruction_error(lambda x: x, lambda z: z + 0.5, X)
    np.testing.assert_allclose(error, np.full(4, 6 * 0.25), rtol=1e-6)


def test_without_noise_the_denoising_error_is_the_plain_one():
    maps = (lambda x: 0.3 * x, lambda z: jnp.tanh(z))
    noisy = autoencoder.denoising_reconstruction_error(*maps, jax.random.key(0), X, 0.0)
    np.testing.assert_array_equal(noisy, autoencoder.reconstruction_error(*maps, X))


def test_the_noise_is_added_to_the_encoder_s_input_and_not_to_the_target():
    key, sigma = jax.random.key(0), 0.7
    error = autoencoder.denoising_reconstruction_error(lambda x: x, lambda z: z, key, X, sigma)
    noise = sigma * jax.random.normal(key, X.shape)
    np.testing.assert_allclose(error, jnp.square(noise).reshape(4, -1).sum(1), rtol=1e-5)


def test_a_decoder_with_another_output_shape_is_refused():
    with pytest.raises(ValueError, match=r"the decoder returned shape \(4, 2, 2\): it must return shape \(4, 2, 3\)"):
        autoencoder.reconstruction_error(lambda x: x, lambda z: z[..., :2], X)


def test_nearest_distance_by_a_search():
    data = jnp.asarray(np.random.RandomState(1).normal(size=(7, 2, 3)), jnp.float32)
    every = np.linalg.norm((np.asarray(X)[:, None] - np.asarray(data)[None]).reshape(4, 7, -1), axis=-1)
    np.testing.assert_allclose(autoencoder.nearest_distance(X, data), every.min(1), rtol=1e-6)
    np.testing.assert_array_equal(autoencoder.nearest_distance(data, data), 0.0)


def _both(x, decode=lambda z: 0.5 * z, sigma=0.25):
    """The plain error, the one with noise, and the distance to other points."""
    key = jax.random.key(0)
    return (
        autoencoder.reconstruction_error(jnp.sin, decode, x),
        autoencoder.denoising_reconstruction_error(jnp.sin, decode, key, x, sigma),
        autoencoder.nearest_distance(x, 2.0 * x[::-1]),
    )


def test_the_error_of_half_precision_data_is_a_float32_sum():
    # 2,000 squares of 1/2: bfloat16 has 8 bits and cannot represent 501
    x = jnp.ones((2, 2004), jnp.bfloat16)
    error = autoencoder.reconstruction_error(lambda x: x, lambda z: 0.5 * z, x)
    assert error.dtype == jnp.float32
    np.testing.assert_array_equal(error, 501.0)
    distance = autoencoder.nearest_distance(x, jnp.zeros((3, 2004), jnp.bfloat16))
    np.testing.assert_allclose(distance, np.sqrt(2004.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_networks_get_data_in_its_own_dtype(dtype):
    seen = []

    def encode(x):
        seen.append(x.dtype)
        return x

    for sigma in (0.5, np.float64(0.5), jnp.float32(0.5)):
        error = autoencoder.denoising_reconstruction_error(
            encode, lambda z: z, jax.random.key(0), X.astype(dtype), sigma
        )
        assert error.dtype == jnp.float32
    assert set(seen) == {jnp.dtype(dtype)}


def test_float32_data_beside_float64_numbers():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert X.dtype == jnp.float32
        wide = _both(X, lambda z: 0.5 * z.astype(jnp.float64), jnp.float64(0.25))
    for ours, plain in zip(wide, _both(X), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_numpy_data_are_converted_to_jax_dtypes():
    for ours, plain in zip(_both(np.asarray(X, np.float64), sigma=np.float64(0.25)), _both(X), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, plain)


def test_on_a_mesh_as_on_one_device():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")

    def errors(x):
        near = autoencoder.nearest_distance(x, X)
        return autoencoder.reconstruction_error(jnp.sin, lambda z: 0.5 * z, x), near

    for check in (True, False):
        ours = jax.shard_map(errors, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)(X)
        for one, other in zip(ours, errors(X), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_compiled_once_for_all_parameters():
    scale = chex.assert_max_traces(lambda w, x: w * x, n=1)
    for w in (0.1, 0.2, 0.3):
        error = autoencoder.reconstruction_error(Partial(scale, jnp.float32(w)), lambda z: z, X)
        np.testing.assert_allclose(error, (1 - w) ** 2 * jnp.square(X).reshape(4, -1).sum(1), rtol=1e-5)


def test_invalid_arguments_are_refused():
    for error in (autoencoder.reconstruction_error, lambda *given: _both(given[2], given[1])):
        with pytest.raises(
            ValueError, match=r"the decoder returned shape \(4, 2, 1\): it must return shape \(4, 2, 3\)"
        ):
            error(lambda x: x, lambda z: z[..., :1], X)
        with pytest.raises(TypeError, match="the decoder returned int32"):
            error(lambda x: x, lambda z: z.astype(jnp.int32), X)
        with pytest.raises(ValueError, match=r"x has shape \(0, 2, 3\)"):
            error(lambda x: x, lambda z: z, X[:0])
    with pytest.raises(ValueError, match=r"x has shape \(4, 2, 3\) and data \(4, 2, 1\)"):  # which would broadcast
        autoencoder.nearest_distance(X, X[..., :1])
    with pytest.raises(ValueError, match=r"data has shape \(0, 2, 3\)"):
        autoencoder.nearest_distance(X, X[:0])
