"""Improved DDPMs: the network predicts the reverse variance too, and is trained by L_hybrid or L_vlb.

Source: Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from vdm_jax import elbo, reverse_variance, samplers, time_sampling
from vdm_jax.discrete_schedules import InterpolatedSchedule, TabulatedSchedule
from vdm_jax.models.ddpm import DDPM
from vdm_jax.models.scaling import PixelScaling
from vdm_jax.networks.unet import UNet
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.training.experiment import Cost, DataSpec, DiffusionModel, Experiment

__all__ = ["IDDPM"]


@dataclass(frozen=True)
class IDDPM(DDPM):
    """A DDPM with a learned reverse variance; the options label_dropout and sampling.variance have no effect."""

    objective: Literal["hybrid", "vlb"] = "hybrid"
    """L_hybrid (better samples), or L_vlb with importance-sampled timesteps (better likelihood)."""
    vlb_weight: float = 1e-3
    """Weight of L_vlb in L_hybrid: L_vlb is in bits per dimension, L_simple a mean over dimensions."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        self.check(data)
        if self.network.num_classes:
            raise ValueError(
                f"--network.num-classes {self.network.num_classes}: class conditioning is not implemented for IDDPM "
                "recipes; set --network.num-classes 0"
            )
        return _Functions(self, data).experiment()

    def condition(self, level: NoiseLevel) -> Array:
        """The noise level as the network takes it: timesteps are rescaled to a range of 1,000."""
        condition = super().condition(level)
        return condition * (1000.0 / self.num_steps) if self.network.embedding == "sinusoidal" else condition


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the model as equations take it."""

    def __init__(self, config: IDDPM, data: DataSpec):
        self.config, self.data, self.schedule = config, data, config.discrete_schedule()
        self.scaling = PixelScaling(data)
        self.network = UNet(replace(config.network, out_channels=2 * data.shape[-1]))
        self.decoder = reverse_variance.InterpolatedDecoder(self.schedule, data.levels)
        self.num_dims = int(np.prod(data.shape))

    def experiment(self) -> Experiment:
        config = self.config
        terms = config.eval_terms or config.num_steps - 1
        cost = Cost(evaluate=1 + terms, sample=config.sampling.network_evaluations(config.num_steps))
        return Experiment(self.init, self.loss, self.sample, self.evaluate, cost, diffusion=self.diffusion)

    def init(self, key):
        return self.network.init(key, jnp.zeros((1, *self.data.shape)), jnp.zeros(1))["params"]

    def predict(self, params, key, x_t, level):
        """The prediction, and the interpolation v between the two fixed log-variances: 0 is small, 1 is large."""
        rngs = {} if key is None else {"dropout": key}
        condition = self.config.condition(level)
        out = self.network.apply({"params": params}, x_t, condition, train=key is not None, rngs=rngs)
        return reverse_variance.split_learned_range(jnp.asarray(out))

    def model(self, params, key=None):
        """x_t, level -> (prediction, v)."""
        return Partial(self.predict, params, key)

    def loss(self, params, key, batch, step):
        """L_hybrid per dimension, or L_vlb in bits per dimension."""
        del step
        key_dropout, key_loss = jax.random.split(key)
        model, x_0 = self.model(params, key_dropout), self.scaling.scale(batch["image"])
        return self.vlb(model, key_loss, x_0) if self.config.objective == "vlb" else self.hybrid(model, key_loss, x_0)

    def hybrid(self, model, key, x_0):
        terms = reverse_variance.hybrid_loss(
            model,
            key,
            x_0,
            self.schedule,
            self.decoder,
            prediction_type=self.config.prediction_type,
            vlb_weight=self.config.vlb_weight / math.log(2.0),
            time_sampling=self.config.time_sampling,
        )
        simple, vlb = terms.squared_error.mean() / self.num_dims, elbo.bits_per_dim(terms.vlb.mean(), self.num_dims)
        return terms.loss.mean() / self.num_dims, {"simple": simple, "vlb": vlb}

    def vlb(self, model, key, x_0):
        key_t, key = jax.random.split(key)
        times = time_sampling.sample_times(key_t, x_0.shape[0], self.config.time_sampling)
        timestep = time_sampling.importance_sample(times, _timestep_probabilities(self.schedule))
        terms = reverse_variance.vlb_loss(
            model,
            key,
            x_0,
            self.schedule,
            self.decoder,
            prediction_type=self.config.prediction_type,
            time_sampling=self.config.time_sampling,
            t=timestep.bin + 1,
            importance=timestep.weight,
        )
        return elbo.bits_per_dim(terms.loss.mean(), self.num_dims), {}

    def sample(self, params, key, n):
        """n samples: ancestral sampling takes the learned variance, every other sampler the prediction alone."""
        config, model = self.config, self.model(params)
        key_T, key_chain = jax.random.split(key)
        x_T = jax.random.normal(key_T, (n, *self.data.shape))
        options = {"prediction_type": config.prediction_type, "clip": 1.0}
        if config.sampling.sampler == "ancestral":
            steps = config.sampling.subsequence(self.schedule)
            snapshots = min(config.snapshots, steps.num_steps)
            samples = samplers.ancestral_learned(model, key_chain, x_T, steps, snapshots=snapshots, **options)
        else:
            plain, options["snapshots"] = self.diffusion(params), config.snapshots
            samples = config.sampling.sample(plain.denoiser, key_chain, x_T, self.schedule, plain.schedule, **options)
        return self.scaling.samples(samples)

    def evaluate(self, params, key, batch):
        """The variational bound and its terms, in bits per dimension."""
        terms = reverse_variance.learned_variance_bound(
            self.model(params),
            key,
            self.scaling.scale(batch["image"]),
            self.schedule,
            self.decoder,
            prediction_type=self.config.prediction_type,
            terms=self.config.eval_terms or None,
        )
        return self.scaling.report(terms)

    def diffusion(self, params, label=None):
        """The model with a fixed reverse variance and Ho et al.'s decoder, as equations take it; it has no labels."""
        del label
        model, continuous = self.model(params), InterpolatedSchedule(self.schedule)
        denoiser, kind = Partial(_prediction_alone, model), self.config.prediction_type
        return DiffusionModel(denoiser, continuous, self.scaling.decoder, kind, self.schedule, model)


def _prediction_alone(model, x_t, level):
    return model(x_t, level)[0]


def _timestep_probabilities(schedule: TabulatedSchedule) -> Array:
    """Sampling probabilities of the timesteps in L_vlb: half uniform, half proportional to the terms of white noise.

    Nichol & Dhariwal keep a running history of the loss of every timestep; the trainer has no such state. The first
    timestep, the decoder's, gets the probability of the second.
    """
    proposal = time_sampling.geometric_variance_proposal(schedule.levels)
    proposal = proposal.at[0].set(proposal[1])
    return 0.5 * proposal / proposal.sum() + 0.5 / schedule.num_steps
