"""Names for the arrays and callables that equations take."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float, Int, PRNGKeyArray, UInt32

X = Float[Array, "*x"]  # one example, of any shape
Batch = Float[Array, "b *x"]  # examples stacked along the first axis
Data = Float[Array, "n *x"]  # a whole data set, beside a batch
Z = Float[Array, "*z"]  # the latent of one example, of another shape than x
Latents = Float[Array, "b *z"]
PerExample = Float[Array, " b"]
Scalar = Float[Array, ""]
Real = Float[Array, "..."]  # a number, or many at once: the function is elementwise
Steps = Int[Array, "..."] | Int[np.ndarray, "..."] | int  # discrete times 0..T
Key = PRNGKeyArray | UInt32[Array, "2"]  # new-style or raw

Parameterization = Literal["x_0", "eps", "v", "score"]
Score = Callable[[Any], Any]  # (B, *x) -> (B, *x), of each example by itself
Energy = Callable[[Any], Any]  # (B, *x) -> (B,), of each example by itself


@runtime_checkable
class Denoiser(Protocol):
    """What stands where a network stands: `denoiser(x_t, level) -> prediction`.

    It takes a *batch* x_t, shape (B, *x), and a `Level` whose fields have shape (B,), and returns its prediction,
    shape (B, *x), in one of the four parameterisations. A batch and not one example, so that labels and dropout masks
    closed over by the callable stay per example. A Flax network comes in as `jax.tree_util.Partial(net.apply, params)`;
    an exact denoiser of a known law goes in the same place.
    """

    def __call__(self, x_t: Batch, level: Any, /) -> Batch: ...


def pytree_callable(function: Callable) -> Callable:
    """A callable that can be an argument of a jitted function: itself if it is a pytree, else a constant `Partial`.

    A Partial of a Partial would not do: JAX compares it by identity, and every call would trace anew.
    """
    leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(function))
    return Partial(function) if leaf else function


def per_example(x: Batch) -> PerExample:
    """The sum over each example."""
    return x.reshape(x.shape[0], -1).sum(-1)


def unknown_parameterization(kind: object) -> ValueError:
    """The error for a parameterisation that is none."""
    return ValueError(f"unknown parameterisation {kind!r}: choose 'x_0', 'eps', 'v' or 'score'")
