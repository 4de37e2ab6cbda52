"""The noise-conditional score network: size and arithmetic against the published code, and receptive fields."""

from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import unoptimized
from vdm_jax.networks.refinenet import InstanceNormPlus, RefineNet, RefineNetConfig

SMALL = RefineNetConfig(channels=4, num_levels=3)


def arguments(size=(6, 12, 3), batch=3):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((batch, *size)), jnp.float32)
    return x, jnp.arange(batch) % SMALL.num_levels


@cache
def shapes(config, channels):
    return jax.eval_shape(RefineNet(config).init, jax.random.key(1), *arguments((2, 2, channels)))


@cache
def perturbed(config, channels=3):
    """Random parameters, so that nothing is zero and levels differ; nothing is compiled."""
    random = np.random.RandomState(2)

    def sample(path, leaf):
        table = "table" in jax.tree_util.keystr(path)
        spread = 0.3 if table or leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(float(table) + spread * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(sample, shapes(config, channels))


@cache
def compiled(config):
    return unoptimized(RefineNet(config).apply)


def relabelled(variables, change):
    """The same network with other norm parameters."""
    return jax.tree.map(lambda leaf: change(leaf) if leaf.ndim == 3 else leaf, variables)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_by_hand(n, levels, image):
    """Parameters of CondRefineNetDilated in ermongroup/ncsn, models/cond_refinenet_dilated.py, module by module."""

    def conv(a, b, size=3, bias=1):
        return size**2 * a * b + bias * b

    def norm(a):  # an embedding of gamma, alpha and beta
        return levels * 3 * a

    def residual(a, b, shortcut):  # conv1 keeps the channels in downsampling blocks; elsewhere a is b
        return norm(a) + conv(a, a) + norm(a) + conv(a, b) + shortcut

    def rcu(a, blocks):
        return blocks * 2 * (norm(a) + conv(a, a, bias=0))

    def crp(a):
        return 2 * (norm(a) + conv(a, a, bias=0))

    def msf(a, b):
        return 2 * (norm(a) + conv(a, b))

    total = conv(image, n) + norm(n) + conv(n, image)  # begin_conv, normalizer, end_conv
    total += 2 * residual(n, n, 0)  # res1
    total += residual(n, 2 * n, conv(n, 2 * n, size=1)) + residual(2 * n, 2 * n, 0)  # res2, by ConvMeanPool
    total += 2 * (residual(2 * n, 2 * n, conv(2 * n, 2 * n)) + residual(2 * n, 2 * n, 0))  # res3, res4, dilated
    total += rcu(2 * n, 2) + crp(2 * n) + rcu(2 * n, 1)  # refine1, without an MSF
    total += 2 * rcu(2 * n, 2) + msf(2 * n, 2 * n) + crp(2 * n) + rcu(2 * n, 1)  # refine2
    total += 2 * rcu(2 * n, 2) + msf(2 * n, n) + crp(n) + rcu(n, 1)  # refine3
    return total + 2 * rcu(n, 2) + msf(n, n) + crp(n) + rcu(n, 3)  # refine4


@pytest.mark.slow
def test_cifar_network_is_as_large_as_the_published_code_s():
    assert count(shapes(RefineNetConfig(), 3)) == 30_117_635 == count_by_hand(128, 10, 3)


@pytest.mark.slow
def test_small_network_s_size_follows_the_same_count():
    assert count(shapes(SMALL, 1)) == count_by_hand(4, 3, 1)
    assert count(shapes(replace(SMALL, num_levels=1), 1)) == count_by_hand(4, 1, 1)


def reference(params, x, index):
    """CondRefineNetDilated.forward in float64, from the order of operations of the published code."""

    def stage(number, h):
        for block in (2 * number, 2 * number + 1):
            dilation, down = (1, 1, 2, 4)[number], number > 0 and block % 2 == 0
            h = residual(params[f"DilatedBlock_{block}"], h, index, dilation, down)
        return h

    layer1 = stage(0, conv(params["Conv_0"], x))
    layer2 = stage(1, layer1)
    layer3 = stage(2, layer2)
    layer4 = stage(3, layer3)
    ref = refine(params["RefineBlock_0"], [layer4], index, 1)
    ref = refine(params["RefineBlock_1"], [layer3, ref], index, 1)
    ref = refine(params["RefineBlock_2"], [layer2, ref], index, 1)
    ref = refine(params["RefineBlock_3"], [layer1, ref], index, 3)
    last = params["NormedConvolution_0"]
    return conv(last["Conv_0"], elu(norm(last["InstanceNormPlus_0"], ref, index)))


def elu(h):
    return np.where(h > 0, h, np.exp(np.minimum(h, 0)) - 1)


def norm(p, h, index):
    means = h.mean((1, 2), keepdims=True)
    unit = (h - means) / np.sqrt(h.var((1, 2), keepdims=True) + 1e-5)
    over = (means - means.mean(3, keepdims=True)) / np.sqrt(means.var(3, keepdims=True, ddof=1) + 1e-5)
    gamma, alpha, beta = np.asarray(p["table"], np.float64)[np.asarray(index)].transpose(1, 0, 2)[:, :, None, None]
    return gamma * (unit + alpha * over) + beta


def window(h, reach, dilation=1):
    """(dy, dx) and the image that many steps of `dilation` further, zero beyond the border; reach to each side."""
    edge, (height, width) = reach * dilation, h.shape[1:3]
    padded = np.pad(h, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            yield i, j, padded[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]


def conv(p, h, dilation=1):
    kernel = p["kernel"]
    return sum(part @ kernel[i, j] for i, j, part in window(h, len(kernel) // 2, dilation)) + p.get("bias", 0.0)


def mean_pool(h):
    return (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4


def residual(p, x, index, dilation, down):
    h = x
    for i in range(2):
        part = p[f"NormedConvolution_{i}"]
        h = conv(part["Conv_0"], elu(norm(part["InstanceNormPlus_0"], h, index)), dilation)
    if not down:
        return x + h
    if dilation > 1:
        return conv(p["Conv_0"], x, dilation) + h
    return mean_pool(conv(p["Conv_0"], x)) + mean_pool(h)


def refine(p, xs, index, units):
    layers = iter(range(100))  # Flax numbers the layers of a kind in the order in which they are called

    def layer(h, between):
        part = p[f"NormedConvolution_{next(layers)}"]
        return conv(part["Conv_0"], between(norm(part["InstanceNormPlus_0"], h, index)))

    def rcu(h, blocks):
        for _ in range(blocks):
            h = h + layer(layer(h, elu), elu)
        return h

    hs = [rcu(x, 2) for x in xs]
    h = hs[0]
    if len(hs) > 1:
        hs = [conv(p[f"Conv_{i}"], norm(p[f"InstanceNormPlus_{i}"], h, index)) for i, h in enumerate(hs)]
        h = hs[0] + bilinear(hs[1], *hs[0].shape[1:3])
    h = path = elu(h)
    for _ in range(2):
        path = layer(path, lambda h: sum(part for _, _, part in window(h, 2)) / 25)
        h = h + path
    return rcu(h, units)


def bilinear(h, height, width):
    """Bilinear interpolation with aligned corners, pixel by pixel."""
    out = np.zeros((len(h), height, width, h.shape[3]))
    for i in range(height):
        for j in range(width):
            y, x = i * (h.shape[1] - 1) / max(height - 1, 1), j * (h.shape[2] - 1) / max(width - 1, 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, h.shape[1] - 1), min(left + 1, h.shape[2] - 1)
            above = h[:, top, left] * (1 - x + left) + h[:, top, right] * (x - left)
            below = h[:, down, left] * (1 - x + left) + h[:, down, right] * (x - left)
            out[:, i, j] = above * (1 - y + top) + below * (y - top)
    return out


@pytest.mark.parametrize(
    "size", [(6, 12, 3), *(pytest.param(size, marks=pytest.mark.slow) for size in [(8, 8, 1), (28, 28, 1), (2, 2, 2)])]
)
def test_network_is_song_and_ermon_s(size):
    x, index = arguments(size)
    variables = perturbed(SMALL, size[2])
    got = compiled(SMALL)(variables, x, index)
    want = reference(jax.tree.map(np.float64, variables["params"]), np.float64(x), index)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "mean", "deviation", "atol"),
    [
        ("float32", 0.0, 1.0, 1e-5),
        ("float32", 0.003, 0.003, 1e-5),  # the square root of 1e-5
        ("float32", 3000.0, 1.0, 1e-2),
        ("bfloat16", 300.0, 1.0, 1e-2),
    ],
)
def test_norm_has_float32_statistics_that_do_not_cancel(dtype, mean, deviation, atol):
    noise = deviation * jax.random.normal(jax.random.key(0), (3, 8, 6, 5))
    x = (mean * jnp.arange(5.0).reshape(1, 1, 1, 5) + noise).astype(dtype)
    table = jnp.asarray(1.0 + np.random.RandomState(0).standard_normal((3, 3, 5)), jnp.float32)
    got = InstanceNormPlus(3).apply({"params": {"table": table}}, x, jnp.array([2, 0, 1]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, norm({"table": table}, np.float64(x), [2, 0, 1]), atol=atol)


@pytest.mark.slow
def test_norm_of_a_constant_is_its_bias_and_can_be_differentiated():
    x, index, module = jnp.full((2, 4, 4, 3), 7.0), jnp.array([0, 2]), InstanceNormPlus(3)
    variables = module.init(jax.random.key(0), x, index)
    np.testing.assert_allclose(module.apply(variables, x, index), 0.0, atol=1e-6)
    gradient = jax.grad(lambda x: module.apply(variables, x, index)[0, 0, 0, 0])(x)
    assert np.all(np.isfinite(gradient))


def test_norm_keeps_how_channels_means_differ_by_alpha():
    # constant channels: an instance norm sees nothing; what is left are the means, standardized with the divisor C - 1
    x = np.broadcast_to(np.float32([1.0, 2.0, 6.0]), (1, 4, 4, 3))
    table = np.stack([np.full((3, 3), level, np.float32) for level in (0.0, 1.0, 2.0)])
    got = jax.jit(InstanceNormPlus(3).apply)({"params": {"table": table}}, x, np.int32([2]))
    want = 2.0 * 2.0 * np.array([-2.0, -1.0, 3.0]) / np.sqrt(7.0) + 2.0
    np.testing.assert_allclose(got[0], np.broadcast_to(want, (4, 4, 3)), rtol=1e-5)


@pytest.mark.slow
def test_scales_start_about_one_and_biases_at_zero():
    module = InstanceNormPlus(100)
    table = module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 50)), jnp.zeros(1, jnp.int32))["params"]["table"]
    assert table.shape == (100, 3, 50)
    np.testing.assert_array_equal(table[:, 2], 0.0)
    for part in (table[:, 0], table[:, 1]):  # 5,000 samples of N(1, 0.02^2)
        assert abs(float(part.mean()) - 1.0) < 5 * 0.02 / 5000**0.5
        assert abs(float(part.std()) / 0.02 - 1.0) < 5 / 10000**0.5
    assert abs(np.corrcoef(table[:, 0].ravel(), table[:, 1].ravel())[0, 1]) < 5 / 5000**0.5


@pytest.mark.slow
def test_level_reaches_the_output_only_as_a_row_of_the_norms_tables():
    x, _ = arguments()
    variables = perturbed(SMALL)
    images = jnp.repeat(x[:1], 3, axis=0)
    levels = compiled(SMALL)(variables, images, jnp.arange(3))
    for i in range(3):
        for j in range(i):
            assert float(jnp.abs(levels[i] - levels[j]).max()) > 1e-2
    order = jnp.array([2, 0, 1])
    moved = compiled(SMALL)(relabelled(variables, lambda table: table[order]), images, jnp.arange(3))
    np.testing.assert_allclose(moved, levels[order], atol=1e-5)
    alike = compiled(SMALL)(relabelled(variables, lambda table: table[:1].repeat(3, 0)), images, jnp.arange(3))
    np.testing.assert_allclose(alike, levels[:1].repeat(3, 0), atol=1e-5)


def test_index_out_of_range_gives_nan_for_its_example_alone():
    x, _ = arguments()
    variables = perturbed(SMALL)
    inside = compiled(SMALL)(variables, x, jnp.array([0, 1, 2]))
    outside = compiled(SMALL)(variables, x, jnp.array([-1, 1, 3]))
    assert np.all(np.isfinite(inside))
    np.testing.assert_array_equal(outside[1], inside[1])
    assert np.all(np.isnan(outside[0]))
    assert np.all(np.isnan(outside[2]))


def test_examples_do_not_see_each_other():
    x, index = arguments()
    before = compiled(SMALL)(perturbed(SMALL), x, index)
    after = compiled(SMALL)(perturbed(SMALL), x.at[0].add(x[1]), index)
    np.testing.assert_array_equal(before[1:], after[1:])
    assert float(jnp.abs(before[0] - after[0]).max()) > 1e-2


@pytest.mark.slow
def test_receptive_field_of_the_deepest_stage_follows_from_its_dilations():
    # A norm sees the whole image. Without norms: seven convolutions at full resolution; then, where a pixel is a pair
    # of them, two that are not dilated, four of dilation 2 and four of dilation 4.
    reach = 7 + 2 * (2 + 4 * 2 + 4 * 4)
    config, width = replace(SMALL, channels=2), 136
    variables = perturbed(config, 1)

    def without_norms(call, args, kwargs, context):
        return args[0] if isinstance(context.module, InstanceNormPlus) else call(*args, **kwargs)

    def deepest(x):
        with nn.intercept_methods(without_norms):
            _, seen = RefineNet(config).apply(variables, x, jnp.zeros(1, jnp.int32), capture_intermediates=True)
        return seen["intermediates"]["DilatedBlock_7"]["__call__"][0][0, 0, 34].sum()  # of pixels 68 and 69

    x = jax.random.normal(jax.random.key(0), (1, 2, width, 1))
    seen = np.flatnonzero(np.any(np.asarray(unoptimized(jax.grad(deepest))(x)) != 0, axis=(0, 1, 3)))
    assert (seen[0], seen[-1], len(seen)) == (68 - reach, 69 + reach, 2 * reach + 2)


@pytest.mark.slow
def test_every_parameter_of_the_levels_in_the_batch_has_a_gradient():
    x, index = arguments((20, 20, 1), 2)  # at half of this every tap of the widest kernels is inside the image
    variables = perturbed(SMALL, 1)
    gradient = unoptimized(jax.grad(lambda v: jnp.sum(RefineNet(SMALL).apply(v, x, index) ** 2)))(variables)
    for leaf in jax.tree.leaves(gradient):
        if leaf.ndim == 3:
            assert np.all(leaf[:2] != 0)
            np.testing.assert_array_equal(leaf[2], 0.0)
        else:
            assert np.all(leaf != 0)


@pytest.mark.slow
def test_bfloat16_is_near_float32_with_float32_parameters_and_output():
    x, index = arguments()
    half, variables = replace(SMALL, dtype="bfloat16"), perturbed(SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half, 1))} == {jnp.dtype("float32")}
    exact, rough = compiled(SMALL)(variables, x, index), compiled(half)(variables, x, index)
    assert rough.dtype == jnp.float32
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    assert 1e-5 < error < 0.05  # not float32 in disguise, and no more than bfloat16's 8 bits through the depth


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, (7, 8, 1), "images of 7 x 8 cannot be halved: pad or crop them to even sides"),
        ({}, (8, 7, 1), "images of 8 x 7 cannot be halved"),
        ({"channels": 1}, (8, 8, 1), "1 channels and 3 noise levels: set 2 channels"),
        ({"num_levels": 0}, (8, 8, 1), "4 channels and 0 noise levels"),
    ],
)
def test_invalid_configs_and_inputs_are_refused(change, size, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change).check(size)
    with pytest.raises(ValueError, match=message):
        RefineNet(replace(SMALL, **change)).init(jax.random.key(0), *arguments(size))
