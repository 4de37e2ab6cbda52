"""Langevin dynamics: sampling from a distribution through its score alone.

    x <- x + eta grad log p(x) + sqrt(2 eta) xi          (LAN-1)

This is the Euler-Maruyama discretization of dx = grad log p dt + sqrt(2) dW, whose stationary distribution is p
(LAN-2). A finite step size causes a bias of O(eta), which `mala` removes by a Metropolis-Hastings correction. Chains
mix slowly between distant modes; `annealed_langevin` addresses this with a decreasing sequence of noise levels (LAN-3).
A chain is one compiled scan over a batch: `score` takes and returns a batch. States have the dtype of x; scores, step
sizes and log-densities are float32 or wider.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from vdm_jax.compilation import compiled, scan
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.parameterization import ScoreFromDenoiser, to_x_0
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
    X,
    at_least_float32,
    check_positive_scalar,
    evaluate,
    evaluate_scalars,
)

__all__ = [
    "Chain",
    "annealed_langevin",
    "check_decreasing_noise",
    "langevin_corrector",
    "langevin_kernel",
    "mala",
    "ula",
]


class Chain(NamedTuple):
    """A batch of Markov chains.

    Fields:
        x: the last states, shape (B, *x).
        path: the states after each step, shape (K, B, *x); length 0 by default.
        acceptance_rate: fraction of proposals accepted, shape (B,); 1 without an accept-reject step.
    """

    x: Batch
    path: Float[Array, "k b *x"]
    acceptance_rate: PerExample


def langevin_kernel(x: X, score: X, step_size: Real) -> Normal:
    """The distribution of the next state, N(x + eta score, 2 eta I), for one example (LAN-1).

    Args:
        x, score: the state and the score there, shape (*x).
        step_size: eta, a positive scalar.

    Source: Rossky et al. 1978; Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions".
    """
    return Normal(x + step_size * score, var=2.0 * step_size)


def _check_step_size(step_size: Scalar | float) -> None:
    check_positive_scalar("step_size", step_size)


@compiled(static=("num_steps",), check=_check_step_size)
def ula(score: Score, key: Key, x: Batch, step_size: Scalar | float, num_steps: int, *, path: bool = False) -> Chain:
    """The unadjusted Langevin algorithm: num_steps steps, without accept-reject (LAN-1, LAN-2).

    Args:
        score: grad log p, (B, *x) -> (B, *x); evaluated once a step.
        key: for the noise.
        x: initial states, shape (B, *x).
        step_size: eta.
        num_steps: number of steps.
        path: return the states after every step, including the last.

    Returns:
        `Chain`.

    Raises:
        ValueError: step_size not positive, or num_steps below 1.

    Source: Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions".
    """
    _check_count("num_steps", num_steps)
    return _ula(score, key, x, jnp.asarray(step_size, at_least_float32(x.dtype)), num_steps, path)


def _ula(score, key, x, step_size, num_steps, path) -> Chain:
    def body(x, key):
        x = _step(score, key, x, step_size)
        return x, x if path else None

    x, states = scan(body, x, jax.random.split(key, num_steps))
    return Chain(x, _path(states, x), _all_accepted(x))


def _all_accepted(x: Batch) -> PerExample:
    return jnp.ones_like(x, at_least_float32(x.dtype), shape=x.shape[:1])


def _path(states, x):
    return jnp.zeros((0, *x.shape), x.dtype) if states is None else states


def _step(score, key, x, step_size) -> Batch:
    """A sample of the kernel, in the dtype of x."""
    return _propose(x, evaluate(score, x, name="score"), key, step_size)


def _propose(x, score, key, step_size) -> Batch:
    dtype = at_least_float32(x.dtype)  # not of score and step_size, so that the noise depends on x's dtype alone
    score, step_size = score.astype(dtype), step_size.astype(dtype)
    keys = jax.random.split(key, x.shape[0])
    return jax.vmap(lambda x, s, k: langevin_kernel(x, s, step_size).sample(k))(x, score, keys).astype(x.dtype)


@compiled(static=("num_steps",), check=_check_step_size)
def mala(
    log_prob: Energy, key: Key, x: Batch, step_size: Scalar | float, num_steps: int, *, path: bool = False
) -> Chain:
    """The Metropolis-adjusted Langevin algorithm: p is exactly stationary at any step size.

        accept y with probability min(1, p(y) k(x | y) / (p(x) k(y | x))),  k the `langevin_kernel`

    Args:
        log_prob: log p up to a constant, (B, *x) -> (B,), for each example independently, such as the negative of
            an energy. Its gradient is the score.
        key, x, step_size, num_steps, path: as in `ula`.

    Returns:
        `Chain`.

    Raises:
        ValueError: as `ula`.

    Source: Besag 1994; Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions".
    """
    _check_count("num_steps", num_steps)
    return _mala(log_prob, key, x, jnp.asarray(step_size, at_least_float32(x.dtype)), num_steps, path)


def _mala(log_prob, key, x, step_size, num_steps, path) -> Chain:
    def log_prob_and_score(x):
        value, vjp = jax.vjp(lambda x: evaluate_scalars(log_prob, x, name="log-density"), x)
        return value, vjp(jnp.ones_like(value))[0].astype(at_least_float32(x.dtype))

    def log_kernel(x, s, y):
        return jax.vmap(lambda x, s, y: langevin_kernel(x, s, step_size).log_prob(y))(x, s, y)

    def body(state, key):
        (x, (value, s)), (key_y, key_u) = state, jax.random.split(key)
        y = _propose(x, s, key_y, step_size)
        at_y = log_prob_and_score(y)
        log_ratio = at_y[0] - value + log_kernel(y, at_y[1], x) - log_kernel(x, s, y)
        accepted = jnp.log(jax.random.uniform(key_u, value.shape, value.dtype)) < log_ratio
        state = jax.tree.map(partial(_select, accepted), (y, at_y), (x, (value, s)))
        return state, (state[0] if path else None, accepted)

    (x, _), (states, accepted) = scan(body, (x, log_prob_and_score(x)), jax.random.split(key, num_steps))
    return Chain(x, _path(states, x), jnp.mean(accepted, axis=0, dtype=at_least_float32(x.dtype)))


def _select(accepted, new, old):
    return jax.vmap(jnp.where)(accepted, new, old)


def _check_annealing(levels: NoiseLevel, rate: Scalar | float) -> None:
    check_positive_scalar("rate", rate)
    check_decreasing_noise(levels)


@compiled(static=("steps",), check=_check_annealing)
def annealed_langevin(
    denoiser: Denoiser,
    key: Key,
    x: Batch,
    levels: NoiseLevel,
    *,
    prediction_type: PredictionType = "score",
    rate: Scalar | float = 0.1,
    steps: int = 100,
    denoise: bool = True,
    path: bool = False,
) -> Chain:
    """Annealed Langevin dynamics: Langevin steps on q(x_t) at a decreasing sequence of noise levels (LAN-3).

    The step size at a level is eta = rate sigma^2, so steps are proportional to the noise at every level. Song &
    Ermon's eps equals 2 rate sigma_L^2. Between levels the state is multiplied by the ratio of their alphas, so that a
    variance-preserving process has the same chain as the variance-exploding process.

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        key: for the noise.
        x: initial states, samples of (approximately) q(x_t) at the noisiest level, shape (B, *x).
        levels: fields of shape (L,), with decreasing sigma / alpha: `jax.vmap(schedule)` or a discrete schedule,
            evaluated at decreasing times.
        prediction_type: what the denoiser predicts.
        rate: eta / sigma^2.
        steps: number of steps at each level.
        denoise: return the denoiser's x_0 for the last state in place of the state, which still has noise.
        path: return the states after every level.

    Returns:
        `Chain`.

    Raises:
        ValueError: unknown prediction_type, rate not positive, steps below 1, or noise levels that do not decrease.

    Source: Song & Ermon 2019, arXiv:1907.05600, algorithm 1; Song & Ermon 2020, arXiv:2006.09011 (the final denoising).
    """
    _check_count("steps", steps)
    rate = jnp.asarray(rate, at_least_float32(x.dtype))

    def body(x, inputs):
        level, previous_alpha, key = inputs
        x = (x * (level.alpha / previous_alpha)).astype(x.dtype)
        score, eta = ScoreFromDenoiser(denoiser, level, prediction_type), rate * level.sigma**2
        keys = jax.random.split(key, steps)
        x, _ = scan(lambda x, key: (_step(score, key, x, eta), None), x, keys)
        return x, x if path else None

    previous_alpha = jnp.concatenate([levels.alpha[:1], levels.alpha[:-1]])
    x, states = scan(body, x, (levels, previous_alpha, jax.random.split(key, levels.alpha.shape[0])))
    last = jax.tree.map(lambda field: field[-1], levels)
    if denoise:
        x = to_x_0(ScoreFromDenoiser(denoiser, last, prediction_type)(x), x, last, "score").astype(x.dtype)
    return Chain(x, _path(states, x), _all_accepted(x))


def _check_snr(snr: Scalar | float) -> None:
    check_positive_scalar("snr", snr)


@compiled(static=("steps",), check=_check_snr)
def langevin_corrector(
    denoiser: Denoiser,
    key: Key,
    x_t: Batch,
    level: NoiseLevel,
    *,
    prediction_type: PredictionType = "score",
    snr: Scalar | float = 0.16,
    steps: int = 1,
) -> Batch:
    """The corrector of predictor-corrector sampling: Langevin steps at one noise level (LAN-2).

        eta = 2 (snr sigma)^2

    Args:
        denoiser: predicts `prediction_type`; evaluated once a step, on the whole batch.
        key: for the noise.
        x_t: shape (B, *x).
        level: scalars, sigma > 0.
        prediction_type: what the denoiser predicts.
        snr: Song et al.'s signal-to-noise ratio r, the norm of the drift over that of the noise. They compute eta from
            the norm of the batch's scores. Here eta is computed from that of the conditional score, sqrt(D) / sigma,
            because a step size that depends on the state changes the stationary distribution.
        steps: number of steps.

    Returns:
        Shape (B, *x). If x_t is a sample of q(x_t), the result is one too, up to the bias of a finite step size.

    Raises:
        ValueError: unknown prediction_type, snr not positive, or steps below 1.

    Source: Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5.
    """
    _check_count("steps", steps)
    eta = 2.0 * (jnp.asarray(snr, at_least_float32(x_t.dtype)) * level.sigma) ** 2
    return _ula(ScoreFromDenoiser(denoiser, level, prediction_type), key, x_t, eta, steps, False).x


def check_decreasing_noise(levels: NoiseLevel) -> None:
    """Check that the noise sigma / alpha of the levels decreases. Traced levels are not checked.

    Raises:
        ValueError: no levels, fields that are not vectors, or noise that does not decrease from each level to the next.
    """
    if jnp.ndim(levels.log_sigma) != 1 or jnp.size(levels.log_sigma) < 1:
        raise ValueError(f"levels have shape {jnp.shape(levels.log_sigma)}: pass at least one level, stacked as (L,)")
    if isinstance(levels.log_sigma, Tracer) or isinstance(levels.log_alpha, Tracer):
        return
    noise = np.asarray(levels.log_sigma) - np.asarray(levels.log_alpha)
    if not np.all(np.diff(noise) < 0):
        raise ValueError(
            "the noise sigma / alpha of the levels must decrease from each level to the next: reverse their order"
        )


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} is {count}: it must be at least 1")
