"""The cost of score matching in the dimension D: a loss and its gradient, over those of denoising score matching.

    python -m benchmarks.score_matching

One network for all, a residual perceptron of 256 units, and batches of 64. Implicit matching takes D forward products,
the others one or none (SM-2 to SM-5).
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from benchmarks.clock import in_turns, ratio
from vdm_jax import score_matching
from vdm_jax.gaussian import Normal
from vdm_jax.networks.mlp import MLP, MLPConfig

DIMENSIONS = (4, 16, 64, 256)
BATCH = 64


def losses(dims: int):
    """Functions without arguments, by name: each a loss's gradient by the network's parameters."""
    network, one = MLP(MLPConfig(width=256)), MLP(MLPConfig(width=256, out_features=1))
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (BATCH, dims))
    level = jnp.zeros(BATCH)
    params, energy_params = (net.init(key, x, level) for net in (network, one))

    def score(params, x):
        return network.apply(params, x, level)

    def energy(params, x):
        return jnp.asarray(one.apply(params, x, level))[:, 0]

    ways = {
        "denoising": lambda s: score_matching.denoising(s, key, x, lambda x: Normal(x, var=jnp.asarray(0.1))),
        "sliced": lambda s: score_matching.sliced(s, key, x),
        "implicit": lambda s: score_matching.implicit(s, x),
    }
    made = {
        name: Partial(jax.jit(jax.grad(lambda p, way=way: way(Partial(score, p)).mean())), params)
        for name, way in ways.items()
    }
    difference = jax.grad(lambda p: score_matching.finite_difference(Partial(energy, p), key, x, 0.05).mean())
    return made | {"finite differences": Partial(jax.jit(difference), energy_params)}


def main() -> None:
    """Print the table."""
    names = None
    for dims in DIMENSIONS:
        taken = in_turns(losses(dims))
        if names is None:
            names = list(taken)
            print(f"| D | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
        print(f"| {dims} | {' | '.join(ratio(taken[name], taken['denoising']) for name in names)} |", flush=True)


if __name__ == "__main__":
    main()
