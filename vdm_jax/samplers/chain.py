"""Shared parts of the samplers: the scan over timesteps, its snapshots, and the denoiser's prediction at a level."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from vdm_jax import forward
from vdm_jax.compilation import scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.noise_levels import NoiseLevel, Step, broadcast_to_batch
from vdm_jax.parameterization import to_eps, to_x_0
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, Real, at_least_float32, evaluate

__all__ = [
    "Prediction",
    "Samples",
    "Trajectory",
    "check_key",
    "check_snapshots",
    "noise",
    "posterior_step",
    "predict",
    "run",
    "to_prediction",
    "transition_variance",
    "warn_of_amplification",
]

_MAX_GAIN = 20.0  # above this gain of the first step the samples of a trained network are unusable


class Trajectory(NamedTuple):
    """Snapshots of the sampling trajectory, noisiest first.

    Fields:
        t: their indices in the discrete schedule, shape (K,).
        x_t: the states, shape (K, B, *x).
        x_hat: the x_0 predicted from each, shape (K, B, *x).
    """

    t: Int[Array, " k"]
    x_t: Float[Array, "k b *x"]
    x_hat: Float[Array, "k b *x"]


class Samples(NamedTuple):
    """Samples x_0, shape (B, *x), and snapshots of their trajectory (length 0 by default)."""

    x_0: Batch
    trajectory: Trajectory


class Prediction(NamedTuple):
    """The denoiser's prediction as x_hat and as eps: x_t = alpha x_hat + sigma eps."""

    x_hat: Batch
    eps: Batch


def predict(
    denoiser: Denoiser, x_t: Batch, level: NoiseLevel, prediction_type: PredictionType, clip: float | None = None
) -> Prediction:
    """x_hat and eps of a batch at one level. If x_hat is clipped, eps is computed from the clipped x_hat.

    Args:
        denoiser: predicts `prediction_type`.
        x_t: shape (B, *x).
        level: scalars, sigma > 0.
        prediction_type: what the denoiser predicts.
        clip: bound on the absolute value of x_hat, or None.

    Raises:
        ValueError: unknown prediction_type.
    """
    return to_prediction(evaluate(denoiser, x_t, broadcast_to_batch(level, x_t)), x_t, level, prediction_type, clip)


def to_prediction(
    prediction: Batch, x_t: Batch, level: NoiseLevel, prediction_type: PredictionType, clip: float | None
) -> Prediction:
    """x_hat and eps of a denoiser's prediction; arguments and errors as in `predict`."""
    x_hat = to_x_0(prediction, x_t, level, prediction_type)
    if clip is None:
        return Prediction(x_hat, to_eps(prediction, x_t, level, prediction_type))
    x_hat = jnp.clip(x_hat, -clip, clip)
    return Prediction(x_hat, to_eps(x_hat, x_t, level, "x_0"))


def posterior_step(x_t: Batch, x_hat: Batch, step: Step, z: Batch, var: Real | None = None) -> Batch:
    """A sample of q(x_s | x_t, x_hat) from standard normal z; `var` replaces its variance. No noise if s is clean."""
    distribution, noisy = forward.posterior(x_t, x_hat, step), step.s.sigma > 0
    scale = jnp.sqrt(jnp.where(noisy, distribution.var if var is None else var, 1.0))  # sqrt has no gradient at 0
    return distribution.mean + jnp.where(noisy, scale, 0.0) * z


def transition_variance(variance: Any, schedule: DiscreteSchedule, x_T: Batch) -> Callable[[Step, Any], Real]:
    """The variance of p(x_{t-1} | x_t) as a function of the step and of t.

    Args:
        variance: "fixed_small", "fixed_large" or an array, as in `ancestral`.
        schedule: a discrete schedule.
        x_T: the initial state, shape (B, *x).

    Raises:
        ValueError: unknown variance, or an array of variances of another shape.
    """
    if isinstance(variance, str):
        match variance:
            case "fixed_small":
                return lambda step, t: forward.posterior_variance(step)
            case "fixed_large":
                return lambda step, t: step.t.sigma**2 * step.one_minus_ratio
        raise ValueError(f"unknown variance {variance!r}: choose 'fixed_small' or 'fixed_large', or pass an array")
    if variance.shape not in ((schedule.num_steps,), (schedule.num_steps, *x_T.shape[1:])):
        raise ValueError(
            f"variance has shape {variance.shape}: with T = {schedule.num_steps} steps pass shape (T,) or (T, *x)"
        )
    # an array with a variance for each dimension is the same for every example of the batch
    return lambda step, t: variance[t - 1][None] if variance.ndim > 1 else variance[t - 1]


def noise(key: Key | None, t: Any, x_t: Batch) -> Batch:
    """Standard normal noise for step t, with the shape of x_t, in float32 or wider.

    Raises:
        ValueError: the key is None.
    """
    return jax.random.normal(jax.random.fold_in(check_key(key), t), x_t.shape, at_least_float32(x_t.dtype))


def check_key(key: Key | None) -> Key:
    """The key, unless it is None.

    Raises:
        ValueError: the key is None.
    """
    if key is None:
        raise ValueError("key must not be None, since this sampler adds noise: pass a key, such as jax.random.key(0)")
    return key


def run(update: Callable, x_T: Batch, schedule: DiscreteSchedule, snapshots: int = 0, carry: Any = None) -> Samples:
    """Scan `update` over t = T..1 and record snapshots.

    Args:
        update: (x_t, carry, step, t) -> (x_s, x_hat, carry), for s = t - 1.
        x_T: the initial state, shape (B, *x).
        schedule: a discrete schedule.
        snapshots: number of evenly spaced states to return.
        carry: initial value of what `update` passes from step to step, a pytree.
    """
    times = np.round(np.linspace(schedule.num_steps, 1, snapshots)).astype(np.int32)
    slots = np.full(schedule.num_steps + 1, snapshots, np.int32)  # the last slot is discarded
    slots[times] = np.arange(snapshots)
    slots = jnp.asarray(slots)

    def body(state, t):
        x_t, carry, buffers = state
        x_s, x_hat, carry = update(x_t, carry, schedule.step(t - 1, t), t)
        record = lambda buffer, new: buffer.at[slots[t]].set(new.astype(buffer.dtype))  # noqa: E731
        return (x_s, carry, jax.tree.map(record, buffers, (x_t, x_hat))), None

    empty = jnp.zeros((snapshots + 1, *x_T.shape), x_T.dtype)
    steps = jnp.arange(schedule.num_steps, 0, -1)
    (x_0, _, (x_t, x_hat)), _ = scan(body, (x_T, carry, (empty, empty)), steps)
    return Samples(x_0, Trajectory(jnp.asarray(times), x_t[:-1], x_hat[:-1]))


def warn_of_amplification(schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None) -> None:
    """Warn if the first step amplifies prediction errors by more than later steps can correct.

    An error d of eps causes an error d sigma_t / alpha_t of x_hat = (x_t - sigma eps) / alpha, and an error
    d sigma_s (e^(h/2) - 1) of x_s, where h is the increase in log-SNR of the step. A traced schedule is not checked.
    """
    if (
        prediction_type in ("x_0", "v")
        or clip is not None
        or any(isinstance(x, Tracer) for x in jax.tree.leaves(schedule))
    ):
        return
    gain = _first_gain(schedule) if isinstance(schedule, Hashable) else _first_gain.__wrapped__(schedule)
    if gain > _MAX_GAIN:
        warnings.warn(
            f"with prediction_type={prediction_type!r} and clip=None, the first sampling step multiplies prediction "
            f"errors by {gain:,.0f}: pass clip=1.0 for data in [-1, 1], predict x_0 or v, or take smaller steps at the "
            "noisy end, schedule.subsequence(discrete_schedules.log_snr_uniform_steps(schedule, count))",
            stacklevel=_stacklevel_of_the_user(),
        )


def _stacklevel_of_the_user() -> int:
    """The `stacklevel` with which a warning of the caller points at the first line outside of this package."""
    frame, count, package = sys._getframe(1), 1, os.path.dirname(os.path.dirname(__file__))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, count = frame.f_back, count + 1
    return count


@functools.lru_cache(maxsize=64)
def _first_gain(schedule: DiscreteSchedule) -> float:
    with jax.ensure_compile_time_eval():
        last = schedule.num_steps
        step = schedule.step(jnp.asarray(last - 1), jnp.asarray(last))
        if last == 1:  # to clean data
            return float(jnp.exp(-0.5 * step.t.log_snr))
        return float(step.s.sigma * jnp.expm1(0.5 * step.log_snr_drop))


def check_snapshots(snapshots: int, schedule: DiscreteSchedule) -> None:
    """Check the number of snapshots.

    Raises:
        ValueError: not in 0..T.
    """
    if not 0 <= snapshots <= schedule.num_steps:
        raise ValueError(f"snapshots must be in 0..{schedule.num_steps}, the number of steps; got {snapshots}")
