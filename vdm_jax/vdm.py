"""Variational diffusion models: the bound as a loss, with the noise schedule learned together with the network."""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from vdm_jax.compilation import compiled, varying_like
from vdm_jax.elbo import (
    DiffusionBound,
    DiffusionDecoder,
    continuous_diffusion_weight,
    denoising_error,
    diffusion_weight,
    prior_kl,
    reconstruction_nll,
)
from vdm_jax.gaussian import STANDARD_NORMAL, Prior
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import LearnedSchedule, Schedule, check_noise_at_start
from vdm_jax.time_sampling import sample_times
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, at_least_float32

__all__ = [
    "vdm_loss",
]


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
    schedule_objective: Literal["variance", "bound"] = "variance",
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """The bound at one time t per example; the times of a batch are evenly spaced from a random start (ELBO-12, VDM-1).

        T -> infinity:  diffusion = 1/2 gamma'(t) ||eps - eps_hat||^2
        T steps:        diffusion = T/2 (SNR(s)/SNR(t) - 1) ||eps - eps_hat||^2,   t in {1/T .. 1}, s = t - 1/T

    As T -> infinity the expectation of the bound depends on a `LearnedSchedule` only through its end points, so its
    shape can be trained to reduce the variance of the estimate. With `schedule_objective="variance"`, gamma_0, gamma_1
    and the denoiser receive the gradient of the bound, and `rise` receives the gradient of

        E[diffusion^2] / (2 D)

    from the same backward pass. The returned values are those of the bound for either objective.

    Args:
        denoiser: predicts `prediction_type`; evaluated twice (at t, and for the decoder), on the whole batch.
        key: for the times and the noise.
        x_0: clean batch, shape (B, *x).
        schedule: continuous, with noise at t = 0.
        decoder: p(x_0 | z_0) of one example.
        prediction_type: what the denoiser predicts.
        num_steps: T; None is T -> infinity.
        schedule_objective: what trains the shape of a `LearnedSchedule` as T -> infinity, "variance" or "bound". At
            finite T it is always the bound.
        prior: p(z_1), with scalar fields, as in `elbo.prior_kl`.

    Returns:
        `DiffusionBound`, each field (B,), nats.

    Raises:
        ValueError: unknown prediction_type or schedule_objective, or num_steps below 1.

    Source: Kingma et al. 2021, arXiv:2107.00630, sections 4 and 5, appendix I.
    """
    if schedule_objective not in ("variance", "bound"):
        raise ValueError(f"unknown schedule_objective {schedule_objective!r}: choose 'variance' or 'bound'")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: the bound needs at least one step, or None for T -> infinity")
    key_t, key_eps, key_0 = jax.random.split(key, 3)
    t = varying_like(
        sample_times(key_t, x_0.shape[0], "low_discrepancy").astype(at_least_float32(x_0.dtype)), x_0, denoiser
    )
    if num_steps is None:
        level, slope, loss_channel = _level_and_slope(schedule, t, schedule_objective)
        weight = jax.vmap(partial(continuous_diffusion_weight, prediction_type=prediction_type))(level, slope)
        diffusion = weight * denoising_error(denoiser, key_eps, x_0, level, prediction_type)
        diffusion = _send_loss_backward(diffusion, loss_channel, x_0[0].size)
    else:
        i = jnp.floor(t * num_steps)
        step = schedule.step(i / num_steps, jnp.minimum((i + 1) / num_steps, 1.0))
        weight = num_steps * jax.vmap(partial(diffusion_weight, prediction_type=prediction_type))(step)
        diffusion = weight * denoising_error(denoiser, key_eps, x_0, step.t, prediction_type)
    first, last = schedule(jnp.zeros_like(t)), schedule(jnp.ones((), t.dtype))
    return DiffusionBound(
        prior=jax.vmap(lambda x: prior_kl(x, last, prior))(x_0),
        reconstruction=reconstruction_nll(denoiser, key_0, x_0, first, decoder, prediction_type),
        diffusion=diffusion,
    )


# The gradient of the schedule's shape (Kingma et al. 2021, appendix I: variance minimization).
#
# Let L_i be the diffusion term of example i. Its time t_i enters only by lambda_i = lambda(t_i) and its slope
# lambda'_i, and these depend on eta, the parameters of the schedule's shape (`rise`). Training eta to minimize the
# variance of the estimate, equivalently its second moment, since its mean does not depend on eta, needs
#
#     d/d eta  mean_i L_i^2 / (2 D)  =  mean_i (L_i / D) [ dL_i/d lambda_i  d lambda_i/d eta
#                                                        + dL_i/d lambda'_i d lambda'_i/d eta ].
#
# The backward pass of mean_i L_i already brings the cotangents dL_i/d lambda_i and dL_i/d lambda'_i (over B) to
# (lambda_i, lambda'_i). The gradient above is the ordinary one, except that these cotangents are multiplied by L_i / D
# before they continue to eta. So no second backward pass through the network is needed.
#
# - `_scale_gradient_by_loss` is the identity on (lambda, lambda'). In the backward pass it multiplies their cotangents
#   by L / D.
# - It runs before L is known, so L / D reaches it in the backward pass, as the cotangent of an additional output: a
#   zero called the loss channel. `_send_loss_backward` is the identity on L and sets that cotangent to L / D.
# - gamma_0 and gamma_1 keep the bound's gradient. `_level_and_slope` therefore evaluates the schedule twice: once
#   differentiable in gamma_0 and gamma_1 alone, and once, scaled, in `rise` alone.


def _level_and_slope(schedule, t, schedule_objective):
    """The level and lambda'(t) of each example, and the loss channel."""

    def log_snr_and_slope(schedule):
        return jax.vmap(jax.value_and_grad(schedule.log_snr))(t)

    if schedule_objective == "bound" or not isinstance(schedule, LearnedSchedule):
        return schedule(t), jax.vmap(jax.grad(schedule.log_snr))(t), jnp.zeros_like(t)
    by_ends = log_snr_and_slope(replace(schedule, rise=_constant(schedule.rise)))
    fixed_ends = replace(schedule, gamma_0=_constant(schedule.gamma_0), gamma_1=_constant(schedule.gamma_1))
    by_shape, loss_channel = _scale_gradient_by_loss(log_snr_and_slope(fixed_ends))
    # by_shape - constant(by_shape) is zero and adds only its gradient
    log_snr, slope = jax.tree.map(lambda end, shape: end + (shape - _constant(shape)), by_ends, by_shape)
    return level_from_log_snr(log_snr, t), slope, loss_channel


def _constant(tree):
    return jax.tree.map(jax.lax.stop_gradient, tree)


@jax.custom_vjp
def _scale_gradient_by_loss(values):
    """The values, and a loss channel whose cotangent multiplies the values' cotangents."""
    return values, jnp.zeros_like(values[0])


def _scale_forward(values):
    return _scale_gradient_by_loss(values), None


def _scale_backward(_, cotangents):
    values, losses = cotangents
    return (jax.tree.map(lambda value: value * losses, values),)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _send_loss_backward(losses, loss_channel, num_dims):
    """The losses, unchanged; the cotangent of the loss channel becomes losses / num_dims."""
    del loss_channel, num_dims
    return losses


def _send_forward(losses, loss_channel, num_dims):
    return losses, (losses / num_dims).astype(loss_channel.dtype)


def _send_backward(num_dims, losses_per_dim, cotangent):
    del num_dims
    return cotangent, losses_per_dim


_scale_gradient_by_loss.defvjp(_scale_forward, _scale_backward)
_send_loss_backward.defvjp(_send_forward, _send_backward)
