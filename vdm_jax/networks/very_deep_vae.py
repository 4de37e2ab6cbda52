"""A deep hierarchy of latents, from the top down: Child's very deep VAE."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.networks.blocks import check_at_least, log_variance

Moments = tuple[Array, Array]  # mean and log-variance, each of shape (B, R, R, z_channels)
Draw = Callable[[int, Moments | None, Moments], Array]  # number of the level, q, p -> z
Latent = tuple[Array, Moments | None, Moments]  # z, q, p of a level


@dataclass(frozen=True)
class VeryDeepVAEConfig:
    """The shape of a `Hierarchy`; the defaults are Child's for CIFAR-10, 39 million parameters."""

    width: int = 384
    """Channels of the two streams, up and down, at every resolution."""
    bottleneck: float = 0.25
    """Channels inside a residual block, as a multiple of width."""
    z_channels: int = 16
    """Channels of every z."""
    layers: tuple[tuple[int, int], ...] = ((1, 1), (4, 3), (8, 6), (16, 11), (32, 22))
    """From the top down: a resolution, and the number of its levels z."""
    encoder: tuple[tuple[int, int], ...] = ((32, 11), (16, 6), (8, 6), (4, 3), (1, 3))
    """From the image up: a resolution, and its residual blocks; one more leads to the next resolution."""
    largest_bias: int = 64
    """The largest resolution with a learned feature map to start from; larger ones start from what comes from above."""
    out_channels: int = 100
    """Numbers a pixel of the output; ten logistics of a colour pixel take 100."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside residual blocks; parameters, the streams between blocks and all output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C) that this network cannot take.

        Raises:
            ValueError: says what does not fit, and what would.
        """
        height, width, sizes = shape[-3], shape[-2], [size for size, _ in self.layers]
        if not sizes or (height, width) != (sizes[-1], sizes[-1]):
            raise ValueError(f"images of {height} x {width} need layers whose last resolution is theirs, got {sizes}")
        if min(sizes) < 1:
            raise ValueError(f"layers have resolutions {sizes}: each is 1 or more")
        for low, high in pairwise(sizes):
            if low >= high or high % low:
                raise ValueError(f"layers go from {low} to {high}: each resolution is a multiple of the one above it")
        up = [size for size, _ in self.encoder]
        if up != sizes[::-1]:
            raise ValueError(f"the encoder has resolutions {up}: take those of the layers upside down, {sizes[::-1]}")
        if min(count for _, count in self.layers) < 1 or min(count for _, count in self.encoder) < 0:
            raise ValueError("every resolution has a level or more, and no fewer than 0 encoder blocks")
        check_at_least(self, out_channels=1)
        if self.z_channels < 1 or int(self.width * self.bottleneck) < 1:
            raise ValueError(
                f"{self.z_channels} z_channels and {self.width} x {self.bottleneck} channels inside a block: "
                "let each be 1 or more"
            )

    @property
    def depth(self) -> int:
        """How many z there are."""
        return sum(count for _, count in self.layers)


class Bottleneck(nn.Module):
    """Four convolutions, 1 x 1, 3 x 3, 3 x 3 and 1 x 1, each after a GELU and narrow inside; the caller adds h.

    At resolutions of 1 and 2 all are 1 x 1.

    Fields:
        middle, features: channels inside, and of the result.
        scale: of the last weights at first, in standard deviations of the others; 0 is zero.

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
    """One z on the way down: its prior, its posterior, and what it adds to the stream h.

        p = N(m(h), v(h)),  q = N(m(h, seen), v(h, seen)),  z = draw(index, q, p)
        h <- h + features(h),  h <- h + linear(z),  h <- h + f(h)

    p is a standard normal at first, whose features are 0. The weights that lead back into the stream start small, by
    1 / sqrt(depth), so that the stream does not grow with depth.

    Source: Child 2021, arXiv:2011.10650.
    """

    config: VeryDeepVAEConfig
    index: int

    @nn.compact
    def __call__(
        self, h: Float[Array, "b r r c"], seen: Float[Array, "b r r c"] | None, draw: Draw
    ) -> tuple[Float[Array, "b r r c"], Latent]:
        cfg, channels, small = self.config, self.config.z_channels, self.config.depth**-0.5
        q = None
        if seen is not None:
            both = jnp.concatenate([h, seen], axis=-1)
            q = _moments(_block(cfg, 2 * channels, 1.0, "posterior")(both), channels)
        prior = _block(cfg, 2 * channels + cfg.width, 0.0, "prior")(h)
        p = _moments(prior, channels)
        z = draw(self.index, q, p)
        if z.shape != p[0].shape:
            raise ValueError(f"level {self.index} was drawn a z of shape {z.shape}: it has shape {p[0].shape}")
        h = h + prior[..., 2 * channels :]
        h = h + _convolution(cfg.width, 1, jnp.float32, small, "project")(z)
        return h + _block(cfg, cfg.width, small, "residual")(h), (z, q, p)


class VeryDeepVAE(nn.Module):
    """Latents z_0, z_1, ... from the top down, each given all above it, and features of the image at the bottom.

    Of each level it gives the prior p(z_i | z_<i) and, where there is an image x, the posterior q(z_i | z_<i, x). What
    z is, `draw` says: a draw of q to train, of p to generate, or any other.

    Fields:
        config: its shape.
        shape: of an image, (H, W, C).

    Source: Child 2021, arXiv:2011.10650.
    """

    config: VeryDeepVAEConfig
    shape: tuple[int, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"] | int, draw: Draw, *, train: bool = False
    ) -> tuple[list[Latent], Float[Array, "b h w out"]]:
        """levels, the (z, q, p) of each level from the top, and features (B, H, W, out_channels), all in float32.

        Args:
            x: images, shape (B, H, W, C); or how many, B, without any: then there is no posterior, and q is None.
                Parameters for both come from `init` with images.
            draw: draw(i, q, p) -> z, called once a level, i = 0 at the top; q and p are (mean, log_var), each of the
                shape (B, R, R, z_channels) that z has; log_var between -20 and 20.
            train: taken for the other networks' sake; nothing here is random.

        Raises:
            ValueError: as config.check; images of another shape; a z of another shape.
        """
        cfg = self.config
        cfg.check(self.shape)
        if not isinstance(x, int) and x.shape[1:] != self.shape:
            raise ValueError(f"images of shape {x.shape[1:]} given to a network of images of shape {self.shape}")
        seen = {} if isinstance(x, int) else self._look(x)
        batch = x if isinstance(x, int) else x.shape[0]
        h, levels = jnp.zeros((batch, 1, 1, cfg.width), jnp.float32), []
        for size, count in cfg.layers:
            h = _unpool(h, size) + self._bias(size)
            for _ in range(count):
                h, latent = TopDownBlock(cfg, len(levels), name=f"level_{len(levels)}")(h, seen.get(size), draw)
                levels.append(latent)
        gain = self.param("gain", nn.initializers.ones, (1, 1, 1, cfg.width))
        bias = self.param("bias", nn.initializers.zeros, (1, 1, 1, cfg.width))
        return levels, _convolution(cfg.out_channels, 1, jnp.float32, 1.0, "leave")(h * gain + bias)

    def _look(self, x: Array) -> dict[int, Array]:
        """What is seen of x at each resolution, on the way up."""
        cfg, seen = self.config, {}
        small = max(1, sum(count + 1 for _, count in cfg.encoder) - 1) ** -0.5
        h = _convolution(cfg.width, 3, jnp.float32, 1.0, "enter")(x)
        for position, (size, count) in enumerate(cfg.encoder):
            for block in range(count):
                h = h + _block(cfg, cfg.width, small, f"encoder_{size}_{block}")(h)
            seen[size] = h
            if position + 1 < len(cfg.encoder):
                h = _pool(h + _block(cfg, cfg.width, small, f"encoder_{size}_down")(h), cfg.encoder[position + 1][0])
        return seen

    def _bias(self, size: int) -> Array:
        if size > self.config.largest_bias:
            return jnp.zeros((1, 1, 1, 1), jnp.float32)
        return self.param(f"bias_{size}", nn.initializers.zeros, (1, size, size, self.config.width))


def _convolution(features: int, size: int, dtype, scale: float = 1.0, name: str | None = None) -> nn.Conv:
    """Initialised as the paper's code, PyTorch, does: uniform, of variance scale^2 / (3 fan-in); biases are zero."""
    start = nn.initializers.variance_scaling(scale**2 / 3.0, "fan_in", "uniform") if scale else nn.initializers.zeros
    return nn.Conv(features, (size, size), kernel_init=start, dtype=dtype, name=name)


def _block(config: VeryDeepVAEConfig, features: int, scale: float, name: str) -> Bottleneck:
    return Bottleneck(int(config.width * config.bottleneck), features, scale, config.dtype, name=name)


def _moments(h: Array, channels: int) -> Moments:
    return h[..., :channels], log_variance(h[..., channels : 2 * channels])


def _pool(h: Array, size: int) -> Array:
    """The image of a smaller size: means over squares."""
    batch, height, width, channels = h.shape
    return h.reshape(batch, size, height // size, size, width // size, channels).mean((2, 4))


def _unpool(h: Array, size: int) -> Array:
    """The image of a larger size: nearest neighbours."""
    factor = size // h.shape[1]
    return jnp.repeat(jnp.repeat(h, factor, axis=1), factor, axis=2)
