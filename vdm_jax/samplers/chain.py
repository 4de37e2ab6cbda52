"""What samplers share: the scan over a table's steps, its snapshots, and what a denoiser says at a level."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vdm_jax import forward
from vdm_jax.compilation import scan
from vdm_jax.levels import Level, Step, for_batch
from vdm_jax.parameterization import to_eps, to_x_0
from vdm_jax.tables import Discrete
from vdm_jax.types import Batch, Denoiser, Key, Parameterization, Real, evaluate


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
    denoiser: Denoiser, x_t: Batch, level: Level, kind: Parameterization, clip: float | None = None
) -> Prediction:
    """x_hat and eps of a batch at one level, x_hat within the clip, and eps what is then left.

    Args:
        denoiser: predicts `kind`.
        x_t: shape (B, *x).
        level: scalars, sigma > 0.
        kind: what the denoiser predicts.
        clip: bound on the size of x_hat, or None.

    Raises:
        ValueError: unknown kind.
    """
    return convert(evaluate(denoiser, x_t, for_batch(level, x_t)), x_t, level, kind, clip)


def convert(prediction: Batch, x_t: Batch, level: Level, kind: Parameterization, clip: float | None) -> Prediction:
    """x_hat and eps of a denoiser's prediction; args and errors as in `predict`."""
    x_hat = to_x_0(prediction, x_t, level, kind)
    if clip is None:
        return Prediction(x_hat, to_eps(prediction, x_t, level, kind))
    x_hat = jnp.clip(x_hat, -clip, clip)
    return Prediction(x_hat, to_eps(x_hat, x_t, level, "x_0"))


def descend(x_t: Batch, x_hat: Batch, step: Step, fresh: Batch, var: Real | None = None) -> Batch:
    """A draw of q(x_s | x_t, x_hat) with this noise, or with another variance; without noise where s is clean."""
    law, noisy = forward.posterior(x_t, x_hat, step), step.s.sigma > 0
    scale = jnp.sqrt(jnp.where(noisy, law.var if var is None else var, 1.0))  # a root at 0 has no gradient
    return law.mean + jnp.where(noisy, scale, 0.0) * fresh


def noise(key: Key, t: Any, x_t: Batch) -> Batch:
    """The noise of step t, of the shape of x_t."""
    return jax.random.normal(jax.random.fold_in(key, t), x_t.shape, x_t.dtype)


def run(visit: Callable, x_T: Batch, table: Discrete, snapshots: int = 0, memory: Any = None) -> Samples:
    """The scan t = T..1 with snapshots.

    Args:
        visit: (x_t, memory, step, t) -> (x_s, x_hat, memory), for s = t - 1.
        x_T: where the chain begins, shape (B, *x).
        table: the schedule.
        snapshots: how many evenly spaced states to return.
        memory: what is handed from step to step, a pytree.
    """
    times = np.round(np.linspace(table.num_steps, 1, snapshots)).astype(np.int32)
    slots = np.full(table.num_steps + 1, snapshots, np.int32)  # the last slot is a waste bin
    slots[times] = np.arange(snapshots)
    slots = jnp.asarray(slots)

    def move(carry, t):
        x_t, memory, kept = carry
        x_s, x_hat, memory = visit(x_t, memory, table.step(t - 1, t), t)
        kept = jax.tree.map(lambda buffer, new: buffer.at[slots[t]].set(new.astype(buffer.dtype)), kept, (x_t, x_hat))
        return (x_s, memory, kept), None

    empty = jnp.zeros((snapshots + 1, *x_T.shape), x_T.dtype)
    steps = jnp.arange(table.num_steps, 0, -1)
    (x_0, _, (x_t, x_hat)), _ = scan(move, (x_T, memory, (empty, empty)), steps)
    return Samples(x_0, Trajectory(jnp.asarray(times), x_t[:-1], x_hat[:-1]))


def check_snapshots(snapshots: int, table: Discrete) -> None:
    """Refuse a number of snapshots that the chain does not have.

    Raises:
        ValueError: not in 0..T.
    """
    if not 0 <= snapshots <= table.num_steps:
        raise ValueError(f"snapshots is {snapshots}: this chain has {table.num_steps} states to return")
