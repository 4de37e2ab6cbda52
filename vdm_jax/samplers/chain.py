"""What samplers share: the scan over a table's steps, its snapshots, and what a denoiser says at a level."""

import functools
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

AMPLIFIED = 20.0  # gain of the first step from which on a trained network's samples are beyond use


class Trajectory(NamedTuple):
    """Snapshots of a chain, the noisiest first.

    Fields:
        t: their positions in the table, shape (K,).
        x_t: the state there, shape (K, B, *x).
        x_hat: the x_0 predicted from it, shape (K, B, *x).
    """

    t: Int[Array, " k"]
    x_t: Float[Array, "k b *x"]
    x_hat: Float[Array, "k b *x"]


class Samples(NamedTuple):
    """Samples x_0, shape (B, *x), and the chain's snapshots (of length 0 unless asked for)."""

    x_0: Batch
    trajectory: Trajectory


class Prediction(NamedTuple):
    """What a denoiser says of x_t, both ways: x_t = alpha x_hat + sigma eps."""

    x_hat: Batch
    eps: Batch


def predict(
    denoiser: Denoiser, x_t: Batch, level: NoiseLevel, prediction_type: PredictionType, clip: float | None = None
) -> Prediction:
    """x_hat and eps of a batch at one level, x_hat within the clip, and eps what is then left.

    Args:
        denoiser: predicts `prediction_type`.
        x_t: shape (B, *x).
        level: scalars, sigma > 0.
        prediction_type: what the denoiser predicts.
        clip: bound on the size of x_hat, or None.

    Raises:
        ValueError: unknown prediction_type.
    """
    return to_prediction(evaluate(denoiser, x_t, broadcast_to_batch(level, x_t)), x_t, level, prediction_type, clip)


def to_prediction(
    prediction: Batch, x_t: Batch, level: NoiseLevel, prediction_type: PredictionType, clip: float | None
) -> Prediction:
    """x_hat and eps of a denoiser's prediction; args and errors as in `predict`."""
    x_hat = to_x_0(prediction, x_t, level, prediction_type)
    if clip is None:
        return Prediction(x_hat, to_eps(prediction, x_t, level, prediction_type))
    x_hat = jnp.clip(x_hat, -clip, clip)
    return Prediction(x_hat, to_eps(x_hat, x_t, level, "x_0"))


def posterior_step(x_t: Batch, x_hat: Batch, step: Step, fresh: Batch, var: Real | None = None) -> Batch:
    """A draw of q(x_s | x_t, x_hat) with this noise, or with another variance; without noise where s is clean."""
    distribution, noisy = forward.posterior(x_t, x_hat, step), step.s.sigma > 0
    scale = jnp.sqrt(jnp.where(noisy, distribution.var if var is None else var, 1.0))  # a root at 0 has no gradient
    return distribution.mean + jnp.where(noisy, scale, 0.0) * fresh


def noise(key: Key | None, t: Any, x_t: Batch) -> Batch:
    """The noise of step t, of the shape of x_t, in float32 or wider.

    Raises:
        ValueError: no key.
    """
    return jax.random.normal(jax.random.fold_in(check_key(key), t), x_t.shape, at_least_float32(x_t.dtype))


def check_key(key: Key | None) -> Key:
    """The key, where there is one.

    Raises:
        ValueError: there is none.
    """
    if key is None:
        raise ValueError("key is None, but this sampler draws noise: pass one, such as jax.random.key(0)")
    return key


def run(visit: Callable, x_T: Batch, schedule: DiscreteSchedule, snapshots: int = 0, memory: Any = None) -> Samples:
    """The scan t = T..1 with snapshots.

    Args:
        visit: (x_t, memory, step, t) -> (x_s, x_hat, memory), for s = t - 1.
        x_T: where the chain begins, shape (B, *x).
        schedule: the schedule.
        snapshots: how many evenly spaced states to return.
        memory: what is handed from step to step, a pytree.
    """
    times = np.round(np.linspace(schedule.num_steps, 1, snapshots)).astype(np.int32)
    slots = np.full(schedule.num_steps + 1, snapshots, np.int32)  # the last slot is a waste bin
    slots[times] = np.arange(snapshots)
    slots = jnp.asarray(slots)

    def move(carry, t):
        x_t, memory, kept = carry
        x_s, x_hat, memory = visit(x_t, memory, schedule.step(t - 1, t), t)
        kept = jax.tree.map(lambda buffer, new: buffer.at[slots[t]].set(new.astype(buffer.dtype)), kept, (x_t, x_hat))
        return (x_s, memory, kept), None

    empty = jnp.zeros((snapshots + 1, *x_T.shape), x_T.dtype)
    steps = jnp.arange(schedule.num_steps, 0, -1)
    (x_0, _, (x_t, x_hat)), _ = scan(move, (x_T, memory, (empty, empty)), steps)
    return Samples(x_0, Trajectory(jnp.asarray(times), x_t[:-1], x_hat[:-1]))


def warn_of_amplification(schedule: DiscreteSchedule, prediction_type: PredictionType, clip: float | None) -> None:
    """Warn where the first step multiplies errors of the prediction by far more than later steps can take back.

    From an error d of eps, x_hat = (x_t - sigma eps) / alpha has the error d sigma_t / alpha_t, and x_s the error
    d sigma_s (e^(h/2) - 1), h the log-SNR gained by the step. A traced table is not checked.
    """
    if (
        prediction_type in ("x_0", "v")
        or clip is not None
        or any(isinstance(x, Tracer) for x in jax.tree.leaves(schedule))
    ):
        return
    gain = _first_gain(schedule) if isinstance(schedule, Hashable) else _first_gain.__wrapped__(schedule)
    if gain > AMPLIFIED:
        warnings.warn(
            f"with {prediction_type} predictions and no clip, the first sampling step multiplies errors of the prediction by "
            f"{gain:,.0f}: pass clip=1.0 for data on [-1, 1], predict x_0 or v, or take smaller steps at the noisy "
            "end, table.subsequence(discrete_schedules.log_snr_uniform_steps(table, count))",
            stacklevel=4,
        )


@functools.lru_cache(maxsize=64)
def _first_gain(schedule: DiscreteSchedule) -> float:
    with jax.ensure_compile_time_eval():
        last = schedule.num_steps
        step = schedule.step(jnp.asarray(last - 1), jnp.asarray(last))
        if last == 1:  # to clean data
            return float(jnp.exp(-0.5 * step.t.log_snr))
        return float(step.s.sigma * jnp.expm1(0.5 * step.log_snr_drop))


def check_snapshots(snapshots: int, schedule: DiscreteSchedule) -> None:
    """Refuse a number of snapshots that the chain does not have.

    Raises:
        ValueError: not in 0..T.
    """
    if not 0 <= snapshots <= schedule.num_steps:
        raise ValueError(f"snapshots is {snapshots}: this chain has {schedule.num_steps} states to return")
