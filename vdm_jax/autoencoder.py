"""Autoencoders: a code of the data and its reconstruction. The code has no distribution, so they cannot generate data.

    ||x - Dec(Enc(x))||^2                  autoencoder                  (AE-1)
    ||x - Dec(Enc(x + sigma eps))||^2      denoising autoencoder        (AE-2)

`encoder` and `decoder` take and return a batch: pass Flax networks as `jax.tree_util.Partial(net.apply, params)`. Known
optima: `linear_gaussian` (principal components) and `closed_form` (E[x | x + sigma eps]).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.gaussian import _root
from vdm_jax.types import Batch, Data, Key, PerExample, Scalar, _stateless, at_least_float32, check_values, per_example

__all__ = ["denoising_reconstruction_error", "nearest_distance", "reconstruction_error"]

_Map = Callable[[Any], Any]


@compiled()
def reconstruction_error(encoder: _Map, decoder: _Map, x: Batch) -> PerExample:
    """||x - Dec(Enc(x))||^2 of each example (AE-1).

    Args:
        encoder: (B, *x) -> (B, *z).
        decoder: (B, *z) -> (B, *x).
        x: shape (B, *x).

    Returns:
        Shape (B,), summed over the example.

    Raises:
        ValueError: the decoder returns another shape than that of x.
        TypeError: the decoder does not return a floating-point array.

    Source: Hinton & Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks".
    """
    return _error(encoder, decoder, x, x)


@compiled()
def denoising_reconstruction_error(
    encoder: _Map, decoder: _Map, key: Key, x: Batch, sigma: Scalar | float
) -> PerExample:
    """||x - Dec(Enc(x + sigma eps))||^2 of each example (AE-2).

    The optimal denoiser is E[x | x + sigma eps]. With (Dec(Enc(y)) - y) / sigma^2 as the score, it is 2 sigma^4
    times the loss of denoising score matching.

    Args:
        encoder, decoder, x: as in `reconstruction_error`.
        key: for the noise.
        sigma: standard deviation of the noise; 0 is `reconstruction_error`.

    Returns:
        Shape (B,), summed over the example.

    Raises:
        ValueError: the decoder returns another shape than that of x.
        TypeError: the decoder does not return a floating-point array.

    Source: Vincent et al. 2008, "Extracting and composing robust features with denoising autoencoders"; Vincent 2011,
        "A connection between score matching and denoising autoencoders".
    """
    dtype = at_least_float32(x.dtype)
    noisy = x.astype(dtype) + jnp.asarray(sigma, dtype) * jax.random.normal(key, x.shape, dtype)
    return _error(encoder, decoder, noisy.astype(x.dtype), x)


def _error(encoder, decoder, inputs, x) -> PerExample:
    x_hat = check_values(_stateless(decoder, "decoder", _stateless(encoder, "encoder", inputs)), x.shape, "decoder")
    return per_example(jnp.square(x.astype(x_hat.dtype) - x_hat))


def _check_examples(x: Any, data: Any) -> None:
    if jnp.shape(x)[1:] != jnp.shape(data)[1:]:  # they must not broadcast
        raise ValueError(
            f"x has shape {jnp.shape(x)} and data {jnp.shape(data)}: examples of both must have the same shape"
        )


@compiled(check=_check_examples)
def nearest_distance(x: Batch, data: Data) -> PerExample:
    """min_n ||x - x_n||, the distance of each example to a data set (AE-3).

    Decoded samples of N(0, I) are far from the data, because an autoencoder does not make the codes normal.

    Args:
        x: shape (B, *x).
        data: shape (N, *x).

    Returns:
        Shape (B,). The gradient at a point of the data set, where the distance is not differentiable, is 0.

    Raises:
        ValueError: the examples of x and data have different shapes.
    """
    dtype = at_least_float32(x.dtype, data.dtype)
    x, data = x.astype(dtype), data.astype(dtype)

    def distance(example):
        return _root(per_example(jnp.square(data - example[None])).min())

    return jax.lax.map(distance, x)
