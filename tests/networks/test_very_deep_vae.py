"""The very deep VAE: size against the paper, arithmetic against loops, and dependencies between levels."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import unoptimized
from vdm_jax.networks.very_deep_vae import VeryDeepVAE, VeryDeepVAEConfig

SMALL = VeryDeepVAEConfig(
    width=8, z_channels=2, layers=((1, 1), (2, 1), (6, 2)), encoder=((6, 1), (2, 0), (1, 1)), out_channels=5
)
SHAPE = (6, 6, 3)


def mean_of_q(i, q, p):
    return q[0]


@cache
def perturbed(config, shape=SHAPE):
    """Random parameters, so that nothing is zero by initialization; nothing is compiled."""
    random = np.random.RandomState(2)
    shapes = jax.eval_shape(
        lambda: VeryDeepVAE(config, shape).init(jax.random.key(1), jnp.zeros((1, *shape)), mean_of_q)
    )
    spreads = jax.tree.map(lambda leaf: 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5, shapes)
    return jax.tree.map(
        lambda leaf, spread: jnp.asarray(spread * random.standard_normal(leaf.shape), jnp.float32), shapes, spreads
    )


def images(batch=2, shape=SHAPE):
    return jnp.asarray(np.random.RandomState(0).standard_normal((batch, *shape)), jnp.float32)


def latents(config, batch=2):
    """A z for every level, at random."""
    random = np.random.RandomState(3)
    sizes = [size for size, count in config.layers for _ in range(count)]
    return [jnp.asarray(random.standard_normal((batch, n, n, config.z_channels)), jnp.float32) for n in sizes]


def given(z):
    return lambda i, q, p: z[i]


@cache
def compiled(config, seen):
    """The network for given z, compiled once for all tests: for images, or for two examples without images."""
    network = VeryDeepVAE(config, SHAPE)
    return unoptimized(lambda v, x, z: network.apply(v, x if seen else 2, given(z)))


def run(config, variables, x, z):
    """Levels and features for given z; x is images or None."""
    return compiled(config, x is not None)(variables, x, z)


@pytest.mark.slow
def test_cifar_network_has_the_paper_s_39_million_parameters():
    config = VeryDeepVAEConfig()
    shapes = jax.eval_shape(
        lambda: VeryDeepVAE(config, (32, 32, 3)).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), mean_of_q)
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(total, -6) == 39_000_000  # as published with the paper's checkpoints

    def block(a, out, size, middle=96):
        kernel = 9 if size > 2 else 1
        return a * middle + middle + 2 * (kernel * middle**2 + middle) + middle * out + out

    width, z = 384, 16
    hand = 9 * 3 * width + width + 2 * width + width * 100 + 100  # enter, gain and bias, leave
    for size, count in {32: 12, 16: 7, 8: 7, 4: 4, 1: 3}.items():  # 32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3
        hand += count * block(width, width, size)
    for size, count in {1: 1, 4: 3, 8: 6, 16: 11, 32: 22}.items():  # 1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21
        level = block(2 * width, 2 * z, size) + block(width, 2 * z + width, size) + block(width, width, size)
        hand += count * (level + z * width + width) + size * size * width
    assert total == hand
    assert config.depth == 43


def gelu(x):
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def dense(params, x):
    """A 1 x 1 convolution, in float64."""
    return x @ np.asarray(params["kernel"], np.float64)[0, 0] + np.asarray(params["bias"], np.float64)


def bottleneck(params, x):
    for i in range(4):
        x = dense(params[f"Conv_{i}"], gelu(x))
    return x


def test_two_resolutions_against_matrix_products():
    # Up to 2 x 2 all but the first convolution are matrix products: the whole network by hand.
    config = replace(SMALL, layers=((1, 1), (2, 2)), encoder=((2, 1), (1, 1)))
    x, z = images(shape=(2, 2, 3)), latents(config)
    variables = perturbed(config, (2, 2, 3))
    params = variables["params"]
    network = VeryDeepVAE(config, (2, 2, 3))
    levels, features = unoptimized(lambda v, x, z: network.apply(v, x, given(z)))(variables, x, z)

    padded, kernel = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))), params["enter"]["kernel"]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    h = np.einsum("bijcmn,mnco->bijo", windows, np.asarray(kernel, np.float64)) + np.asarray(params["enter"]["bias"])
    seen = {2: h + bottleneck(params["encoder_2_0"], h)}
    h = (seen[2] + bottleneck(params["encoder_2_down"], seen[2])).mean((1, 2), keepdims=True)
    seen[1] = h + bottleneck(params["encoder_1_0"], h)

    h = np.zeros((2, 1, 1, 8))
    for i, size in enumerate([1, 2, 2]):
        level = params[f"level_{i}"]
        if i in (0, 1):  # a new resolution: every pixel of the one above fills its square
            h = h[:, np.arange(size) // size][:, :, np.arange(size) // size] + np.asarray(params[f"bias_{size}"])
        q = bottleneck(level["posterior"], np.concatenate([h, seen[size]], axis=-1))
        p = bottleneck(level["prior"], h)
        for got, want in zip(levels[i][1:], (q, p), strict=True):
            np.testing.assert_allclose(got[0], want[..., :2], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got[1], 20 * np.tanh(want[..., 2:4] / 20), rtol=1e-5, atol=1e-5)
        h = h + p[..., 4:] + dense(level["project"], np.asarray(z[i], np.float64))
        h = h + bottleneck(level["residual"], h)
    want = dense(params["leave"], h * np.asarray(params["gain"]) + np.asarray(params["bias"]))
    np.testing.assert_allclose(features, want, rtol=1e-5, atol=1e-5)


def test_generation_repeats_inference():
    # The priors do not depend on x: given the same z they and the features are the same without it.
    x, z, variables = images(), latents(SMALL), perturbed(SMALL)
    levels, features = run(SMALL, variables, x, z)
    blind, generated = run(SMALL, variables, None, z)
    assert features.shape == (2, 6, 6, 5)
    np.testing.assert_allclose(generated, features, rtol=1e-5, atol=1e-5)
    for i, ((_, q, p), (same, missing, prior)) in enumerate(zip(levels, blind, strict=True)):
        np.testing.assert_array_equal(same, z[i])
        assert missing is None
        assert all(a.shape == b.shape == same.shape for a, b in zip(q, p, strict=True))
        np.testing.assert_allclose(prior, p, rtol=1e-5, atol=1e-5)


def test_generation_needs_no_parameter_of_the_posterior():
    variables = perturbed(SMALL)
    params = {name: leaf for name, leaf in variables["params"].items() if not name.startswith(("encoder", "enter"))}
    for name in [name for name in params if name.startswith("level")]:
        params[name] = {part: leaf for part, leaf in params[name].items() if part != "posterior"}
    generate = VeryDeepVAE(SMALL, SHAPE).apply
    jax.eval_shape(lambda v, z: generate(v, 2, given(z)), {"params": params}, latents(SMALL))


@pytest.mark.slow
def test_each_level_depends_on_those_above_it_and_on_x():
    x, z, variables = images(), latents(SMALL), perturbed(SMALL)

    def moved(amounts):  # of each level, and of x, along all ones
        shifted = [value + amount for value, amount in zip(z, amounts[:-1], strict=True)]
        levels, features = VeryDeepVAE(SMALL, SHAPE).apply(variables, x + amounts[-1], given(shifted))
        return [jnp.stack(q) for _, q, _ in levels], [jnp.stack(p) for _, _, p in levels], features

    posteriors, priors, features = unoptimized(jax.jacfwd(moved))(jnp.zeros(SMALL.depth + 1))
    for i in range(SMALL.depth):
        for of in range(SMALL.depth):
            assert bool(jnp.any(priors[of][..., i] != 0.0)) == (of > i)
            assert bool(jnp.any(posteriors[of][..., i] != 0.0)) == (of > i)
        assert float(jnp.abs(features[..., i]).max()) > 0
        assert float(jnp.abs(posteriors[i][..., -1]).max()) > 0
        np.testing.assert_array_equal(priors[i][..., -1], 0.0)
    np.testing.assert_array_equal(features[..., -1], 0.0)


def test_choose_is_called_from_the_top_with_q_and_p():
    calls = []

    def choose(i, q, p):
        calls.append((i, q is None, p[0].shape, p[1].shape))
        return p[0]

    jax.eval_shape(lambda v: VeryDeepVAE(SMALL, SHAPE).apply(v, 3, choose), perturbed(SMALL))
    assert calls == [(i, True, (3, n, n, 2), (3, n, n, 2)) for i, n in enumerate([1, 2, 6, 6])]


@pytest.mark.slow
def test_divergence_is_moderate_at_initialization_however_deep():
    # 45 levels: p starts as N(0, I), q near it, and neither grows with depth
    config = VeryDeepVAEConfig(
        width=16, z_channels=2, layers=((1, 2), (4, 43)), encoder=((4, 2), (1, 1)), out_channels=3
    )
    network, x = VeryDeepVAE(config, (4, 4, 1)), images(2, (4, 4, 1))
    noise = latents(config)

    def choose(i, q, p):
        return q[0] + jnp.exp(0.5 * q[1]) * noise[i]

    (levels, features), variables = network.init_with_output(
        jax.random.key(1), x, choose
    )  # to compile it would take minutes
    assert len(levels) == config.depth == 45
    for _, q, p in levels:
        np.testing.assert_array_equal(p, 0.0)
        divergence = 0.5 * (jnp.exp(q[1]) + q[0] ** 2 - 1.0 - q[1])  # to N(0, I), of each number in nats
        assert -1e-7 < float(divergence.mean()) < 0.1
        assert float(jnp.abs(q[0]).max()) > 1e-6
    assert 1e-2 < float(jnp.std(features)) < 3.0
    params = variables["params"]  # layers that add to a residual stream are divided by the root of its length
    for block, last, fan, length in (
        (params["level_9"]["residual"], "Conv_3", 4, 45),
        (params["level_9"], "project", 2, 45),
        (params["encoder_4_1"], "Conv_3", 4, 4),
    ):
        assert 0.8 < float(jnp.abs(block[last]["kernel"]).max()) * (fan * length) ** 0.5 <= 1.0


@pytest.mark.slow
def test_bfloat16_is_near_float32_with_float32_parameters_and_output():
    x, z, variables = images(), latents(SMALL), perturbed(SMALL)
    half = replace(SMALL, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(perturbed(half))} == {jnp.dtype("float32")}
    exact, rough = run(SMALL, variables, x, z), run(half, variables, x, z)
    for expected, got in zip(jax.tree.leaves(exact), jax.tree.leaves(rough), strict=True):
        assert got.dtype == jnp.float32
        assert float(jnp.linalg.norm(got - expected)) <= 0.05 * float(jnp.linalg.norm(expected))
    assert float(jnp.linalg.norm(rough[1] - exact[1])) > 1e-5 * float(jnp.linalg.norm(exact[1]))


def test_examples_do_not_see_each_other():
    x, z, variables = images(), latents(SMALL), perturbed(SMALL)
    before, after = run(SMALL, variables, x, z), run(SMALL, variables, x.at[0].add(1.0), z)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
    assert np.all(before[0][0][1][0][0] != after[0][0][1][0][0])


def test_large_resolutions_start_from_what_comes_from_above():
    params = perturbed(replace(SMALL, largest_bias=2))["params"]
    assert "bias_2" in params
    assert "bias_6" not in params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ((1, 1), (4, 1))}, r"layers have resolutions \[1, 4\]: .* 6 x 6"),
        ({"layers": ()}, r"layers have resolutions \[\]: .* 6 x 6"),
        ({"layers": ((4, 1), (6, 1))}, "layers go from 4 to 6: each must be a multiple"),
        ({"layers": ((6, 1), (6, 1))}, "layers go from 6 to 6"),
        ({"encoder": ((6, 1), (1, 1))}, r"encoder has resolutions \[6, 1\]: set .* \[6, 2, 1\]"),
        ({"layers": ((1, 0), (2, 2), (6, 2))}, "layers and encoder: .* 1 level or more"),
        ({"encoder": ((6, 1), (2, -1), (1, 1))}, "layers and encoder: .* 0 encoder blocks or more"),
        ({"z_channels": 0}, "0 z_channels"),
        ({"width": 3}, "3 x 0.25 channels inside a block"),
    ],
)
def test_invalid_configs_and_inputs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change).check(SHAPE)
    with pytest.raises(ValueError, match=message):
        VeryDeepVAE(replace(SMALL, **change), SHAPE).init(jax.random.key(0), images(), mean_of_q)


def test_images_and_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"layers have resolutions .* 6 x 4"):
        SMALL.check((6, 4, 3))
    network, variables = VeryDeepVAE(SMALL, SHAPE), perturbed(SMALL)
    with pytest.raises(ValueError, match=r"images have shape \(6, 6, 1\): .* \(6, 6, 3\)"):
        network.apply(variables, images(1, (6, 6, 1)), mean_of_q)
    with pytest.raises(ValueError, match=r"z of shape \(1, 1, 2\) at level 0: return shape \(2, 1, 1, 2\)"):
        network.apply(variables, 2, lambda i, q, p: p[0][0])
