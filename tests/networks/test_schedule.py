import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.networks.schedule import MonotoneNetwork

T = np.linspace(0.0, 1.0, 33, dtype=np.float32)


def initial(features):
    """f(t) - f(s) as a function of params, s and t, and the parameters at initialization."""
    network = MonotoneNetwork(features)
    return jax.jit(network.apply), jax.jit(network.init)(jax.random.key(0), T[0], T[0])


def random_network(features, seed=0):
    """A network with random parameters."""
    rise, params = initial(features)
    noise = np.random.RandomState(seed)
    return rise, jax.tree.map(lambda p: np.asarray(p) + np.float32(noise.randn(*p.shape)), params)


@pytest.mark.parametrize("seed", range(2))
def test_it_rises_and_parts_add_up(seed):
    rise, params = random_network(20, seed)
    rises = rise(params, T[:-1], T[1:])
    assert np.all(rises > 0)
    np.testing.assert_allclose(rises.sum(), rise(params, T[0], T[-1]), rtol=1e-5)


def test_it_is_a_line_and_its_sigmoids():
    rise, params = random_network(7)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    width, height = 10.0 * np.exp(p["log_sharpness"]), 0.1 / 7 * np.exp(p["log_height"])

    def f(t):
        z = width * (t - np.linspace(0, 1, 7) - p["center"])
        return 0.9 * np.exp(p["log_slope"]) * t + np.sum(height * 0.5 * (1 + np.tanh(z / 2)))

    for s, t in ((0.0, 1.0), (0.3, 0.5), (0.7, 0.71)):
        got = rise(params, jnp.float32(s), jnp.float32(t))
        np.testing.assert_allclose(got, f(t) - f(s), rtol=1e-5)


def test_short_steps_keep_their_digits():
    rise, params = random_network(20)
    s, h = np.float32(0.5), np.float32(2.0**-20)  # s + h is exact
    slope = jax.jit(jax.grad(lambda t: rise(params, jnp.zeros(()), t)))(s)
    np.testing.assert_allclose(rise(params, s, s + h) / h, slope, rtol=5e-5)


def test_without_features_it_is_a_line():
    rise, params = initial(0)
    rises = np.asarray(rise(params, np.zeros_like(T), T))
    np.testing.assert_allclose(rises / rises[-1], T, rtol=1e-6)


def test_nearly_a_line_at_initialization():
    rise, params = initial(64)
    rises = np.asarray(rise(params, np.zeros_like(T), T))
    assert np.abs(rises / rises[-1] - T).max() < 0.01
