"""A small residual image classifier, for classifier guidance and for features of sample quality."""

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
    conv3,
    dense,
    normalize,
)

__all__ = ["Classification", "Classifier", "ClassifierConfig"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of a `Classifier`."""

    num_classes: int = 10
    """Number of classes."""
    channels: int = 32
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each resolution as multiples of channels; each resolution is half the previous one."""
    blocks: int = 1
    """Residual blocks in each resolution."""
    features: int = 64
    """Dimension of the penultimate layer."""
    dropout: float = 0.0
    """Dropout probability in residual blocks."""
    groups: int = 8
    """Groups of the group norms."""
    embedding: Literal["none", "sinusoidal", "log_snr"] = "none"
    """Conditioning on the noise level: none (clean images), by timestep (sinusoidal), or by log-SNR."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the hidden layers; parameters, norms, the last two layers and the output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of shape (H, W, C) that this network cannot take.

        Raises:
            ValueError: names the field, its value and valid ones.
        """
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}: use data with 2 classes or more")
        check_at_least(self, channels=1, blocks=0, features=1, groups=1)
        check_pyramid(shape, self.multipliers, self.channels, self.groups)


class Classification(NamedTuple):
    """Output of a classifier for a batch, in float32.

    Fields:
        features: the penultimate layer, shape (B, F), normalized to mean square 1.
        logits: log p(y | x) up to a constant, shape (B, classes); a linear map of the features.
    """

    features: Float[Array, "b f"]
    logits: Float[Array, "b classes"]


class Classifier(nn.Module):
    """p(y | x) of clean images, or p(y | x_t) of noisy images and their noise level; uniform at initialization.

    Source: He et al. 2016, arXiv:1603.05027 (residual blocks), with Ho et al.'s blocks, arXiv:2006.11239;
        conditioned on the noise level for guidance: Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], condition: Float[Array, " b"] | None = None, *, train: bool = False
    ) -> Classification:
        """Features and logits.

        Args:
            x: images, shape (B, H, W, C).
            condition: the noise level in the form of config.embedding, shape (B,); None if that is "none".
            train: whether dropout is on (it then needs the rng "dropout").

        Raises:
            ValueError: as config.check; condition is given although config.embedding is "none", or missing otherwise.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        cfg.check(x.shape[1:])
        embedding = self._embed(x, condition)
        h = conv3(x.astype(dtype), cfg.channels * cfg.multipliers[0], dtype)
        for level, multiplier in enumerate(cfg.multipliers):
            if level:
                h = conv3(h, cfg.channels * multiplier, dtype, stride=2)
            for _ in range(cfg.blocks):
                h = ResidualBlock(cfg.channels * multiplier, cfg.groups, cfg.dropout, dtype)(h, embedding, train)
        h = nn.swish(normalize(h, cfg.groups)).astype(jnp.float32)
        features = nn.swish(dense(cfg.features, jnp.float32)(h.reshape(h.shape[0], -1)))
        # equal length: otherwise the longest would dominate a polynomial kernel distance
        features = nn.RMSNorm(use_scale=False)(features)
        return Classification(features, dense(cfg.num_classes, jnp.float32, zero=True)(features))

    def _embed(self, x: Array, condition: Array | None) -> Array:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        if (condition is None) != (cfg.embedding == "none"):
            given = "no noise level" if condition is None else "a noise level"
            raise ValueError(
                f"{given} was passed, and embedding is {cfg.embedding!r}: set embedding to 'none', 'sinusoidal' or "
                "'log_snr' to match"
            )
        if condition is None:
            return jnp.zeros((x.shape[0], 1), dtype)  # the blocks then add a constant bias
        return LevelEmbedding(cfg.embedding, cfg.channels, 4 * cfg.channels, 0, dtype)(condition, None)
