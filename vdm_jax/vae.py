"""Variational autoencoders: the evidence lower bound with one latent, and what follows from it.

    -log p(x) <= - E_q log p(x|z) + KL(q(z|x) || p(z)),      p(z) = N(0, I)                                 (VAE-3)
                   reconstruction    kl

Three callables make a model. The two networks take batches: `encoder(x)` is q(z|x), a `Normal` of fields (B, *z), and
`decoder(z)` gives, for z of shape (B, *z), whatever `likelihood` reads, with a leading axis B. `likelihood(output)` is
p(x|z) of ONE example: `Normal`, or one of `likelihoods`. All is in nats, and costs, as in `elbo`. New data come from
the *prior*, z ~ N(0, I), never from the encoder (VAE-12).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.compilation import compiled, scan
from vdm_jax.gaussian import Normal, kl
from vdm_jax.likelihoods import Likelihood
from vdm_jax.types import Batch, Key, Latents, PerExample, Real, Scalar, X, Z, at_least_float32, check_values

Gradient = Literal["reparameterized", "score_function"]
Theta = TypeVar("Theta")
Code = Float[Array, "*z"]  # one latent, of any shape: not the shape of x
Codes = Float[Array, "b *z"]


@runtime_checkable
class EncoderFn(Protocol):
    """`encoder(x)`: q(z|x) of a batch (B, *x), a `Normal` whose mean is (B, *z) and whose variance (B, *z) or (B,)."""

    def __call__(self, x: Batch, /) -> Normal: ...


@runtime_checkable
class DecoderFn(Protocol):
    """`decoder(z)`: arrays with a leading axis B, of which `likelihood` makes p(x|z) one example at a time."""

    def __call__(self, z: Latents, /) -> Any: ...


@runtime_checkable
class LikelihoodFn(Protocol):
    """`likelihood(output)`: p(x|z) of one example, from its part of what the decoder gave."""

    def __call__(self, output: Any, /) -> Likelihood: ...


class VAEBound(NamedTuple):
    """The two terms of the bound on -log p(x), in nats; each shape (B,)."""

    reconstruction: PerExample
    kl: PerExample

    @property
    def total(self) -> PerExample:
        """The bound itself."""
        return self.reconstruction + self.kl


def kl_to_prior(q: Normal) -> Scalar:
    """KL(q || N(0, I)) of one example in nats, 1/2 (||mu||^2 + tr Sigma - k - log |Sigma|) (VAE-4).

    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix B.
    """
    return kl(q, _prior(q.mean))


def kl_monte_carlo(q: Normal, z: Z) -> Scalar:
    """log q(z) - log p(z) of one example in nats: over draws z ~ q its mean is `kl_to_prior` (VAE-4)."""
    return q.log_prob(z) - _prior(z).log_prob(z)


def reconstruction_nll(decoder: DecoderFn, likelihood: LikelihoodFn, z: Codes, x: Batch) -> PerExample:
    """-log p(x|z) of pairs, in nats; with draws z ~ q(z|x), the bound's reconstruction term (VAE-6, VAE-7).

    A decoder trained by it on given pairs is trained alone, by maximum likelihood; a Gaussian one by least squares:
    ||x - mu(z)||^2 / (2 v) + D/2 log(2 pi v).

    Args:
        decoder, likelihood: p(x|z).
        z: shape (B, *z).
        x: shape (B, *x).

    Returns:
        Shape (B,).

    Raises:
        ValueError, TypeError: as `decoded_cost`.
    """
    return output_nll(likelihood, decoder(z), x)


def output_nll(likelihood: LikelihoodFn, output: Any, x: Batch) -> PerExample:
    """-log p(x|z) of a batch in nats, from the decoder's output.

    Args:
        likelihood: p(x|z) of one example, from its part of the output.
        output: arrays with a leading axis B.
        x: shape (B, *x).

    Returns:
        Shape (B,).

    Raises:
        ValueError: the output's leading axis is not B, or the likelihood has another shape than x.
        TypeError: the likelihood returns no distribution.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(output)]
    if any(shape[:1] != x.shape[:1] for shape in shapes):
        raise ValueError(f"the decoder returned shapes {shapes} for {x.shape[0]} examples: each must begin with B")

    def one(output, example):
        distribution = likelihood(output)
        if not isinstance(distribution, Likelihood):
            raise TypeError(
                f"the likelihood returned {type(distribution).__name__}: it must return a distribution with log_prob, "
                "such as gaussian.Normal or likelihoods.Bernoulli"
            )
        sample = getattr(distribution, "sample", None)
        if sample is not None:  # a distribution of another shape might broadcast
            drawn = jax.eval_shape(lambda: sample(jax.random.key(0))).shape
            if drawn != example.shape:
                raise ValueError(
                    f"the likelihood is of shape {drawn} for an x of shape {example.shape}: both must agree"
                )
        return -check_values(distribution.log_prob(example), (), "likelihood's log_prob")

    return jax.vmap(one)(output, x)


def encode(encoder: EncoderFn, x: Batch) -> Normal:
    """q(z|x) of a batch, checked, in float32 or a wider type.

    Raises:
        TypeError: the encoder returns no `Normal`.
        ValueError: its mean is not (B, *z), or its variance neither that nor (B,).
    """
    return check_posterior(encoder(x), x.shape[0], "encoder")


def check_posterior(q: Any, batch: int, name: str) -> Normal:
    """A network's `Normal` for a batch, in float32 or a wider type; errors as in `encode`."""
    if not isinstance(q, Normal):
        raise TypeError(f"the {name} returned {type(q).__name__}: it must return a gaussian.Normal of a batch")
    mean, var = jnp.shape(q.mean), jnp.shape(q.var)
    if mean[:1] != (batch,) or var not in (mean, mean[:1]):
        raise ValueError(
            f"the {name} returned a mean of shape {mean} and a variance of shape {var} for {batch} examples: the mean "
            "must be (B, *z), the variance (B, *z) or (B,)"
        )
    return Normal(q.mean.astype(at_least_float32(q.mean.dtype)), var=q.var.astype(at_least_float32(q.var.dtype)))


def score_function_surrogate(cost: Real, log_q: Real) -> Real:
    """`cost` at a draw z ~ q, with cost * grad log q for a gradient besides its own: E of that is grad E cost (VAE-5).

    For costs that cannot be differentiated by z. It varies far more than the reparameterised gradient.

    Args:
        cost: f(z), z without a gradient of its own (`jax.lax.stop_gradient`).
        log_q: log q(z), as a function of q's parameters; shape of cost.

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
    gradient: Gradient = "reparameterized",
) -> VAEBound:
    """One unbiased estimate per example of the bound on -log p(x), from one draw z ~ q(z|x) (VAE-3).

        -log p(x) = bound - KL(q(z|x) || p(z|x))                                                              (VAE-2)

    Args:
        encoder: q(z|x).
        decoder, likelihood: p(x|z).
        key: for z.
        x: shape (B, *x).
        sampled_kl: log q(z|x) - log p(z) at the draw instead of the closed form: then the terms add up to the log of
            the importance ratio q(z|x) / p(x, z).
        gradient: through the draw, z = mu + sigma eps, or by the score function (VAE-5).

    Returns:
        `Bound`, each field (B,).

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
        cost = score_function_surrogate(cost, log_q)
        divergence = score_function_surrogate(divergence, log_q) if sampled_kl else divergence
    return VAEBound(cost, divergence)


def reparameterized_sample(distribution: Normal, key: Key) -> Latents:
    """One z = mu + sigma eps of every example's law, each with a key of its own (VAE-5). Shape (B, *z)."""
    return jax.vmap(Normal.sample)(distribution, jax.random.split(key, distribution.mean.shape[0]))


def importance_weighted_average(log_ratios: Float[Array, "K b"]) -> PerExample:
    """-log 1/K sum_k e^(log ratio k): the K-sample bound on -log p(x) from K draws of log p(x, z)/q(z|x) (VAE-3).

    Averaged inside the logarithm: without its -log K a sum would claim log K nats too many.

    Args:
        log_ratios: shape (K, B), nats.

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

    K = 1 is the bound itself; it falls with K to -log p(x). With the prior for an encoder it is plain Monte Carlo of
    p(x) = int p(x|z) p(z) dz, which needs hopelessly many draws where p(x|z) is small for nearly all of them (VAE-1).

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
        raise ValueError(f"samples is {samples}: the bound needs at least one draw")
    q = encode(encoder, x)

    def log_ratio(key):
        z = reparameterized_sample(q, key)
        return -reconstruction_nll(decoder, likelihood, z, x) - jax.vmap(kl_monte_carlo)(q, z)

    return importance_weighted_average(jax.lax.map(log_ratio, jax.random.split(key, samples)))


def aggregated_posterior_log_prob(q: Normal, z: Z) -> Scalar:
    """log q(z) = log 1/N sum_n q(z|x_n): the law of the codes of a data set (VAE-11).

    Args:
        q: the encoder's law of all N examples, fields (N, *z).
        z: one code, shape (*z).
    """
    log_q = _log_probs(q, z)
    return jax.nn.logsumexp(log_q) - jnp.log(log_q.shape[0])


class KLDecomposition(NamedTuple):
    """E_x KL(q(z|x) || p(z)) = I_q(x; z) + KL(q(z) || p(z)), example by example, nats; each shape (N,) (VAE-11).

    Fields:
        kl: KL(q(z|x_n) || p(z)), in closed form.
        mutual_information: log q(z|x_n) - log q(z), averaged over draws z ~ q(z|x_n).
        marginal_kl: log q(z) - log p(z) at the same draws.
    """

    kl: PerExample
    mutual_information: PerExample
    marginal_kl: PerExample


@compiled(static=("samples",))
def kl_decomposition(q: Normal, key: Key, *, samples: int = 1) -> KLDecomposition:
    """What of the bound's KL is information about x, and what a mismatch of the codes with the prior (VAE-11).

    The data set is the N examples themselves, x ~ uniform: I_q(x; z) is at most log N.

    Args:
        q: the encoder's law of all N examples, fields (N, *z).
        key: for the draws.
        samples: draws an example.

    Returns:
        `InformationSplit`; its means over the examples are the three terms.

    Raises:
        ValueError: samples below 1.

    Source: Hoffman & Johnson 2016, "ELBO surgery".
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: at least one draw of every example is needed")

    def one(key):
        z = reparameterized_sample(q, key)
        log_q = jax.lax.map(partial(aggregated_posterior_log_prob, q), z)
        return jax.vmap(Normal.log_prob)(q, z) - log_q, log_q - jax.vmap(lambda z: _prior(z).log_prob(z))(z)

    parts = jax.lax.map(one, jax.random.split(key, samples))
    return KLDecomposition(jax.vmap(kl_to_prior)(q), *(part.mean(0) for part in parts))


def optimal_mean_decoder(q: Normal, data: Batch, z: Code) -> X:
    """E_q(x|z)[x] = sum_n q(z|x_n) x_n / sum_n q(z|x_n): the best mean a Gaussian decoder can have (VAE-8).

    An average of every x whose code z may be: where codes overlap, a blur of several.

    Args:
        q: the encoder's law of all N examples, fields (N, *z).
        data: the examples, shape (N, *x).
        z: one code, shape (*z).

    Returns:
        Shape (*x).
    """
    if data.shape[:1] != q.mean.shape[:1]:
        raise ValueError(f"data has shape {data.shape} and q's mean {q.mean.shape}: N must be the same")
    weights = jax.nn.softmax(_log_probs(q, z))
    # No matrix product: on an accelerator its default precision would not do.
    return jnp.sum(data * weights.reshape(-1, *(1,) * (data.ndim - 1)), axis=0)


def variational_em(
    e_step: Callable[[Theta], Any], m_step: Callable[[Any], Theta], theta: Theta, *, rounds: int
) -> tuple[Theta, Theta]:
    """Variational EM: phi <- argmax ELBO(phi, theta), theta <- argmax ELBO(phi, theta), in turn (VAE-9).

    The ELBO never falls, whatever part of its maximum each step reaches.

    Args:
        e_step: theta -> phi, the better encoder; m_step: phi -> theta, the better decoder.
        theta: the decoder to begin with, a pytree of arrays.
        rounds: how many of both.

    Returns:
        the last theta, and the theta before each round, stacked along a first axis.

    Source: Neal & Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and other variants".
    """
    return scan(lambda theta, _: (m_step(e_step(theta)), theta), theta, jnp.arange(rounds))


def _prior(z: Z) -> Normal:
    return Normal(jnp.zeros_like(z), var=jnp.ones((), z.dtype))


def _log_probs(q: Normal, z: Z) -> PerExample:
    """log q(z|x_n) of one code, for every example's law."""
    if z.shape != q.mean.shape[1:]:
        raise ValueError(f"z has shape {z.shape} and q's mean {q.mean.shape}: z must be one code")
    return jax.vmap(Normal.log_prob, in_axes=(0, None))(q, z)
