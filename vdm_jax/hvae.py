"""Hierarchical VAEs: the bound with any number of latents, from one Gaussian latent to the T of a diffusion model.

    p(z_L) prod_{i=2..L} p(z_{i-1} | z_i) p(x | z_1)            generation, from the top down               (HVAE-1)
    q(z_1 | x) prod_{i=2..L} q(z_i | z_{i-1})                   inference, from the bottom up               (HVAE-2)
    q(z_L | x) prod_{i=2..L} q(z_{i-1} | z_i, x)                or from the top down (ladder VAE)

A model is a `Hierarchy`: a callable that computes its layers in one pass and calls `choose` for every latent. Sampling
all latents from q is inference, sampling them from p is generation, and sampling the upper layers from q and the lower
ones from p is reconstruction. `top_down` and `bottom_up` build a hierarchy from a list of conditionals, each of which
depends on the adjacent layer only; a deep network whose layers share a state implements the protocol itself. With one
layer the model is a VAE; with fixed linear-Gaussian layers of the data's size it is a diffusion model (HVAE-5). All
terms are in nats and are minimized.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from vdm_jax.compilation import compiled
from vdm_jax.gaussian import Normal, kl
from vdm_jax.types import Batch, Key, Latents, PerExample, Scalar, at_least_float32
from vdm_jax.vae import (
    DecoderFn,
    EncoderFn,
    LikelihoodFn,
    check_posterior,
    importance_weighted_average,
    output_nll,
    reparameterized_sample,
)

__all__ = [
    "ChooseLatent",
    "CollapseDiagnostics",
    "HierarchicalBound",
    "Hierarchy",
    "Latent",
    "bottom_up",
    "bound",
    "collapse_diagnostics",
    "free_bits_objective",
    "importance_weighted_bound",
    "kl_warm_up",
    "reconstruct",
    "sample",
    "sample_decoder_output",
    "top_down",
]


class Latent(NamedTuple):
    """The latent variable of one layer, with its two distributions.

    Fields:
        z: the latent, shape (B, *z).
        q: its approximate posterior, fields (B, *z); None if the hierarchy is evaluated without data.
        p: its conditional prior, fields (B, *z).
        upward: z was sampled before the layer above, on which p depends. The KL is then estimated by log q(z) / p(z):
            the closed form KL(q || p) is not an unbiased estimate if p depends on z through the layer above.
    """

    z: Latents
    q: Normal | None
    p: Normal
    upward: bool = False


@runtime_checkable
class ChooseLatent(Protocol):
    """`choose(i, q, p)`: the latent of layer i, shape (B, *z), counted from 0 in the order of choosing.

    q is None without data; p is None in bottom-up inference, where it is computed later.
    """

    def __call__(self, i: int, q: Normal | None, p: Normal | None, /) -> Latents: ...


@runtime_checkable
class Hierarchy(Protocol):
    """`hierarchy(x, choose)`: the latents, in the order in which they are chosen, and the decoder output.

    x is a batch (B, *x), or an integer B to generate B examples without data.
    """

    def __call__(self, x: Batch | int, choose: ChooseLatent, /) -> tuple[Sequence[Latent], Any]: ...


class HierarchicalBound(NamedTuple):
    """The terms of the bound on -log p(x), in nats.

    Fields:
        reconstruction: -log p(x|z_1), shape (B,).
        kl: one row for each layer, in the order of the latents, shape (L, B).
    """

    reconstruction: PerExample
    kl: Float[Array, "L b"]

    @property
    def total(self) -> PerExample:
        """The bound: the sum of all terms."""
        return self.reconstruction + self.kl.sum(0)


def top_down(
    shape: tuple[int, ...],
    posteriors: Sequence[Callable[[Any, Any], Normal]],
    conditionals: Sequence[EncoderFn],
    decoder: DecoderFn,
) -> Hierarchy:
    """A hierarchy with inference and generation from the top down, as in ladder VAEs.

    Args:
        shape: shape of one z_L; its prior is N(0, I).
        posteriors: q(z_L | x), q(z_{L-1} | z_L, x), ..., q(z_1 | z_2, x), L in all, each
            `(z above or None, x) -> Normal`.
        conditionals: p(z_{L-1} | z_L), ..., p(z_1 | z_2), each `z above -> Normal`, L - 1 in all.
        decoder: maps z_1 to the input of the likelihood.

    Raises:
        ValueError: the numbers of layers do not match, or (when evaluated) q and p of a layer differ in shape.

    Source: Sønderby et al. 2016, arXiv:1602.02282; Sohl-Dickstein et al. 2015, arXiv:1503.03585.
    """
    _check_count("posteriors", posteriors, conditionals)
    return Partial(_top_down, jnp.zeros(shape), *_callables(posteriors, conditionals, decoder))


def _top_down(zero, posteriors, conditionals, decoder, x, choose):
    has_data = not isinstance(x, int)
    z, latents, prior = None, [], _standard_normal(zero, x)
    for i, posterior in enumerate(posteriors):
        p = conditionals[i - 1](z) if i else prior
        p, q = _checked(len(posteriors) - i, posterior(z, x) if has_data else None, p, len(prior.mean))
        z = choose(i, q, p)
        latents.append(Latent(z, q, p))
    return latents, decoder(z)


def bottom_up(
    shape: tuple[int, ...], encoders: Sequence[EncoderFn], conditionals: Sequence[EncoderFn], decoder: DecoderFn
) -> Hierarchy:
    """A hierarchy with inference from the bottom up and generation from the top down (HVAE-1, HVAE-2).

    Args:
        shape: shape of one z_L; its prior is N(0, I).
        encoders: q(z_1 | x), q(z_2 | z_1), ..., q(z_L | z_{L-1}).
        conditionals: p(z_{L-1} | z_L), ..., p(z_1 | z_2), top layer first, L - 1 in all.
        decoder: maps z_1 to the input of the likelihood.

    Raises:
        ValueError: the numbers of layers do not match, or (when evaluated) q and p of a layer differ in shape.

    Source: Luo 2022, arXiv:2208.11970; Rezende et al. 2014, arXiv:1401.4082.
    """
    _check_count("encoders", encoders, conditionals)
    return Partial(_bottom_up, jnp.zeros(shape), *_callables(encoders, conditionals, decoder))


def _bottom_up(zero, encoders, conditionals, decoder, x, choose):
    if isinstance(x, int):  # generation is always from the top down
        return _top_down(zero, encoders, conditionals, decoder, x, choose)
    distributions, zs = [], [x]
    for i, encoder in enumerate(encoders):
        distributions.append(check_posterior(encoder(zs[-1]), len(x), f"encoder of z_{i + 1}"))
        zs.append(choose(i, distributions[-1], None))
    priors = [
        *(distribution(z) for distribution, z in zip(reversed(conditionals), zs[2:], strict=True)),
        _standard_normal(zero, x),
    ]
    priors = [_checked(i + 1, q, p, len(x))[0] for i, (q, p) in enumerate(zip(distributions, priors, strict=True))]
    last = len(distributions) - 1
    latents = [Latent(z, q, p, i < last) for i, (z, q, p) in enumerate(zip(zs[1:], distributions, priors, strict=True))]
    return latents, decoder(zs[1])


@compiled()
def bound(
    hierarchy: Hierarchy, likelihood: LikelihoodFn, key: Key, x: Batch, *, sampled_kl: bool = False
) -> HierarchicalBound:
    """An unbiased estimate of the bound on -log p(x) for each example, from one sample of all latents (HVAE-3).

        - E log p(x|z_1) + sum_i E KL(q(z_i | .) || p(z_i | .))

    Each KL is in closed form given the latents sampled before. With bottom-up inference this is only possible for the
    top layer (see `Latent`); the others are estimated by log q - log p at the sample.

    Args:
        hierarchy: the model, inference and generation.
        likelihood: p(x|z_1) of one example, given the decoder output for this example.
        key: for the latents.
        x: shape (B, *x).
        sampled_kl: estimate every KL by log q - log p at the sample. The sum of all terms is then
            -log p(x, z) / q(z|x), the negative log importance weight.

    Returns:
        `HierarchicalBound`.

    Raises:
        ValueError: the layers do not match.

    Source: Child 2020, arXiv:2011.10650; Kingma et al. 2016, arXiv:1606.04934.
    """
    latents, output = hierarchy(x, _inference(key))
    return HierarchicalBound(
        output_nll(likelihood, output, x), jnp.stack([_kl(latent, sampled_kl) for latent in latents])
    )


@compiled(static=("samples",))
def importance_weighted_bound(
    hierarchy: Hierarchy, likelihood: LikelihoodFn, key: Key, x: Batch, *, samples: int
) -> PerExample:
    """The K-sample importance-weighted bound on -log p(x), with any number of layers (VAE-3).

    Args:
        hierarchy, likelihood, key, x: as in `bound`.
        samples: K, at least 1.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: samples below 1, or layers that do not match.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: it must be at least 1")

    def log_ratio(key):
        return -bound(hierarchy, likelihood, key, x, sampled_kl=True).total

    return importance_weighted_average(jax.lax.map(log_ratio, jax.random.split(key, samples)))


def sample(
    hierarchy: Hierarchy, likelihood: Callable[[Any], Any], key: Key, n: int, *, temperature: Scalar | float = 1.0
) -> Batch:
    """Generate n examples: sample every latent from p, top layer first, then x ~ p(x|z_1) (HVAE-1, VAE-12).

    Args:
        hierarchy, likelihood: the model.
        key: for the latents and x.
        n: number of examples.
        temperature: factor of the standard deviation of every latent. Below 1, samples are more typical and less
            diverse than those of the model.

    Returns:
        Shape (n, *x).

    Raises:
        ValueError: n below 1.
    """
    key_z, key_x = jax.random.split(key)
    output = sample_decoder_output(hierarchy, key_z, n, temperature=temperature)
    return jax.vmap(lambda o, k: likelihood(o).sample(k))(output, jax.random.split(key_x, n))


@compiled(static=("n",))
def sample_decoder_output(hierarchy: Hierarchy, key: Key, n: int, *, temperature: Scalar | float = 1.0) -> Any:
    """The decoder output for n samples of all latents from p: the input of the likelihood, with a leading axis n.

    Arguments and errors as in `sample`.
    """
    if n < 1:
        raise ValueError(f"n is {n}: it must be at least 1")

    def from_prior(i, q, p):
        del q
        return reparameterized_sample(Normal(p.mean, var=temperature**2 * p.var), jax.random.fold_in(key, i))

    return hierarchy(n, from_prior)[1]


@compiled(static=("keep",))
def reconstruct(hierarchy: Hierarchy, key: Key, x: Batch, *, keep: int) -> Any:
    """The decoder output if the upper `keep` latents are sampled from q and the others are set to the mean of p.

    Args:
        hierarchy: a hierarchy with top-down inference.
        key: for the latents.
        x: shape (B, *x).
        keep: number of layers that depend on x; 0 ignores x.

    Returns:
        The input of the likelihood, with a leading axis B.

    Raises:
        ValueError: inference is from the bottom up and keep is less than the number of layers.
    """
    infer = _inference(key)

    def choose(i, q, p):
        if i < keep:
            return infer(i, q, p)
        if p is None:
            raise ValueError(f"keep is {keep}: bottom-up inference can only keep all layers; use a top_down hierarchy")
        return p.mean

    return hierarchy(x, choose)[1]


def free_bits_objective(
    bound: HierarchicalBound, *, beta: Scalar | float = 1.0, free_nats: Scalar | float = 0.0
) -> Scalar:
    """The training objective with KL annealing and free bits (HVAE-4).

        mean reconstruction + beta sum_i max(mean KL_i, free_nats)

    Args:
        bound: the bound of a batch.
        beta: weight of the KLs; `kl_warm_up` increases it from 0 to 1. With beta = 1 and free_nats = 0 the objective is
            the mean bound.
        free_nats: the KL of each layer below which it is not penalized, in nats per example. It prevents posterior
            collapse: decreasing the KL further does not decrease the objective.

    Returns:
        A scalar, nats.

    Source: Kingma et al. 2016, arXiv:1606.04934 (free bits); Bowman et al. 2015, arXiv:1511.06349 (KL annealing).
    """
    return bound.reconstruction.mean() + beta * jnp.maximum(bound.kl.mean(1), free_nats).sum()


def kl_warm_up(step: Int[Array, ""] | int, steps: int) -> Scalar:
    """beta = min(1, (step + 1) / steps) of update number `step`, counted from 0; 1 if steps is 0."""
    return jnp.minimum(1.0, (jnp.asarray(step) + 1).astype(jnp.float32) / max(steps, 1))


class CollapseDiagnostics(NamedTuple):
    """Posterior-collapse diagnostics of every layer, shape (L,) each, in the order of the latents (HVAE-4).

    Fields:
        kl: E KL(q(z_i|.) || p(z_i|.)), nats.
        active_units: number of dimensions of z_i whose posterior mean, relative to the mean and standard deviation of
            p, has a variance above 0.01 over the data.
        mutual_information: I_q(x; z) in nats for the latents of this layer and of those before it; at most log N.
    """

    kl: Float[Array, " L"]
    active_units: Int[Array, " L"]
    mutual_information: Float[Array, " L"]


@compiled()
def collapse_diagnostics(hierarchy: Hierarchy, key: Key, x: Batch) -> CollapseDiagnostics:
    """Posterior-collapse diagnostics for every layer, on a data set of N examples (HVAE-4).

    Costs N passes through the hierarchy, for the latents of every example under the posterior of every other.

    Args:
        hierarchy: the model.
        key: for the latents.
        x: the data set, shape (N, *x).

    Source: Burda et al. 2015, arXiv:1509.00519 (active units); Hoffman & Johnson 2016, "ELBO surgery".
    """
    latents, _ = hierarchy(x, _inference(key))
    kls = jnp.stack([_kl(latent, False).mean() for latent in latents])
    active = jnp.stack([_active(latent).sum() for latent in latents])

    def shifted_log_q(shift):  # log q(latents of example n up to each layer | x_{n + shift})
        others, _ = hierarchy(jnp.roll(x, -shift, axis=0), lambda i, q, p: latents[i].z)
        return jnp.cumsum(jnp.stack([jax.vmap(Normal.log_prob)(_posterior(o.q), o.z) for o in others]), axis=0)

    log_q = jax.lax.map(shifted_log_q, jnp.arange(x.shape[0]))
    information = log_q[0] - jax.nn.logsumexp(log_q, axis=0) + jnp.log(x.shape[0])
    return CollapseDiagnostics(kls, active, information.mean(1))


def _active(latent: Latent):
    scale = jnp.sqrt(latent.p.var)
    scale = scale.reshape(scale.shape + (1,) * (latent.z.ndim - scale.ndim))
    return jnp.var((_posterior(latent.q).mean - latent.p.mean) / scale, axis=0) > 0.01


def _inference(key: Key) -> ChooseLatent:
    """Sample every latent from q."""
    return lambda i, q, p: reparameterized_sample(_posterior(q), jax.random.fold_in(key, i))


def _kl(latent: Latent, sampled: bool) -> PerExample:
    if sampled or latent.upward:
        log_q, log_p = (
            jax.vmap(Normal.log_prob)(distribution, latent.z) for distribution in (_posterior(latent.q), latent.p)
        )
        return log_q - log_p
    return jax.vmap(kl)(_posterior(latent.q), latent.p)


def _posterior(q: Normal | None) -> Normal:
    if q is None:
        raise ValueError("the hierarchy returned q = None for a layer, although x is data: return its posterior")
    return q


def _standard_normal(zero: Array, x: Batch | int) -> Normal:
    n, dtype = (x, zero.dtype) if isinstance(x, int) else (x.shape[0], at_least_float32(x.dtype))
    return Normal(jnp.zeros((n, *zero.shape), dtype), var=jnp.ones((n,), dtype))


def _callables(distributions, conditionals, decoder):
    return tuple(map(_as_pytree, distributions)), tuple(map(_as_pytree, conditionals)), _as_pytree(decoder)


def _as_pytree(function: Callable) -> Callable:
    """A plain function as a pytree without leaves, so that a hierarchy of it can be differentiated and jitted."""
    leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(function))
    return Partial(function) if leaf else function


def _check_count(what: str, distributions: Sequence, conditionals: Sequence) -> None:
    if len(distributions) < 1 or len(conditionals) != len(distributions) - 1:
        raise ValueError(
            f"{len(distributions)} {what} and {len(conditionals)} conditionals: L layers need L {what} and L - 1 "
            "conditionals, since p(z_L) is N(0, I)"
        )


def _checked(i: int, q: Any, p: Any, batch: int) -> tuple[Normal, Normal | None]:
    """p and q of layer i, checked to have the same shape."""
    p = check_posterior(p, batch, f"conditional p(z_{i} | .)")
    q = None if q is None else check_posterior(q, batch, f"posterior q(z_{i} | .)")
    if q is not None and q.mean.shape != p.mean.shape:
        raise ValueError(
            f"q(z_{i}) has shape {q.mean.shape} and p(z_{i}) has shape {p.mean.shape}: both are of z_{i}, "
            "so make them equal"
        )
    return p, q
