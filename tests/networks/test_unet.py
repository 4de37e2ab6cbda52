"""The U-Net: its size against a count by hand, and properties of its output."""

from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import unoptimized
from vdm_jax.networks.blocks import Attention, ResidualBlock, normalize, upsample
from vdm_jax.networks.mlp import MLPConfig
from vdm_jax.networks.unet import UNet, UNetConfig

SMALL = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), groups=4, dropout=0.0)
SMALLEST = replace(SMALL, multipliers=(1,), attention_resolutions=(), middle_attention=False)


def normal(*shape):
    return jnp.asarray(np.random.RandomState(0).standard_normal(shape), jnp.float32)


def arguments(batch=3, size=8, channels=1):
    return normal(batch, size, size, channels), jnp.asarray(np.linspace(1.0, 900.0, batch), jnp.float32)


def initial(config, *args):
    # Unoptimized: a hundred initializers take XLA ten times longer to compile well than to run.
    return unoptimized(UNet(config).init)(jax.random.key(1), *args)


def initial_shapes(config, *args):
    return jax.eval_shape(UNet(config).init, jax.random.key(1), *args)


@cache
def compiled(config):
    """The network, compiled once for all tests."""
    return unoptimized(UNet(config).apply)


def output(config, variables, *args):
    return compiled(config)(variables, *args)


def perturbed(module, *args):
    """Random parameters (scales near one), so that nothing is zero by initialization; nothing is compiled."""
    random = np.random.RandomState(2)

    def sample(path, leaf):
        center = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        spread = 0.1 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(center + spread * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(sample, jax.eval_shape(module.init, jax.random.key(1), *args))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_by_hand(image, ch, widths, blocks, attention_levels):
    """Parameters of Ho et al.'s U-Net from the paper's description, layer by layer."""

    def conv(a, b):
        return 9 * a * b + b

    def dense(a, b):
        return a * b + b

    def norm(a):
        return 2 * a

    def residual(a, b):
        return norm(a) + conv(a, b) + dense(4 * ch, b) + norm(b) + conv(b, b) + (dense(a, b) if a != b else 0)

    def attention(a):
        return norm(a) + 4 * dense(a, a)

    total = dense(ch, 4 * ch) + dense(4 * ch, 4 * ch) + conv(image, ch)
    skips, now = [ch], ch
    for level, width in enumerate(widths):
        for _ in range(blocks):
            total += residual(now, width) + (attention(width) if level in attention_levels else 0)
            now = width
            skips.append(now)
        if level + 1 < len(widths):
            total += conv(now, now)
            skips.append(now)
    total += 2 * residual(now, now) + attention(now)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks + 1):
            total += residual(now + skips.pop(), width) + (attention(width) if level in attention_levels else 0)
            now = width
        if level:
            total += conv(now, now)
    return total + norm(now) + conv(now, image)


def test_cifar_network_has_the_paper_s_35_7_million_parameters():
    shapes = initial_shapes(UNetConfig(), *arguments(1, 32, 3))
    assert count(shapes) == 35_746_307 == count_by_hand(3, 128, (128, 256, 256, 256), 2, {1})


def test_small_network_s_size_follows_the_same_count():
    by_hand = count_by_hand(1, 8, (8, 16), 1, {1})
    assert count(initial_shapes(SMALL, *arguments())) == by_hand
    waves = 4  # sine and cosine for two exponents, each with a 3 x 3 kernel
    assert count(initial_shapes(replace(SMALL, fourier_exponents=(1, 2)), *arguments())) == by_hand + 9 * waves * 8


@pytest.mark.slow
def test_output_is_zero_at_initialization_and_its_last_layer_learns():
    x, t = arguments()
    variables = initial(SMALL, x, t)
    np.testing.assert_array_equal(output(SMALL, variables, x, t), 0.0)
    gradient = unoptimized(jax.grad(lambda v: UNet(SMALL).apply(v, x, t).sum()))(variables)["params"]
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["Conv_3"]))


@pytest.mark.parametrize("embedding", ["sinusoidal", "log_snr"])
def test_condition_reaches_the_output(embedding):
    config = replace(SMALL, embedding=embedding)
    x, t = arguments()
    variables = perturbed(UNet(config), x, t)
    moved = output(config, variables, x, jnp.asarray([1.5, -3.0, 7.0]))
    same = output(config, variables, x, jnp.asarray([1.5, -3.0, 8.0]))
    np.testing.assert_array_equal(moved[:2], same[:2])
    assert float(jnp.abs(moved[2] - same[2]).max()) > 1e-3


def test_examples_do_not_see_each_other():
    config = replace(SMALL, position_bias=True, fourier_exponents=(1, 2))
    x, t = arguments()
    variables = perturbed(UNet(config), x, t)
    before, after = (output(config, variables, images, t) for images in (x, x.at[0].add(x[1])))
    np.testing.assert_array_equal(before[1:], after[1:])
    assert float(jnp.abs(before[0] - after[0]).max()) > 1e-3


def test_position_bias_distinguishes_positions():
    # With kernels symmetric from left to right, a network can distinguish left from right only by the bias.
    config = replace(SMALLEST, position_bias=True)
    flat, t = jnp.ones((1, 8, 8, 1)), jnp.ones(1)
    variables = perturbed(UNet(config), flat, t)
    symmetric = jax.tree.map(lambda k: (k + k[:, ::-1]) / 2 if k.ndim == 4 else k, variables)
    bias = symmetric["params"].pop("position_bias")

    def asymmetry(bias):
        out = output(config, {"params": {**symmetric["params"], "position_bias": bias}}, flat, t)
        return float(jnp.abs(out - out[:, :, ::-1]).max())

    assert asymmetry(jnp.zeros_like(bias)) < 1e-5
    assert asymmetry(bias) > 1e-2


def test_label_reaches_the_output_and_null_class_exists():
    config = replace(SMALLEST, num_classes=3)
    x, t = arguments()
    variables = perturbed(UNet(config), x, t, jnp.zeros(3, jnp.int32))
    outputs = [output(config, variables, x, t, jnp.full(3, label)) for label in range(4)]  # 3 is "no label"
    for i in range(4):
        for j in range(i):
            assert float(jnp.abs(outputs[i] - outputs[j]).max()) > 1e-3


def test_dropout_differs_between_examples_and_is_off_outside_training():
    config = replace(SMALLEST, dropout=0.5)
    x, t = jnp.ones((3, 8, 8, 1)), jnp.ones(3)
    variables = perturbed(UNet(config), x, t)
    still = output(config, variables, x, t)
    np.testing.assert_array_equal(still, output(SMALLEST, variables, x, t))
    np.testing.assert_allclose(still[0], still[1], atol=1e-6)
    training = unoptimized(lambda v, key: UNet(config).apply(v, x, t, train=True, rngs={"dropout": key}))
    shaken = training(variables, jax.random.key(3))
    assert float(jnp.abs(shaken[0] - shaken[1]).max()) > 1e-2


@pytest.mark.slow
def test_bfloat16_is_near_float32_with_float32_parameters_and_output():
    x, t = arguments()
    variables = perturbed(UNet(SMALL), x, t)
    half = UNet(replace(SMALL, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(initial_shapes(half.config, x, t))} == {jnp.dtype("float32")}
    exact, rough = output(SMALL, variables, x, t), output(half.config, variables, x, t)
    assert rough.dtype == jnp.float32
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    assert 1e-5 < error < 0.05  # not float32 in disguise, and no more than bfloat16's 8 bits through the depth


def test_attention_against_loops():
    x = normal(2, 2, 2, 4)
    module = Attention(2, jnp.dtype("float32"))
    params = perturbed(module, x)["params"]
    got = np.asarray(unoptimized(module.apply)({"params": params}, x))
    h = np.asarray(x, np.float64).reshape(2, 4, 2, 2)  # example, position, group, channel of the group
    h = (h - h.mean((1, 3), keepdims=True)) / np.sqrt(h.var((1, 3), keepdims=True) + 1e-6)
    h = h.reshape(2, 4, 4) * np.asarray(params["GroupNorm_0"]["scale"]) + np.asarray(params["GroupNorm_0"]["bias"])

    def layer(i, z):
        return z @ np.asarray(params[f"Dense_{i}"]["kernel"]) + np.asarray(params[f"Dense_{i}"]["bias"])

    for example in range(2):
        q, k, v = (layer(i, h[example]) for i in range(3))
        for position in range(4):
            weights = np.exp([q[position] @ k[other] / np.sqrt(4) for other in range(4)])
            mixed = sum(w * v[other] for other, w in enumerate(weights)) / weights.sum()
            want = np.asarray(x[example]).reshape(4, 4)[position] + layer(3, mixed)
            np.testing.assert_allclose(got[example].reshape(4, 4)[position], want, rtol=1e-4, atol=1e-5)


def test_blocks_are_the_identity_at_initialization():
    x, level = normal(2, 4, 4, 8), jnp.ones((2, 5))
    attention, block = Attention(4, jnp.dtype("float32")), ResidualBlock(8, 4, 0.0, jnp.dtype("float32"))

    def blocks(x, level):
        yield attention.init_with_output(jax.random.key(1), x)[0]
        yield block.init_with_output(jax.random.key(1), x, level, False)[0]

    for got in unoptimized(lambda *given: list(blocks(*given)))(x, level):
        np.testing.assert_array_equal(got, x)


def test_upsample_repeats_each_pixel():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    want = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(upsample(x)[0, :, :, 0], want)


def test_a_series_is_an_image_with_equal_columns():
    """With kernels that are zero beside their middle column, equal columns stay equal and do not mix."""
    config = replace(SMALL, position_bias=True, fourier_exponents=(1,))
    images, t = arguments(2, 8, 3)
    series = images[:, :, 0]
    variables = perturbed(UNet(config), series, t)

    def widened(leaf):
        if leaf.ndim == 3:  # a kernel of width 3, (3, in, out)
            return jnp.pad(leaf[:, None], ((0, 0), (1, 1), (0, 0), (0, 0)))
        return leaf

    wide = jax.tree.map(widened, variables)
    wide["params"]["position_bias"] = jnp.repeat(variables["params"]["position_bias"][:, None], 4, axis=1)
    got = output(config, variables, series, t)
    want = output(config, wide, jnp.repeat(series[:, :, None], 4, axis=2), t)
    assert got.shape == series.shape
    np.testing.assert_allclose(want, jnp.repeat(got[:, :, None], 4, axis=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "multipliers"),
    [
        ((8, 8, 1), (1, 2)),
        ((28, 28, 1), (1, 2, 2)),
        ((64, 64, 3), (1, 2, 2, 2, 2)),
        ((64, 24, 3), (1, 2, 2)),  # 16 x 6: 3 would be less than 4
        ((30, 20, 3), (1, 2)),
        ((25, 25, 1), (1,)),
        ((1000, 2), (1, 2, 2, 2)),
    ],
)
def test_multipliers_that_are_left_open_are_chosen_by_size(shape, multipliers):
    config = replace(SMALL, multipliers=())
    explicit = config.resolved(shape)
    assert explicit == replace(SMALL, multipliers=multipliers)
    assert explicit.resolved((8, 8, 1)) == explicit
    given = jnp.zeros((1, *shape)), jnp.zeros(1)
    variables = [jax.eval_shape(UNet(each).init, jax.random.key(0), *given) for each in (config, explicit)]
    assert jax.tree.map(jnp.shape, variables[0]) == jax.tree.map(jnp.shape, variables[1])


def test_images_too_large_for_the_resolutions_that_their_size_allows_are_refused():
    with pytest.raises(ValueError, match=r"sides \(90, 90\) can only be halved to \(45, 45\) without a remainder"):
        replace(SMALL, multipliers=()).check((90, 90, 3))


@pytest.mark.parametrize(
    ("config", "size", "label", "message"),
    [
        (SMALL, 7, None, "7 x 7 cannot be halved 1 times"),
        (replace(SMALL, groups=3), 8, None, "8 channels do not split into 3 groups"),
        (SMALL, 8, 0, "num_classes is 0: set num_classes"),
        (replace(SMALL, num_classes=2), 8, None, "num_classes is 2: set num_classes"),
    ],
)
def test_invalid_configs_and_inputs_are_refused(config, size, label, message):
    x, t = arguments(1, size)
    label = None if label is None else jnp.full(1, label)
    with pytest.raises(ValueError, match=message):
        initial(config, x, t, label)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (SMALL, (7, 2), "series of length 7 cannot be halved 1 times"),
        (SMALL, (7,), r"a U-Net takes images .* or series .*, not examples of shape \(7,\)"),
        (MLPConfig(), (7, 2), r"an MLP takes vectors .*, not examples of shape \(7, 2\)"),
    ],
)
def test_shapes_that_a_network_cannot_take_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        config.check(shape)


@pytest.mark.parametrize(("dtype", "mean", "atol"), [("bfloat16", 300.0, 0.02), ("float32", 3000.0, 2e-3)])
def test_normalize_has_float32_statistics_that_do_not_cancel(dtype, mean, atol):
    x = (mean + normal(1, 8, 8, 4)).astype(dtype)

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            return normalize(x, 1)

    out, _ = jax.jit(Normalized().init_with_output)(jax.random.key(0), x)
    exact = np.asarray(x, np.float64)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), (exact - exact.mean()) / exact.std(), atol=atol)


def test_out_channels_are_columns_of_the_last_layer():
    x, t = arguments()
    two = replace(SMALLEST, out_channels=2)
    both = perturbed(UNet(two), x, t)
    pair = output(two, both, x, t)
    last = jax.tree.map(lambda leaf: leaf[..., 1:], both["params"]["Conv_1"])
    second = output(SMALLEST, {"params": {**both["params"], "Conv_1": last}}, x, t)
    np.testing.assert_allclose(pair[..., 1:], second, rtol=1e-5, atol=1e-5)


def test_remat_changes_no_number_and_takes_less_memory():
    """Including dropout. Parameter names are the same, so that a run can start without it and resume with it."""
    config = replace(SMALLEST, dropout=0.5)
    x, condition = arguments(batch=16)
    plain, less = UNet(config), UNet(replace(config, remat=True))
    params = perturbed(plain, x, condition)
    assert jax.tree.structure(initial_shapes(less.config, x, condition)) == jax.tree.structure(params)

    def gradient(network):
        def loss(params):
            output = network.apply(params, x, condition, train=True, rngs={"dropout": jax.random.key(4)})
            return jnp.square(output - 1.0).mean()

        return unoptimized(jax.value_and_grad(loss)).lower(params).compile()

    both = gradient(plain), gradient(less)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *(run(params) for run in both))
    kept, again = (run.memory_analysis().temp_size_in_bytes for run in both)
    assert again < 0.8 * kept
