"""Child's very deep VAE: a top-down hierarchy of latents."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.networks.blocks import check_at_least, log_variance

__all__ = ["Bottleneck", "Choose", "Latent", "Moments", "TopDownBlock", "VeryDeepVAE", "VeryDeepVAEConfig"]

Moments = tuple[Array, Array]  # mean and log-variance, each of shape (B, R, R, z_channels)
Choose = Callable[[int, Moments | None, Moments], Array]  # index of the level, q, p -> z
Latent = tuple[Array, Moments | None, Moments]  # z, q and p of a level


@dataclass(frozen=True)
class VeryDeepVAEConfig:
    """Architecture of a `VeryDeepVAE`; by default Child's for CIFAR-10, with 39 million parameters."""

    width: int = 384
    """Channels of the bottom-up and the top-down path, at every resolution."""
    bottleneck: float = 0.25
    """Channels inside a residual block as a multiple of width."""
    z_channels: int = 16
    """Channels of every z."""
    layers: tuple[tuple[int, int], ...] = ((1, 1), (4, 3), (8, 6), (16, 11), (32, 22))
    """Top-down path: pairs of a resolution and its number of latent levels."""
    encoder: tuple[tuple[int, int], ...] = ((32, 11), (16, 6), (8, 6), (4, 3), (1, 3))
    """Bottom-up path: pairs of a resolution and its number of residual blocks; one more block leads to the next."""
    largest_bias: int = 64
    """Largest resolution at which a learned feature map is added to the top-down path."""
    out_channels: int = 100
    """Channels of the output; ten logistics of a color pixel need 100."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside residual blocks; parameters, the two paths and the output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C) that this network cannot take.

        Raises:
            ValueError: names the field, its value and valid ones.
        """
        height, width, sizes = shape[-3], shape[-2], [size for size, _ in self.layers]
        if not sizes or (height, width) != (sizes[-1], sizes[-1]):
            raise ValueError(f"layers have resolutions {sizes}: the last must be the image size, {height} x {width}")
        if min(sizes) < 1:
            raise ValueError(f"layers have resolutions {sizes}: set each to 1 or more")
        for low, high in pairwise(sizes):
            if low >= high or high % low:
                raise ValueError(f"layers go from {low} to {high}: each must be a multiple of the previous one")
        up = [size for size, _ in self.encoder]
        if up != sizes[::-1]:
            raise ValueError(f"encoder has resolutions {up}: set those of the layers in reverse, {sizes[::-1]}")
        if min(count for _, count in self.layers) < 1 or min(count for _, count in self.encoder) < 0:
            raise ValueError("layers and encoder: every resolution needs 1 level or more, and 0 encoder blocks or more")
        check_at_least(self, out_channels=1)
        if self.z_channels < 1 or int(self.width * self.bottleneck) < 1:
            raise ValueError(
                f"{self.z_channels} z_channels and {self.width} x {self.bottleneck} channels inside a block: "
                "set each to 1 or more"
            )

    @property
    def depth(self) -> int:
        """Number of latent levels."""
        return sum(count for _, count in self.layers)


class Bottleneck(nn.Module):
    """Bottleneck block: convolutions of 1 x 1, 3 x 3, 3 x 3 and 1 x 1, each after a GELU; the caller adds h.

    At resolutions of 1 and 2, all convolutions are 1 x 1.

    Fields:
        middle, features: channels inside and of the output.
        scale: initial scale of the last convolution, relative to the others; 0 initializes it at zero.

    Source: Child 2021, arXiv:2011.10650.
    """

    middle: int
    features: int
    scale: float
    dtype: str

    @nn.compact
    def __call__(self, h: Float[Array, "b r r c"]) -> Float[Array, "b r r out"]:
        size, dtype = (3 if h.shape[1] > 2 else 1), jnp.dtype(self.dtype)
        h = h.astype(dtype)
        for kernel in (1, size, size):
            h = _convolution(self.middle, kernel, dtype)(nn.gelu(h, approximate=False))
        return _convolution(self.features, 1, dtype, self.scale)(nn.gelu(h, approximate=False)).astype(jnp.float32)


class TopDownBlock(nn.Module):
    """One latent level of the top-down path: its prior, its posterior, and its contribution to h.

        p = N(m(h), v(h)),  q = N(m(h, x_features), v(h, x_features)),  z = choose(index, q, p)
        h <- h + features(h),  h <- h + linear(z),  h <- h + f(h)

    At initialization, p is a standard normal and features(h) is 0. The weights of the residual updates are scaled by
    1 / sqrt(depth), so that h does not grow with depth.

    Source: Child 2021, arXiv:2011.10650.
    """

    config: VeryDeepVAEConfig
    index: int

    @nn.compact
    def __call__(
        self, h: Float[Array, "b r r c"], x_features: Float[Array, "b r r c"] | None, choose: Choose
    ) -> tuple[Float[Array, "b r r c"], Latent]:
        cfg, channels, small = self.config, self.config.z_channels, self.config.depth**-0.5
        q = None
        if x_features is not None:
            both = jnp.concatenate([h, x_features], axis=-1)
            q = _moments(_block(cfg, 2 * channels, 1.0, "posterior")(both), channels)
        prior = _block(cfg, 2 * channels + cfg.width, 0.0, "prior")(h)
        p = _moments(prior, channels)
        z = choose(self.index, q, p)
        if z.shape != p[0].shape:
            raise ValueError(f"choose returned z of shape {z.shape} at level {self.index}: return shape {p[0].shape}")
        h = h + prior[..., 2 * channels :]
        h = h + _convolution(cfg.width, 1, jnp.float32, small, "project")(z)
        return h + _block(cfg, cfg.width, small, "residual")(h), (z, q, p)


class VeryDeepVAE(nn.Module):
    """Latents z_0, z_1, ... from the top down, each conditioned on all above it, and features of the image at the end.

    Each level has the prior p(z_i | z_<i) and, for a given image x, the posterior q(z_i | z_<i, x). `choose` returns
    z: a sample of q in training, a sample of p in generation, or any other value.

    Fields:
        config: the architecture.
        shape: of an image, (H, W, C).

    Source: Child 2021, arXiv:2011.10650.
    """

    config: VeryDeepVAEConfig
    shape: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"] | int, choose: Choose, *, train: bool = False
    ) -> tuple[list[Latent], Float[Array, "b h w out"]]:
        """The (z, q, p) of each level, top first, and features (B, H, W, out_channels), all in float32.

        Args:
            x: images, shape (B, H, W, C); or the batch size B, for generation without a posterior (q is None).
                Initialize the parameters with images.
            choose: (i, q, p) -> z, called once for each level, i = 0 at the top; q and p are (mean, log_var), each of
                shape (B, R, R, z_channels) as z; log_var is within [-20, 20].
            train: ignored, for the same signature as other networks; there is no dropout.

        Raises:
            ValueError: as config.check; images or z of another shape.
        """
        cfg = self.config
        cfg.check(self.shape)
        if not isinstance(x, int) and x.shape[1:] != self.shape:
            raise ValueError(f"images have shape {x.shape[1:]}: this network takes shape {self.shape}")
        x_features = {} if isinstance(x, int) else self._bottom_up(x)
        batch = x if isinstance(x, int) else x.shape[0]
        h, levels = jnp.zeros((batch, 1, 1, cfg.width), jnp.float32), []
        for size, count in cfg.layers:
            h = _unpool(h, size) + self._bias(size)
            for _ in range(count):
                h, latent = TopDownBlock(cfg, len(levels), name=f"level_{len(levels)}")(h, x_features.get(size), choose)
                levels.append(latent)
        gain = self.param("gain", nn.initializers.ones, (1, 1, 1, cfg.width))
        bias = self.param("bias", nn.initializers.zeros, (1, 1, 1, cfg.width))
        return levels, _convolution(cfg.out_channels, 1, jnp.float32, 1.0, "leave")(h * gain + bias)

    def _bottom_up(self, x: Array) -> dict[int, Array]:
        """Features of x at each resolution."""
        cfg, features = self.config, {}
        small = max(1, sum(count + 1 for _, count in cfg.encoder) - 1) ** -0.5
        h = _convolution(cfg.width, 3, jnp.float32, 1.0, "enter")(x)
        for position, (size, count) in enumerate(cfg.encoder):
            for block in range(count):
                h = h + _block(cfg, cfg.width, small, f"encoder_{size}_{block}")(h)
            features[size] = h
            if position + 1 < len(cfg.encoder):
                h = _pool(h + _block(cfg, cfg.width, small, f"encoder_{size}_down")(h), cfg.encoder[position + 1][0])
        return features

    def _bias(self, size: int) -> Array:
        if size > self.config.largest_bias:
            return jnp.zeros((1, 1, 1, 1), jnp.float32)
        return self.param(f"bias_{size}", nn.initializers.zeros, (1, size, size, self.config.width))


def _convolution(features: int, size: int, dtype, scale: float = 1.0, name: str | None = None) -> nn.Conv:
    """A convolution with the initialization of PyTorch: uniform, variance scale^2 / (3 fan-in); biases at zero."""
    start = nn.initializers.variance_scaling(scale**2 / 3.0, "fan_in", "uniform") if scale else nn.initializers.zeros
    return nn.Conv(features, (size, size), kernel_init=start, dtype=dtype, name=name)


def _block(config: VeryDeepVAEConfig, features: int, scale: float, name: str) -> Bottleneck:
    return Bottleneck(int(config.width * config.bottleneck), features, scale, config.dtype, name=name)


def _moments(h: Array, channels: int) -> Moments:
    return h[..., :channels], log_variance(h[..., channels : 2 * channels])


def _pool(h: Array, size: int) -> Array:
    """Average pooling to a smaller size."""
    batch, height, width, channels = h.shape
    return h.reshape(batch, size, height // size, size, width // size, channels).mean((2, 4))


def _unpool(h: Array, size: int) -> Array:
    """Nearest-neighbor upsampling to a larger size."""
    factor = size // h.shape[1]
    return jnp.repeat(jnp.repeat(h, factor, axis=1), factor, axis=2)
