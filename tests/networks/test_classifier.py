"""The classifier: its initialization, its conditioning, and that it learns an exact posterior."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optimizations import unoptimized
from vdm_jax.networks.classifier import Classifier, ClassifierConfig

CONFIG = ClassifierConfig(num_classes=3, channels=4, groups=2, features=6)
IMAGES = jax.random.normal(jax.random.key(0), (4, 4, 4, 2))


def moved(network, *inputs):
    """Random variables, since some layers are zero at initialization."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    random = np.random.RandomState(0)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * random.standard_normal(x.shape), x.dtype), shapes)


def apply(network, variables, *inputs):
    return unoptimized(network.apply)(variables, *inputs)


@pytest.mark.slow
def test_classes_are_equally_probable_at_initialization():
    network = Classifier(CONFIG)
    output = apply(network, unoptimized(network.init)(jax.random.key(0), IMAGES), IMAGES)
    np.testing.assert_array_equal(output.logits, 0.0)
    assert float(jnp.abs(output.features).min(axis=0).max()) > 0.0


def test_logits_are_a_linear_map_of_the_features():
    network = Classifier(CONFIG)
    variables = moved(network, IMAGES)
    output = apply(network, variables, IMAGES)
    last = [layer for layer in variables["params"].values() if layer.get("kernel", jnp.zeros(0)).shape == (6, 3)]
    assert len(last) == 1
    np.testing.assert_allclose(output.logits, output.features @ last[0]["kernel"] + last[0]["bias"][None], rtol=1e-5)


@pytest.mark.slow
def test_examples_do_not_see_each_other():
    network = Classifier(CONFIG)
    variables = moved(network, IMAGES)
    alone = [apply(network, variables, image[None]).logits[0] for image in IMAGES]
    np.testing.assert_allclose(apply(network, variables, IMAGES).logits, jnp.stack(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sinusoidal", "log_snr"])
def test_the_output_depends_on_the_level(kind):
    network, level = Classifier(dataclasses.replace(CONFIG, embedding=kind)), jnp.arange(4.0)
    variables = moved(network, IMAGES, level)
    near, far = (apply(network, variables, IMAGES, at).logits for at in (level, level + jnp.arange(4.0)))
    np.testing.assert_array_equal(near[0], far[0])
    assert float(jnp.abs(near - far)[1:].max(axis=1).min()) > 1e-3


@pytest.mark.slow
def test_dropout_is_off_outside_training():
    network = Classifier(dataclasses.replace(CONFIG, dropout=0.5))
    variables = moved(network, IMAGES)

    @unoptimized
    def dropped(key):
        return network.apply(variables, IMAGES, train=True, rngs={"dropout": key}).logits

    outputs = np.stack([dropped(jax.random.key(i)) for i in range(20)])
    assert outputs.std(axis=0).min() > 0.05
    still = Classifier(CONFIG)  # with no dropout at all
    np.testing.assert_array_equal(apply(network, variables, IMAGES).logits, apply(still, variables, IMAGES).logits)


def test_invalid_configs_and_inputs_are_refused():
    init = lambda config, *inputs: Classifier(config).init(jax.random.key(0), *inputs)  # noqa: E731
    with pytest.raises(ValueError, match="embedding is 'none': set embedding"):
        init(CONFIG, IMAGES, jnp.zeros(4))
    with pytest.raises(ValueError, match="embedding is 'log_snr': set embedding"):
        init(ClassifierConfig(embedding="log_snr"), IMAGES)
    with pytest.raises(ValueError, match="cannot be halved 1 times: set fewer multipliers"):
        init(CONFIG, IMAGES[:, :3])
    with pytest.raises(ValueError, match="num_classes is 1: use data with 2 classes"):
        ClassifierConfig(num_classes=1).check((8, 8, 1))


@pytest.mark.slow
def test_it_learns_the_exact_posterior_of_noisy_images():
    # Of images m and -m in noise, log p(m | x_t) - log p(-m | x_t) = 2 alpha m . x_t / sigma^2.
    network = Classifier(ClassifierConfig(num_classes=2, channels=16, multipliers=(1,), groups=4, embedding="log_snr"))
    m = 0.3 * jnp.asarray([[1.0, -1.0], [0.5, 1.5]])[..., None]

    def noisy(key, count):
        key_y, key_t, key_x = jax.random.split(key, 3)
        label, log_snr = jax.random.bernoulli(key_y, 0.5, (count,)), 6.0 * jax.random.uniform(key_t, (count,)) - 3.0
        alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(s * log_snr))[:, None, None, None] for s in (1.0, -1.0))
        x = alpha * jnp.where(label[:, None, None, None], m[None], -m[None])
        x = x + sigma * jax.random.normal(key_x, (count, 2, 2, 1))
        return x, log_snr, label.astype(jnp.int32), (2.0 * alpha / sigma**2 * m[None] * x).sum((1, 2, 3))

    def loss(params, key):
        x, log_snr, label, _ = noisy(key, 256)
        logits = network.apply(params, x, log_snr).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def train(params, state, key):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
            updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return optax.apply_updates(params, updates), state

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
    x, log_snr, _, odds = noisy(jax.random.key(10_000), 2000)
    params = network.init(jax.random.key(0), x[:1], log_snr[:1])
    state = optimizer.init(params)
    for i in range(1500):
        params, state = train(params, state, jax.random.key(i))
    logits = network.apply(params, x, log_snr).logits
    error = jax.nn.sigmoid(logits[:, 1] - logits[:, 0]) - jax.nn.sigmoid(odds)
    assert float(jnp.sqrt(jnp.mean(error**2))) < 0.03
