"""What the recipes of noise-conditional score networks share: denoising score matching at ten levels, and Langevin.

Source: Song & Ermon 2019, arXiv:1907.05600.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import score_matching
from vdm_jax.likelihoods import normalize
from vdm_jax.models.annealing import Langevin, Noise
from vdm_jax.models.images import pixels
from vdm_jax.networks.refinenet import RefineNet, RefineNetConfig
from vdm_jax.time_sampling import sample_timesteps
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch


@dataclass(frozen=True)
class NCSN(TrainConfig):
    """A noise-conditional score network."""

    network: RefineNetConfig = field(default_factory=RefineNetConfig)
    """The network; its num_levels are the levels of noise."""
    noise: Noise = field(default_factory=Noise)
    """The levels."""
    sampling: Langevin = field(default_factory=Langevin)
    """How samples are drawn."""
    prediction_type: Literal["eps", "score"] = "eps"
    """What the network gives: the noise, which has one size at all levels, or the score itself, as in 2019."""
    time_sampling: Literal["independent", "low_discrepancy", "antithetic"] = "independent"
    """How the noise levels of a batch are sampled; low_discrepancy has the least variance."""
    dequantize: bool = False
    """Train on pixel values with a uniform number added, so that they fill their bins."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        count, dims = self.network.num_levels, int(np.prod(data.shape))
        schedule, network = self.noise.discrete_schedule(count), RefineNet(self.network)

        def init(key):
            return network.init(key, jnp.zeros((1, *data.shape)), jnp.zeros(1, jnp.int32))["params"]

        def predict(params, x_t, level):
            index = count - level.t.astype(jnp.int32)  # the noisiest is the first
            return network.apply({"params": params}, x_t, index)

        def errors(params, key, x, t):
            denoiser = Partial(predict, params)
            return (
                score_matching.denoising_at(denoiser, key, x, schedule(t), prediction_type=self.prediction_type) / dims
            )

        def loss(params, key, batch, step):
            del step
            key_t, key_u, key_eps = jax.random.split(key, 3)
            x = normalize(batch["image"], data.levels)
            if self.dequantize:
                x = x + (jax.random.uniform(key_u, x.shape) - 0.5) * (2.0 / (data.levels - 1))
            return errors(
                params, key_eps, x, sample_timesteps(key_t, len(x), count, time_sampling=self.time_sampling)
            ).mean(), {}

        def sample(params, key, n):
            chain = self.sampling(Partial(predict, params), key, (n, *data.shape), schedule, self.prediction_type)
            rows = np.unique(np.round(np.linspace(0, count - 1, min(count, 9))).astype(int))
            images, states = pixels(chain.x, data.levels), pixels(chain.path[rows, : min(n, 8)], data.levels)
            return SampleBatch(images, jnp.concatenate([states, images[None, : min(n, 8)]]))

        def evaluate(params, key, batch):
            x = normalize(batch["image"], data.levels)

            def at(t):
                return errors(params, jax.random.fold_in(key, t), x, jnp.full(len(x), t))

            each = jax.lax.map(at, jnp.arange(1, count + 1))
            return {"denoising_error": each.mean(0), "of_the_noisiest": each[-1], "of_the_cleanest": each[0]}

        return Experiment(init, loss, sample, evaluate, Cost(evaluate=count, sample=count * self.sampling.steps))
