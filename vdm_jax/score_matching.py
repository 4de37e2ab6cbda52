"""Score matching: training losses for the score grad log p, given samples of p. All losses are per example.

    explicit          1/2 ||s - grad log p||^2                               needs the exact score              (SM-1)
    implicit          1/2 ||s||^2 + div s                                    D forward passes                   (SM-2)
    sliced            1/2 ||s||^2 + v^T J v, or with 1/2 (v^T s)^2           one forward pass                   (SM-3)
    finite_difference the same for an energy, by differences                 no derivative with respect to x
    denoising         1/2 ||s(y) - grad_y log q(y|x)||^2, y ~ q(y|x)         no derivative of s                 (SM-4)
    denoising_at_level  the same for Gaussian noise at any level             with a weight                      (SM-5)

The first three have the same expectation up to a constant that does not depend on s, and so has the fourth in the limit
of small differences. The last two have it for the distribution of y. `score` takes and returns a batch and treats each
example independently.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vdm_jax import forward
from vdm_jax.compilation import compiled
from vdm_jax.divergence import Trace, hutchinson_probes, value_and_divergence
from vdm_jax.noise_levels import NoiseLevel, broadcast_to_batch, check_positive
from vdm_jax.parameterization import to_eps
from vdm_jax.types import (
    Batch,
    Denoiser,
    Energy,
    Key,
    PerExample,
    PredictionType,
    Real,
    Scalar,
    Score,
    at_least_float32,
    check_distribution,
    check_positive_scalar,
    check_values,
    check_weights,
    evaluate,
    evaluate_scalars,
    per_example,
)

__all__ = ["denoising", "denoising_at_level", "explicit", "finite_difference", "implicit", "sliced"]


@compiled()
def explicit(score: Score, exact_score: Score, x: Batch) -> PerExample:
    """1/2 ||s(x) - grad log p(x)||^2, whose mean over p is half the Fisher divergence (SM-1).

    Args:
        score, exact_score: (B, *x) -> (B, *x).
        x: samples of p, shape (B, *x).

    Returns:
        Shape (B,).

    Source: Hyvärinen 2005, "Estimation of non-normalized statistical models by score matching".
    """
    return 0.5 * per_example(
        jnp.square(evaluate(score, x, name="score") - evaluate(exact_score, x, name="exact_score"))
    )


@compiled()
def implicit(score: Score, x: Batch) -> PerExample:
    """1/2 ||s(x)||^2 + div s(x), equal to `explicit` up to a constant, in expectation (SM-2).

    Integration by parts gives E s . grad log p = -E div s if p s vanishes at infinity. The trace is exact and costs D
    forward passes.

    Arguments and result as in `explicit`.

    Raises:
        ValueError: the shape of the score differs from that of x.

    Source: Hyvärinen 2005, "Estimation of non-normalized statistical models by score matching".
    """
    return _sliced(score, None, x, "exact", 1, True)


@compiled(static=("probes",))
def sliced(
    score: Score, key: Key, x: Batch, *, trace: Trace = "rademacher", probes: int = 1, reduced: bool = True
) -> PerExample:
    """Sliced score matching, 1/2 ||s(x)||^2 + v^T J v: `implicit` with an estimate of the trace (SM-3).

    With reduced=False it is 1/2 (v^T s)^2 + v^T J v, which has the same expectation and usually a larger variance.

    Args:
        score: (B, *x) -> (B, *x).
        key: for v.
        x: samples of p, shape (B, *x).
        trace: distribution of v, as in `divergence.hutchinson_probes`.
        probes: number of directions for each example, over which the mean is taken.
        reduced: use ||s||^2 (variance-reduced SSM) instead of (v^T s)^2.

    Returns:
        Shape (B,).

    Raises:
        ValueError: unknown trace, probes below 1, or the shape of the score differs from that of x.

    Source: Song et al. 2019, arXiv:1905.07088; Hutchinson 1990.
    """
    return _sliced(score, key, x, trace, probes, reduced)


def _sliced(score, key, x, trace, probes, reduced) -> PerExample:
    v = hutchinson_probes(key, x, trace, probes)
    s, trace_of_jacobian = value_and_divergence(score, x, v)
    square = per_example(s**2) if reduced else jnp.square(jax.vmap(lambda v: per_example(v * s))(v)).mean(0)
    return 0.5 * square + trace_of_jacobian


def _check_size(size: Scalar | float) -> None:
    check_positive_scalar("size", size)


@compiled(static=("probes",), check=_check_size)
def finite_difference(
    energy: Energy, key: Key, x: Batch, size: Scalar | float, *, trace: Trace = "rademacher", probes: int = 1
) -> PerExample:
    """Sliced score matching of the score -grad E by finite differences of the energy, without derivatives.

        -(E(x + h v) - 2 E(x) + E(x - h v)) / h^2 + 1/2 ((E(x + h v) - E(x - h v)) / 2h)^2

    Approximates `sliced` with reduced=False, with an error of O(h^2) and a rounding error of about 1e-7 |E| / h^2 in
    float32.

    Args:
        energy: (B, *x) -> (B,); evaluated 2 K + 1 times and not differentiated with respect to x. It receives x in
            float32 or wider, since narrower types do not resolve a small step.
        key: for v.
        x: samples of p, shape (B, *x).
        size: step size h, positive.
        trace, probes: as in `sliced`.

    Returns:
        Shape (B,).

    Raises:
        ValueError: size not positive, unknown trace, or probes below 1.

    Source: Pang et al. 2020, arXiv:2007.03317.
    """
    x = x.astype(at_least_float32(x.dtype))
    size, center = jnp.asarray(size, x.dtype), evaluate_scalars(energy, x, name="energy")

    def loss(v):
        forward_value, backward_value = (
            evaluate_scalars(energy, x + step * v, name="energy") for step in (size, -size)
        )
        return (
            0.5 * jnp.square((forward_value - backward_value) / (2 * size))
            - (forward_value - 2 * center + backward_value) / size**2
        )

    return jax.lax.map(loss, hutchinson_probes(key, x, trace, probes)).mean(0)


@compiled()
def denoising(score: Score, key: Key, x: Batch, noise: Callable[[Any], Any]) -> PerExample:
    """Denoising score matching, 1/2 ||s(y) - grad_y log q(y|x)||^2 with y ~ q(y|x) (SM-4).

    Its expectation is that of `explicit` for the distribution of y plus 1/2 E ||grad log q(y|x) - grad log q(y)||^2.
    The optimal s is the score of q(y).

    Args:
        score: (B, *x) -> (B, *x).
        key: for y.
        x: samples of p, shape (B, *x).
        noise: x -> q(y|x) of one example, a distribution with `sample(key)` and a differentiable `log_prob(y)`:
            `lambda x: Normal(x, var=var)`.

    Returns:
        Shape (B,).

    Source: Vincent 2011, "A connection between score matching and denoising autoencoders".
    """
    clean = x.astype(at_least_float32(x.dtype))

    def sample(x, k):
        return _noise_distribution(noise, x).sample(k)

    def log_prob(y, x):
        return check_values(_noise_distribution(noise, x).log_prob(y), (), "log_prob of the noise")

    y = jax.vmap(sample)(clean, jax.random.split(key, x.shape[0]))
    target = jax.vmap(jax.grad(log_prob))(y, clean)
    return 0.5 * per_example(jnp.square(evaluate(score, y.astype(x.dtype), name="score") - target))


def _noise_distribution(noise, x):
    return check_distribution(noise(x), "noise", "sample", "log_prob")


def _check_level(level: NoiseLevel) -> None:
    check_positive(level, "sigma")


@compiled(check=_check_level)
def denoising_at_level(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    level: NoiseLevel,
    *,
    prediction_type: PredictionType = "score",
    weight: Callable[[NoiseLevel], Real] | None = None,
) -> PerExample:
    """`denoising` at a noise level: w/2 ||s(x_t) + eps / sigma||^2 with x_t = alpha x_0 + sigma eps (SM-5).

    With the default weight sigma^2 it equals 1/2 ||eps - eps_hat||^2, which has a similar magnitude at every level. It
    is the loss of noise-conditional score networks.

    Args:
        denoiser: predicts `prediction_type`; evaluated once, on the whole batch.
        key: for eps.
        x_0: clean batch, shape (B, *x).
        level: scalars, or one level for each example, shape (B,); sigma > 0.
        prediction_type: what the denoiser predicts.
        weight: level -> w; None is sigma^2.

    Returns:
        Shape (B,).

    Raises:
        ValueError: unknown prediction_type, a level without noise, or weights of another shape.

    Source: Vincent 2011; Song & Ermon 2019, arXiv:1907.05600, equations 5 and 6.
    """
    level = broadcast_to_batch(level, x_0)
    eps = jax.random.normal(key, x_0.shape, x_0.dtype)
    x_t = jax.vmap(forward.add_noise)(x_0, eps, level)
    eps_hat = jax.vmap(partial(to_eps, prediction_type=prediction_type))(evaluate(denoiser, x_t, level), x_t, level)
    weights = check_weights((weight or _sigma_squared)(level), x_0.shape[:1])
    return 0.5 * weights / level.sigma**2 * per_example(jnp.square(eps - eps_hat))


def _sigma_squared(level: NoiseLevel) -> Real:
    return level.sigma**2
