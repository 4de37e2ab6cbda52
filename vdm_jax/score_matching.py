"""Score matching: learning grad log p from samples of p, without knowing it. Each loss per example, half a square.

    explicit          1/2 ||s - grad log p||^2                               the truth must be known            (SM-1)
    implicit          1/2 ||s||^2 + div s                                    D forward passes                   (SM-2)
    sliced            1/2 ||s||^2 + v^T J v, or with 1/2 (v^T s)^2           one                                (SM-3)
    finite_difference the same, of an energy, by differences                 no derivative by x at all
    denoising         1/2 ||s(y) - grad_y log q(y|x)||^2, y ~ q(y|x)         no derivative of s                 (SM-4)
    denoising_at      the same for Gaussian noise, of any level              with a weight                      (SM-5)

The first three have one expectation up to a constant that does not depend on s; the fourth too, as its differences
vanish; the last two have it for the law of y. `score` takes and gives a batch, and treats each example by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from vdm_jax import forward
from vdm_jax.compilation import compiled
from vdm_jax.divergence import Trace, directions, value_and_divergence
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
    check_values,
    check_weights,
    evaluate,
    evaluate_scalars,
    per_example,
)


@compiled()
def explicit(score: Score, truth: Score, x: Batch) -> PerExample:
    """1/2 ||s(x) - grad log p(x)||^2, whose mean over p is half the Fisher divergence (SM-1).

    Args:
        score, truth: (B, *x) -> (B, *x).
        x: draws of p, shape (B, *x).

    Returns:
        Shape (B,).

    Source: Hyvärinen 2005, "Estimation of non-normalized statistical models by score matching".
    """
    return 0.5 * per_example(jnp.square(evaluate(score, x, name="score") - evaluate(truth, x, name="truth")))


@compiled()
def implicit(score: Score, x: Batch) -> PerExample:
    """1/2 ||s(x)||^2 + div s(x), which is `explicit` less a constant, in expectation (SM-2).

    By parts: E s . grad log p = -E div s, where p s vanishes far away. The trace is exact, by D forward products; of an
    energy's score they are forward over reverse.

    Args and returns as in `explicit`.

    Raises:
        ValueError: the score has another shape than x.

    Source: Hyvärinen 2005, "Estimation of non-normalized statistical models by score matching".
    """
    return _sliced(score, None, x, "exact", 1, True)


@compiled(static=("probes",))
def sliced(
    score: Score, key: Key, x: Batch, *, trace: Trace = "rademacher", probes: int = 1, reduced: bool = True
) -> PerExample:
    """1/2 ||s(x)||^2 + v^T J v: `implicit`, its trace estimated along random directions (SM-3).

    Without `reduced` it is 1/2 (v^T s)^2 + v^T J v, the derivative along a random line matched: the same expectation,
    and mostly more variance.

    Args:
        score: (B, *x) -> (B, *x).
        key: for v.
        x: draws of p, shape (B, *x).
        trace: the law of v, as in `divergence.directions`.
        probes: how many v an example; their mean is taken.
        reduced: the form with ||s||^2, Hutchinson's estimate of the trace.

    Returns:
        Shape (B,).

    Raises:
        ValueError: unknown trace, probes below 1, or the score has another shape than x.

    Source: Song et al. 2019, arXiv:1905.07088; Hutchinson 1990.
    """
    return _sliced(score, key, x, trace, probes, reduced)


def _sliced(score, key, x, trace, probes, reduced) -> PerExample:
    v = directions(key, x, trace, probes)
    s, trace_of_jacobian = value_and_divergence(score, x, v)
    square = per_example(s**2) if reduced else jnp.square(jax.vmap(lambda v: per_example(v * s))(v)).mean(0)
    return 0.5 * square + trace_of_jacobian


def _check_size(size: Scalar | float) -> None:
    if not isinstance(size, Tracer) and not size > 0:
        raise ValueError(f"size is {size}: a difference needs a positive one")


@compiled(static=("probes",), check=_check_size)
def finite_difference(
    energy: Energy, key: Key, x: Batch, size: Scalar | float, *, trace: Trace = "rademacher", probes: int = 1
) -> PerExample:
    """`sliced`, not reduced, of the score -grad E, by differences of the energy alone.

        -(E(x + h v) - 2 E(x) + E(x - h v)) / h^2 + 1/2 ((E(x + h v) - E(x - h v)) / 2h)^2

    Off by O(h^2); and by rounding, some 1e-7 |E| / h^2 in float32.

    Args:
        energy: (B, *x) -> (B,); evaluated 2 K + 1 times, and never differentiated by x. It gets x in float32 or a wider
            type, since a small step is lost in a narrower one.
        key: for v.
        x: draws of p, shape (B, *x).
        size: h, positive.
        trace, probes: as in `sliced`.

    Returns:
        Shape (B,).

    Raises:
        ValueError: size not positive, unknown trace, or probes below 1.

    Source: Pang et al. 2020, arXiv:2007.03317.
    """
    x = x.astype(at_least_float32(x.dtype))
    size, middle = jnp.asarray(size, x.dtype), evaluate_scalars(energy, x, name="energy")

    def along(v):
        ahead, behind = (evaluate_scalars(energy, x + step * v, name="energy") for step in (size, -size))
        return 0.5 * jnp.square((ahead - behind) / (2 * size)) - (ahead - 2 * middle + behind) / size**2

    return jax.lax.map(along, directions(key, x, trace, probes)).mean(0)


@compiled()
def denoising(score: Score, key: Key, x: Batch, noise: Callable[[Any], Any]) -> PerExample:
    """1/2 ||s(y) - grad_y log q(y|x)||^2 with y ~ q(y|x): `explicit` for the law of y, and a constant (SM-4).

    The constant is half of E ||grad log q(y|x) - grad log q(y)||^2; the best score is that of the noisy law.

    Args:
        score: (B, *x) -> (B, *x).
        key: for y.
        x: draws of p, shape (B, *x).
        noise: x -> q(y|x) of one example, a law with `sample(key)` and a `log_prob(y)` that is smooth:
            `lambda x: Normal(x, var)`.

    Returns:
        Shape (B,).

    Source: Vincent 2011, "A connection between score matching and denoising autoencoders".
    """
    clean = x.astype(at_least_float32(x.dtype))

    def sample(x, k):
        return _noise_of(noise, x).sample(k)

    def log_prob(y, x):
        return check_values(_noise_of(noise, x).log_prob(y), (), "log_prob of the noise")

    y = jax.vmap(sample)(clean, jax.random.split(key, x.shape[0]))
    target = jax.vmap(jax.grad(log_prob))(y, clean)
    return 0.5 * per_example(jnp.square(evaluate(score, y.astype(x.dtype), name="score") - target))


def _noise_of(noise, x):
    return check_distribution(noise(x), "noise", "sample", "log_prob")


def _check_level(level: NoiseLevel) -> None:
    check_positive(level, "sigma")


@compiled(check=_check_level)
def denoising_at(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    level: NoiseLevel,
    *,
    prediction_type: PredictionType = "score",
    weight: Callable[[NoiseLevel], Real] | None = None,
) -> PerExample:
    """w/2 ||s(x_t) + eps / sigma||^2 with x_t = alpha x_0 + sigma eps: `denoising` at a level of any schedule (SM-5).

    Over the levels of a noise-conditional score network the weight sigma^2 makes all terms of one size, and the loss
    half of ||eps - eps_hat||^2.

    Args:
        denoiser: predicts `prediction_type`; called once, with the whole batch.
        key: for eps.
        x_0: clean batch, shape (B, *x).
        level: one for all, scalars, or one for each example, (B,); sigma > 0.
        prediction_type: what the denoiser predicts.
        weight: w of a level; None is sigma^2.

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
    weights = check_weights((weight or _power)(level), x_0.shape[:1])
    return 0.5 * weights / level.sigma**2 * per_example(jnp.square(eps - eps_hat))


def _power(level: NoiseLevel) -> Real:
    return level.sigma**2
