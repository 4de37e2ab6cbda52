"""Variational diffusion models: the bound as a loss, with the noise schedule learned beside the network."""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from vdm_jax.compilation import compiled, varying_like
from vdm_jax.elbo import (
    DiffusionBound,
    DiffusionDecoder,
    denoising_error,
    diffusion_rate,
    diffusion_weight,
    prior_kl,
    reconstruction_nll,
)
from vdm_jax.gaussian import STANDARD_NORMAL, Prior
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import LearnedSchedule, Schedule, check_noise_at_start
from vdm_jax.time_sampling import uniform_times
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, at_least_float32


def _check_start(schedule: Schedule) -> None:
    check_noise_at_start(schedule, 0.0, jnp.float32)


@compiled(static=("num_steps",), check=_check_start)
def vdm_loss(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: Schedule,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
    num_steps: int | None = None,
    shape: Literal["variance", "bound"] = "variance",
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """The bound at one time t an example, those of the batch spread evenly from a random start (ELBO-12, VDM-1).

        T -> infinity:  diffusion = 1/2 gamma'(t) ||eps - eps_hat||^2
        T steps:        diffusion = T/2 (SNR(s)/SNR(t) - 1) ||eps - eps_hat||^2,   t in {1/T .. 1}, s = t - 1/T

    As T -> infinity the bound's expectation depends on a `Learned` schedule's end points alone, so its shape is free to
    make the estimate less noisy: gamma_0, gamma_1 and the denoiser get the gradient of the bound, `rise` that of

        E[diffusion^2] / (2 D)

    from the same backward pass: the bound's own gradient with respect to each example's gamma(t) and gamma'(t), times
    that example's diffusion term per dimension. The values returned are the bound's, whatever the gradient.

    Args:
        denoiser: predicts `prediction_type`; called twice (at t, and for the decoder), with the whole batch.
        key: for times and noises.
        x_0: clean batch, shape (B, *x).
        schedule: continuous, with noise at t = 0.
        decoder: p(x_0 | z_0) of one example.
        prediction_type: what the denoiser predicts.
        num_steps: T; None is T -> infinity.
        shape: what a `Learned` schedule's shape is trained on as T -> infinity. At finite T it is the bound.
        prior: p(x_T), with scalar fields, as in `elbo.prior_kl`.

    Returns:
        `Bound`, each field (B,), nats.

    Raises:
        ValueError: unknown prediction_type or shape, or num_steps below 1.

    Source: Kingma et al. 2021, arXiv:2107.00630, sections 4 and 5, appendix I.
    """
    if shape not in ("variance", "bound"):
        raise ValueError(f"unknown shape {shape!r}: choose 'variance' or 'bound'")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: the bound needs at least one step, or None for T -> infinity")
    key_t, key_eps, key_0 = jax.random.split(key, 3)
    t = varying_like(
        uniform_times(key_t, x_0.shape[0], "low_discrepancy").astype(at_least_float32(x_0.dtype)), x_0, denoiser
    )
    if num_steps is None:
        level, slope, token = _pace(schedule, t, shape == "variance")
        weight = jax.vmap(partial(diffusion_rate, prediction_type=prediction_type))(level, slope)
        diffusion = _tell(weight * denoising_error(denoiser, key_eps, x_0, level, prediction_type), token, x_0[0].size)
    else:
        i = jnp.floor(t * num_steps)
        step = schedule.step(i / num_steps, jnp.minimum((i + 1) / num_steps, 1.0))
        weight = num_steps * jax.vmap(partial(diffusion_weight, prediction_type=prediction_type))(step)
        diffusion = weight * denoising_error(denoiser, key_eps, x_0, step.t, prediction_type)
    at_end = jax.vmap(lambda x: prior_kl(x, schedule(jnp.ones((), t.dtype)), prior))(x_0)
    first = schedule(jnp.zeros_like(t))
    return DiffusionBound(at_end, reconstruction_nll(denoiser, key_0, x_0, first, decoder, prediction_type), diffusion)


def _pace(schedule, t, least_variance):
    """Level and lambda'(t) of each example, and the token that will tell their gradients the loss they led to."""
    if not (least_variance and isinstance(schedule, LearnedSchedule)):
        return schedule(t), jax.vmap(jax.grad(schedule.log_snr))(t), jnp.zeros_like(t)

    def pace(schedule):
        return jax.vmap(jax.value_and_grad(schedule.log_snr))(t)

    ends = pace(replace(schedule, rise=_held(schedule.rise)))
    moved, token = _mark(pace(replace(schedule, gamma_0=_held(schedule.gamma_0), gamma_1=_held(schedule.gamma_1))))
    log_snr, slope = jax.tree.map(lambda end, move: end + (move - _held(move)), ends, moved)
    return level_from_log_snr(log_snr, t), slope, token


def _held(tree):
    return jax.tree.map(jax.lax.stop_gradient, tree)


# On the way back a gradient meets `_tell` first, which hands the losses to `_mark` by way of the token, and `_mark`
# multiplies with them. Forward both do nothing.
@jax.custom_vjp
def _mark(values):
    return values, jnp.zeros_like(values[0])


def _mark_forward(values):
    return _mark(values), None


def _mark_backward(_, cotangents):
    values, losses = cotangents
    return (jax.tree.map(lambda value: value * losses, values),)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tell(losses, token, num_dims):
    del token, num_dims
    return losses


def _tell_forward(losses, token, num_dims):
    return losses, (losses / num_dims).astype(token.dtype)


def _tell_backward(num_dims, losses, cotangent):
    del num_dims
    return cotangent, losses


_mark.defvjp(_mark_forward, _mark_backward)
_tell.defvjp(_tell_forward, _tell_backward)
