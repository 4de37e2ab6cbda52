"""Hierarchical VAEs: the bound with any number of latents, from one Gaussian code to a diffusion model's T.

    p(z_L) prod_{i=2..L} p(z_{i-1} | z_i) p(x | z_1)            generation, from the top down               (HVAE-1)
    q(z_1 | x) prod_{i=2..L} q(z_i | z_{i-1})                   inference, from the bottom up               (HVAE-2)
    q(z_L | x) prod_{i=2..L} q(z_{i-1} | z_i, x)                or from the top down, a ladder

A model is a `Hierarchy`: a callable that goes through its levels once and asks `draw` for every latent. Who draws
decides what the pass is: from q it is inference, from p generation, from both a reconstruction by the upper levels.
`ladder` and `bottom_up` make one of a list of conditionals, where each level sees its neighbour alone; a deep network
whose levels share a state is one by itself. One level is the VAE; fixed linear-Gaussian levels of the data's size are a
diffusion model (HVAE-5). All is in nats, and costs.
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

Levels = Float[Array, "L b"]


class Latent(NamedTuple):
    """One level of a pass.

    Fields:
        z: what was drawn, shape (B, *z).
        q: its law given the data, fields (B, *z); None where no data are seen.
        p: its law in the model, fields (B, *z).
        upward: z was drawn before the level above it, on which p depends: log q/p at z is all there is, since
            KL(q || p) at a z above that has heard of z would be another number.
    """

    z: Latents
    q: Normal | None
    p: Normal
    upward: bool = False


@runtime_checkable
class ChooseLatent(Protocol):
    """`draw(i, q, p)`: the latent of level i (in order of drawing, from 0), shape (B, *z). p may not be known yet."""

    def __call__(self, i: int, q: Normal | None, p: Normal | None, /) -> Latents: ...


@runtime_checkable
class Hierarchy(Protocol):
    """`hierarchy(x, draw)`: its latents in order of drawing, and what the likelihood reads, with a leading axis B.

    x is a batch (B, *x), or an integer B: that many, with no data seen.
    """

    def __call__(self, x: Batch | int, draw: ChooseLatent, /) -> tuple[Sequence[Latent], Any]: ...


class HierarchicalBound(NamedTuple):
    """The terms of the bound on -log p(x), in nats.

    Fields:
        reconstruction: -log p(x|z_1), shape (B,).
        kl: one row a level in order of drawing, shape (L, B).
    """

    reconstruction: PerExample
    kl: Levels

    @property
    def total(self) -> PerExample:
        """The bound itself."""
        return self.reconstruction + self.kl.sum(0)


def top_down(
    shape: tuple[int, ...],
    posteriors: Sequence[Callable[[Any, Any], Normal]],
    conditionals: Sequence[EncoderFn],
    decoder: DecoderFn,
) -> Hierarchy:
    """Inference and generation from the top down, level by level.

    Args:
        shape: of one z_L, whose prior is N(0, I).
        posteriors: q(z_L | x), q(z_{L-1} | z_L, x), ..., q(z_1 | z_2, x), each `(z above or None, x) -> Normal`.
        conditionals: p(z_{L-1} | z_L), ..., p(z_1 | z_2), each `z above -> Normal`: one fewer.
        decoder: of z_1.

    Raises:
        ValueError: numbers of levels that do not fit, or (when asked) laws of different shapes at one level.

    Source: Sønderby et al. 2016, arXiv:1602.02282; Sohl-Dickstein et al. 2015, arXiv:1503.03585.
    """
    _check_count("posteriors", posteriors, conditionals)
    return Partial(_ladder, jnp.zeros(shape), *_callables(posteriors, conditionals, decoder))


def _ladder(zero, posteriors, conditionals, decoder, x, draw):
    seen = not isinstance(x, int)
    z, latents, prior = None, [], _standard(zero, x)
    for i, posterior in enumerate(posteriors):
        p = conditionals[i - 1](z) if i else prior
        p, q = _checked(len(posteriors) - i, posterior(z, x) if seen else None, p, len(prior.mean))
        z = draw(i, q, p)
        latents.append(Latent(z, q, p))
    return latents, decoder(z)


def bottom_up(
    shape: tuple[int, ...], encoders: Sequence[EncoderFn], conditionals: Sequence[EncoderFn], decoder: DecoderFn
) -> Hierarchy:
    """Inference from the bottom up, generation from the top down (HVAE-1, HVAE-2).

    Args:
        shape: of one z_L, whose prior is N(0, I).
        encoders: q(z_1 | x), q(z_2 | z_1), ..., q(z_L | z_{L-1}).
        conditionals: p(z_{L-1} | z_L), ..., p(z_1 | z_2), the top first: one fewer.
        decoder: of z_1.

    Raises:
        ValueError: numbers of levels that do not fit, or (when asked) laws of different shapes at one level.

    Source: Luo 2022, arXiv:2208.11970; Rezende et al. 2014, arXiv:1401.4082.
    """
    _check_count("encoders", encoders, conditionals)
    return Partial(_bottom_up, jnp.zeros(shape), *_callables(encoders, conditionals, decoder))


def _bottom_up(zero, encoders, conditionals, decoder, x, draw):
    if isinstance(x, int):  # without data there is but one way through
        return _ladder(zero, encoders, conditionals, decoder, x, draw)
    distributions, zs = [], [x]
    for i, encoder in enumerate(encoders):
        distributions.append(check_posterior(encoder(zs[-1]), len(x), f"encoder of z_{i + 1}"))
        zs.append(draw(i, distributions[-1], None))
    priors = [
        *(distribution(z) for distribution, z in zip(reversed(conditionals), zs[2:], strict=True)),
        _standard(zero, x),
    ]
    priors = [_checked(i + 1, q, p, len(x))[0] for i, (q, p) in enumerate(zip(distributions, priors, strict=True))]
    last = len(distributions) - 1
    latents = [Latent(z, q, p, i < last) for i, (z, q, p) in enumerate(zip(zs[1:], distributions, priors, strict=True))]
    return latents, decoder(zs[1])


@compiled()
def bound(
    hierarchy: Hierarchy, likelihood: LikelihoodFn, key: Key, x: Batch, *, sampled_kl: bool = False
) -> HierarchicalBound:
    """One unbiased estimate per example of the bound on -log p(x), from one draw of all levels (HVAE-3).

        - E log p(x|z_1) + sum_i E KL(q(z_i | .) || p(z_i | .))

    Each KL is in closed form given the levels drawn before. From the bottom up only the topmost can be (see `Latent`);
    the others are log q - log p at the draw.

    Args:
        hierarchy: the model, inference and generation.
        likelihood: p(x|z_1) of one example, from its part of what the hierarchy gave.
        key: for the latents.
        x: shape (B, *x).
        sampled_kl: log q - log p at the draw everywhere: the terms then add up to -log p(x, z)/q(z|x).

    Returns:
        `Bound`.

    Raises:
        ValueError: levels that do not fit together.

    Source: Child 2020, arXiv:2011.10650; Kingma et al. 2016, arXiv:1606.04934.
    """
    latents, output = hierarchy(x, _inference(key))
    return HierarchicalBound(
        output_nll(likelihood, output, x), jnp.stack([_divergence(latent, sampled_kl) for latent in latents])
    )


@compiled(static=("samples",))
def importance_weighted_bound(
    hierarchy: Hierarchy, likelihood: LikelihoodFn, key: Key, x: Batch, *, samples: int
) -> PerExample:
    """The K-sample importance-weighted bound on -log p(x): `vae.importance_weighted_bound` with any number of levels (VAE-3).

    Args:
        hierarchy, likelihood, key, x: as in `bound`.
        samples: K, at least 1.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: samples below 1, or levels that do not fit together.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: the bound needs at least one draw")

    def log_ratio(key):
        return -bound(hierarchy, likelihood, key, x, sampled_kl=True).total

    return importance_weighted_average(jax.lax.map(log_ratio, jax.random.split(key, samples)))


def sample(
    hierarchy: Hierarchy, likelihood: Callable[[Any], Any], key: Key, n: int, *, temperature: Scalar | float = 1.0
) -> Batch:
    """n new examples: every latent from p, the top one from the prior, then x ~ p(x|z_1) (HVAE-1, VAE-12).

    Args:
        hierarchy, likelihood: the model.
        key: for the latents and x.
        n: how many.
        temperature: factor of every latent's standard deviation; below 1 likelier than the model's own draws.

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
    """What the decoder gives for n draws of all latents from p: what the likelihood reads, with a leading axis n.

    Args and errors as in `generate`.
    """
    if n < 1:
        raise ValueError(f"n is {n}: at least one example is generated")

    def from_prior(i, q, p):
        del q
        return reparameterized_sample(Normal(p.mean, var=temperature**2 * p.var), jax.random.fold_in(key, i))

    return hierarchy(n, from_prior)[1]


@compiled(static=("keep",))
def reconstruct(hierarchy: Hierarchy, key: Key, x: Batch, *, keep: int) -> Any:
    """What the decoder gives when the first `keep` latents are drawn from q and the others are their mean in the model.

    Args:
        hierarchy: drawn from the top down, so that the first levels are the uppermost.
        key: for the latents.
        x: shape (B, *x).
        keep: how many levels hear of x; 0 is none of them.

    Returns:
        What the likelihood reads, with a leading axis B.

    Raises:
        ValueError: the hierarchy draws from the bottom up, and keep is less than its levels.
    """
    infer = _inference(key)

    def choose(i, q, p):
        if i < keep:
            return infer(i, q, p)
        if p is None:
            raise ValueError(f"level {i} is drawn before the one it hangs on: only a ladder can keep its first {keep}")
        return p.mean

    return hierarchy(x, choose)[1]


def free_bits_objective(
    bound: HierarchicalBound, *, beta: Scalar | float = 1.0, free_nats: Scalar | float = 0.0
) -> Scalar:
    """What one trains: the mean bound, its KLs weighted, and none of them pressed below its free nats (HVAE-4).

        mean reconstruction + beta sum_i max(mean KL_i, free_nats)

    Args:
        bound: of a batch.
        beta: weight of the KLs: `warm_up` lets it grow from 0 to 1. At 1, without free nats, it is the bound.
        free_nats: how much each level may say before it costs, nats an example: a level cannot gain by falling silent.

    Returns:
        A scalar, nats.

    Source: Kingma et al. 2016, arXiv:1606.04934 (free bits); Bowman et al. 2015, arXiv:1511.06349 (KL annealing).
    """
    return bound.reconstruction.mean() + beta * jnp.maximum(bound.kl.mean(1), free_nats).sum()


def kl_warm_up(step: Int[Array, ""] | int, steps: int) -> Scalar:
    """beta = min(1, (step + 1) / steps) of update number `step`, from 0 on; 1 where steps is 0."""
    return jnp.minimum(1.0, (jnp.asarray(step) + 1).astype(jnp.float32) / max(steps, 1))


class CollapseDiagnostics(NamedTuple):
    """Whether a level says anything of the data; each shape (L,), in order of drawing (HVAE-4).

    Fields:
        kl: E KL(q(z_i|.) || p(z_i|.)), nats.
        active_units: numbers of z_i whose posterior mean, less the prior's and in its standard deviations, varies over
            the data by more than 0.01.
        mutual_information: I_q(x; z_1st..z_ith) of all levels drawn so far, nats; at most log N.
    """

    kl: Float[Array, " L"]
    active_units: Int[Array, " L"]
    mutual_information: Float[Array, " L"]


@compiled()
def collapse_diagnostics(hierarchy: Hierarchy, key: Key, x: Batch) -> CollapseDiagnostics:
    """Posterior collapse, level by level, on a data set of N examples (HVAE-4).

    Goes N times through the hierarchy, for every example's latents under every other example's posterior.

    Args:
        hierarchy: the model.
        key: for the latents.
        x: the data set, shape (N, *x).

    Source: Burda et al. 2015, arXiv:1509.00519 (active units); Hoffman & Johnson 2016, "ELBO surgery".
    """
    latents, _ = hierarchy(x, _inference(key))
    divergence = jnp.stack([_divergence(latent, False).mean() for latent in latents])
    active = jnp.stack([_active(latent).sum() for latent in latents])

    def under_another(shift):  # log q(z_1st..z_ith of example n | x_{n + shift})
        others, _ = hierarchy(jnp.roll(x, -shift, axis=0), lambda i, q, p: latents[i].z)
        return jnp.cumsum(jnp.stack([jax.vmap(Normal.log_prob)(_seen(o.q), o.z) for o in others]), axis=0)

    log_q = jax.lax.map(under_another, jnp.arange(x.shape[0]))
    information = log_q[0] - jax.nn.logsumexp(log_q, axis=0) + jnp.log(x.shape[0])
    return CollapseDiagnostics(divergence, active, information.mean(1))


def _active(latent: Latent):
    scale = jnp.sqrt(latent.p.var)
    scale = scale.reshape(scale.shape + (1,) * (latent.z.ndim - scale.ndim))
    return jnp.var((_seen(latent.q).mean - latent.p.mean) / scale, axis=0) > 0.01


def _inference(key: Key) -> ChooseLatent:
    """Every latent from q."""
    return lambda i, q, p: reparameterized_sample(_seen(q), jax.random.fold_in(key, i))


def _divergence(latent: Latent, sampled: bool) -> PerExample:
    if sampled or latent.upward:
        log_q, log_p = (
            jax.vmap(Normal.log_prob)(distribution, latent.z) for distribution in (_seen(latent.q), latent.p)
        )
        return log_q - log_p
    return jax.vmap(kl)(_seen(latent.q), latent.p)


def _seen(q: Normal | None) -> Normal:
    if q is None:
        raise ValueError("the hierarchy gave no q for a level though it was shown data: only an integer x has none")
    return q


def _standard(zero: Array, x: Batch | int) -> Normal:
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
            f"{len(distributions)} {what} and {len(conditionals)} conditionals do not chain: L levels need L of the one and "
            "L - 1 of the other, since p(z_L) is N(0, I)"
        )


def _checked(i: int, q: Any, p: Any, batch: int) -> tuple[Normal, Normal | None]:
    """p and q of level z_i, both over the same z_i."""
    p = check_posterior(p, batch, f"conditional p(z_{i} | .)")
    q = None if q is None else check_posterior(q, batch, f"posterior q(z_{i} | .)")
    if q is not None and q.mean.shape != p.mean.shape:
        raise ValueError(
            f"the levels do not chain: q(z_{i}) is of shape {q.mean.shape}, p(z_{i}) of {p.mean.shape}; both are laws "
            f"of the same z_{i}"
        )
    return p, q
