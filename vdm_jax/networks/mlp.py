"""A residual multilayer perceptron for vector data."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax.networks.blocks import LevelEmbedding, check_at_least, dense

__all__ = ["MLP", "MLPConfig"]


@dataclass(frozen=True)
class MLPConfig:
    """Architecture of an `MLP`."""

    width: int = 128
    """Units of every hidden layer."""
    blocks: int = 3
    """Number of residual blocks."""
    out_features: int = 0
    """Dimension of the output; 0 is the dimension of the input."""
    embedding: Literal["sinusoidal", "log_snr"] = "log_snr"
    """Conditioning on the noise level by timestep (sinusoidal) or by log-SNR."""
    num_classes: int = 0
    """Number of classes; class number num_classes means "no label". 0 is a network without labels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the hidden layers; parameters and output are float32."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse examples that are not vectors (D,), and invalid sizes.

        Raises:
            ValueError: names the field, its value and valid ones.
        """
        if len(shape) != 1:
            raise ValueError(f"an MLP takes vectors (D,), not examples of shape {shape}")
        check_at_least(self, blocks=0, out_features=0, num_classes=0)
        if self.width < 4 or self.width % 2:
            raise ValueError(f"width is {self.width}: set an even number, 4 or more, for the level embedding")


class MLP(nn.Module):
    """Prediction from a noisy vector x_t and its noise level; zero at initialization."""

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
            condition: the noise level in the form of config.embedding, shape (B,).
            label: classes, shape (B,), if the network has classes.
            train: ignored, for the same signature as `UNet`; there is no dropout.

        Raises:
            ValueError: as config.check; a label is given to a network without classes, or missing otherwise.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        cfg.check(x.shape[1:])
        embedding = LevelEmbedding(cfg.embedding, cfg.width, cfg.width, cfg.num_classes, dtype)(condition, label)
        h = dense(cfg.width, dtype)(x.astype(dtype))
        for _ in range(cfg.blocks):
            r = dense(cfg.width, dtype)(nn.swish(h)) + dense(cfg.width, dtype)(embedding)
            h = h + dense(cfg.width, dtype, zero=True)(nn.swish(r))
        return dense(cfg.out_features or x.shape[-1], dtype, zero=True)(h).astype(jnp.float32)
