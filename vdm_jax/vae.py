"""Variational autoencoders: the evidence lower bound (ELBO) with one latent, its estimators and diagnostics.

    -log p(x) <= - E_q log p(x|z) + KL(q(z|x) || p(z)),      p(z) = N(0, I)                                 (VAE-3)
                   reconstruction    kl

A model consists of three callables. The two networks take batches: `encoder(x)` returns q(z|x), a `Normal` with fields
(B, *z), and `decoder(z)` returns the input of `likelihood` for z of shape (B, *z), with a leading axis B.
`likelihood(output)` is p(x|z) of ONE example: a `Normal`, or a distribution of `likelihoods`. All terms are in nats and
are minimized, as in `elbo`. To generate data, sample z from the *prior* N(0, I), not from the encoder (VAE-12).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.compilation import compiled, scan
from vdm_jax.gaussian import Normal, kl
from vdm_jax.likelihoods import Likelihood, evaluate_log_prob
from vdm_jax.types import Batch, Key, Latents, PerExample, Real, Scalar, X, Z, at_least_float32

__all__ = [
    "DecoderFn",
    "EncoderFn",
    "KLDecomposition",
    "LikelihoodFn",
    "VAEBound",
    "aggregated_posterior_log_prob",
    "bound",
    "check_posterior",
    "encode",
    "importance_weighted_average",
    "importance_weighted_bound",
    "kl_decomposition",
    "kl_monte_carlo",
    "kl_to_prior",
    "optimal_mean_decoder",
    "output_nll",
    "reconstruction_nll",
    "reinforce_surrogate",
    "reparameterized_sample",
    "variational_em",
]

_Theta = TypeVar("_Theta")


@runtime_checkable
class EncoderFn(Protocol):
    """`encoder(x)`: q(z|x) for a batch (B, *x), a `Normal` with mean (B, *z) and variance (B, *z) or (B,)."""

    def __call__(self, x: Batch, /) -> Normal: ...


@runtime_checkable
class DecoderFn(Protocol):
    """`decoder(z)`: arrays with a leading axis B, the input of `likelihood`."""

    def __call__(self, z: Latents, /) -> Any: ...


@runtime_checkable
class LikelihoodFn(Protocol):
    """`likelihood(output)`: p(x|z) of one example, given the decoder output for this example."""

    def __call__(self, output: Any, /) -> Likelihood: ...


class VAEBound(NamedTuple):
    """The two terms of the bound on -log p(x), in nats; each shape (B,)."""

    reconstruction: PerExample
    kl: PerExample

    @property
    def total(self) -> PerExample:
        """The bound: the sum of both terms."""
        return self.reconstruction + self.kl


def kl_to_prior(q: Normal) -> Scalar:
    """KL(q || N(0, I)) of one example in nats: 1/2 (||mu||^2 + tr Sigma - k - log |Sigma|) (VAE-4).

    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix B.
    """
    return kl(q, _prior(q.mean))


def kl_monte_carlo(q: Normal, z: Z) -> Scalar:
    """log q(z) - log p(z) of one example in nats: for z ~ q, an unbiased estimate of `kl_to_prior` (VAE-4)."""
    return q.log_prob(z) - _prior(z).log_prob(z)


def reconstruction_nll(decoder: DecoderFn, likelihood: LikelihoodFn, z: Latents, x: Batch) -> PerExample:
    """-log p(x|z) in nats. For samples z ~ q(z|x) it is the reconstruction term of the bound (VAE-6, VAE-7).

    Minimizing it over the decoder for given pairs (x, z) is maximum likelihood. For a Gaussian decoder that is least
    squares: ||x - mu(z)||^2 / (2 v) + D/2 log(2 pi v).

    Args:
        decoder, likelihood: p(x|z).
        z: shape (B, *z).
        x: shape (B, *x).

    Returns:
        Shape (B,).

    Raises:
        ValueError, TypeError: as `output_nll`.
    """
    return output_nll(likelihood, decoder(z), x)


def output_nll(likelihood: LikelihoodFn, output: Any, x: Batch) -> PerExample:
    """-log p(x|z) of a batch in nats, given the decoder output.

    Args:
        likelihood: p(x|z) of one example, given the output for this example.
        output: arrays with a leading axis B.
        x: shape (B, *x).

    Returns:
        Shape (B,).

    Raises:
        ValueError: the leading axis of the output is not B, or the shape of the likelihood differs from that of x.
        TypeError: the likelihood does not return a distribution.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(output)]
    if any(shape[:1] != x.shape[:1] for shape in shapes):
        raise ValueError(f"the decoder returned shapes {shapes}: the leading axis must be the batch, {x.shape[0]}")

    return -jax.vmap(lambda output, x: evaluate_log_prob(likelihood(output), x, "likelihood"))(output, x)


def encode(encoder: EncoderFn, x: Batch) -> Normal:
    """q(z|x) for a batch, checked, in float32 or a wider type.

    Raises:
        TypeError: the encoder does not return a `Normal`.
        ValueError: the mean does not have shape (B, *z), or the variance neither that shape nor (B,).
    """
    return check_posterior(encoder(x), x.shape[0], "encoder")


def check_posterior(q: Any, batch: int, name: str) -> Normal:
    """A `Normal` returned by a network for a batch, in float32 or a wider type; errors as in `encode`."""
    if not isinstance(q, Normal):
        raise TypeError(f"the {name} returned {type(q).__name__}: it must return a gaussian.Normal")
    mean, var = jnp.shape(q.mean), jnp.shape(q.var)
    if mean[:1] != (batch,) or var not in (mean, mean[:1]):
        raise ValueError(
            f"the {name} returned mean {mean} and variance {var} for a batch of {batch}: the shapes must be (B, *z) "
            "and (B, *z) or (B,)"
        )
    return Normal(q.mean.astype(at_least_float32(q.mean.dtype)), var=q.var.astype(at_least_float32(q.var.dtype)))


def reinforce_surrogate(cost: Real, log_q: Real) -> Real:
    """The value of `cost`, with the score-function (REINFORCE) gradient: cost grad log q + grad cost (VAE-5).

    Its expectation over z ~ q is grad E[cost]. Use it if cost is not differentiable with respect to z; its variance is
    much larger than that of the reparameterized gradient.

    Args:
        cost: f(z), with `jax.lax.stop_gradient` applied to z.
        log_q: log q(z) as a function of the parameters of q, same shape as cost.

    Source: Williams 1992 (REINFORCE); Mohamed et al. 2019, arXiv:1906.10652.
    """
    return cost + jax.lax.stop_gradient(cost) * (log_q - jax.lax.stop_gradient(log_q))


@compiled()
def bound(
    encoder: EncoderFn,
    decoder: DecoderFn,
    likelihood: LikelihoodFn,
    key: Key,
    x: Batch,
    *,
    sampled_kl: bool = False,
    gradient: Literal["reparameterized", "score_function"] = "reparameterized",
) -> VAEBound:
    """An unbiased estimate of the bound on -log p(x) for each example, from one sample z ~ q(z|x) (VAE-3).

        -log p(x) = bound - KL(q(z|x) || p(z|x))                                                              (VAE-2)

    Args:
        encoder: q(z|x).
        decoder, likelihood: p(x|z).
        key: for z.
        x: shape (B, *x).
        sampled_kl: estimate the KL by log q(z|x) - log p(z) at the sample instead of the closed form. The sum of both
            terms is then log q(z|x) / p(x, z), the negative log importance weight.
        gradient: with respect to q, by reparameterization, z = mu + sigma eps, or by the score function (VAE-5).

    Returns:
        `VAEBound`, each field of shape (B,).

    Raises:
        ValueError: unknown gradient.

    Source: Kingma & Welling 2013, arXiv:1312.6114; Rezende et al. 2014, arXiv:1401.4082.
    """
    if gradient not in ("reparameterized", "score_function"):
        raise ValueError(f"unknown gradient {gradient!r}: choose 'reparameterized' or 'score_function'")
    q = encode(encoder, x)
    z = reparameterized_sample(q, key)
    z = jax.lax.stop_gradient(z) if gradient == "score_function" else z
    cost = reconstruction_nll(decoder, likelihood, z, x)
    divergence = jax.vmap(kl_monte_carlo)(q, z) if sampled_kl else jax.vmap(kl_to_prior)(q)
    if gradient == "score_function":
        log_q = jax.vmap(Normal.log_prob)(q, z)
        cost = reinforce_surrogate(cost, log_q)
        divergence = reinforce_surrogate(divergence, log_q) if sampled_kl else divergence
    return VAEBound(cost, divergence)


def reparameterized_sample(distribution: Normal, key: Key) -> Latents:
    """A sample z = mu + sigma eps for every example of a batch, shape (B, *z) (VAE-5)."""
    return jax.vmap(Normal.sample)(distribution, jax.random.split(key, distribution.mean.shape[0]))


def importance_weighted_average(log_ratios: Float[Array, "K b"]) -> PerExample:
    """-log 1/K sum_k e^(log w_k): the K-sample bound on -log p(x) from K log importance weights (VAE-3).

    Args:
        log_ratios: log w_k = log p(x, z_k) / q(z_k|x) in nats, shape (K, B).

    Returns:
        Shape (B,).

    Source: Burda et al. 2015, arXiv:1509.00519.
    """
    return jnp.log(log_ratios.shape[0]) - jax.nn.logsumexp(log_ratios, axis=0)


@compiled(static=("samples",))
def importance_weighted_bound(
    encoder: EncoderFn, decoder: DecoderFn, likelihood: LikelihoodFn, key: Key, x: Batch, *, samples: int
) -> PerExample:
    """The K-sample importance-weighted bound on -log p(x) (VAE-3, VAE-1).

    K = 1 is `bound`; as K grows the bound decreases to -log p(x). With the prior as encoder it is the Monte Carlo
    estimate of p(x) = int p(x|z) p(z) dz, which needs far too many samples if p(x|z) is small for most z (VAE-1).

    Args:
        encoder, decoder, likelihood, key, x: as in `bound`.
        samples: K, at least 1.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: samples below 1.

    Source: Burda et al. 2015, arXiv:1509.00519.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1")
    q = encode(encoder, x)

    def log_ratio(key):
        z = reparameterized_sample(q, key)
        return -reconstruction_nll(decoder, likelihood, z, x) - jax.vmap(kl_monte_carlo)(q, z)

    return importance_weighted_average(jax.lax.map(log_ratio, jax.random.split(key, samples)))


def aggregated_posterior_log_prob(q: Normal, z: Z) -> Scalar:
    """log q(z) = log 1/N sum_n q(z|x_n), the aggregated posterior of a data set (VAE-11).

    Args:
        q: q(z|x_n) of all N examples, fields (N, *z).
        z: one latent, shape (*z).
    """
    log_q = _log_probs(q, z)
    return jax.nn.logsumexp(log_q) - jnp.log(log_q.shape[0])


class KLDecomposition(NamedTuple):
    """E_x KL(q(z|x) || p(z)) = I_q(x; z) + KL(q(z) || p(z)), for each example in nats, shape (N,) (VAE-11).

    Fields:
        kl: KL(q(z|x_n) || p(z)), in closed form.
        mutual_information: log q(z|x_n) - log q(z), averaged over samples z ~ q(z|x_n).
        marginal_kl: log q(z) - log p(z) at the same samples.
    """

    kl: PerExample
    mutual_information: PerExample
    marginal_kl: PerExample


@compiled(static=("samples",))
def kl_decomposition(q: Normal, key: Key, *, samples: int = 1) -> KLDecomposition:
    """Decompose the KL of the bound into mutual information and the KL of the aggregated posterior (VAE-11).

    The data distribution is uniform on the N examples, so I_q(x; z) is at most log N.

    Args:
        q: q(z|x_n) of all N examples, fields (N, *z).
        key: for the samples.
        samples: number of samples for each example.

    Returns:
        `KLDecomposition`; the means over the examples are the three terms.

    Raises:
        ValueError: samples below 1.

    Source: Hoffman & Johnson 2016, "ELBO surgery".
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1")

    def one(key):
        z = reparameterized_sample(q, key)
        log_q = jax.lax.map(partial(aggregated_posterior_log_prob, q), z)
        return jax.vmap(Normal.log_prob)(q, z) - log_q, log_q - jax.vmap(lambda z: _prior(z).log_prob(z))(z)

    parts = jax.lax.map(one, jax.random.split(key, samples))
    return KLDecomposition(jax.vmap(kl_to_prior)(q), *(part.mean(0) for part in parts))


def optimal_mean_decoder(q: Normal, data: Batch, z: Z) -> X:
    """E_q(x|z)[x] = sum_n q(z|x_n) x_n / sum_n q(z|x_n), the optimal mean of a Gaussian decoder (VAE-8).

    It averages all x that may have the latent z, which is why reconstructions are blurred if posteriors overlap.

    Args:
        q: q(z|x_n) of all N examples, fields (N, *z).
        data: the examples, shape (N, *x).
        z: one latent, shape (*z).

    Returns:
        Shape (*x).
    """
    if data.shape[:1] != q.mean.shape[:1]:
        raise ValueError(f"data has shape {data.shape} and q.mean {q.mean.shape}: the leading axes must be equal")
    weights = jax.nn.softmax(_log_probs(q, z))
    # No matrix product: its default precision on accelerators is too low.
    return jnp.sum(data * weights.reshape(-1, *(1,) * (data.ndim - 1)), axis=0)


def variational_em(
    e_step: Callable[[_Theta], Any], m_step: Callable[[Any], _Theta], theta: _Theta, *, iterations: int
) -> tuple[_Theta, _Theta]:
    """Variational EM: alternate phi <- argmax ELBO(phi, theta) and theta <- argmax ELBO(phi, theta) (VAE-9).

    The ELBO never decreases, even if a step only increases it without reaching the maximum.

    Args:
        e_step: theta -> phi, the encoder for this decoder.
        m_step: phi -> theta, the decoder for this encoder.
        theta: the initial decoder, a pytree of arrays.
        iterations: number of iterations, each an E-step and an M-step.

    Returns:
        (theta, path): the final theta, and the theta before each iteration, stacked along a first axis.

    Source: Neal & Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other variants".
    """
    return scan(lambda theta, _: (m_step(e_step(theta)), theta), theta, jnp.arange(iterations))


def _prior(z: Z) -> Normal:
    return Normal(jnp.zeros_like(z), var=jnp.ones((), z.dtype))


def _log_probs(q: Normal, z: Z) -> PerExample:
    """log q(z|x_n) of one latent z under the posterior of every example."""
    if z.shape != q.mean.shape[1:]:
        raise ValueError(f"z has shape {z.shape} and q.mean {q.mean.shape}: z must be one latent, of shape (*z)")
    return jax.vmap(Normal.log_prob, in_axes=(0, None))(q, z)
