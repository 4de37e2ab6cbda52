"""What the variational diffusion recipes share: a learned noise schedule, the bound as the loss, a network of x_t.

Source: Kingma et al. 2021, arXiv:2107.00630.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax import elbo, vdm
from vdm_jax.discrete_schedules import DiscretizedSchedule
from vdm_jax.likelihoods import Categorical, normalize
from vdm_jax.models.images import pictures
from vdm_jax.models.likelihood_rows import LikelihoodRows, likelihood_rows
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.schedule import MonotoneNetwork
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.schedules import ContinuousSchedule, LearnedSchedule, LinearLogSNR
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment


@dataclass(frozen=True)
class VDM(TrainConfig):
    """A variational diffusion model."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """The denoiser."""
    head: Literal["eps", "v", "values"] = "eps"
    """What the network gives: eps (less x_t), v, or a logit for every value of every pixel, whose law given x_t has the
    mean x_hat; values suits few grey levels."""
    noise_schedule: Literal["learned", "fixed"] = "learned"
    """The schedule gamma(t): a monotone network between end points that are learned too, or a fixed line."""
    gamma_0: float = -13.3
    """-log SNR of the least noisy latent, to begin with."""
    gamma_1: float = 5.0
    """-log SNR of the noisiest latent, to begin with."""
    schedule_features: int = 1024
    """Sigmoids of the monotone network; 0 is a line, of which only the end points are learned."""
    num_steps: int = 0
    """T, the steps that the bound is trained for; 0 is T -> infinity."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=250))
    """How samples are drawn."""
    eval_terms: int = 128
    """Times at which the diffusion term is evaluated for each test image, spread evenly."""
    snapshots: int = 9
    """Rows of the trajectory picture before the finished samples."""
    ledger: LikelihoodRows = field(default_factory=LikelihoodRows)
    """What `make eval` looks at."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        self.check()
        num_dims = data.shape[0] * data.shape[1] * data.shape[2]
        prediction_type = "x_0" if self.head == "values" else self.head
        network = UNet(self._sized(data))

        def decoder(x_hat, z_0, level):
            return Categorical(z_0, level, data.levels)

        def init(key):
            params = network.init(key, jnp.zeros((1, *data.shape)), jnp.zeros(1))["params"]
            return {"network": params, "schedule": self.first_schedule()}

        @partial(jax.jit, inline=True)
        def predict(params, key, x_t, level):
            rngs = {} if key is None else {"dropout": key}
            out = network.apply({"params": params}, x_t, level.log_snr, train=key is not None, rngs=rngs)
            return self._read(out, x_t, level, data)

        def model(params, key=None):
            return Partial(predict, params["network"], key), self.schedule_of(params["schedule"])

        def loss(params, key, batch, step):
            del step
            key_dropout, key_loss = jax.random.split(key)
            denoiser, schedule = model(params, key_dropout)
            x_0 = normalize(batch["image"], data.levels)
            options = {"prediction_type": prediction_type, "num_steps": self.num_steps or None}
            terms = vdm.vdm_loss(denoiser, key_loss, x_0, schedule, decoder, **options)
            bits = {name: elbo.bits_per_dim(nats.mean(), num_dims) for name, nats in terms._asdict().items()}
            ends = {"gamma_0": -schedule.log_snr(0.0), "gamma_1": -schedule.log_snr(1.0)}
            return elbo.bits_per_dim(terms.total.mean(), num_dims), bits | ends

        def sample(params, key, n):
            denoiser, schedule = model(params)
            key_T, key_chain = jax.random.split(key)
            x_T = jax.random.normal(key_T, (n, *data.shape))
            chain, options = (
                DiscretizedSchedule(schedule, self.sampling.steps),
                {"prediction_type": prediction_type, "clip": None},
            )
            drawn = self.sampling.draw(denoiser, key_chain, x_T, chain, schedule, snapshots=self.snapshots, **options)
            return pictures(drawn, data.levels)

        def evaluate(params, key, batch):
            denoiser, schedule = model(params)
            x_0 = normalize(batch["image"], data.levels)
            if self.num_steps:
                grid, count = DiscretizedSchedule(schedule, self.num_steps + 1), min(self.eval_terms, self.num_steps)
                terms = elbo.bound(denoiser, key, x_0, grid, decoder, prediction_type=prediction_type, terms=count)
            else:
                terms = elbo.continuous_bound(
                    denoiser, key, x_0, schedule, decoder, prediction_type=prediction_type, terms=self.eval_terms
                )
            bits = {name: elbo.bits_per_dim(nats, num_dims) for name, nats in terms._asdict().items()}
            return {"bits_per_dim": elbo.bits_per_dim(terms.total, num_dims), **bits}

        cost = Cost(1 + self.eval_terms, self.sampling.passes(self.sampling.steps))
        return Experiment(
            init, loss, sample, evaluate, cost, *likelihood_rows(model, decoder, data, prediction_type, self.ledger)
        )

    def check(self) -> None:
        """Refuse options that no model has.

        Raises:
            ValueError: names the option and its remedy.
        """
        if not self.gamma_0 < self.gamma_1:
            raise ValueError(f"--gamma-0 {self.gamma_0} must be below --gamma-1 {self.gamma_1}: noise grows with t")
        for option, least in {"eval_terms": 1, "num_steps": 0, "schedule_features": 0}.items():
            if getattr(self, option) < least:
                raise ValueError(f"--{option.replace('_', '-')} must be at least {least}")
        if self.network.num_classes:
            raise ValueError("--network.num-classes: variational diffusion models take no labels here")
        if self.sampling.steps < 2 or self.sampling.spacing != "even":
            raise ValueError("--sampling.steps must be at least 2, and --sampling.spacing even: any steps will do here")
        self.sampling.check(self.sampling.steps)

    def _sized(self, data: DataSpec) -> UNetConfig:
        return replace(self.network, out_channels=data.shape[-1] * (data.levels if self.head == "values" else 1))

    def _read(self, out, x_t, level, data: DataSpec):
        """The network's output as a prediction."""
        if self.head == "values":
            logits = out.reshape(*x_t.shape, data.levels)
            return jax.vmap(lambda x, lv, logit: Categorical(x, lv, data.levels, logit).mean())(x_t, level, logits)
        return x_t + out if self.head == "eps" else out  # much noise is nearly x_t itself

    def first_schedule(self) -> dict:
        """The schedule's parameters before training."""
        if self.noise_schedule == "fixed":
            return {}
        zero = jnp.zeros(())
        shape = MonotoneNetwork(self.schedule_features).init(jax.random.key(0), zero, zero)
        return {"gamma_0": jnp.float32(self.gamma_0), "gamma_1": jnp.float32(self.gamma_1), "shape": shape}

    def schedule_of(self, params: dict) -> ContinuousSchedule:
        """The schedule of these parameters."""
        if self.noise_schedule == "fixed":
            return LinearLogSNR(-self.gamma_0, -self.gamma_1)
        rise = Partial(MonotoneNetwork(self.schedule_features).apply, params["shape"])
        return LearnedSchedule(params["gamma_0"], params["gamma_1"], rise)
