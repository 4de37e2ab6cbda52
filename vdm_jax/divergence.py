"""The divergence of a vector field, the trace of its Jacobian: exact, or by the Hutchinson trace estimator.

    div f(x) = tr J = E_v v^T J v    for any v with E v v^T = I

Each product J v costs one forward pass: D of them give the exact trace, and one gives an unbiased estimate. Used by
score matching, Stein's unbiased risk estimate, and the likelihood of the probability-flow ODE.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.compilation import varying_like
from vdm_jax.types import Batch, Key, PerExample, Score, at_least_float32, evaluate, per_example

__all__ = ["Trace", "check_trace", "hutchinson_probes", "value_and_divergence"]

Trace = Literal["exact", "rademacher", "gaussian", "sphere"]  # how the trace is computed
_Directions = Float[Array, "k b *x"]


def hutchinson_probes(key: Key | None, x: Batch, trace: Trace = "rademacher", probes: int = 1) -> _Directions:
    """The directions v of the estimate v^T J v, with E v v^T = I.

    `rademacher`, random signs, has the smallest variance, which is zero if J is diagonal; `sphere` is uniform on the
    sphere of radius sqrt(D). The directions of an example do not depend on the size of the batch.

    Args:
        key: for the directions; not used if the trace is exact.
        x: shape (B, *x).
        trace: distribution of v; `exact` is every axis, scaled by sqrt(D).
        probes: number of directions for each example; not used if the trace is exact.

    Returns:
        Shape (K, B, *x), in float32 or a wider type.

    Raises:
        ValueError: unknown trace, probes below 1, or no key for random directions.

    Source: Hutchinson 1990, "A stochastic estimator of the trace"; Song et al. 2019, arXiv:1905.07088 (distributions of
    v).
    """
    check_trace(trace, probes)
    dtype, dims = at_least_float32(x.dtype), math.prod(x.shape[1:])
    if trace == "exact":
        basis = jnp.eye(dims, dtype=dtype).reshape(-1, 1, *x.shape[1:])
        return jnp.broadcast_to(basis * dims**0.5, (dims, *x.shape))
    if key is None:
        raise ValueError(f"key is None and trace is {trace!r}: pass a key, or trace='exact'")
    distribution = jax.random.rademacher if trace == "rademacher" else jax.random.normal
    keys = jax.random.split(key, x.shape[0])
    v = jax.vmap(lambda k: distribution(k, (probes, *x.shape[1:]), dtype), out_axes=1)(keys)
    if trace != "sphere":
        return v
    square = jnp.sum(v**2, axis=tuple(range(2, v.ndim)), keepdims=True)
    return v * jnp.sqrt(dims / square)


def check_trace(trace: str, probes: int) -> None:
    """Check the arguments of `hutchinson_probes`.

    Raises:
        ValueError: unknown trace, or probes below 1.
    """
    if trace not in ("exact", "rademacher", "gaussian", "sphere"):
        raise ValueError(f"unknown trace {trace!r}: choose 'exact', 'rademacher', 'gaussian' or 'sphere'")
    if probes < 1:
        raise ValueError(f"probes is {probes}: it must be at least 1")


def value_and_divergence(field: Score, x: Batch, directions: _Directions) -> tuple[Batch, PerExample]:
    """f(x) and the mean of v^T J v over the directions, for each example.

    Args:
        field: f, (B, *x) -> (B, *x), for each example independently; evaluated and linearized once for all directions.
        x: shape (B, *x).
        directions: as returned by `hutchinson_probes`.

    Returns:
        Shapes (B, *x) and (B,).

    Raises:
        ValueError: the shape of f(x) or of a direction differs from that of x.
    """
    x = jnp.asarray(x)
    if directions.shape[1:] != x.shape:
        raise ValueError(
            f"directions of shape {directions.shape} for x of shape {x.shape}: they must be (K, *{x.shape})"
        )
    start = varying_like(
        x.astype(at_least_float32(x.dtype)), directions
    )  # products and their sums are at least float32
    value, jvp = jax.linearize(lambda y: evaluate(field, y.astype(x.dtype), name="field"), start)
    directions = varying_like(directions.astype(start.dtype), start)

    def quadratic_form(v):
        return per_example(v * jvp(v))

    if directions.shape[0] == 1:  # without a loop: within one, XLA runs convolutions on fewer cores
        return value, quadratic_form(directions[0])
    return value, jax.lax.map(quadratic_form, directions).mean(0)
