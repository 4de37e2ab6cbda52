"""Variational diffusion models: the bound as the loss, with a learned noise schedule.

Source: Kingma et al. 2021, arXiv:2107.00630.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import elbo, vdm
from vdm_jax.discrete_schedules import DiscretizedSchedule
from vdm_jax.likelihoods import Categorical
from vdm_jax.models.likelihood_report import LikelihoodReport, likelihood_rows
from vdm_jax.models.sampling import Sampling
from vdm_jax.models.scaling import PixelScaling
from vdm_jax.networks.schedule import MonotoneNetwork
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.schedules import ContinuousSchedule, LearnedSchedule, LinearLogSNR
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, DiffusionModel, Experiment
from vdm_jax.types import PredictionType

__all__ = ["VDM"]


@dataclass(frozen=True)
class VDM(TrainConfig):
    """A variational diffusion model."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """Options of the denoising network."""
    head: Literal["eps", "v", "categorical"] = "eps"
    """Output of the network: eps (minus x_t), v, or a logit for every value of every pixel. The logits are combined
    with the Gaussian likelihood of x_t, and x_hat is the mean of the result: for images with few gray levels."""
    noise_schedule: Literal["learned", "fixed"] = "learned"
    """The schedule gamma(t): a monotone network with learned end points, or a fixed line."""
    gamma_0: float = -13.3
    """Initial -log SNR at t = 0, the least noise."""
    gamma_1: float = 5.0
    """Initial -log SNR at t = 1, the most noise."""
    schedule_features: int = 1024
    """Sigmoids in the monotone network; 0 is a line with learned end points."""
    num_steps: int = 0
    """T, the number of timesteps of the loss and the bound; 0 is T -> infinity."""
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=250))
    """Sampling options."""
    eval_terms: int = 128
    """Diffusion terms of the bound evaluated for each test image, at evenly spaced times."""
    snapshots: int = 9
    """Intermediate states shown in the trajectory figure, one per row."""
    likelihood_report: LikelihoodReport = field(default_factory=LikelihoodReport)
    """Options of the likelihood report of `make eval`."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        self.check()
        return _Functions(self, data).experiment()

    def check(self) -> None:
        """Reject invalid options.

        Raises:
            ValueError: names the option and its remedy.
        """
        if not self.gamma_0 < self.gamma_1:
            raise ValueError(f"--gamma-0 {self.gamma_0} must be below --gamma-1 {self.gamma_1}: noise grows with t")
        for option, least in {"eval_terms": 1, "num_steps": 0, "schedule_features": 0}.items():
            if getattr(self, option) < least:
                raise ValueError(f"--{option.replace('_', '-')} {getattr(self, option)} must be at least {least}")
        if self.network.num_classes:
            raise ValueError(
                f"--network.num-classes {self.network.num_classes}: class conditioning is not implemented for VDM "
                "recipes; set --network.num-classes 0"
            )
        if self.sampling.steps < 2:
            raise ValueError(
                f"the number of sampling steps must be at least 2 in continuous time, got {self.sampling.steps}"
            )
        if self.sampling.spacing != "uniform":
            raise ValueError(
                f"spacing {self.sampling.spacing} is not supported for continuous-time models: use uniform"
            )
        self.sampling.check(self.sampling.steps)

    def initial_schedule(self) -> dict:
        """The parameters of the noise schedule before training."""
        if self.noise_schedule == "fixed":
            return {}
        zero = jnp.zeros(())
        shape = MonotoneNetwork(self.schedule_features).init(jax.random.key(0), zero, zero)
        return {"gamma_0": jnp.float32(self.gamma_0), "gamma_1": jnp.float32(self.gamma_1), "shape": shape}

    def continuous_schedule(self, params: dict) -> ContinuousSchedule:
        """The noise schedule with these parameters."""
        if self.noise_schedule == "fixed":
            return LinearLogSNR(-self.gamma_0, -self.gamma_1)
        rise = Partial(MonotoneNetwork(self.schedule_features).apply, params["shape"])
        return LearnedSchedule(params["gamma_0"], params["gamma_1"], rise)


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the model as equations take it."""

    def __init__(self, config: VDM, data: DataSpec):
        self.config, self.data, self.num_dims = config, data, int(np.prod(data.shape))
        self.scaling = PixelScaling(data)
        self.prediction_type: PredictionType = "x_0" if config.head == "categorical" else config.head
        channels = data.shape[-1] * (data.levels if config.head == "categorical" else 1)
        self.network = UNet(replace(config.network, out_channels=channels))

    def experiment(self) -> Experiment:
        config = self.config
        cost = Cost(1 + config.eval_terms, config.sampling.network_evaluations(config.sampling.steps))
        rows, curve = likelihood_rows(self.diffusion, self.data, config.likelihood_report)
        functions = (self.init, self.loss, self.sample, self.evaluate, cost)
        return Experiment(*functions, rows, curve, diffusion=self.diffusion)

    def init(self, key):
        params = self.network.init(key, jnp.zeros((1, *self.data.shape)), jnp.zeros(1))["params"]
        return {"network": params, "schedule": self.config.initial_schedule()}

    @partial(jax.jit, static_argnums=0, inline=True)
    def predict(self, params, key, x_t, level):
        """Apply the network and convert its output to `prediction_type`. With a key, dropout is on."""
        rngs = {} if key is None else {"dropout": key}
        out = self.network.apply({"params": params}, x_t, level.log_snr, train=key is not None, rngs=rngs)
        if self.config.head == "categorical":
            logits, levels = jnp.asarray(out).reshape(*x_t.shape, self.data.levels), self.data.levels
            return jax.vmap(lambda x, lv, logit: Categorical(x, lv, levels, logit).mean())(x_t, level, logits)
        return x_t + out if self.config.head == "eps" else out  # at high noise eps is close to x_t

    def model(self, params, key=None):
        """The denoiser, x_t, level -> prediction, and the noise schedule."""
        return Partial(self.predict, params["network"], key), self.config.continuous_schedule(params["schedule"])

    def decoder(self, x_hat, z_0, level):
        """p(x | z_0): every pixel value in proportion to the likelihood of z_0."""
        del x_hat
        return Categorical(z_0, level, self.data.levels)

    def loss(self, params, key, batch, step):
        """The variational bound, in bits per dimension."""
        del step
        key_dropout, key_loss = jax.random.split(key)
        denoiser, schedule = self.model(params, key_dropout)
        terms = vdm.vdm_loss(
            denoiser,
            key_loss,
            self.scaling.scale(batch["image"]),
            schedule,
            self.decoder,
            prediction_type=self.prediction_type,
            num_steps=self.config.num_steps or None,
        )
        bits = {name: elbo.bits_per_dim(nats.mean(), self.num_dims) for name, nats in terms._asdict().items()}
        ends = {"gamma_0": -schedule.log_snr(0.0), "gamma_1": -schedule.log_snr(1.0)}
        return elbo.bits_per_dim(terms.total.mean(), self.num_dims), bits | ends

    def sample(self, params, key, n):
        """n samples, in `sampling.steps` uniform steps of t."""
        denoiser, schedule = self.model(params)
        key_T, key_chain = jax.random.split(key)
        samples = self.config.sampling.sample(
            denoiser,
            key_chain,
            jax.random.normal(key_T, (n, *self.data.shape)),
            DiscretizedSchedule(schedule, self.config.sampling.steps),
            schedule,
            prediction_type=self.prediction_type,
            clip=None,
            snapshots=self.config.snapshots,
        )
        return self.scaling.samples(samples)

    def evaluate(self, params, key, batch):
        """The variational bound and its terms, in bits per dimension."""
        config, x_0 = self.config, self.scaling.scale(batch["image"])
        denoiser, schedule = self.model(params)
        options = {"prediction_type": self.prediction_type, "terms": config.eval_terms}
        if config.num_steps:
            steps = DiscretizedSchedule(schedule, config.num_steps + 1)
            options["terms"] = min(config.eval_terms, config.num_steps)
            terms = elbo.bound(denoiser, key, x_0, steps, self.decoder, **options)
        else:
            terms = elbo.continuous_bound(denoiser, key, x_0, schedule, self.decoder, **options)
        return self.scaling.report(terms)

    def diffusion(self, params, label=None):
        """The model as equations take it; it has no labels."""
        del label
        denoiser, schedule = self.model(params)
        steps = DiscretizedSchedule(schedule, self.config.sampling.steps)
        return DiffusionModel(denoiser, schedule, self.decoder, self.prediction_type, steps)
