import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.networks.schedule import MonotoneNetwork

T = jnp.linspace(0.0, 1.0, 33)


def random_network(features, seed=0):
    """A network with random parameters."""
    network = MonotoneNetwork(features)
    params = network.init(jax.random.key(0), T[0], T[0])
    noise = np.random.RandomState(seed)
    return network, jax.tree.map(lambda p: p + np.float32(noise.randn(*p.shape)), params)


@pytest.mark.parametrize("seed", range(4))
def test_it_rises_and_parts_add_up(seed):
    network, params = random_network(20, seed)
    rise = network.apply(params, T[:-1], T[1:])
    assert np.all(rise > 0)
    np.testing.assert_allclose(rise.sum(), network.apply(params, T[0], T[-1]), rtol=1e-5)


def test_it_is_a_line_and_its_sigmoids():
    network, params = random_network(7)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    width, height = 10.0 * np.exp(p["log_sharpness"]), 0.1 / 7 * np.exp(p["log_height"])

    def f(t):
        z = width * (t - np.linspace(0, 1, 7) - p["center"])
        return 0.9 * np.exp(p["log_slope"]) * t + np.sum(height * 0.5 * (1 + np.tanh(z / 2)))

    for s, t in ((0.0, 1.0), (0.3, 0.5), (0.7, 0.71)):
        got = network.apply(params, jnp.asarray(s), jnp.asarray(t))
        np.testing.assert_allclose(got, f(t) - f(s), rtol=1e-5)


def test_short_steps_keep_their_digits():
    network, params = random_network(20)
    s = jnp.asarray(0.5, jnp.float32)
    h = jnp.asarray(2.0**-20, jnp.float32)  # s + h is exact
    slope = jax.grad(lambda t: network.apply(params, jnp.zeros(()), t))(s)
    np.testing.assert_allclose(network.apply(params, s, s + h) / h, slope, rtol=5e-5)


def test_without_features_it_is_a_line():
    network = MonotoneNetwork(0)
    params = network.init(jax.random.key(0), T[0], T[0])
    rise = network.apply(params, jnp.zeros_like(T), T)
    np.testing.assert_allclose(rise / rise[-1], T, rtol=1e-6)


def test_nearly_a_line_at_initialization():
    network = MonotoneNetwork(64)
    params = network.init(jax.random.key(0), T[0], T[0])
    rise = network.apply(params, jnp.zeros_like(T), T)
    assert np.abs(rise / rise[-1] - T).max() < 0.01
