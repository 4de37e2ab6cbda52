"""Noise-conditional score networks: denoising score matching at every noise scale, annealed Langevin dynamics.

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
from vdm_jax.models.annealing import AnnealedLangevin, NoiseScales
from vdm_jax.models.images import to_pixels
from vdm_jax.networks.refinenet import RefineNet, RefineNetConfig
from vdm_jax.time_sampling import TimeSampling, sample_timesteps
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch

__all__ = ["NCSN"]


@dataclass(frozen=True)
class NCSN(TrainConfig):
    """A noise-conditional score network."""

    network: RefineNetConfig = field(default_factory=RefineNetConfig)
    """Options of the score network; its num_levels is the number of noise scales."""
    noise_scales: NoiseScales = field(default_factory=NoiseScales)
    """The range of the noise scales."""
    sampling: AnnealedLangevin = field(default_factory=AnnealedLangevin)
    """Options of annealed Langevin dynamics."""
    prediction_type: Literal["eps", "score"] = "eps"
    """Output of the network: eps, which has the same magnitude at all levels, or the score, as in the 2019 paper."""
    time_sampling: TimeSampling = "independent"
    """How the noise levels of a batch are sampled; low_discrepancy has the least variance."""
    dequantize: bool = False
    """Add uniform noise to the pixel values in training, so that they fill their bins."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        return _Functions(self, data).experiment()


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate."""

    def __init__(self, config: NCSN, data: DataSpec):
        self.config, self.data = config, data
        self.num_levels, self.num_dims = config.network.num_levels, int(np.prod(data.shape))
        self.schedule = config.noise_scales.discrete_schedule(self.num_levels)
        self.network = RefineNet(config.network)

    def experiment(self) -> Experiment:
        cost = Cost(evaluate=self.num_levels, sample=self.num_levels * self.config.sampling.steps)
        return Experiment(self.init, self.loss, self.sample, self.evaluate, cost)

    def init(self, key):
        return self.network.init(key, jnp.zeros((1, *self.data.shape)), jnp.zeros(1, jnp.int32))["params"]

    def predict(self, params, x_t, level):
        index = self.num_levels - level.t.astype(jnp.int32)  # the network counts from the noisiest level
        return self.network.apply({"params": params}, x_t, index)

    def errors(self, params, key, x, t):
        """Denoising score matching at levels t, per dimension; shape (B,)."""
        denoiser, prediction_type = Partial(self.predict, params), self.config.prediction_type
        losses = score_matching.denoising_at_level(denoiser, key, x, self.schedule(t), prediction_type=prediction_type)
        return losses / self.num_dims

    def loss(self, params, key, batch, step):
        """Denoising score matching, each example at a random level."""
        del step
        key_t, key_u, key_eps = jax.random.split(key, 3)
        x = normalize(batch["image"], self.data.levels)
        if self.config.dequantize:
            x = x + (jax.random.uniform(key_u, x.shape) - 0.5) * (2.0 / (self.data.levels - 1))
        t = sample_timesteps(key_t, len(x), self.num_levels, time_sampling=self.config.time_sampling)
        return self.errors(params, key_eps, x, t).mean(), {}

    def sample(self, params, key, n):
        """n samples, and the state of the first eight chains after some of the levels."""
        denoiser, shape = Partial(self.predict, params), (n, *self.data.shape)
        chain = self.config.sampling(denoiser, key, shape, self.schedule, self.config.prediction_type)
        shown = np.unique(np.round(np.linspace(0, self.num_levels - 1, min(self.num_levels, 9))).astype(int))
        images = to_pixels(chain.x, self.data.levels)
        states = to_pixels(chain.path[shown, : min(n, 8)], self.data.levels)
        return SampleBatch(images, jnp.concatenate([states, images[None, : min(n, 8)]]))

    def evaluate(self, params, key, batch):
        """Denoising score matching: the mean over levels, and the two ends."""
        x = normalize(batch["image"], self.data.levels)

        def error(t):
            return self.errors(params, jax.random.fold_in(key, t), x, jnp.full(len(x), t))

        errors = jax.lax.map(error, jnp.arange(1, self.num_levels + 1))
        return {"denoising_error": errors.mean(0), "error_noisiest": errors[-1], "error_cleanest": errors[0]}
