"""Twisted sequential Monte Carlo: weighted samples of p(x_0 | y), exact as the number of particles grows."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import Step, broadcast_to_batch
from vdm_jax.reverse_variance import PerStep
from vdm_jax.samplers.chain import noise, predict, transition_variance, warn_of_amplification
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    PerExample,
    PredictionType,
    Scalar,
    at_least_float32,
    evaluate_scalars,
    per_example,
)

__all__ = ["Particles", "systematic_resampling", "twisted_smc"]


class Particles(NamedTuple):
    """Weighted samples of p(x_0 | y), and an estimate of p(y).

    Fields:
        x_0: the particles, shape (B, *x).
        log_weights: their normalized log-weights, shape (B,): p(x_0 | y) is estimated by sum_i w_i delta(x_0 - x_0^i).
        log_evidence: log of the estimate of p(y), in nats, a scalar. The estimate of p(y), not of its logarithm, is
            unbiased.
        effective_sample_size: 1 / sum_i w_i^2 at t = T..0 before resampling, shape (T + 1,), noisiest first; between 1
            and B.
    """

    x_0: Batch
    log_weights: PerExample
    log_evidence: Scalar
    effective_sample_size: Float[Array, " steps"]


@compiled(static=("ess_threshold", "clip"), check=warn_of_amplification)
def twisted_smc(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    log_likelihood: Callable[[Any, Any], PerExample],
    *,
    prediction_type: PredictionType = "eps",
    variance: Literal["fixed_small", "fixed_large"] | PerStep = "fixed_small",
    ess_threshold: float = 0.5,
    clip: float | None = None,
) -> Particles:
    """The Twisted Diffusion Sampler: guided ancestral steps, corrected by weights and resampling.

    The twisting function h_t(x_t) = p(y | x_hat(x_t)) approximates p(y | x_t) of the denoiser's reverse process. Its
    gradient guides the steps, and the weights correct for them:

        x_s ~ N(mu_t + c_2 (sigma_t^2 / alpha_t) grad log h_t, v_t I)
        w_s = w_t  [p(x_s | x_t) / proposal(x_s)]  h_s(x_s) / h_t(x_t),     w_T = h_T(x_T)

    Here p(x_s | x_t) = N(mu_t, v_t I) is the step of `ancestral` and c_2 that of `forward.posterior_coefficients`. The
    last step, to clean data, has no noise and no guidance, and h_0 is the likelihood p(y | x_0) itself. As the number
    of particles B grows, the weighted particles converge to the p(x_0 | y) of the T-step chain of `ancestral` for *any*
    twisting function; a poor one only needs more particles. Estimates of p(y) are unbiased at every B.

    All particles belong to one y. For several, use `jax.vmap` over the key, x_T and the arrays of `log_likelihood`.

    Args:
        denoiser: predicts `prediction_type`; must be differentiable. It is evaluated and differentiated once a step.
        key: for the noise and for resampling.
        x_T: samples of the prior, shape (B, *x), one for each particle.
        schedule: a discrete schedule.
        log_likelihood: (x_hat, level) -> (B,), log p(y | x_0) for x_0 = x_hat, for each particle independently. It is
            log h_t at noisy levels, where it may depend on the level, and the likelihood at sigma = 0. For linear
            measurements use `guidance.LinearMeasurement`, otherwise for instance `lambda x_hat, level: f(x_hat)`.
        prediction_type: what the denoiser predicts.
        variance: v_t, of the model's step and of the proposal, as in `ancestral`.
        ess_threshold: particles are resampled if the effective sample size is below this fraction of B. 0 never
            resamples, 1 at every step with unequal weights.
        clip: bound on the absolute value of every predicted x_0; None does not clip.

    Returns:
        `Particles`. If every particle has likelihood 0, log_evidence is -inf and the log-weights are NaN.

    Raises:
        ValueError: unknown prediction_type or variance, an array of variances of another shape, ess_threshold outside
            of [0, 1], or log_likelihood does not return shape (B,).

    Source: Wu et al. 2023, arXiv:2306.17775, algorithm 1; Chopin & Papaspiliopoulos 2020, chapter 10 (adaptive
        resampling, estimates of the evidence).
    """
    if not 0.0 <= ess_threshold <= 1.0:
        raise ValueError(f"ess_threshold is {ess_threshold}: it must be in [0, 1], a fraction of the particles")
    variance_of = transition_variance(variance, schedule, x_T)
    key_noise, key_resampling = jax.random.split(key)
    count, dtype = x_T.shape[0], at_least_float32(x_T.dtype)

    def log_twist(x_hat, level):
        values = evaluate_scalars(log_likelihood, x_hat, broadcast_to_batch(level, x_hat), name="log-likelihood")
        return values.astype(dtype)

    def body(carry, t):
        x_t, log_weights = carry
        step = schedule.step(t - 1, t)

        def twist(x_t):
            x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
            log_h = log_twist(x_hat, step.t)
            return log_h.sum(), (x_hat, log_h)

        gradient, (x_hat, log_h) = jax.grad(twist, has_aux=True)(x_t)
        log_weights = log_weights + log_h
        size = _effective_sample_size(log_weights)
        resampled = size < ess_threshold * count
        chosen = systematic_resampling(jax.random.fold_in(key_resampling, t), log_weights)
        chosen = jnp.where(resampled, chosen, jnp.arange(count, dtype=chosen.dtype))
        log_weights = jnp.where(resampled, _log_mean_exp(log_weights), log_weights)  # the mean weight is kept
        x_t, x_hat, gradient, log_h = (value[chosen] for value in (x_t, x_hat, gradient, log_h))
        x_s, log_ratio = _propose(x_t, x_hat, gradient, step, variance_of(step, t), noise(key_noise, t, x_t))
        return (x_s, log_weights + log_ratio - log_h), size

    carry = x_T, jnp.zeros(count, dtype)
    (x_0, log_weights), sizes = scan(body, carry, jnp.arange(schedule.num_steps, 0, -1))
    log_weights = log_weights + log_twist(x_0, schedule(0))
    sizes = jnp.append(sizes, _effective_sample_size(log_weights))
    return Particles(x_0, jax.nn.log_softmax(log_weights), _log_mean_exp(log_weights), sizes)


def systematic_resampling(key: Key, log_weights: PerExample) -> Int[Array, " b"]:
    """Indices of B particles with equal weights in place of B weighted ones: particle i occurs B w_i times on average.

    A particle occurs floor(B w_i) or ceil(B w_i) times.

    Args:
        key: for one uniform number.
        log_weights: shape (B,); they need not be normalized.

    Returns:
        Indices in increasing order, shape (B,): `x_0[indices]` are the resampled particles.

    Source: Kitagawa 1996, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models".
    """
    count = log_weights.shape[0]
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights))
    ranks = jnp.arange(1, count + 1, dtype=cumulative.dtype)
    positions = (ranks - jax.random.uniform(key, dtype=cumulative.dtype)) / count  # in (0, 1]
    return jnp.searchsorted(cumulative, positions * cumulative[-1])


def _propose(x_t, x_hat, gradient, step: Step, var, z):
    """A guided step, x_s, and log p(x_s | x_t) - log proposal(x_s), computed from the difference of the two means."""
    noisy = step.s.sigma > 0
    coefficients = forward.posterior_coefficients(step)
    scale = jnp.sqrt(jnp.where(noisy, var, 1.0))
    drift = coefficients.c_2 * step.t.sigma**2 / step.t.alpha / scale * gradient.astype(z.dtype)  # in deviations
    mean = forward.posterior(x_t, x_hat, step).mean
    x_s = mean + jnp.where(noisy, scale * (drift + z), 0.0)
    log_ratio = -per_example(drift * z + 0.5 * jnp.square(drift))
    return x_s.astype(x_t.dtype), jnp.where(noisy, log_ratio, 0.0)


def _effective_sample_size(log_weights: PerExample) -> Scalar:
    return jnp.exp(-jax.nn.logsumexp(2.0 * jax.nn.log_softmax(log_weights)))


def _log_mean_exp(log_weights: PerExample) -> Scalar:
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.asarray(log_weights.size, log_weights.dtype))
