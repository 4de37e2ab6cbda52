"""Autoencoders: a code of the data, and the data from it. No law of the code, so nothing to draw new data from.

    ||x - Dec(Enc(x))||^2                  autoencoder                  (AE-1)
    ||x - Dec(Enc(x + sigma eps))||^2      denoising autoencoder        (AE-2)

`encoder` and `decoder` take and give a batch: Flax networks as `jax.tree_util.Partial(net.apply, params)`, or any other
callables. Their optima where all is known: `linear` (principal components), `exact` (E[x | x + sigma eps]).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.gaussian import _root
from vdm_jax.types import Batch, Data, Key, PerExample, Scalar, _stateless, at_least_float32, check_values, per_example

Map = Callable[[Any], Any]


@compiled()
def reconstruction_error(encoder: Map, decoder: Map, x: Batch) -> PerExample:
    """||x - Dec(Enc(x))||^2 of each example (AE-1).

    Args:
        encoder: (B, *x) -> (B, *z).
        decoder: (B, *z) -> (B, *x).
        x: shape (B, *x).

    Returns:
        Shape (B,), summed over the example.

    Raises:
        ValueError: the decoder returns another shape than x. TypeError: it returns no floating-point array.

    Source: Hinton & Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks".
    """
    return _error(encoder, decoder, x, x)


@compiled()
def denoising_reconstruction_error(encoder: Map, decoder: Map, key: Key, x: Batch, sigma: Scalar | float) -> PerExample:
    """||x - Dec(Enc(x + sigma eps))||^2 of each example (AE-2).

    Its best denoiser is E[x | x + sigma eps]; with (Dec(Enc(y)) - y) / sigma^2 for a score it is denoising score
    matching, times sigma^4.

    Args:
        encoder, decoder, x: as in `reconstruction_error`.
        key: for the noise.
        sigma: its standard deviation; with 0 it is `reconstruction_error`.

    Returns:
        Shape (B,), summed over the example.

    Raises:
        ValueError: the decoder returns another shape than x. TypeError: it returns no floating-point array.

    Source: Vincent et al. 2008, "Extracting and composing robust features with denoising autoencoders"; Vincent 2011,
        "A connection between score matching and denoising autoencoders".
    """
    dtype = at_least_float32(x.dtype)
    noisy = x.astype(dtype) + jnp.asarray(sigma, dtype) * jax.random.normal(key, x.shape, dtype)
    return _error(encoder, decoder, noisy.astype(x.dtype), x)


def _error(encoder, decoder, seen, x) -> PerExample:
    x_hat = check_values(_stateless(decoder, "decoder", _stateless(encoder, "encoder", seen)), x.shape, "decoder")
    return per_example(jnp.square(x.astype(x_hat.dtype) - x_hat))


def _check_examples(x: Any, data: Any) -> None:
    if jnp.shape(x)[1:] != jnp.shape(data)[1:]:  # or they might broadcast
        raise ValueError(
            f"x has shape {jnp.shape(x)} and data {jnp.shape(data)}: examples of both must have the same shape"
        )


@compiled(check=_check_examples)
def nearest_distance(x: Batch, data: Data) -> PerExample:
    """min_n ||x - x_n||: how far each example is from a data set (AE-3).

    Decoded draws of N(0, I) are far from the data where nothing made codes normal.

    Args:
        x: shape (B, *x).
        data: shape (N, *x).

    Returns:
        Shape (B,). The gradient at a point of the data, where the distance has a kink, is 0.

    Raises:
        ValueError: x and the data have examples of different shapes.
    """
    dtype = at_least_float32(x.dtype, data.dtype)
    x, data = x.astype(dtype), data.astype(dtype)

    def nearest(one):
        return _root(per_example(jnp.square(data - one[None])).min())

    return jax.lax.map(nearest, x)
