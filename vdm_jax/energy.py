"""Energies: a law up to its constant, p(x) = exp(-E(x)) / Z.

The score -grad E knows nothing of Z (EBM-2), and gives log p back along any path, up to a constant (EBM-3). Learning E
by likelihood needs draws of the model itself (EBM-4), here by Langevin chains. `energy` takes a batch (B, *x) and gives
(B,), each example's by itself.
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


def log_density(energy: Energy, x: Batch, log_partition: Scalar | float = 0.0) -> PerExample:
    """log p(x) = -E(x) - log Z; unnormalised as long as log Z is not known (EBM-1).

    Args:
        energy: E, (B, *x) -> (B,).
        x: shape (B, *x).
        log_partition: log Z, a scalar.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: the energy is not one number an example, or log_partition is not one number.

    Source: LeCun et al. 2006, "A tutorial on energy-based learning".
    """
    check_scalar("log_partition", log_partition)
    return -evaluate_scalars(energy, x, name="energy") - log_partition


def log_partition(energy: Energy, nodes: Data, log_weights: Float[Array, " n"]) -> Scalar:
    """log Z = log sum_n w_n exp(-E(x_n)), by quadrature or by importance sampling (EBM-1).

    Args:
        energy: E, (N, *x) -> (N,).
        nodes: x_n, shape (N, *x): of a quadrature, or draws of a law q.
        log_weights: log w_n, shape (N,): of the quadrature, or -log(N q(x_n)).

    Returns:
        Scalar. From draws it is low on average, the less so the more there are.

    Raises:
        ValueError: the energy or log_weights are not one number an example.
    """
    if log_weights.shape != nodes.shape[:1]:
        raise ValueError(f"log_weights has shape {log_weights.shape}: it must be {nodes.shape[:1]}, one for each node")
    return jax.nn.logsumexp(log_weights - evaluate_scalars(energy, nodes, name="energy"))


def score(energy: Energy, x: Batch) -> Batch:
    """grad log p(x) = -grad E(x), whatever Z is (EBM-2).

    Args:
        energy: E, (B, *x) -> (B,).
        x: shape (B, *x).

    Returns:
        Shape (B, *x), in float32 or a wider type.

    Raises:
        ValueError: the energy is not one number an example.
    """
    x = jnp.asarray(x)
    value, pull = jax.vjp(
        lambda y: evaluate_scalars(energy, y.astype(x.dtype), name="energy"), x.astype(at_least_float32(x.dtype))
    )
    return pull(-jnp.ones_like(value))[0]


@compiled(static=("nodes",))
def line_integral(
    score: Score,
    start: Batch,
    end: Batch,
    *,
    path: Callable[[Any, Any, Any], Any] | None = None,
    nodes: int = 32,
) -> PerExample:
    """log p(end) - log p(start), from the score alone (EBM-3).

        int_0^1 s(r(u)) . r'(u) du   with  r(0) = start, r(1) = end

    The same along every path if s is a gradient; of a network's s the difference says how far it is from being one.

    Args:
        score: (B, *x) -> (B, *x); called once a node.
        start, end: shape (B, *x).
        path: r(u, start, end) -> (B, *x), with a derivative by the scalar u; None is the straight line.
        nodes: of the Gauss-Legendre rule.

    Returns:
        Shape (B,), nats.

    Raises:
        ValueError: nodes below 1, start and end of two shapes, or a score or path of another shape.
    """
    if nodes < 1:
        raise ValueError(f"nodes is {nodes}: an integral needs at least one")
    if start.shape != end.shape:
        raise ValueError(f"start has shape {start.shape} and end {end.shape}: the two must be equal")
    places, weights = (
        jnp.asarray(part, at_least_float32(start.dtype)) for part in np.polynomial.legendre.leggauss(nodes)
    )

    def position(u):
        return check_values((path or _straight)(u, start, end), start.shape, "path")

    def visit(total, node):
        u, weight = node
        x, velocity = jax.jvp(position, (u,), (jnp.ones_like(u),))
        return total + weight * per_example(evaluate(score, x.astype(start.dtype), name="score") * velocity), None

    halves = (0.5 * (places + 1.0), 0.5 * weights)
    return scan(visit, jnp.zeros(start.shape[:1], places.dtype), halves)[0]


def _straight(u, start, end):
    return start + u * (end - start)


class ContrastiveDivergence(NamedTuple):
    """Both sides of the likelihood's gradient.

    Fields:
        data: E of the data, shape (B,).
        model: E of the negatives, shape (N,).
        negatives: where the chains ended, shape (N, *x); begin the next ones here to make them persistent.
    """

    data: PerExample
    model: Float[Array, " n"]
    negatives: Data

    @property
    def loss(self) -> Scalar:
        """Mean E of the data less that of the negatives. Its *gradient* is what is meant, its value tells little."""
        return self.data.mean() - self.model.mean()


def contrastive_divergence(
    energy: Energy, key: Key, x: Batch, start: Data, step_size: Scalar | float, num_steps: int
) -> ContrastiveDivergence:
    """The gradient of -log p by the energy's parameters, as that of a difference of energies (EBM-4).

        -grad_theta E_data log p = E_data grad_theta E - E_model grad_theta E

    The model's side comes from Langevin chains on the energy as it is, through which no gradient runs. From the data
    themselves (`start=x`) it is contrastive divergence; from where the last chains ended, persistent; from noise, a
    short run. It is the likelihood's own gradient as far as the chains have come to the model's law.

    Args:
        energy: E, (B, *x) -> (B,), any B; closed over its parameters as a `jax.tree_util.Partial`.
        key: for the chains.
        x: data, shape (B, *x).
        start: where the chains begin, shape (N, *x).
        step_size, num_steps: of the chains, as in `langevin.ula`.

    Returns:
        `Contrast`, of which `loss` is to be differentiated.

    Raises:
        ValueError: the energy is not one number an example, step_size not positive, or num_steps below 1.

    Source: Hinton 2002, "Training products of experts by minimizing contrastive divergence"; Tieleman 2008, "Training
        restricted Boltzmann machines using approximations to the likelihood gradient" (persistent).
    """
    held = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, energy)
    chain = ula(jax.tree_util.Partial(score, held), key, start, step_size, num_steps)
    negatives = jax.lax.stop_gradient(chain.x)
    data, model = (evaluate_scalars(energy, y, name="energy") for y in (x, negatives))
    return ContrastiveDivergence(data, model, negatives)
