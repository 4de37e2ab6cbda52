"""The MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from vdm_jax import losses
from vdm_jax.discrete_schedules import discretize
from vdm_jax.networks.embeddings import log_snr_embedding
from vdm_jax.networks.mlp import MLP, MLPConfig
from vdm_jax.schedules import LinearLogSNR

CONFIG = MLPConfig(width=32, blocks=2)


def test_output_is_zero_at_initialization():
    x = jnp.ones((2, 3))
    output, _ = jax.jit(MLP(CONFIG).init_with_output)(jax.random.key(0), x, jnp.zeros(2))
    np.testing.assert_array_equal(output, 0.0)


def test_it_is_residual_blocks_with_the_level_and_the_label_added_inside():
    """Against matrix products in float64; the features of the level are those of `log_snr_embedding`."""
    config = MLPConfig(width=4, blocks=2, num_classes=3, out_features=5)
    x, level, label = np.float32([[0.5, -1.0], [2.0, 0.3]]), np.float32([-3.0, 6.0]), np.array([3, 1])
    shapes = jax.eval_shape(MLP(config).init, jax.random.key(0), x, level, label)
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), shapes)["params"]
    got = jax.jit(MLP(config).apply)({"params": params}, x, level, label)

    def dense(params, i, h):
        layer = params[f"Dense_{i}"]
        return h @ np.float64(layer["kernel"]) + layer["bias"]

    def swish(h):
        return h / (1.0 + np.exp(-h))

    inner = params["LevelEmbedding_0"]
    embedding = dense(inner, 1, swish(dense(inner, 0, np.float64(log_snr_embedding(jnp.asarray(level), 4)))))
    embedding = embedding + inner["Embed_0"]["embedding"][label]
    h = dense(params, 0, np.float64(x))
    for block in range(2):
        r = dense(params, 3 * block + 1, swish(h)) + dense(params, 3 * block + 2, embedding)
        h = h + dense(params, 3 * block + 3, swish(r))
    np.testing.assert_allclose(got, dense(params, 7, h), rtol=1e-5, atol=1e-4)


def test_label_and_classes_must_agree():
    with pytest.raises(ValueError, match="num_classes is 0: set num_classes"):
        MLP(CONFIG).init(jax.random.key(0), jnp.ones((2, 3)), jnp.zeros(2), jnp.zeros(2, jnp.int32))


@pytest.mark.slow
def test_it_learns_the_exact_denoiser_of_gaussian_data():
    # Of data N(m, v I) the best eps is sigma (x - alpha m) / (alpha^2 v + sigma^2); its loss is a known number.
    schedule, m, v = discretize(LinearLogSNR(4.0, -4.0), 20), jnp.asarray([1.0, -1.0]), 0.25

    def exact(x_t, level):
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        return sigma * (x_t - alpha * m[None]) / (alpha**2 * v + sigma**2)

    def network(params, x_t, level):
        return MLP(CONFIG).apply(params, x_t, level.log_snr)

    def loss(params, key):
        key_data, key_loss = jax.random.split(key)
        x_0 = m[None] + v**0.5 * jax.random.normal(key_data, (256, 2))
        return losses.simple_loss(Partial(network, params), key_loss, x_0, schedule).mean()

    @jax.jit
    def train(params, state, key):
        gradient = jax.grad(loss)(params, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 1000))
    params = MLP(CONFIG).init(jax.random.key(0), jnp.ones((1, 2)), jnp.zeros(1))
    state = optimizer.init(params)
    for i in range(1000):
        params, state = train(params, state, jax.random.key(i))
    level = schedule(jax.random.randint(jax.random.key(1), (500,), 1, 21))
    spread = jnp.sqrt(level.alpha**2 * v + level.sigma**2)[:, None]
    x_t = level.alpha[:, None] * m[None] + spread * jax.random.normal(jax.random.key(2), (500, 2))
    error = jnp.mean((network(params, x_t, level) - exact(x_t, level)) ** 2) / jnp.mean(exact(x_t, level) ** 2)
    assert float(error) < 0.02
