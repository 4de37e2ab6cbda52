"""Encoder and decoder: perceptrons against matrix products, and properties of the convolutional network."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import unoptimized
from vdm_jax.networks.autoencoder import AutoencoderConfig, Decoder, Encoder

CONV = AutoencoderConfig(latent=3, width=4, blocks=1, multipliers=(1, 2), groups=2)
MLP = AutoencoderConfig(architecture="mlp", latent=3, width=6, blocks=2)
SHAPE = (8, 4, 2)  # not square

kinds = pytest.mark.parametrize("config", [CONV, MLP], ids=["conv", "mlp"])


def perturbed(module, x):
    """Random parameters, scales near one, so that nothing is zero by initialization."""
    random = np.random.RandomState(2)

    def sample(path, leaf):
        center = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        spread = 0.1 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(center + spread * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(sample, jax.eval_shape(module.init, jax.random.key(1), x))


def images():
    return jnp.asarray(np.random.RandomState(0).standard_normal((3, *SHAPE)), jnp.float32)


def latents():
    return jnp.asarray(np.random.RandomState(0).standard_normal((3, 3)), jnp.float32)


@cache
def compiled(module):
    """A network, compiled once for all tests."""
    return unoptimized(module.apply)


def applied(module, variables, x):
    return compiled(module)(variables, x)


def swish(x):
    return x / (1.0 + np.exp(-x))


def perceptron(params, x):
    """The residual perceptron by matrix products in float64, and the function of one layer."""

    def layer(params, i, h):
        return h @ np.asarray(params[f"Dense_{i}"]["kernel"], np.float64) + np.asarray(params[f"Dense_{i}"]["bias"])

    inner = params["_Perceptron_0"]
    h = layer(inner, 0, np.asarray(x, np.float64).reshape(len(x), -1))
    for block in range(MLP.blocks):
        h = h + layer(inner, 2 * block + 2, swish(layer(inner, 2 * block + 1, swish(h))))
    return swish(h), lambda i, h: layer(params, i, h)


def test_perceptrons_against_matrix_products():
    encoder, decoder = Encoder(MLP), Decoder(MLP, 5, SHAPE)
    x, z = images(), latents()
    variables = perturbed(encoder, x)
    h, layer = perceptron(variables["params"], x)
    mean, log_var = applied(encoder, variables, x)
    np.testing.assert_allclose(mean, layer(0, h), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_var, 20 * np.tanh(layer(1, h) / 20), rtol=1e-4, atol=1e-5)
    variables = perturbed(decoder, z)
    h, layer = perceptron(variables["params"], z)
    np.testing.assert_allclose(applied(decoder, variables, z), layer(0, h).reshape(3, 8, 4, 5), rtol=1e-4, atol=1e-5)


def test_small_convolutions_have_the_parameters_of_a_hand_count():
    def conv(a, b):
        return 9 * a * b + b

    def block(a):
        return 2 * (2 * a + conv(a, a))

    body = block(4) + block(8) + 2 * 8  # both blocks, and the last norm of 8 or 4 channels
    encoder = jax.eval_shape(Encoder(CONV).init, jax.random.key(0), images())
    flat = 4 * 2 * 8
    assert sum(a.size for a in jax.tree.leaves(encoder)) == conv(2, 4) + conv(4, 8) + body + 2 * (flat * 3 + 3)
    decoder = jax.eval_shape(Decoder(CONV, 5, SHAPE).init, jax.random.key(0), latents())
    assert sum(a.size for a in jax.tree.leaves(decoder)) == 3 * flat + flat + conv(8, 4) + body - 2 * 4 + conv(4, 5)


@kinds
def test_log_variance_is_zero_at_initialization_and_bounded_for_good(config):
    x, encoder = images(), Encoder(config)
    variables = unoptimized(encoder.init)(jax.random.key(1), x)
    mean, log_var = applied(encoder, variables, x)
    assert mean.shape == log_var.shape == (3, 3)
    assert float(jnp.abs(mean).min()) > 0
    np.testing.assert_array_equal(log_var, 0.0)
    huge = jax.tree.map(lambda leaf: 1e3 * np.asarray(leaf), perturbed(encoder, x))
    log_var = applied(encoder, huge, x)[1]
    assert np.all(np.abs(log_var) <= 20.0)
    assert float(jnp.abs(log_var).max()) > 19.0


def test_every_parameter_of_the_convolutions_is_used():
    for module, x in ((Encoder(CONV), images()), (Decoder(CONV, 5, SHAPE), latents())):
        variables = perturbed(module, x)
        before = jax.tree.leaves(applied(module, variables, x))
        for changed, _ in jax.tree_util.tree_leaves_with_path(variables):
            others = jax.tree_util.tree_map_with_path(
                lambda path, leaf, changed=changed: np.float32(1.5 * (path == changed) + 1.0) * leaf, variables
            )
            after = jax.tree.leaves(applied(module, others, x))
            assert not all(map(np.array_equal, before, after)), jax.tree_util.keystr(changed)


def test_examples_do_not_see_each_other():
    for module, x in ((Encoder(CONV), images()), (Decoder(CONV, 5, SHAPE), latents())):
        variables = perturbed(module, x)
        before, after = (applied(module, variables, given) for given in (x, x.at[0].add(1.0)))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old[1:], new[1:])
            assert np.any(old[0] != new[0])


def test_decoded_components_differ_at_initialization():
    # components of a mixture that are equal at initialization stay equal in training
    features = unoptimized(Decoder(CONV, 4, SHAPE).init_with_output)(jax.random.key(1), latents())[0]
    assert features.shape == (3, 8, 4, 4)
    for i in range(4):
        for j in range(i):
            assert float(jnp.abs(features[..., i] - features[..., j]).max()) > 1e-2


@kinds
def test_dropout_differs_between_examples_and_is_off_outside_training(config):
    config = replace(config, dropout=0.5)
    for module, x in ((Encoder(config), jnp.ones((3, *SHAPE))), (Decoder(config, 5, SHAPE), jnp.ones((3, 3)))):
        variables = perturbed(module, x)
        still = jax.tree.leaves(applied(module, variables, x))[0]
        np.testing.assert_allclose(still[0], still[1], atol=1e-6)
        train = unoptimized(lambda v, key, module=module, x=x: module.apply(v, x, train=True, rngs={"dropout": key}))
        shaken = jax.tree.leaves(train(variables, jax.random.key(3)))[0]
        assert float(jnp.abs(shaken[0] - shaken[1]).max()) > 1e-3


@pytest.mark.parametrize("config", [pytest.param(CONV, marks=pytest.mark.slow, id="conv"), pytest.param(MLP, id="mlp")])
def test_bfloat16_is_near_float32_with_float32_parameters_and_output(config):
    half = replace(config, dtype="bfloat16")
    for x, exact, rough in (
        (images(), Encoder(config), Encoder(half)),
        (latents(), Decoder(config, 5, SHAPE), Decoder(half, 5, SHAPE)),
    ):
        variables = perturbed(exact, x)
        shapes = jax.eval_shape(rough.init, jax.random.key(1), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        expected, got = (jax.tree.leaves(applied(module, variables, x))[0] for module in (exact, rough))
        assert got.dtype == jnp.float32
        assert 1e-5 < float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 0.05


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (CONV, (8, 7, 1), "8 x 7 cannot be halved 1 times: set fewer multipliers"),
        (replace(CONV, groups=3), SHAPE, "4 channels do not split into 3 groups"),
        (replace(MLP, latent=0), SHAPE, "latent is 0: set it to 1"),
    ],
)
def test_invalid_configs_and_inputs_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        config.check(shape)
    with pytest.raises(ValueError, match=message):
        Encoder(config).init(jax.random.key(0), jnp.ones((1, *shape)))
    with pytest.raises(ValueError, match=message):
        Decoder(config, 2, shape).init(jax.random.key(0), jnp.ones((1, 3)))


def test_a_latent_of_another_size_is_refused():
    with pytest.raises(ValueError, match="z has 4 dimensions and latent is 3: set latent"):
        Decoder(CONV, 2, SHAPE).init(jax.random.key(0), jnp.ones((1, 4)))


def test_an_unknown_architecture_is_refused():
    config = AutoencoderConfig()
    object.__setattr__(config, "architecture", "transformer")  # as from a file; a type checker would refuse it
    with pytest.raises(ValueError, match="architecture is 'transformer': set it to 'mlp' or 'conv'"):
        config.check(SHAPE)
