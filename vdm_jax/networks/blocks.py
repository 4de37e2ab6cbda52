"""Building blocks shared by the networks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax.networks.embeddings import log_snr_embedding, sinusoidal

__all__ = [
    "Attention",
    "LevelEmbedding",
    "ResidualBlock",
    "check_at_least",
    "check_pyramid",
    "conv3",
    "dense",
    "log_variance",
    "normalize",
    "upsample",
]

FAN_AVERAGE = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def check_at_least(config: Any, **least: int) -> None:
    """Refuse fields of a network's config that are too small, and a dropout probability outside [0, 1).

    Raises:
        ValueError: names the field, its value and the smallest valid one.
    """
    for name, smallest in least.items():
        if (value := getattr(config, name)) < smallest:
            raise ValueError(f"{name} is {value}: set it to {smallest} or more")
    if not 0.0 <= getattr(config, "dropout", 0.0) < 1.0:
        raise ValueError(f"dropout is {config.dropout}: set a probability in [0, 1)")


def check_pyramid(shape: tuple[int, ...], multipliers: tuple[int, ...], channels: int, groups: int) -> None:
    """Refuse images of shape (H, W, C), or series of shape (L, C), that cannot be halved often enough, and channels not
    divisible by groups.

    Raises:
        ValueError: names the values and valid ones.
    """
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers is {multipliers}: set one number for each resolution, 1 or more")
    sides, factor = shape[:-1], 2 ** (len(multipliers) - 1)
    if any(side % factor for side in sides):
        what = f"images of {sides[0]} x {sides[1]}" if len(sides) == 2 else f"series of length {sides[0]}"
        raise ValueError(
            f"{what} cannot be halved {len(multipliers) - 1} times: "
            f"set fewer multipliers than {multipliers}, or use sides that are multiples of {factor}"
        )
    if channels % groups:
        raise ValueError(f"{channels} channels do not split into {groups} groups: change one of the two")


def dense(features: int, dtype: Any, *, zero: bool = False) -> nn.Dense:
    """A dense layer (a 1 x 1 convolution) with Ho et al.'s initialization, or zeros."""
    return nn.Dense(features, kernel_init=nn.initializers.zeros if zero else FAN_AVERAGE, dtype=dtype)


def conv3(x: Float[Array, "b *s c"], features: int, dtype: Any, *, zero: bool = False, stride: int = 1) -> Array:
    """A convolution of width 3 in every spatial dimension, with Ho et al.'s initialization or zeros."""
    dims, init = x.ndim - 2, nn.initializers.zeros if zero else FAN_AVERAGE
    return nn.Conv(features, (3,) * dims, strides=(stride,) * dims, kernel_init=init, dtype=dtype)(x)


def normalize(x: Float[Array, "b *s c"], groups: int) -> Float[Array, "b *s c"]:
    """Group normalization, computed in float32 and returned in the dtype of x."""
    # Flax's fast variance E[x^2] - E[x]^2 cancels: 7 % error at a mean of 300 standard deviations, worthless at 3,000
    norm = nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def log_variance(h: Float[Array, "*h"]) -> Float[Array, "*h"]:
    """Soft clipping of a log-variance to [-20, 20], in float32, so that no KL divergence overflows."""
    return 20.0 * jnp.tanh(h.astype(jnp.float32) / 20.0)


class LevelEmbedding(nn.Module):
    """Embedding of the noise level, and of the label if the network has classes.

    Fields:
        embedding: "sinusoidal" for timesteps, or "log_snr".
        features: dimension of the fixed embedding.
        width: dimension of the output.
        num_classes: number of classes, or 0; class number num_classes means "no label".

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    embedding: str
    features: int
    width: int
    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, condition: Float[Array, " b"], label: Int[Array, " b"] | None) -> Float[Array, "b e"]:
        if (label is None) != (self.num_classes == 0):
            given = "no label" if label is None else "a label"
            raise ValueError(f"{given} was passed, and num_classes is {self.num_classes}: set num_classes to match")
        embeddings = {"sinusoidal": sinusoidal, "log_snr": log_snr_embedding}
        if self.embedding not in embeddings:
            raise ValueError(f"embedding is {self.embedding!r}: set it to 'sinusoidal' or 'log_snr'")
        features = embeddings[self.embedding](condition, self.features)
        h = dense(self.width, self.dtype)(features.astype(self.dtype))
        h = dense(self.width, self.dtype)(nn.swish(h))
        return h if label is None else h + nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype)(label)


class ResidualBlock(nn.Module):
    """x + f(x, embedding), f two normalized convolutions with the embedding added in between; the identity at
    initialization.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    features: int
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"], embedding: Float[Array, "b e"], train: bool):
        h = conv3(nn.swish(normalize(x, self.groups)), self.features, self.dtype)
        shift = dense(self.features, self.dtype)(nn.swish(embedding))
        h = h + jnp.expand_dims(shift, range(1, h.ndim - 1))
        h = nn.swish(normalize(h, self.groups))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3(h, self.features, self.dtype, zero=True)
        return h + (x if x.shape[-1] == self.features else dense(self.features, self.dtype)(x))


class Attention(nn.Module):
    """x + single-head self-attention over all positions; the identity at initialization.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]):
        channels = x.shape[-1]
        h = normalize(x, self.groups).reshape(x.shape[0], -1, channels)
        query, key, value = (dense(channels, self.dtype)(h) for _ in range(3))
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32) * channels**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, value)
        return x + dense(channels, self.dtype, zero=True)(h).reshape(x.shape)


def upsample(x: Float[Array, "b *s c"]) -> Array:
    """Nearest-neighbor upsampling by a factor of two in every spatial dimension."""
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x
