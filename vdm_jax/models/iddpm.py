"""What the improved DDPM recipes share: a DDPM whose network gives the reverse variance too, and L_hybrid or L_vlb.

Source: Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from vdm_jax import elbo, reverse_variance, samplers, time_sampling
from vdm_jax.discrete_schedules import InterpolatedSchedule, TabulatedSchedule
from vdm_jax.likelihoods import normalize
from vdm_jax.models.ddpm import DDPM
from vdm_jax.models.images import pictures
from vdm_jax.networks.unet import UNet
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.training.experiment import Cost, DataSpec, Experiment


@dataclass(frozen=True)
class IDDPM(DDPM):
    """A DDPM with a learned variance; the option `sampling.variance` is of no meaning here."""

    objective: Literal["hybrid", "vlb"] = "hybrid"
    """L_hybrid (better pictures), or L_vlb with importance-sampled steps (better likelihood)."""
    vlb_weight: float = 1e-3
    """Weight of L_vlb, in bits a dimension, beside L_simple, a mean over dimensions."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        self.check(data)
        if self.network.num_classes:
            raise ValueError("--network.num-classes: models with a learned variance take no labels here")
        schedule, num_dims = self.discrete_schedule(), data.shape[0] * data.shape[1] * data.shape[2]
        network = UNet(replace(self.network, out_channels=2 * data.shape[-1]))
        decoder = reverse_variance.InterpolatedDecoder(schedule, data.levels)

        def init(key):
            return network.init(key, jnp.zeros((1, *data.shape)), jnp.zeros(1))["params"]

        def predict(params, key, x_t, level):
            rngs = {} if key is None else {"dropout": key}
            out = network.apply({"params": params}, x_t, self.condition(level), train=key is not None, rngs=rngs)
            prediction, range_ = jnp.split(jnp.asarray(out), 2, axis=-1)
            return prediction, 0.5 * (range_ + 1.0)  # the network's -1 and 1 are the two ends

        def loss(params, key, batch, step):
            del step
            key_dropout, key_loss = jax.random.split(key)
            model, x_0 = Partial(predict, params, key_dropout), normalize(batch["image"], data.levels)
            return self._loss(model, key_loss, x_0, schedule, decoder, num_dims)

        def sample(params, key, n):
            key_T, key_chain = jax.random.split(key)
            x_T, chain = jax.random.normal(key_T, (n, *data.shape)), self.sampling.chain(schedule)
            model = Partial(predict, params, None)
            options = {
                "prediction_type": self.prediction_type,
                "clip": 1.0,
                "snapshots": min(self.snapshots, chain.num_steps),
            }
            if self.sampling.sampler == "ancestral":
                drawn = samplers.ancestral_learned(model, key_chain, x_T, chain, **options)
            else:
                mean = Partial(lambda model, x_t, level: model(x_t, level)[0], model)
                drawn = self.sampling.draw(mean, key_chain, x_T, schedule, InterpolatedSchedule(schedule), **options)
            return pictures(drawn, data.levels)

        def evaluate(params, key, batch):
            model, x_0 = Partial(predict, params, None), normalize(batch["image"], data.levels)
            options = {"prediction_type": self.prediction_type, "terms": self.eval_terms or None}
            terms = reverse_variance.learned_variance_bound(model, key, x_0, schedule, decoder, **options)
            bits = {name: elbo.bits_per_dim(nats, num_dims) for name, nats in terms._asdict().items()}
            return {"bits_per_dim": elbo.bits_per_dim(terms.total, num_dims), **bits}

        passes = self.sampling.passes(self.num_steps)
        cost = Cost(evaluate=1 + (self.eval_terms or self.num_steps - 1), sample=passes)
        return Experiment(init, loss, sample, evaluate, cost)

    def condition(self, level: NoiseLevel) -> Array:
        """As a DDPM's, with steps counted as if there were 1,000."""
        told = super().condition(level)
        return told * (1000.0 / self.num_steps) if self.network.embedding == "sinusoidal" else told

    def _loss(self, model, key, x_0, schedule, decoder, num_dims):
        """The objective a dimension, and its parts."""
        options = {"prediction_type": self.prediction_type, "low_discrepancy": self.time_sampling}
        if self.objective == "vlb":
            key_t, key = jax.random.split(key)
            drawn = time_sampling.importance_sample(
                time_sampling.uniform_times(key_t, x_0.shape[0], self.time_sampling), _probabilities(schedule)
            )
            options |= {"t": drawn.bin + 1, "importance": drawn.weight}
            terms = reverse_variance.vlb_loss(model, key, x_0, schedule, decoder, **options)
            return elbo.bits_per_dim(terms.loss.mean(), num_dims), {}
        nats_weight = self.vlb_weight / math.log(2.0)
        terms = reverse_variance.hybrid_loss(model, key, x_0, schedule, decoder, vlb_weight=nats_weight, **options)
        parts = {"simple": terms.squared_error.mean() / num_dims, "vlb": elbo.bits_per_dim(terms.vlb.mean(), num_dims)}
        return terms.loss.mean() / num_dims, parts


def _probabilities(schedule: TabulatedSchedule) -> Array:
    """Of the steps of L_vlb: half of them uniform, half in proportion to the terms that white noise as data would have.

    Nichol & Dhariwal keep a running history of every step's losses; the loop has no such state. Their first step, the
    decoder's, gets what the second gets.
    """
    noise = time_sampling.geometric_variance_proposal(schedule.levels)
    noise = noise.at[0].set(noise[1])
    return 0.5 * noise / noise.sum() + 0.5 / schedule.num_steps
