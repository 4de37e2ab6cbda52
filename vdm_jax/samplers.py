"""Sampling: from noise back to data, one compiled scan."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vdm_jax import forward
from vdm_jax.levels import Step
from vdm_jax.parameterization import to_x_0
from vdm_jax.tables import Table
from vdm_jax.types import Batch, Denoiser, Key, Parameterization, Real, pytree_callable


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


def ancestral(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    table: Table,
    *,
    kind: Parameterization = "eps",
    variance: Literal["lower", "upper"] = "lower",
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """x_{t-1} ~ p(x_{t-1} | x_t) for t = T..1, without noise in the last step (SAM-2).

    The mean is the posterior's at the predicted x_0. The variance is the posterior's (`lower`, exact for data that is
    one point) or the forward step's beta_t (`upper`, exact for data from N(0, I)).

    Args:
        denoiser: predicts `kind`; called once a step, with the whole batch.
        key: for the noise.
        x_T: draws of the prior, shape (B, *x).
        table: the schedule; `table.strided(even_steps(T, n))` takes n steps only.
        kind: what the denoiser predicts.
        variance: see above.
        clip: bound on the size of every predicted x_0 (1 for data on [-1, 1]); None leaves it, as the bound assumes.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown kind or variance, or snapshots not in 0..T.

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2 and section 3.2.
    """
    if variance not in ("lower", "upper"):
        raise ValueError(f"unknown variance {variance!r}: choose 'lower' or 'upper'")
    if not 0 <= snapshots <= table.num_steps:
        raise ValueError(f"snapshots is {snapshots}: this chain has {table.num_steps} states to return")
    return _ancestral(pytree_callable(denoiser), key, x_T, table, kind, variance, clip, snapshots)


@partial(jax.jit, static_argnames=("kind", "variance", "clip", "snapshots"))
def _ancestral(denoiser, key, x_T, table, kind, variance, clip, snapshots) -> Samples:
    times = np.round(np.linspace(table.num_steps, 1, snapshots)).astype(np.int32)
    slots = np.full(table.num_steps + 1, snapshots, np.int32)  # the last slot is a waste bin
    slots[times] = np.arange(snapshots)
    slots = jnp.asarray(slots)

    def visit(carry, t):
        x_t, kept = carry
        step = table.step(t - 1, t)
        x_hat = _predict(denoiser, x_t, step, kind, clip)
        noise = jax.random.normal(jax.random.fold_in(key, t), x_t.shape, x_t.dtype)
        x_s = forward.posterior(x_t, x_hat, step).mean + jnp.sqrt(_variance(step, variance)) * noise
        kept = jax.tree.map(lambda buffer, new: buffer.at[slots[t]].set(new), kept, (x_t, x_hat))
        return (x_s, kept), None

    empty = jnp.zeros((snapshots + 1, *x_T.shape), x_T.dtype)
    steps = jnp.arange(table.num_steps, 0, -1)
    (x_0, (x_t, x_hat)), _ = jax.lax.scan(visit, (x_T, (empty, empty)), steps)
    return Samples(x_0, Trajectory(jnp.asarray(times), x_t[:-1], x_hat[:-1]))


def _predict(denoiser, x_t, step: Step, kind, clip) -> Batch:
    level = jax.tree.map(lambda field: jnp.full((x_t.shape[0],), field), step.t)
    x_hat = jax.vmap(partial(to_x_0, kind=kind))(denoiser(x_t, level), x_t, level)
    return x_hat if clip is None else jnp.clip(x_hat, -clip, clip)


def _variance(step: Step, variance) -> Real:
    beta = step.t.sigma**2 * step.one_minus_ratio
    return forward.posterior_variance(step) if variance == "lower" else jnp.where(step.s.sigma > 0, beta, 0.0)
