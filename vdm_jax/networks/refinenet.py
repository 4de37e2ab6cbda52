"""Song and Ermon's score network: a dilated RefineNet, conditioned on the noise level in its norms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["DilatedBlock", "InstanceNormPlus", "NormedConvolution", "RefineBlock", "RefineNet", "RefineNetConfig"]


@dataclass(frozen=True)
class RefineNetConfig:
    """Architecture of a `RefineNet`; by default Song and Ermon's for CIFAR-10, with 30.1 million parameters."""

    channels: int = 128
    """Channels at full resolution; half the resolution has twice as many."""
    num_levels: int = 10
    """Number of noise levels; each has its own scales and biases in every norm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the hidden layers; parameters, norms, pooling and output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C) that this network cannot take.

        Raises:
            ValueError: names the field, its value and valid ones.
        """
        height, width = shape[-3], shape[-2]
        if height % 2 or width % 2:
            raise ValueError(f"images of {height} x {width} cannot be halved: pad or crop them to even sides")
        if self.channels < 2 or self.num_levels < 1:
            raise ValueError(
                f"{self.channels} channels and {self.num_levels} noise levels: "
                "set 2 channels or more (their means need a variance), and 1 level or more"
            )


class InstanceNormPlus(nn.Module):
    """Conditional instance normalization++, in float32.

        gamma ((x - m) / sqrt(v + 1e-5) + alpha (m - mean_c m) / sqrt(var_c m + 1e-5)) + beta

    m and v are the mean and variance of a channel over positions, mean_c and var_c those of m over channels (the
    latter with divisor C - 1). The alpha term restores the differences between channel means, which instance
    normalization removes. gamma, alpha and beta are per channel and noise level; NaN for an invalid `index`.

    Fields:
        num_levels: number of noise levels.

    Source: Song and Ermon 2019, arXiv:1907.05600, appendix A.
    """

    num_levels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], index: Int[Array, " b"]) -> Float[Array, "b h w c"]:
        x = x.astype(jnp.float32)
        means = x.mean((1, 2), keepdims=True)
        unit = (x - means) * jax.lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)
        scale = jax.lax.rsqrt(means.var(-1, ddof=1, keepdims=True) + 1e-5)
        contrast = (means - means.mean(-1, keepdims=True)) * scale
        table = self.param("table", _initial_table, (self.num_levels, 3, x.shape[-1]))
        row = jnp.where(index < 0, self.num_levels, index)  # a negative index would count from the end
        rows = jnp.take(table, row, axis=0, mode="fill", fill_value=jnp.nan)
        gamma, alpha, beta = (part[:, None] for part in jnp.split(rows, 3, axis=1))
        return gamma * (unit + alpha * contrast) + beta


class NormedConvolution(nn.Module):
    """A norm, an activation and a 3 x 3 convolution.

    Fields:
        features: channels of the output.
        config: config of the whole network.
        between: the activation, or a pooling function.
        dilation, bias: options of the convolution.

    Source: Song and Ermon 2019, arXiv:1907.05600, appendix A.
    """

    features: int
    config: RefineNetConfig
    between: Callable[[Array], Array] = nn.elu
    dilation: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], index: Int[Array, " b"]) -> Float[Array, "b h w out"]:
        h = self.between(InstanceNormPlus(self.config.num_levels)(x, index))
        return _convolution(self.features, 3, self.config.dtype, self.dilation, self.bias)(h)


class DilatedBlock(nn.Module):
    """shortcut(x) + f(x, index), f two normed convolutions.

    Fields:
        features: channels of the output.
        config: config of the whole network.
        dilation: dilation of every 3 x 3 convolution.
        first: whether the block starts a new stage. It then has a convolution as its shortcut, and without dilation
            halves the resolution; otherwise the shortcut is the identity.

    Source: Song and Ermon 2019, arXiv:1907.05600, appendix A.
    """

    features: int
    config: RefineNetConfig
    dilation: int
    first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], index: Int[Array, " b"]) -> Float[Array, "b h2 w2 out"]:
        h = NormedConvolution(x.shape[-1], self.config, dilation=self.dilation)(x, index)
        h = NormedConvolution(self.features, self.config, dilation=self.dilation)(h, index)
        if not self.first:
            return x + h
        if self.dilation > 1:
            return _convolution(self.features, 3, self.config.dtype, self.dilation)(x) + h
        # pooling before the 1 x 1 convolution gives the same result as after it, at a quarter of the cost
        return _convolution(self.features, 1, self.config.dtype)(_halve(x)) + _halve(h)


class RefineBlock(nn.Module):
    """Combine the features of a stage with the refined features of the next deeper one, at the stage's resolution.

    Residual units on each input; convolution and sum of the inputs; chained residual pooling; residual units.

    Fields:
        features: channels of the output; with a single input, equal to its channels.
        config: config of the whole network.
        units: number of residual units at the end.

    Source: Lin et al. 2017, arXiv:1611.06612; Song and Ermon 2019, arXiv:1907.05600, appendix A.
    """

    features: int
    config: RefineNetConfig
    units: int

    @nn.compact
    def __call__(self, xs: list[Array], index: Int[Array, " b"]) -> Float[Array, "b h w out"]:
        hs = [self._residual(x, index, 2) for x in xs]
        if len(hs) > 1:
            normed = [InstanceNormPlus(self.config.num_levels)(h, index) for h in hs]
            hs = [_convolution(self.features, 3, self.config.dtype)(h) for h in normed]
        h = path = nn.elu(sum(_resize(h, hs[0].shape) for h in hs))
        for _ in range(2):
            path = NormedConvolution(self.features, self.config, _pool, bias=False)(path, index)
            h = h + path
        return self._residual(h, index, self.units)

    def _residual(self, h: Array, index: Array, units: int) -> Array:
        for _ in range(units):
            inner = NormedConvolution(h.shape[-1], self.config, bias=False)(h, index)
            h = h + NormedConvolution(h.shape[-1], self.config, bias=False)(inner, index)
        return h


class RefineNet(nn.Module):
    """A score from x_t and the index of its noise level: four residual stages, refined from the deepest up.

    Only the second stage halves the resolution; the last two have dilations of 2 and 4. The same function of its
    parameters as `CondRefineNetDilated` of the published code, which however maps its input from [0, 1] to [-1, 1]
    first. Biases are initialized at zero here, at random there.

    Source: Song and Ermon 2019, arXiv:1907.05600, appendix A.
    """

    config: RefineNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], index: Int[Array, " b"], *, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """The network's output, not divided by sigma, in float32.

        Args:
            x: noisy images, shape (B, H, W, C).
            index: indices of the noise levels, 0 to num_levels - 1, shape (B,); any other returns NaN.
            train: ignored, for the same signature as other networks; there is no dropout.

        Raises:
            ValueError: as config.check.
        """
        cfg = self.config
        cfg.check(x.shape)
        h, stages = _convolution(cfg.channels, 3, cfg.dtype)(x), []
        for stage, (multiple, dilation) in enumerate([(1, 1), (2, 1), (2, 2), (2, 4)]):
            h = DilatedBlock(multiple * cfg.channels, cfg, dilation, first=stage > 0)(h, index)
            h = DilatedBlock(multiple * cfg.channels, cfg, dilation, first=False)(h, index)
            stages.append(h)
        h = RefineBlock(2 * cfg.channels, cfg, units=1)([stages[3]], index)
        h = RefineBlock(2 * cfg.channels, cfg, units=1)([stages[2], h], index)
        h = RefineBlock(cfg.channels, cfg, units=1)([stages[1], h], index)
        h = RefineBlock(cfg.channels, cfg, units=3)([stages[0], h], index)
        return NormedConvolution(x.shape[-1], cfg)(h, index).astype(jnp.float32)


def _initial_table(key: Array, shape: tuple[int, ...]) -> Array:
    """For each level, gamma and alpha sampled from N(1, 0.02^2), and beta 0."""
    return jnp.array([1.0, 1.0, 0.0]).reshape(1, 3, 1) * (1.0 + 0.02 * jax.random.normal(key, shape))


def _convolution(features: int, size: int, dtype: str, dilation: int = 1, bias: bool = True) -> nn.Conv:
    """A convolution with the kernel initialization of PyTorch: uniform, variance 1 / (3 fan-in); biases at zero."""
    init, kernel = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform"), (size, size)
    return nn.Conv(features, kernel, kernel_dilation=dilation, use_bias=bias, kernel_init=init, dtype=jnp.dtype(dtype))


def _halve(x: Array) -> Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _pool(x: Array) -> Array:
    """5 x 5 average pooling with zero padding, stride 1."""
    return nn.pool(x, 0.0, jax.lax.add, (5, 5), (1, 1), "SAME") / 25.0


def _resize(x: Array, shape: tuple[int, ...]) -> Array:
    """Bilinear interpolation of x to the height and width of `shape`, with aligned corners."""
    if x.shape == shape:
        return x
    rows, columns = (_interpolation_weights(x.shape[axis], shape[axis]) for axis in (1, 2))
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x.astype(jnp.float32)).astype(x.dtype)


def _interpolation_weights(size: int, to: int) -> Array:
    """Linear interpolation from `size` to `to` evenly spaced points: row i has the weights for output point i."""
    distance = np.abs(np.linspace(0.0, size - 1.0, to)[:, None] - np.arange(size))
    return jnp.asarray(np.maximum(0.0, 1.0 - distance), jnp.float32)
