"""A residual perceptron for data that are vectors."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax.networks.blocks import LevelEmbedding, check_at_least, dense


@dataclass(frozen=True)
class MLPConfig:
    """The shape of an `MLP`."""

    width: int = 128
    """Units of every hidden layer."""
    blocks: int = 3
    """Residual blocks."""
    out_features: int = 0
    """Numbers of the output; 0 is as many as the input has."""
    embedding: Literal["sinusoidal", "log_snr"] = "log_snr"
    """What the noise level comes in as: a step number, or a log-SNR."""
    num_classes: int = 0
    """Classes of the label; class number num_classes is "no label". 0 is a network without labels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside; parameters, statistics and output are float32."""

    def check(self) -> None:
        """Refuse sizes that no perceptron has.

        Raises:
            ValueError: says what does not fit, and what would.
        """
        check_at_least(self, blocks=0, out_features=0, num_classes=0)
        if self.width < 4 or self.width % 2:
            raise ValueError(f"width is {self.width}: take an even number, 4 or more, as the level's embedding has")


class MLP(nn.Module):
    """eps, x_0, v or a score of vectors, from x_t and its noise level; its output layer starts at zero."""

    config: MLPConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b d"],
        condition: Float[Array, " b"],
        label: Int[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b out"]:
        """The prediction, in float32.

        Args:
            x: noisy vectors, shape (B, D).
            condition: the noise level, as config.embedding says, shape (B,).
            label: classes, shape (B,); where the network has any.
            train: taken for the U-Net's sake; nothing here is random.

        Raises:
            ValueError: as config.check; a label where there are no classes, or none where there are.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        cfg.check()
        embedding = LevelEmbedding(cfg.embedding, cfg.width, cfg.width, cfg.num_classes, dtype)(condition, label)
        h = dense(cfg.width, dtype)(x.astype(dtype))
        for _ in range(cfg.blocks):
            r = dense(cfg.width, dtype)(nn.swish(h)) + dense(cfg.width, dtype)(embedding)
            h = h + dense(cfg.width, dtype, zero=True)(nn.swish(r))
        return dense(cfg.out_features or x.shape[-1], dtype, zero=True)(h).astype(jnp.float32)
