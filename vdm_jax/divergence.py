"""The divergence of a vector field, the trace of its Jacobian: exact, or estimated along random directions.

    div f(x) = tr J = E_v v^T J v    for any v with E v v^T = I

Each product J v is one forward pass, so D of them are the exact trace and one is an estimate without bias. Score
matching, Stein's risk estimate and the likelihood of a flow are made of it.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.compilation import varying_like
from vdm_jax.types import Batch, Key, PerExample, Score, at_least_float32, evaluate, per_example

Trace = Literal["exact", "rademacher", "gaussian", "sphere"]
Directions = Float[Array, "k b *x"]


def directions(key: Key | None, x: Batch, trace: Trace = "rademacher", probes: int = 1) -> Directions:
    """The v of v^T J v, of which the mean of v v^T is the identity, or in expectation.

    Signs (`rademacher`) have the least variance, and none where J is diagonal; `sphere` is uniform on the sphere of
    radius sqrt(D). An example's directions do not depend on how many examples there are beside it.

    Args:
        key: for the directions; not looked at where the trace is exact.
        x: shape (B, *x).
        trace: `exact` is every axis, scaled by sqrt(D).
        probes: how many an example; an exact trace has D.

    Returns:
        Shape (K, B, *x), in float32 or a wider type.

    Raises:
        ValueError: unknown trace, probes below 1, or no key where one is needed.

    Source: Hutchinson 1990, "A stochastic estimator of the trace"; Song et al. 2019, arXiv:1905.07088 (the laws of v).
    """
    check_trace(trace, probes)
    dtype = at_least_float32(x.dtype)
    if trace == "exact":
        basis = jnp.eye(x[0].size, dtype=dtype).reshape(-1, 1, *x.shape[1:])
        return jnp.broadcast_to(basis * x[0].size ** 0.5, (x[0].size, *x.shape))
    if key is None:
        raise ValueError(f"directions that are {trace} are drawn: give a key, or take trace 'exact'")
    draw = jax.random.rademacher if trace == "rademacher" else jax.random.normal
    keys = jax.random.split(key, x.shape[0])
    v = jax.vmap(lambda k: draw(k, (probes, *x.shape[1:]), dtype), out_axes=1)(keys)
    if trace != "sphere":
        return v
    square = jnp.sum(v**2, axis=tuple(range(2, v.ndim)), keepdims=True)
    return v * jnp.sqrt(x[0].size / square)


def check_trace(trace: str, probes: int) -> None:
    """Refuse what `directions` cannot do.

    Raises:
        ValueError: unknown trace, or probes below 1.
    """
    if trace not in ("exact", "rademacher", "gaussian", "sphere"):
        raise ValueError(f"unknown trace {trace!r}: choose 'exact', 'rademacher', 'gaussian' or 'sphere'")
    if probes < 1:
        raise ValueError(f"probes is {probes}: the trace needs at least one")


def value_and_divergence(field: Score, x: Batch, directions: Directions) -> tuple[Batch, PerExample]:
    """f(x) and the mean of v^T J v over the directions, for each example.

    Args:
        field: f, (B, *x) -> (B, *x), of each example by itself; run once, and linearised once for all directions.
        x: shape (B, *x).
        directions: as `directions` gives them.

    Returns:
        Shapes (B, *x) and (B,).

    Raises:
        ValueError: f(x) or a direction has another shape than x.
    """
    x = jnp.asarray(x)
    if directions.shape[1:] != x.shape:
        raise ValueError(
            f"directions of shape {directions.shape} for x of shape {x.shape}: they must be (K, *{x.shape})"
        )
    start = varying_like(
        x.astype(at_least_float32(x.dtype)), directions
    )  # products and their sums are at least float32
    value, push = jax.linearize(lambda y: evaluate(field, y.astype(x.dtype), name="field"), start)
    directions = varying_like(directions.astype(start.dtype), start)

    def along(v):
        return per_example(v * push(v))

    # a loop of one turn is not free: XLA runs its convolutions on fewer cores
    return value, along(directions[0]) if directions.shape[0] == 1 else jax.lax.map(along, directions).mean(0)
