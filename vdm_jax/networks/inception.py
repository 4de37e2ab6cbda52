"""The Inception-v3 network of the FID, as a function of weights that the user provides.

Weights are a dict from torchvision's names ("Mixed_5b.branch1x1.conv.weight", ...) to arrays; a safetensors file of the
ported TensorFlow weights (pytorch-fid's `pt_inception-2015-12-05`) contains them. As in pytorch-fid, there are two
differences from torchvision's network: average pools exclude the padding, and the last block has a max pool.

Source: Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500 (its features);
    Parmar et al. 2021, arXiv:2104.11222 (resizing).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

__all__ = ["FEATURES", "SIDE", "check_weights", "inception_features", "resize", "weight_shapes"]

SIDE = 299  # pixels, the size of the training images
FEATURES = 2048
PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")  # of every convolution
_EPSILON = 1e-3  # of the batch norms
_UNUSED = ("fc.", "AuxLogits.")  # parts of torchvision's network that the features do not need
Pair = tuple[int, int]
Conv = Callable[..., Array]


def resize(images: Float[Array, "b h w c"]) -> Float[Array, "b side side c"]:
    """Resize images to 299 x 299 bilinearly, with pixel centers at i + 1/2 and without a low-pass filter.

    This is the method of pytorch-fid (`interpolate(mode="bilinear", align_corners=False)`). The TensorFlow FID of 2017
    has pixel centers at i, a shift by a fraction of a pixel; clean-fid filters, which matters for larger images only.
    """
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, SIDE, SIDE, channels), "bilinear", antialias=False)


def inception_features(weights: Mapping[str, Any], images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    """The 2,048 means over positions after the last block ("pool3").

    Args:
        weights: as returned by `check_weights`.
        images: on [-1, 1], shape (B, H, W, 3), at least 75 pixels a side; `resize` makes them 299 x 299.
    """

    def conv(x: Array, name: str, out: int, kernel: Pair, stride: int = 1, padding: Pair = (0, 0)) -> Array:
        """Convolution, batch norm with running statistics, ReLU."""
        del out, kernel
        weight, *norm = (jnp.asarray(weights[f"{name}.{part}"], x.dtype) for part in PARTS)
        scale, shift, mean, var = (part[None, None, None, :] for part in norm)
        pad = [(side, side) for side in padding]
        y = lax.conv_general_dilated(x, weight, (stride, stride), pad, dimension_numbers=("NHWC", "OIHW", "NHWC"))
        return jax.nn.relu((y - mean) * (scale * lax.rsqrt(var + _EPSILON)) + shift)

    return _network(conv, images)


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that `inception_features` needs."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(x: Array, name: str, out: int, kernel: Pair, stride: int = 1, padding: Pair = (0, 0)) -> Array:
        for part in PARTS:
            found[f"{name}.{part}"] = (out, x.shape[-1], *kernel) if part == "conv.weight" else (out,)
        sides = [(x.shape[i + 1] + 2 * padding[i] - kernel[i]) // stride + 1 for i in range(2)]
        return jnp.zeros((x.shape[0], *sides, out))

    jax.eval_shape(lambda: _network(conv, jnp.zeros((1, SIDE, SIDE, 3))))
    return found


def check_weights(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Select the tensors that the network needs, in float32.

    Raises:
        ValueError: lists tensors that are missing, unknown, of another shape, or not finite.
    """
    shapes = weight_shapes()
    given = {name for name in weights if not name.startswith(_UNUSED) and not name.endswith("num_batches_tracked")}
    faults = [f"missing: {name} {shapes[name]}" for name in sorted(shapes.keys() - given)]
    faults += [f"unknown: {name}" for name in sorted(given - shapes.keys())]
    faults += [
        f"{name}: shape {tuple(weights[name].shape)}, expected {shapes[name]}"
        for name in sorted(given & shapes.keys())
        if tuple(weights[name].shape) != shapes[name]
    ]
    given &= shapes.keys()
    faults += [f"{name}: not all finite" for name in sorted(given) if not np.isfinite(weights[name]).all()]
    if faults:
        faults[20:] = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
        shown = "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(f"these are not Inception-v3 weights, use those of pt_inception-2015-12-05:{shown}")
    return {name: np.asarray(weights[name], np.float32) for name in shapes}


def _network(conv: Conv, x: Array) -> Array:
    x = conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
    x = conv(x, "Conv2d_2a_3x3", 32, (3, 3))
    x = _max_pool(conv(x, "Conv2d_2b_3x3", 64, (3, 3), padding=(1, 1)), stride=2)
    x = conv(x, "Conv2d_3b_1x1", 80, (1, 1))
    x = _max_pool(conv(x, "Conv2d_4a_3x3", 192, (3, 3)), stride=2)
    for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
        x = _a(conv, x, f"Mixed_5{letter}", pooled)
    x = _b(conv, x, "Mixed_6a")
    for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        x = _c(conv, x, f"Mixed_6{letter}", width)
    x = _d(conv, x, "Mixed_7a")
    x = _e(conv, x, "Mixed_7b", _mean_pool)
    x = _e(conv, x, "Mixed_7c", lambda x: _max_pool(x, padding=1))  # as in the reference network only
    return x.mean(axis=(1, 2))


def _a(conv: Conv, x: Array, name: str, pooled: int) -> Array:
    one = conv(x, f"{name}.branch1x1", 64, (1, 1))
    five = conv(x, f"{name}.branch5x5_1", 48, (1, 1))
    five = conv(five, f"{name}.branch5x5_2", 64, (5, 5), padding=(2, 2))
    double = conv(x, f"{name}.branch3x3dbl_1", 64, (1, 1))
    double = conv(double, f"{name}.branch3x3dbl_2", 96, (3, 3), padding=(1, 1))
    double = conv(double, f"{name}.branch3x3dbl_3", 96, (3, 3), padding=(1, 1))
    return _join(one, five, double, conv(_mean_pool(x), f"{name}.branch_pool", pooled, (1, 1)))


def _b(conv: Conv, x: Array, name: str) -> Array:
    three = conv(x, f"{name}.branch3x3", 384, (3, 3), stride=2)
    double = conv(x, f"{name}.branch3x3dbl_1", 64, (1, 1))
    double = conv(double, f"{name}.branch3x3dbl_2", 96, (3, 3), padding=(1, 1))
    double = conv(double, f"{name}.branch3x3dbl_3", 96, (3, 3), stride=2)
    return _join(three, double, _max_pool(x, stride=2))


def _c(conv: Conv, x: Array, name: str, width: int) -> Array:
    across, down = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
    one = conv(x, f"{name}.branch1x1", 192, (1, 1))
    seven = conv(x, f"{name}.branch7x7_1", width, (1, 1))
    seven = conv(seven, f"{name}.branch7x7_2", width, **across)
    seven = conv(seven, f"{name}.branch7x7_3", 192, **down)
    double = conv(x, f"{name}.branch7x7dbl_1", width, (1, 1))
    for index, (out, direction) in enumerate([(width, down), (width, across), (width, down), (192, across)]):
        double = conv(double, f"{name}.branch7x7dbl_{index + 2}", out, **direction)
    return _join(one, seven, double, conv(_mean_pool(x), f"{name}.branch_pool", 192, (1, 1)))


def _d(conv: Conv, x: Array, name: str) -> Array:
    three = conv(x, f"{name}.branch3x3_1", 192, (1, 1))
    three = conv(three, f"{name}.branch3x3_2", 320, (3, 3), stride=2)
    seven = conv(x, f"{name}.branch7x7x3_1", 192, (1, 1))
    seven = conv(seven, f"{name}.branch7x7x3_2", 192, (1, 7), padding=(0, 3))
    seven = conv(seven, f"{name}.branch7x7x3_3", 192, (7, 1), padding=(3, 0))
    seven = conv(seven, f"{name}.branch7x7x3_4", 192, (3, 3), stride=2)
    return _join(three, seven, _max_pool(x, stride=2))


def _e(conv: Conv, x: Array, name: str, pool: Callable[[Array], Array]) -> Array:
    def both(h: Array, branch: str) -> list[Array]:
        wide = conv(h, f"{name}.{branch}a", 384, (1, 3), padding=(0, 1))
        return [wide, conv(h, f"{name}.{branch}b", 384, (3, 1), padding=(1, 0))]

    one = conv(x, f"{name}.branch1x1", 320, (1, 1))
    three = conv(x, f"{name}.branch3x3_1", 384, (1, 1))
    double = conv(x, f"{name}.branch3x3dbl_1", 448, (1, 1))
    double = conv(double, f"{name}.branch3x3dbl_2", 384, (3, 3), padding=(1, 1))
    pooled = conv(pool(x), f"{name}.branch_pool", 192, (1, 1))
    return _join(one, *both(three, "branch3x3_2"), *both(double, "branch3x3dbl_3"), pooled)


def _join(*parts: Array) -> Array:
    return jnp.concatenate(parts, axis=-1)


def _max_pool(x: Array, stride: int = 1, padding: int = 0) -> Array:
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), pads)


def _mean_pool(x: Array) -> Array:
    """3 x 3 average pooling that excludes the padding."""
    total = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    count = lax.reduce_window(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, lax.add, (1, 3, 3, 1), (1,) * 4, "SAME")
    return total / count
