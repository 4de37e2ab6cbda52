"""Langevin dynamics: draws of a law from its score alone.

    x <- x + eta grad log p(x) + sqrt(2 eta) xi          (LAN-1)

Steps of the diffusion dx = grad log p dt + sqrt(2) dW, which keeps p as it is (LAN-2). A step of finite size has a bias
of O(eta), which `metropolis` removes; modes that lie apart mix slowly, which `annealed` cures, going from much noise to
little (LAN-3). A chain is one compiled scan over a whole batch, and `score` takes and gives a batch. States have the
type of x; scores, step sizes and the sums of a density are in float32 or wider.
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
    evaluate,
    evaluate_scalars,
)


class Chain(NamedTuple):
    """Where chains ended, and where they were.

    Fields:
        x: the last states, shape (B, *x).
        path: states on the way, shape (K, B, *x); of length 0 unless asked for.
        accepted: share of proposals accepted, shape (B,); 1 where none is refused.
    """

    x: Batch
    path: Float[Array, "k b *x"]
    accepted: PerExample


def langevin_kernel(x: X, score: X, step_size: Real) -> Normal:
    """The law of the next state, N(x + eta score, 2 eta I), for one example (LAN-1).

    Args:
        x, score: the state and the score there, shape (*x).
        step_size: eta, a positive scalar.

    Source: Rossky et al. 1978; Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions".
    """
    return Normal(x + step_size * score, var=2.0 * step_size)


def _check_step_size(step_size: Scalar | float) -> None:
    _check_positive("step_size", step_size)


@compiled(static=("num_steps",), check=_check_step_size)
def ula(score: Score, key: Key, x: Batch, step_size: Scalar | float, num_steps: int, *, path: bool = False) -> Chain:
    """So many steps of a Langevin chain (LAN-1, LAN-2).

    Args:
        score: grad log p, (B, *x) -> (B, *x); called once a step.
        key: for the noise.
        x: where the chains begin, shape (B, *x).
        step_size: eta.
        num_steps: how many.
        path: return every state, the last one included.

    Returns:
        `Chain`.

    Raises:
        ValueError: step_size not positive, or num_steps below 1.

    Source: Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions".
    """
    _check_count("num_steps", num_steps)
    return _unadjusted(score, key, x, jnp.asarray(step_size, at_least_float32(x.dtype)), num_steps, path)


def _unadjusted(score, key, x, step_size, num_steps, path) -> Chain:
    def move(x, key):
        x = _step(score, key, x, step_size)
        return x, x if path else None

    x, states = scan(move, x, jax.random.split(key, num_steps))
    return Chain(x, _path(states, x), _all_accepted(x))


def _all_accepted(x: Batch) -> PerExample:
    return jnp.ones_like(x, at_least_float32(x.dtype), shape=x.shape[:1])


def _path(states, x):
    return jnp.zeros((0, *x.shape), x.dtype) if states is None else states


def _step(score, key, x, step_size) -> Batch:
    """A draw of the kernel, in the type of x."""
    return _propose(x, evaluate(score, x, name="score"), key, step_size)


def _propose(x, score, key, step_size) -> Batch:
    score, step_size = (
        value.astype(at_least_float32(x.dtype)) for value in (score, step_size)
    )  # the noise is of x's type alone
    keys = jax.random.split(key, x.shape[0])
    return jax.vmap(lambda x, s, k: langevin_kernel(x, s, step_size).sample(k))(x, score, keys).astype(x.dtype)


@compiled(static=("num_steps",), check=_check_step_size)
def mala(
    log_prob: Energy, key: Key, x: Batch, step_size: Scalar | float, num_steps: int, *, path: bool = False
) -> Chain:
    """Langevin proposals, accepted or refused so that p is kept exactly, at any step size (MALA).

        accept y with probability min(1, p(y) k(x | y) / (p(x) k(y | x))),  k the `kernel`

    Args:
        log_prob: log p up to a constant, (B, *x) -> (B,), of each example by itself: minus an energy. Its gradient is
            the score.
        key, x, step_size, num_steps, path: as in `unadjusted`.

    Returns:
        `Chain`.

    Raises:
        ValueError: as `unadjusted`.

    Source: Besag 1994; Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions".
    """
    _check_count("num_steps", num_steps)
    return _metropolis(log_prob, key, x, jnp.asarray(step_size, at_least_float32(x.dtype)), num_steps, path)


def _metropolis(log_prob, key, x, step_size, num_steps, path) -> Chain:
    def look(x):
        value, pull = jax.vjp(lambda x: evaluate_scalars(log_prob, x, name="log-density"), x)
        return value, pull(jnp.ones_like(value))[0].astype(at_least_float32(x.dtype))

    def log_kernel(x, s, y):
        return jax.vmap(lambda x, s, y: langevin_kernel(x, s, step_size).log_prob(y))(x, s, y)

    def move(state, key):
        (x, (value, s)), (key_y, key_u) = state, jax.random.split(key)
        y = _propose(x, s, key_y, step_size)
        there = look(y)
        log_ratio = there[0] - value + log_kernel(y, there[1], x) - log_kernel(x, s, y)
        taken = jnp.log(jax.random.uniform(key_u, value.shape, value.dtype)) < log_ratio
        state = jax.tree.map(partial(_choose, taken), (y, there), (x, (value, s)))
        return state, (state[0] if path else None, taken)

    (x, _), (states, taken) = scan(move, (x, look(x)), jax.random.split(key, num_steps))
    return Chain(x, _path(states, x), jnp.mean(taken, axis=0, dtype=at_least_float32(x.dtype)))


def _choose(chosen, new, old):
    return jax.vmap(jnp.where)(chosen, new, old)


def _check_annealing(levels: NoiseLevel, rate: Scalar | float) -> None:
    _check_positive("rate", rate)
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
    """Langevin chains on q(x_t) of one level after the other, from much noise to little (LAN-3).

    The step size of a level is eta = rate sigma^2, so that all levels move by the same share of their noise. Song &
    Ermon's eps is 2 rate sigma_L^2. From a level to the next the state is multiplied by the ratio of their alphas: a
    denoiser of a variance-preserving process makes the same chain as one of the exploding process.

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        key: for the noise.
        x: where the chains begin, draws of (nearly) the noisiest law, shape (B, *x).
        levels: fields of shape (L,), their noise sigma / alpha falling; `jax.vmap(schedule)` or a table gives them.
        prediction_type: what the denoiser predicts.
        rate: eta / sigma^2.
        steps: on each level.
        denoise: end with the denoiser's x_0 in the place of the last, still noisy, state.
        path: return the state after every level.

    Returns:
        `Chain`.

    Raises:
        ValueError: unknown prediction_type, rate not positive, steps below 1, or levels whose noise does not fall.

    Source: Song & Ermon 2019, arXiv:1907.05600, algorithm 1; Song & Ermon 2020, arXiv:2006.09011 (the last denoising).
    """
    _check_count("steps", steps)
    rate = jnp.asarray(rate, at_least_float32(x.dtype))

    def visit(x, turn):
        level, before, key = turn
        x = (x * (level.alpha / before)).astype(x.dtype)
        score, eta = ScoreFromDenoiser(denoiser, level, prediction_type), rate * level.sigma**2
        keys = jax.random.split(key, steps)
        x, _ = scan(lambda x, key: (_step(score, key, x, eta), None), x, keys)
        return x, x if path else None

    before = jnp.concatenate([levels.alpha[:1], levels.alpha[:-1]])
    x, states = scan(visit, x, (levels, before, jax.random.split(key, levels.alpha.shape[0])))
    last = jax.tree.map(lambda field: field[-1], levels)
    if denoise:
        x = to_x_0(ScoreFromDenoiser(denoiser, last, prediction_type)(x), x, last, "score").astype(x.dtype)
    return Chain(x, _path(states, x), _all_accepted(x))


def _check_ratio(ratio: Scalar | float) -> None:
    _check_positive("ratio", ratio)


@compiled(static=("steps",), check=_check_ratio)
def langevin_corrector(
    denoiser: Denoiser,
    key: Key,
    x_t: Batch,
    level: NoiseLevel,
    *,
    prediction_type: PredictionType = "score",
    ratio: Scalar | float = 0.16,
    steps: int = 1,
) -> Batch:
    """Langevin steps at one level, between the steps of a sampler: the corrector of a predictor-corrector (LAN-2).

        eta = 2 (ratio sigma)^2

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        key: for the noise.
        x_t: shape (B, *x).
        level: scalars, sigma > 0.
        prediction_type: what the denoiser predicts.
        ratio: Song et al.'s r, the drift's length over the noise's. They divide by the length of the score in a batch;
            here by that of the conditional score, sqrt(D) / sigma, since steps that depend on the state change its law.
        steps: how many.

    Returns:
        Shape (B, *x), of the same law as x_t if that is q(x_t), up to the bias of a finite step.

    Raises:
        ValueError: unknown prediction_type, ratio not positive, or steps below 1.

    Source: Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5.
    """
    _check_count("steps", steps)
    eta = 2.0 * (jnp.asarray(ratio, at_least_float32(x_t.dtype)) * level.sigma) ** 2
    return _unadjusted(ScoreFromDenoiser(denoiser, level, prediction_type), key, x_t, eta, steps, False).x


def check_decreasing_noise(levels: NoiseLevel) -> None:
    """Refuse levels whose noise does not fall; what is traced is not asked.

    Raises:
        ValueError: fewer than one level, fields that are no vectors, or noise that rises or stays.
    """
    if jnp.ndim(levels.log_sigma) != 1 or jnp.size(levels.log_sigma) < 1:
        raise ValueError(f"levels have shape {jnp.shape(levels.log_sigma)}: give at least one, stacked along one axis")
    if isinstance(levels.log_sigma, Tracer) or isinstance(levels.log_alpha, Tracer):
        return
    noise = np.asarray(levels.log_sigma) - np.asarray(levels.log_alpha)
    if not np.all(np.diff(noise) < 0):
        raise ValueError("the noise of the levels, sigma / alpha, must fall from each to the next: give them reversed")


def _check_positive(name: str, size: Scalar | float) -> None:
    if not isinstance(size, Tracer) and not size > 0:
        raise ValueError(f"{name} is {size}: it must be positive")


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} is {count}: a chain has at least one step")
