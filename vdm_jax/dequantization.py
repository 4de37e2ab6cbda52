"""Dequantization: from a density to bounds on the probability of quantized data.

A density p(y) on the reals assigns quantized data x the probability P(x) = int p(y) dy over x's bin, and by Jensen

    -log P(x) <= E_q(y|x) [ log q(y|x) - log p(y) ],                                                           (LIK-3)

with a gap equal to the KL from q to p restricted to the bin. The bound holds for every dequantization distribution q.
There are `levels` values, evenly spaced on [-1, 1], and all bins, also the first and the last, have the width
w = 2 / (levels - 1). Mass of p outside of all bins loosens the bound.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.elbo import DiffusionDecoder, decoder_log_prob
from vdm_jax.gaussian import LOG_2PI, Normal
from vdm_jax.likelihoods import _from_integer, _widened, denormalize, log_interval_probability, normalize, on_grid
from vdm_jax.noise_levels import NoiseLevel, broadcast_to_batch, check_positive
from vdm_jax.parameterization import to_x_0
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    PerExample,
    PredictionType,
    Real,
    Scalar,
    X,
    at_least_float32,
    check_distribution,
    check_values,
    evaluate,
    evaluate_scalars,
)
from vdm_jax.vae import importance_weighted_average

__all__ = ["TruncatedNormal", "Uniform", "dequantized_bound", "latent_dequantization_bound"]

_LogDensity = Callable[[Batch], PerExample]


class Uniform(NamedTuple):
    """Uniform dequantization: y uniform over the bin of x (LIK-3).

    Fields:
        x: quantized, on [-1, 1], shape (*x).
        levels: number of values.

    Source: Theis et al. 2016, arXiv:1511.01844.
    """

    x: X
    levels: int

    def sample(self, key: Key) -> X:
        """A sample, shape (*x), in float32 or a wider type.

        Raises:
            ValueError: as `likelihoods.on_grid`.
        """
        x = _value(self.x, self.levels)
        return x + (jax.random.uniform(key, x.shape, x.dtype) - 0.5) * (2.0 / (self.levels - 1))

    def log_prob(self, y: X) -> Scalar:
        """log q(y | x) = -D log w for y in the bin, in nats. Raises ValueError as `sample`."""
        density = jnp.asarray((self.levels - 1) / 2.0, at_least_float32(y.dtype))
        return on_grid(self.x, self.levels).mean() * y.size * jnp.log(density)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TruncatedNormal:
    """y ~ N(x + mean, scale^2), truncated to the bin of x (LIK-4).

    With mean 0 and the scale sigma / alpha of the first noise level, y is distributed as the training data of a
    diffusion model except for the tails, and no network is needed. With a learned mean and scale, or those of a
    network, it is variational dequantization: `sample` is differentiable with respect to both, and they are trained on
    the bound together with the model. As the scale increases it approaches `Uniform`. All fields except x are
    keyword-only.

    Fields:
        x: quantized, on [-1, 1], shape (*x).
        levels: number of values; static.
        mean: mean of y - x before truncation, scalar or (*x). It may be outside of the bin by a few scales.
        scale: standard deviation before truncation, positive, scalar or (*x).

    Source: Zheng et al. 2023, arXiv:2305.03935 (fixed); Ho et al. 2019, arXiv:1902.00275 (variational).
    """

    x: Any  # arrays; JAX rebuilds pytrees with other objects in their place
    _: KW_ONLY
    levels: int = field(metadata={"static": True})
    mean: Any
    scale: Any

    def sample(self, key: Key) -> X:
        """A sample, shape (*x), in float32 or a wider type.

        Raises:
            ValueError: as `likelihoods.on_grid`.
        """
        mean, scale = _widened(self.mean, self.scale)
        low, high = (jnp.broadcast_to(edge, self.x.shape) for edge in self._edges(mean, scale))
        u = jax.random.uniform(key, low.shape, low.dtype) + 0.5 * jnp.finfo(low.dtype).eps  # neither 0 nor 1
        return _value(self.x, self.levels) + (mean + scale * _quantile(u, low, high))

    def log_prob(self, y: X) -> Scalar:
        """log q(y | x) for y in the bin, in nats. Raises ValueError as `sample`."""
        mean, scale = _widened(self.mean, self.scale)
        low, high = self._edges(mean, scale)
        z = (y - _value(self.x, self.levels) - mean) / scale
        mass = log_interval_probability(mean / scale, 2.0 / ((self.levels - 1) * scale), jnp.minimum(-low, high))
        return jnp.sum(-0.5 * (z**2 + LOG_2PI) - jnp.log(scale) - mass)

    def _edges(self, mean: Real, scale: Real) -> tuple[Real, Real]:
        """The edges of the bin, as distances from the mean in scales."""
        low, high = (-_from_integer(mean, jnp.asarray(side), self.levels) for side in (-1, 1))
        bins = (self.levels - 1) * scale
        return low / bins, high / bins


def _value(x: X, levels: int) -> X:
    """x in float32 or wider, NaN if it is not on the grid. Values of narrower types are rounded to the grid."""
    x = jnp.asarray(x)
    dtype = at_least_float32(x.dtype)
    return on_grid(x, levels) * (x if x.dtype == dtype else normalize(denormalize(x, levels), levels).astype(dtype))


@jax.custom_jvp
def _quantile(u: X, low: X, high: X) -> X:
    """The u-quantile of N(0, 1) truncated to [low, high], by bisection; accurate in any tail."""
    near, odds = jnp.clip(0.0, low, high), jnp.log(u) - jnp.log1p(-u)
    low, high = jnp.maximum(low, near - 12.0), jnp.minimum(high, near + 12.0)  # the mass beyond is e^-72

    def halve(ends, _):
        begin, end = ends
        z = 0.5 * (begin + end)
        below = (
            log_interval_probability(0.5 * (low + z), z - low) - log_interval_probability(0.5 * (z + high), high - z)
            < odds
        )
        return (jnp.where(below, z, begin), jnp.where(below, end, z)), None

    (begin, end), _ = scan(halve, (low, high), jnp.arange(jnp.finfo(low.dtype).nmant + 5))
    return 0.5 * (begin + end)


@_quantile.defjvp
def _(primals, tangents):
    # u = (Phi(z) - Phi(low)) / (Phi(high) - Phi(low)) is constant, so
    # phi(z) dz = (1 - u) phi(low) dlow + u phi(high) dhigh
    (u, low, high), (_, d_low, d_high) = primals, tangents
    z = _quantile(u, low, high)
    by_low, by_high = (jnp.exp(0.5 * (z - edge) * (z + edge)) for edge in (low, high))
    return z, (1.0 - u) * by_low * d_low + u * by_high * d_high


@compiled(static=("samples",))
def dequantized_bound(
    log_prob: _LogDensity,
    key: Key,
    x_0: Batch,
    dequantizer: Callable[[X], Uniform | TruncatedNormal],
    *,
    samples: int = 1,
) -> PerExample:
    """An unbiased estimate of the bound on -log P(x_0) of a model with a density, per example (LIK-3, LIK-4).

        -log P(x) <= -E log 1/K sum_k p(y_k) / q(y_k | x),   y_k ~ q(y | x)

    P(x) is the integral of the density over x's bin. The bound is tighter for larger K, and exact in the limit. Divided
    by D log 2 it is bits per dimension, without a correction for the width of the bins.

    Args:
        log_prob: the model's log-density of y for a batch, (B, *x) -> (B,); y is float32 or wider for any dtype of x_0.
            `probability_flow.log_likelihood` returns the density of z_0 = alpha_0 y: add D log alpha_0 for that of y.
        key: for y.
        x_0: quantized batch, on [-1, 1], shape (B, *x).
        dequantizer: x -> q(y | x) of one example: `lambda x: Uniform(x, levels)`.
        samples: K, at least 1.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: samples below 1, or a dequantizer or density of another shape.

    Source: Theis et al. 2016, arXiv:1511.01844; Ho et al. 2019, arXiv:1902.00275; Burda et al. 2015, arXiv:1509.00519.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1")

    def distribution(x):
        return check_distribution(dequantizer(x), "dequantizer", "sample", "log_prob")

    def sample(x, k):
        return check_values(distribution(x).sample(k), x.shape, "sample of the dequantizer")

    def density(x, y):
        return check_values(distribution(x).log_prob(y), (), "log_prob of the dequantizer")

    def log_ratio(key):
        y = jax.vmap(sample)(x_0, jax.random.split(key, x_0.shape[0]))
        return evaluate_scalars(log_prob, y, name="log_prob") - jax.vmap(density)(x_0, y)

    return importance_weighted_average(jax.lax.map(log_ratio, jax.random.split(key, samples)))


def _check_level(level: NoiseLevel) -> None:
    check_positive(level, "sigma")


@compiled(check=_check_level)
def latent_dequantization_bound(
    log_prob: _LogDensity,
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    level: NoiseLevel,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
) -> PerExample:
    """An unbiased estimate of the bound with the latent z_0 as the dequantized data, per example (LIK-5).

        -log P(x) <= E_q(z_0|x) [ -log P(x | z_0) - log p(z_0) + log q(z_0 | x) ]

    P(x) = int P(x | z_0) p(z_0) dz_0 is the same model as that of the ELBO, but with the exact density p(z_0) instead
    of a bound on it. It is variational dequantization by the first diffusion step, whose samples may leave the bin.

    Args:
        log_prob: log p(z_0) of a batch at this level.
        denoiser: predicts `prediction_type`; evaluated once, for the decoder's x_hat.
        key: for z_0.
        x_0: clean batch, shape (B, *x).
        level: level of z_0, scalars, sigma > 0.
        decoder: P(x | z_0) of one example.
        prediction_type: what the denoiser predicts.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: unknown prediction_type, a level without noise, or a density of another shape.

    Source: Kingma et al. 2021, arXiv:2107.00630, equation 3; Ho et al. 2019, arXiv:1902.00275.
    """
    distributions = jax.vmap(lambda x: forward.marginal(x.astype(at_least_float32(x.dtype)), level))(x_0)
    z_0 = jax.vmap(Normal.sample)(distributions, jax.random.split(key, x_0.shape[0]))
    levels = broadcast_to_batch(level, x_0)
    prediction = evaluate(denoiser, z_0.astype(x_0.dtype), levels)
    x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(prediction, z_0, levels)
    log_p_x = decoder_log_prob(lambda h, z: decoder(h, z, level), x_0, x_hat, z_0)
    return jax.vmap(Normal.log_prob)(distributions, z_0) - evaluate_scalars(log_prob, z_0, name="log_prob") - log_p_x
