"""An energy for points in a plane, learned by likelihood: down at the data, up where its own Langevin chains end.

    make train EXP=ebm_2d ARGS="--data moons"                     # two_modes, eight_modes, moons or spiral

`energy.png` has the learned log-density beside the true one, `langevin.png` chains on it. In two dimensions Z is a sum
over a grid, so that the likelihood is known: `excess_nats` is what the model loses against the truth. `--objective
sliced`, `implicit` and `finite_difference` match the score instead, and draw nothing.

Cost: two minutes on 2 idle CPU cores.

Source: Hinton 2002; Nijkamp et al. 2019, arXiv:1904.09770; Song & Kingma 2021, arXiv:2101.03288.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax import energy, langevin, score_matching
from vdm_jax.models import planes
from vdm_jax.networks.mlp import MLP, MLPConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch

SHOWN = 40  # chains in a picture
SIDE, NODES = 4.0, 200  # the square over which Z is summed; nodes across


@dataclass(frozen=True)
class EBM2D(planes.PlaneConfig):
    """An energy-based model of points in a plane."""

    network: MLPConfig = field(default_factory=lambda: MLPConfig(out_features=1))
    """The network, beside a wide bowl that keeps Z finite."""
    objective: Literal["contrastive", "short_run", "implicit", "sliced", "finite_difference"] = "contrastive"
    """Likelihood by chains from the data, or from noise; or score matching."""
    chain_steps: int = 40
    """Langevin steps of a chain in training."""
    step_size: float = 2e-3
    """Of a Langevin step."""
    sampling_steps: int = 2_000
    """Langevin steps of a sample, each accepted or refused."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with, and the pictures."""
        planes.check_network(self.network)
        distribution, network = planes.truth(data), MLP(self.network)
        nodes = planes.grid(NODES, SIDE).reshape(-1, 2)
        log_weights = jnp.full(len(nodes), 2.0 * jnp.log(2.0 * SIDE / NODES))

        def init(key):
            return network.init(key, jnp.zeros((1, 2)), jnp.zeros(1))["params"]

        def potential(params, x):
            bowl = 0.5 * jnp.sum(jnp.square(x), axis=-1) / (SIDE / 2) ** 2
            return bowl + jnp.asarray(network.apply({"params": params}, x, jnp.zeros(len(x))))[:, 0]

        def log_prob(params):
            e = Partial(potential, params)
            return lambda x: energy.log_density(e, x, energy.log_partition(e, nodes, log_weights))

        def loss(params, key, batch, step):
            del step
            return self.matching(Partial(potential, params), key, batch["image"])

        def chains(params, key, n):
            key_x, key_chain = jax.random.split(key)
            x = jax.random.uniform(key_x, (n, 2), minval=-2.0, maxval=2.0)
            e = Partial(potential, params)
            return langevin.mala(lambda x: -e(x), key_chain, x, self.step_size, self.sampling_steps, path=True)

        def sample(params, key, n):
            chain = chains(params, key, n)
            return SampleBatch(chain.x, chain.path[:: max(1, self.sampling_steps // 100), :SHOWN])

        def evaluate(params, key, batch):
            del key
            nats, least = -log_prob(params)(batch["image"]), -jax.vmap(distribution.log_prob)(batch["image"])
            return {"nats": nats, "excess_nats": nats - least}

        def landscapes(params, key):
            del key
            return {
                "learned": planes.landscape(log_prob(params)),
                "truth": planes.landscape(jax.vmap(distribution.log_prob)),
            }

        def paths(params, key):
            states = chains(params, key, SHOWN).path[:: max(1, self.sampling_steps // 100)]
            return {"chains on the learned energy": planes.landscape(log_prob(params), paths=states)}

        cost = Cost(evaluate=1, sample=self.sampling_steps)
        return Experiment(init, loss, sample, evaluate, cost, planes={"energy": landscapes, "langevin": paths})

    def matching(self, e, key, x):
        """The loss and what else is to be seen of it."""
        key_x, key_v = jax.random.split(key)
        match self.objective:
            case "contrastive" | "short_run":
                noise = jax.random.uniform(key_x, x.shape, minval=-2.0, maxval=2.0)
                start = x if self.objective == "contrastive" else noise
                contrast = energy.contrastive_divergence(e, key_v, x, start, self.step_size, self.chain_steps)
                return contrast.loss, {"energy": contrast.data.mean()}
            case "implicit":
                return score_matching.implicit(Partial(energy.score, e), x).mean(), {}
            case "sliced":
                return score_matching.sliced(Partial(energy.score, e), key_v, x).mean(), {}
            case "finite_difference":
                return score_matching.finite_difference(e, key_v, x, 0.01).mean(), {}


CONFIG = EBM2D(
    data="moons",
    steps=4_000,
    batch_size=256,
    learning_rate=1e-3,
    lr_schedule="cosine",
    ema_decay=0.995,
    eval_batch_size=2_000,
    num_samples=2_000,
    log_every=500,
    picture_every=0,
)
