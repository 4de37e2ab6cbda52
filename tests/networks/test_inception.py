"""Inception-v3: tensors, pooling, resizing, order of branches; and against torchvision, if installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.networks import inception

SHAPES = inception.weight_shapes()


def random_weights(seed=0):
    """Weights that keep activations of order one."""
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in SHAPES.items():
        value = random.standard_normal(shape)
        match name.split(".")[-2:]:
            case ["conv", _]:
                value *= np.sqrt(2.0 / np.prod(shape[1:]))
            case [_, "running_var"]:
                value = np.exp(0.1 * value)
            case [_, "weight"]:
                value = 1.0 + 0.1 * value
            case _:
                value *= 0.1
        weights[name] = value.astype(np.float32)
    return weights


def test_the_number_of_parameters_is_torchvision_s():
    # torchvision's inception_v3 without its auxiliary classifier: 23,834,568, including 2,049,000 in the last layer.
    learned = [shape for name, shape in SHAPES.items() if "running" not in name]
    assert sum(np.prod(shape) for shape in learned) == 23_834_568 - 2_049_000
    assert len(SHAPES) == 94 * 5
    assert SHAPES["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert SHAPES["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)


@pytest.mark.slow
def test_features_come_in_the_order_of_the_branches():
    # Convolutions with zero weights leave max(bias - mean scale / (var + 0.001)^1/2, 0) of the last block's branches.
    weights = {
        name: np.zeros_like(value) if name.endswith("conv.weight") else value
        for name, value in random_weights().items()
    }
    branches = ["branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool"]
    bias, mean, scale, var = (
        np.concatenate([weights[f"Mixed_7c.{branch}.bn.{part}"] for branch in branches]).astype(np.float64)
        for part in ("bias", "running_mean", "weight", "running_var")
    )
    expected = np.maximum(bias - mean * scale / np.sqrt(var + 1e-3), 0.0)
    got = jax.jit(inception.inception_features)(weights, jnp.zeros((2, 75, 75, 3)))
    assert got.shape == (2, inception.FEATURES)
    np.testing.assert_allclose(got, np.stack([expected, expected]), rtol=1e-5, atol=1e-6)


def test_mean_pools_exclude_padding_and_maximum_pools_ignore_it():
    x = jnp.arange(-12.0, -3.0).reshape(1, 3, 3, 1)
    corner = (-12.0 - 11.0 - 9.0 - 8.0) / 4
    assert float(inception._mean_pool(x)[0, 0, 0, 0]) == pytest.approx(corner)
    assert float(inception._mean_pool(x)[0, 1, 1, 0]) == pytest.approx(-8.0)
    np.testing.assert_allclose(inception._mean_pool(jnp.full((1, 5, 4, 2), 3.0)), 3.0, rtol=1e-6)
    assert float(inception._max_pool(x, padding=1)[0, 0, 0, 0]) == -8.0
    assert inception._max_pool(x, stride=2).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("side", [8, 32, 299, 598])
def test_resizing_a_ramp(side):
    # Pixel i is centered at i + 1/2 and the edge is repeated: output j is the ramp at (j + 1/2) side / 299 - 1/2.
    ramp = jnp.broadcast_to(jnp.arange(float(side))[None, :, None, None], (1, side, side, 3))
    expected = np.clip((np.arange(299) + 0.5) * side / 299 - 0.5, 0.0, side - 1.0)
    for image, axis in ((ramp, 1), (ramp.swapaxes(1, 2), 2)):
        got = np.moveaxis(np.asarray(inception.resize(image)), axis, -1)
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-5, atol=1e-4)


def test_resizing_larger_images_does_not_filter():
    # Every output interpolates at most four pixels: without a filter the output is white at the white pixels.
    image = jnp.zeros((1, 897, 897, 1)).at[:, 1::3, 1::3].set(1.0)
    np.testing.assert_allclose(inception.resize(image), 1.0, atol=1e-4)


def test_weights_that_do_not_fit_are_listed():
    weights = {name: np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
    unused = ("fc.weight", "AuxLogits.fc.bias", "Mixed_5b.branch1x1.bn.num_batches_tracked")
    more = {name: np.zeros(3) for name in unused}
    checked = inception.check_weights(weights | more)
    assert checked.keys() == SHAPES.keys()
    assert {value.dtype for value in checked.values()} == {np.dtype(np.float32)}
    gone = "Mixed_7c.branch1x1.conv.weight"
    wrong = {name: value for name, value in weights.items() if name != gone} | {"odd": np.zeros(1)}
    wrong["Conv2d_1a_3x3.bn.bias"] = np.zeros(31)
    with pytest.raises(ValueError, match="not Inception-v3 weights, use those of pt_inception") as error:
        inception.check_weights(wrong)
    for line in (
        f"missing: {gone} (320, 2048, 1, 1)", "unknown: odd", "Conv2d_1a_3x3.bn.bias: shape (31,), expected (32,)"
    ):  # fmt: skip
        assert line in str(error.value)
    with pytest.raises(ValueError, match="and 450 more"):
        inception.check_weights({})


@pytest.mark.slow
def test_it_is_torchvision_s_with_the_reference_s_three_changes():
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    functional = torch.nn.functional
    network = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    weights = random_weights()
    named = {name: torch.from_numpy(value) for name, value in weights.items()}
    left = network.load_state_dict(named, strict=False)
    assert not left.unexpected_keys
    network.fc = torch.nn.Identity()
    images = np.random.RandomState(1).uniform(-1.0, 1.0, (2, 3, 32, 32)).astype(np.float32)
    x = torch.from_numpy(images)
    pool, own = functional.avg_pool2d, functional.avg_pool2d
    last = next(block for name, block in network.named_children() if name == "Mixed_7c")
    inside = []
    last.register_forward_pre_hook(lambda *_: inside.append(True))
    last.register_forward_hook(lambda *_: inside.clear())

    def patched(x, kernel_size, stride, padding):
        if inside:
            return functional.max_pool2d(x, kernel_size, stride, padding)
        return pool(x, kernel_size, stride, padding, count_include_pad=False)

    functional.avg_pool2d = patched
    try:
        with torch.no_grad():
            resized = functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            expected = network(resized).numpy()
    finally:
        functional.avg_pool2d = own
    ours = inception.resize(jnp.asarray(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(ours, resized.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    got = jax.jit(inception.inception_features)(weights, ours)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
