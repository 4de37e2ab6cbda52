"""A small residual classifier of images: its logits guide and judge, its last features measure distances."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.networks.blocks import (
    LevelEmbedding,
    ResidualBlock,
    check_at_least,
    check_pyramid,
    conv3x3,
    dense,
    normalize,
)


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of a `Classifier`."""

    num_classes: int = 10
    """Classes of the logits."""
    channels: int = 32
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each resolution, as multiples; each is half the one before."""
    blocks: int = 1
    """Residual blocks a resolution."""
    features: int = 64
    """Dimension of the last layer but one."""
    dropout: float = 0.0
    """Dropout inside residual blocks."""
    groups: int = 8
    """Groups of a group norm."""
    embedding: Literal["none", "sinusoidal", "log_snr"] = "none"
    """What the noise level comes in as: not at all, for clean images; or as a step number, or a log-SNR."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside; parameters, statistics, the last two layers and the output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C) that this network cannot take.

        Raises:
            ValueError: says what does not fit, and what would.
        """
        if self.num_classes < 2:
            raise ValueError(f"{self.num_classes} class(es) cannot be told apart: take data with 2 labels or more")
        check_at_least(self, channels=1, blocks=0, features=1, groups=1)
        check_pyramid(shape, self.multipliers, self.channels, self.groups)


class Classified(NamedTuple):
    """What a classifier says of a batch, in float32.

    Fields:
        features: the last layer but one, shape (B, F), each of mean square 1.
        logits: log p(y | x) up to a constant, shape (B, classes); a linear map of the features.
    """

    features: Float[Array, "b f"]
    logits: Float[Array, "b classes"]


class Classifier(nn.Module):
    """p(y | x_t), of clean images or of noisy ones and their level. Every class is alike probable at first.

    Source: He et al. 2016, arXiv:1603.05027 (residual blocks), with Ho et al.'s blocks, arXiv:2006.11239; told the
        level, as a guide: Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], condition: Float[Array, " b"] | None = None, *, train: bool = False
    ) -> Classified:
        """Features and logits.

        Args:
            x: images, shape (B, H, W, C).
            condition: the noise level, as config.embedding says, shape (B,); None where it is "none".
            train: whether dropout is on (it then needs the rng "dropout").

        Raises:
            ValueError: as config.check, or a level where config.embedding is "none", or none where it is not.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        cfg.check(x.shape)
        embedding = self._embed(x, condition)
        h = conv3x3(cfg.channels * cfg.multipliers[0], dtype)(x.astype(dtype))
        for level, multiplier in enumerate(cfg.multipliers):
            if level:
                h = conv3x3(cfg.channels * multiplier, dtype, stride=2)(h)
            for _ in range(cfg.blocks):
                h = ResidualBlock(cfg.channels * multiplier, cfg.groups, cfg.dropout, dtype)(h, embedding, train)
        h = nn.swish(normalize(h, cfg.groups)).astype(jnp.float32)
        features = nn.swish(dense(cfg.features, jnp.float32)(h.reshape(h.shape[0], -1)))
        # of one length: else a kernel distance, a polynomial of them, would be all about the longest
        features = nn.RMSNorm(use_scale=False)(features)
        return Classified(features, dense(cfg.num_classes, jnp.float32, zero=True)(features))

    def _embed(self, x: Array, condition: Array | None) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        if (condition is None) != (cfg.embedding == "none"):
            given = "no noise level was" if condition is None else "a noise level was"
            raise ValueError(
                f"{given} given to a classifier of embedding {cfg.embedding!r}: set embedding to 'none', 'sinusoidal' "
                "or 'log_snr' to match"
            )
        if condition is None:
            return jnp.zeros((x.shape[0], 1), dtype)  # the blocks then add what they have learned to add, and no more
        return LevelEmbedding(cfg.embedding, cfg.channels, 4 * cfg.channels, 0, dtype)(condition, None)
