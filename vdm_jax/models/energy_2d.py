"""Energy-based models of points in the plane, trained by contrastive divergence or by score matching.

In two dimensions Z is a sum over a grid, so the likelihood is exact up to the grid.

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

__all__ = ["Energy2D"]

SHOWN = 40  # chains in a figure
SIDE, NODES = 4.0, 200  # the square [-SIDE, SIDE]^2 over which Z is summed, and the grid points across


@dataclass(frozen=True)
class Energy2D(planes.PlaneModel):
    """An energy-based model of points in the plane."""

    network: MLPConfig = field(default_factory=lambda: MLPConfig(out_features=1))
    """Options of the energy network; a quadratic term is added to its output, so that Z is finite."""
    objective: Literal["contrastive", "short_run", "implicit", "sliced", "finite_difference"] = "contrastive"
    """Contrastive divergence with chains from the data (contrastive) or from noise (short_run), or a form of score
    matching (implicit, sliced, finite_difference)."""
    chain_steps: int = 40
    """Langevin steps of a chain in training."""
    step_size: float = 2e-3
    """Step size of Langevin dynamics."""
    sampling_steps: int = 2_000
    """MALA steps of a sample."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on points of a data set."""
        planes.check_network(self.network)
        return _Functions(self, data).experiment()


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the figures."""

    def __init__(self, config: Energy2D, data: DataSpec):
        self.config, self.network = config, MLP(config.network)
        self.distribution = planes.data_distribution(data)
        self.nodes = planes.grid(NODES, SIDE).reshape(-1, 2)
        self.log_weights = jnp.full(len(self.nodes), 2.0 * jnp.log(2.0 * SIDE / NODES))

    def experiment(self) -> Experiment:
        cost = Cost(evaluate=1, sample=self.config.sampling_steps)
        plots = {"energy": self.density_panels, "langevin": self.langevin_panels}
        return Experiment(self.init, self.loss, self.sample, self.evaluate, cost, plane_plots=plots)

    def init(self, key):
        return self.network.init(key, jnp.zeros((1, 2)), jnp.zeros(1))["params"]

    def energy(self, params, x):
        """E(x) of a batch, shape (B,): the network, and a quadratic term that makes Z finite."""
        quadratic = 0.5 * jnp.sum(jnp.square(x), axis=-1) / (SIDE / 2) ** 2
        return quadratic + jnp.asarray(self.network.apply({"params": params}, x, jnp.zeros(len(x))))[:, 0]

    def log_prob(self, params):
        """x -> log p(x) = -E(x) - log Z."""
        e = Partial(self.energy, params)
        return lambda x: energy.log_density(e, x, energy.log_partition(e, self.nodes, self.log_weights))

    def loss(self, params, key, batch, step):
        """Contrastive divergence, or score matching."""
        del step
        config, e, x = self.config, Partial(self.energy, params), batch["image"]
        key_x, key_v = jax.random.split(key)
        match config.objective:
            case "contrastive" | "short_run":
                noise = jax.random.uniform(key_x, x.shape, minval=-2.0, maxval=2.0)
                start = x if config.objective == "contrastive" else noise
                terms = energy.contrastive_divergence(e, key_v, x, start, config.step_size, config.chain_steps)
                return terms.loss, {"energy": terms.data.mean()}
            case "implicit":
                return score_matching.implicit(Partial(energy.score, e), x).mean(), {}
            case "sliced":
                return score_matching.sliced(Partial(energy.score, e), key_v, x).mean(), {}
            case "finite_difference":
                return score_matching.finite_difference(e, key_v, x, 0.01).mean(), {}

    def chains(self, params, key, n):
        """n MALA chains from uniform noise."""
        key_x, key_chain = jax.random.split(key)
        x, e = jax.random.uniform(key_x, (n, 2), minval=-2.0, maxval=2.0), Partial(self.energy, params)
        config = self.config
        return langevin.mala(lambda x: -e(x), key_chain, x, config.step_size, config.sampling_steps, path=True)

    def sample(self, params, key, n):
        """n samples by MALA, and some of the chains."""
        chain = self.chains(params, key, n)
        return SampleBatch(chain.x, chain.path[:: max(1, self.config.sampling_steps // 100), :SHOWN])

    def evaluate(self, params, key, batch):
        """-log p(x), and how much it exceeds the negative log-likelihood of the data distribution, in nats."""
        del key
        nats, exact = -self.log_prob(params)(batch["image"]), -jax.vmap(self.distribution.log_prob)(batch["image"])
        return {"nats": nats, "excess_nats": nats - exact}

    def density_panels(self, params, key):
        """The learned and the exact log-density."""
        del key
        exact = jax.vmap(self.distribution.log_prob)
        return {"learned": planes.density_panel(self.log_prob(params)), "exact": planes.density_panel(exact)}

    def langevin_panels(self, params, key):
        """Chains on the learned density."""
        states = self.chains(params, key, SHOWN).path[:: max(1, self.config.sampling_steps // 100)]
        return {"chains on the learned energy": planes.density_panel(self.log_prob(params), paths=states)}
