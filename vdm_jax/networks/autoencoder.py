"""Encoder and decoder of an autoencoder: multilayer perceptrons, or residual convolutional networks."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.networks.blocks import check_at_least, check_pyramid, conv3, dense, log_variance, normalize, upsample

__all__ = ["AutoencoderConfig", "Decoder", "Encoder"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of an `Encoder` and its `Decoder`."""

    architecture: Literal["mlp", "conv"] = "conv"
    """A multilayer perceptron on the flattened image, or a convolutional network with several resolutions."""
    latent: int = 32
    """Dimension of z."""
    width: int = 64
    """Units of every hidden layer, or channels at full resolution."""
    blocks: int = 2
    """Number of residual blocks, in total (mlp) or in each resolution (conv)."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels of each resolution as multiples of width (conv only); each resolution is half the previous one."""
    groups: int = 8
    """Groups of the group norms (conv only)."""
    dropout: float = 0.0
    """Dropout probability in residual blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the hidden layers; parameters, norms, the last layers and the output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C) that these networks cannot take.

        Raises:
            ValueError: names the field, its value and valid ones.
        """
        if self.latent < 1:
            raise ValueError(f"latent is {self.latent}: set it to 1 or more")
        if self.architecture not in ("mlp", "conv"):
            raise ValueError(f"architecture is {self.architecture!r}: set it to 'mlp' or 'conv'")
        check_at_least(self, width=1, blocks=0, groups=1)
        if self.architecture == "conv":
            check_pyramid(shape, self.multipliers, self.width, self.groups)


class Encoder(nn.Module):
    """The mean and log-variance of q(z | x), from images; an autoencoder without noise uses the mean alone.

    The log-variance is 0 at initialization. Source: Kingma & Welling 2013, arXiv:1312.6114, with the residual blocks of
    He et al. 2016, arXiv:1603.05027.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
        """mean and log_var, each of shape (B, latent), in float32; log_var between -20 and 20.

        Args:
            x: images, shape (B, H, W, C).
            train: whether dropout is on (it then needs the rng "dropout").

        Raises:
            ValueError: as config.check.
        """
        cfg = self.config
        cfg.check(x.shape[1:])
        h = self._down(x, train) if cfg.architecture == "conv" else _Perceptron(cfg)(x.reshape(x.shape[0], -1), train)
        h = h.reshape(x.shape[0], -1).astype(jnp.float32)
        mean = dense(cfg.latent, jnp.float32)(h)
        return mean, log_variance(dense(cfg.latent, jnp.float32, zero=True)(h))

    def _down(self, x: Array, train: bool) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        h = conv3(x.astype(dtype), cfg.width * cfg.multipliers[0], dtype)
        for level, multiplier in enumerate(cfg.multipliers):
            if level:
                h = conv3(h, cfg.width * multiplier, dtype, stride=2)
            for _ in range(cfg.blocks):
                h = _Convolutions(cfg, cfg.width * multiplier)(h, train)
        return nn.swish(normalize(h, cfg.groups))


class Decoder(nn.Module):
    """The parameters of p(x | z) from z, such as logits or means: `out_channels` numbers per pixel.

    The output layer is not initialized at zero, since the components of a mixture would then stay equal.

    Fields:
        config: the config of the encoder.
        out_channels: numbers per pixel.
        shape: of an image, (H, W, C).

    Source: as `Encoder`.
    """

    config: AutoencoderConfig
    out_channels: int
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Float[Array, "b z"], *, train: bool = False) -> Float[Array, "b h w out"]:
        """The features, shape (B, H, W, out_channels), in float32.

        Args:
            z: latents, shape (B, latent).
            train: whether dropout is on (it then needs the rng "dropout").

        Raises:
            ValueError: as config.check; z does not have config.latent dimensions.
        """
        cfg = self.config
        cfg.check(self.shape)
        if z.shape[-1] != cfg.latent:
            raise ValueError(f"z has {z.shape[-1]} dimensions and latent is {cfg.latent}: set latent to match")
        if cfg.architecture == "conv":
            h = self._up(z, train).astype(jnp.float32)
            return conv3(h, self.out_channels, jnp.float32)
        height, width = self.shape[0], self.shape[1]
        h = _Perceptron(cfg)(z, train).astype(jnp.float32)
        return dense(height * width * self.out_channels, jnp.float32)(h).reshape(-1, height, width, self.out_channels)

    def _up(self, z: Array, train: bool) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        widths, factor = [cfg.width * multiplier for multiplier in cfg.multipliers], 2 ** (len(cfg.multipliers) - 1)
        lowest = (self.shape[0] // factor, self.shape[1] // factor, widths[-1])
        h = dense(lowest[0] * lowest[1] * lowest[2], dtype)(z.astype(dtype)).reshape(-1, *lowest)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.blocks):
                h = _Convolutions(cfg, width)(h, train)
            if level:
                h = conv3(upsample(h), widths[level - 1], dtype)
        return nn.swish(normalize(h, cfg.groups))


class _Convolutions(nn.Module):
    """h + f(h), f two normalized convolutions; the identity at initialization."""

    config: AutoencoderConfig
    features: int

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        r = conv3(nn.swish(normalize(h, cfg.groups)), self.features, dtype)
        r = nn.Dropout(cfg.dropout, deterministic=not train)(nn.swish(normalize(r, cfg.groups)))
        return h + conv3(r, self.features, dtype, zero=True)


class _Perceptron(nn.Module):
    """Residual dense layers, including the last activation."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool) -> Float[Array, "b e"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        h = dense(cfg.width, dtype)(x.astype(dtype))
        for _ in range(cfg.blocks):
            r = nn.swish(dense(cfg.width, dtype)(nn.swish(h)))
            r = nn.Dropout(cfg.dropout, deterministic=not train)(r)
            h = h + dense(cfg.width, dtype, zero=True)(r)
        return nn.swish(h)
