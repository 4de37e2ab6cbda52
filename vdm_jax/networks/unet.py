"""Ho et al.'s U-Net: residual blocks and attention at several resolutions, conditioned on the noise level."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax.networks.blocks import (
    Attention,
    LevelEmbedding,
    ResidualBlock,
    check_at_least,
    check_pyramid,
    conv3,
    normalize,
    upsample,
)
from vdm_jax.networks.embeddings import fourier_features

__all__ = ["UNet", "UNetConfig"]

LEAST_SIDE = 4  # of the lowest resolution, if it is chosen by the size of the data
MOST_POSITIONS = 32 * 32  # likewise: attention compares all with all


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net; by default Ho et al.'s for CIFAR-10, with 35.7 million parameters."""

    channels: int = 128
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each resolution as multiples of channels; each resolution is half the previous one. A single entry
    means no downsampling. () chooses (1, 2, ..., 2) by the size of the data: see `resolved`."""
    blocks: int = 2
    """Residual blocks in each resolution."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights of images, or lengths of series, at which attention follows every block."""
    middle_attention: bool = True
    """Attention between the two middle blocks."""
    dropout: float = 0.1
    """Dropout probability in residual blocks."""
    groups: int = 32
    """Groups of the group norms."""
    out_channels: int = 0
    """Channels of the output; 0 is the number of input channels."""
    embedding: Literal["sinusoidal", "log_snr"] = "sinusoidal"
    """Conditioning on the noise level by timestep (sinusoidal) or by log-SNR."""
    num_classes: int = 0
    """Number of classes; class number num_classes means "no label". 0 is a network without labels."""
    fourier_exponents: tuple[int, ...] = ()
    """Exponents n of the Fourier features sin(2^n pi x) and cos(2^n pi x) appended to the input channels."""
    position_bias: bool = False
    """Add a learned feature map after the first convolution, which encodes positions."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the hidden layers; parameters, norms and output are float32."""
    remat: bool = False
    """Rematerialize activations inside blocks in the backward pass: less memory, more time."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C), or series of shape (L, C), that this network cannot take.

        Raises:
            ValueError: names the field, its value and valid ones.
        """
        if len(shape) not in (2, 3):
            raise ValueError(f"a U-Net takes images (H, W, C) or series (L, C), not examples of shape {shape}")
        check_at_least(self, blocks=0, groups=1, out_channels=0, num_classes=0)
        if self.channels < 4 or self.channels % 2:
            raise ValueError(f"channels is {self.channels}: set an even number, 4 or more, for the level embedding")
        check_pyramid(shape, self.resolved(shape).multipliers, self.channels, self.groups)

    def resolved(self, shape: tuple[int, ...]) -> "UNetConfig":
        """This config with multipliers: if it has none, the sides are halved to 4 or more, without a remainder.

        Args:
            shape: of images (H, W, C), or of series (L, C).

        Raises:
            ValueError: the sides are still too large after that.
        """
        if self.multipliers:
            return self
        sides, halvings = shape[:-1], 0
        while all(side % 2 == 0 and side >= 2 * LEAST_SIDE for side in sides):
            sides, halvings = [side // 2 for side in sides], halvings + 1
        if math.prod(sides) > MOST_POSITIONS:
            raise ValueError(
                f"sides {shape[:-1]} can only be halved to {tuple(sides)} without a remainder: use sides that are "
                "multiples of 8 or 16, or set multipliers"
            )
        return replace(self, multipliers=(1, *[2] * halvings))


class UNet(nn.Module):
    """Prediction from noisy images or series x_t and their noise level; zero at initialization.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *s c"],
        condition: Float[Array, " b"],
        label: Int[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b *s out"]:
        """The prediction, in float32.

        Args:
            x: noisy images, shape (B, H, W, C), or series, shape (B, L, C).
            condition: the noise level in the form of config.embedding, shape (B,).
            label: classes, shape (B,), if the network has classes.
            train: whether dropout is on (it then needs the rng "dropout").

        Raises:
            ValueError: as config.check; a label is given to a network without classes, or missing otherwise.
        """
        self.config.check(x.shape[1:])
        cfg, dtype = self.config.resolved(x.shape[1:]), jnp.dtype(self.config.dtype)
        embedding = LevelEmbedding(cfg.embedding, cfg.channels, 4 * cfg.channels, cfg.num_classes, dtype)(
            condition, label
        )
        block = nn.remat(UNet._block, static_argnums=(3, 4)) if cfg.remat else UNet._block
        h = self._first_layer(x, dtype)
        widths = [cfg.channels * multiplier for multiplier in cfg.multipliers]
        skips = [h]
        for level, width in enumerate(widths):
            for _ in range(cfg.blocks):
                h = block(self, h, embedding, width, train)
                skips.append(h)
            if level + 1 < len(widths):
                h = conv3(h, width, dtype, stride=2)
                skips.append(h)
        h = self._middle(h, embedding, widths[-1], train)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.blocks + 1):
                h = block(self, jnp.concatenate([h, skips.pop()], axis=-1), embedding, width, train)
            if level:
                h = conv3(upsample(h), width, dtype)
        h = nn.swish(normalize(h, cfg.groups))
        return conv3(h, cfg.out_channels or x.shape[-1], dtype, zero=True).astype(jnp.float32)

    def _first_layer(self, x: Array, dtype: Any) -> Array:
        cfg = self.config
        h = conv3(fourier_features(x, cfg.fourier_exponents).astype(dtype), cfg.channels, dtype)
        if not cfg.position_bias:
            return h
        bias = self.param("position_bias", nn.initializers.normal(0.02), h.shape[1:])
        return h + bias.astype(dtype)[None]

    def _block(self, h: Array, embedding: Array, width: int, train: bool) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        h = ResidualBlock(width, cfg.groups, cfg.dropout, dtype)(h, embedding, train)
        return Attention(cfg.groups, dtype)(h) if h.shape[1] in cfg.attention_resolutions else h

    def _middle(self, h: Array, embedding: Array, width: int, train: bool) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        h = ResidualBlock(width, cfg.groups, cfg.dropout, dtype)(h, embedding, train)
        h = Attention(cfg.groups, dtype)(h) if cfg.middle_attention else h
        return ResidualBlock(width, cfg.groups, cfg.dropout, dtype)(h, embedding, train)
