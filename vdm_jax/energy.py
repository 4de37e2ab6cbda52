"""Energy-based models: p(x) = exp(-E(x)) / Z, with an unknown normalizing constant Z.

The score -grad E does not depend on Z (EBM-2), and its line integral gives log p up to a constant (EBM-3). Maximum
likelihood needs samples of the model (EBM-4), here from Langevin chains. `energy` takes a batch (B, *x) and returns
(B,), computed for each example independently.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdm_jax.compilation import compiled, scan
from vdm_jax.langevin import ula
from vdm_jax.types import (
    Batch,
    Data,
    Energy,
    Key,
    PerExample,
    Scalar,
    Score,
    at_least_float32,
    check_scalar,
    check_values,
    evaluate,
    evaluate_scalars,
    per_example,
)

__all__ = [
    "ContrastiveDivergence",
    "contrastive_divergence",
    "line_integral",
    "log_density",
    "log_partition",
    "score",
]


def log_density(energy: Energy, x: Batch, log_partition: Scalar | float = 0.0) -> PerExample:
    """log p(x) = -E(x) - log Z, unnormalized with the default log Z = 0 (EBM-1).

    Args:
        energy: E, (B, *x) -> (B,).
        x: shape (B, *x).
        log_partition: log Z, a scalar.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: the energy does not return one value per example, or log_partition is not a scalar.

    Source: LeCun et al. 2006, "A tutorial on energy-based learning".
    """
    check_scalar("log_partition", log_partition)
    return -evaluate_scalars(energy, x, name="energy") - log_partition


def log_partition(energy: Energy, nodes: Data, log_weights: Float[Array, " n"]) -> Scalar:
    """The partition function, log Z = log sum_n w_n exp(-E(x_n)), by quadrature or importance sampling (EBM-1).

    Args:
        energy: E, (N, *x) -> (N,).
        nodes: x_n, shape (N, *x): quadrature nodes, or samples of a proposal q.
        log_weights: log w_n, shape (N,): quadrature weights, or -log(N q(x_n)).

    Returns:
        Scalar. With importance sampling it is biased downwards; the bias vanishes as N increases.

    Raises:
        ValueError: the energy or log_weights do not have one value per node.
    """
    if log_weights.shape != nodes.shape[:1]:
        raise ValueError(f"log_weights has shape {log_weights.shape}: it must be {nodes.shape[:1]}, one for each node")
    return jax.nn.logsumexp(log_weights - evaluate_scalars(energy, nodes, name="energy"))


def score(energy: Energy, x: Batch) -> Batch:
    """The score grad log p(x) = -grad E(x), independent of Z (EBM-2).

    Args:
        energy: E, (B, *x) -> (B,).
        x: shape (B, *x).

    Returns:
        Shape (B, *x), in float32 or a wider type.

    Raises:
        ValueError: the energy does not return one value per example.
    """
    x = jnp.asarray(x)
    value, vjp = jax.vjp(
        lambda y: evaluate_scalars(energy, y.astype(x.dtype), name="energy"), x.astype(at_least_float32(x.dtype))
    )
    return vjp(-jnp.ones_like(value))[0]


@compiled(static=("nodes",))
def line_integral(
    score: Score,
    start: Batch,
    end: Batch,
    *,
    path: Callable[[Any, Any, Any], Any] | None = None,
    nodes: int = 32,
) -> PerExample:
    """log p(end) - log p(start) as a line integral of the score (EBM-3).

        int_0^1 s(r(u)) . r'(u) du   with  r(0) = start, r(1) = end

    It does not depend on the path if s is a gradient field. For a network, the difference between two paths measures
    how far s is from a gradient field.

    Args:
        score: (B, *x) -> (B, *x); evaluated once per node.
        start, end: shape (B, *x).
        path: r(u, start, end) -> (B, *x), differentiable with respect to the scalar u; None is the straight line.
        nodes: number of Gauss-Legendre nodes.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: nodes below 1, start and end of different shapes, or a score or path of another shape.
    """
    if nodes < 1:
        raise ValueError(f"nodes is {nodes}: it must be at least 1")
    if start.shape != end.shape:
        raise ValueError(f"start has shape {start.shape} and end {end.shape}: the two must be equal")
    u_nodes, weights = (
        jnp.asarray(part, at_least_float32(start.dtype)) for part in np.polynomial.legendre.leggauss(nodes)
    )

    def position(u):
        return check_values((path or _straight)(u, start, end), start.shape, "path")

    def add_node(total, node):
        u, weight = node
        x, velocity = jax.jvp(position, (u,), (jnp.ones_like(u),))
        return total + weight * per_example(evaluate(score, x.astype(start.dtype), name="score") * velocity), None

    rule = (0.5 * (u_nodes + 1.0), 0.5 * weights)
    return scan(add_node, jnp.zeros(start.shape[:1], u_nodes.dtype), rule)[0]


def _straight(u, start, end):
    return start + u * (end - start)


class ContrastiveDivergence(NamedTuple):
    """The two terms of the likelihood gradient.

    Fields:
        data: energies of the data, shape (B,).
        model: energies of the negatives, shape (N,).
        negatives: the final states of the chains, shape (N, *x). Pass them as `start` of the next update for persistent
            contrastive divergence.
    """

    data: PerExample
    model: Float[Array, " n"]
    negatives: Data

    @property
    def loss(self) -> Scalar:
        """Mean energy of the data minus that of the negatives. Only its *gradient* is meaningful, not its value."""
        return self.data.mean() - self.model.mean()


def contrastive_divergence(
    energy: Energy, key: Key, x: Batch, start: Data, step_size: Scalar | float, num_steps: int
) -> ContrastiveDivergence:
    """Contrastive divergence: a loss whose gradient estimates that of -log p for the energy's parameters (EBM-4).

        -grad_theta E_data log p = E_data grad_theta E - E_model grad_theta E

    The samples of the model come from Langevin chains with the current energy, without gradients through the chain.
    With start=x it is contrastive divergence, with the final states of the previous chains persistent contrastive
    divergence, and from noise short-run MCMC. The gradient is unbiased if the chains have converged to the model
    distribution.

    Args:
        energy: E, (B, *x) -> (B,) for any B, a `jax.tree_util.Partial` with its parameters.
        key: for the chains.
        x: data, shape (B, *x).
        start: initial states of the chains, shape (N, *x).
        step_size, num_steps: as in `langevin.ula`.

    Returns:
        `ContrastiveDivergence`; differentiate its `loss`.

    Raises:
        ValueError: the energy does not return one value per example, step_size not positive, or num_steps below 1.

    Source: Hinton 2002, "Training products of experts by minimizing contrastive divergence"; Tieleman 2008, "Training
        restricted Boltzmann machines using approximations to the likelihood gradient" (persistent).
    """
    frozen = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, energy)
    chain = ula(jax.tree_util.Partial(score, frozen), key, start, step_size, num_steps)
    negatives = jax.lax.stop_gradient(chain.x)
    data, model = (evaluate_scalars(energy, y, name="energy") for y in (x, negatives))
    return ContrastiveDivergence(data, model, negatives)
