"""Denoising diffusion probabilistic models: Ho et al.'s network, L_simple, every sampler, the variational bound.

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from vdm_jax import elbo, losses
from vdm_jax.discrete_schedules import InterpolatedSchedule, TabulatedSchedule, discretize, linear_betas
from vdm_jax.guidance import ClassifierFreeGuidance
from vdm_jax.models.likelihood_report import LikelihoodReport, likelihood_rows
from vdm_jax.models.sampling import Sampling
from vdm_jax.models.scaling import scaling
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.schedules import Cosine, LinearLogSNR, Sigmoid
from vdm_jax.time_sampling import TimeSampling
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, DiffusionModel, Experiment

__all__ = ["DDPM"]


@dataclass(frozen=True)
class DDPM(TrainConfig):
    """A denoising diffusion probabilistic model."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """Options of the denoising network."""
    prediction_type: Literal["eps", "x_0", "v"] = "eps"
    """Quantity that the network predicts."""
    noise_schedule: Literal["linear", "cosine", "sigmoid", "log_snr"] = "linear"
    """Noise schedule: Ho et al.'s linear beta, cosine, sigmoid, or linear log-SNR."""
    num_steps: int = 1000
    """T, the number of timesteps."""
    log_snr_max: float = 9.0
    """Log-SNR of timestep 1 (noise schedule log_snr only)."""
    log_snr_min: float = -4.0
    """Log-SNR of timestep T (noise schedule log_snr only)."""
    time_sampling: TimeSampling = "independent"
    """How the timesteps of a batch are sampled; low_discrepancy has the least variance."""
    label_dropout: float = 0.1
    """Probability that a label is dropped in training (class-conditional networks only). Classifier-free guidance and
    the likelihood report, which evaluates the unconditional P(x), need it above 0."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling options."""
    eval_terms: int = 0
    """Diffusion terms of the bound evaluated for each test image, at evenly spaced timesteps; 0 evaluates all."""
    snapshots: int = 9
    """Intermediate states shown in the trajectory figure, one per row."""
    likelihood_report: LikelihoodReport = field(default_factory=LikelihoodReport)
    """Options of the likelihood report of `make eval`."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        self.check(data)
        return _Functions(self, data).experiment()

    def check(self, data: DataSpec) -> None:
        """Reject invalid options.

        Raises:
            ValueError: names the option and its remedy.
        """
        classes = self.network.num_classes
        if self.num_steps < 2:
            raise ValueError(
                f"--num-steps must be at least 2, got {self.num_steps}: with T = 1 the bound has no diffusion terms"
            )
        if self.noise_schedule == "linear" and self.num_steps <= 20:
            raise ValueError(
                "--noise-schedule linear needs --num-steps of at least 21: its final beta is 20 / num_steps = "
                f"20 / {self.num_steps}, which must be below 1"
            )
        self.sampling.check(self.num_steps, classes)
        if classes not in (0, data.num_classes):
            raise ValueError(
                f"--network.num-classes {classes} does not match {data.name}, which has {data.num_classes} classes: "
                f"set it to {data.num_classes}, or to 0 for an unconditional model"
            )
        if not 0.0 <= self.label_dropout < 1.0:
            raise ValueError(f"--label-dropout {self.label_dropout:g} must be in [0, 1)")
        if classes and not self.label_dropout and self.sampling.guidance_scale != 1.0:
            raise ValueError(
                f"guidance scale {self.sampling.guidance_scale:g} needs an unconditional prediction, which "
                "--label-dropout 0 does not train: set the guidance scale to 1, or --label-dropout to 0.1"
            )

    def module(self) -> nn.Module:
        """The denoising network."""
        return UNet(self.network)

    def discrete_schedule(self) -> TabulatedSchedule:
        """The noise schedule at timesteps 0..T."""
        match self.noise_schedule:
            case "linear":
                return linear_betas(self.num_steps, 0.1 / self.num_steps, 20.0 / self.num_steps)
            case "cosine":
                return discretize(Cosine(), self.num_steps)
            case "sigmoid":
                return discretize(Sigmoid(), self.num_steps)
            case "log_snr":
                return discretize(LinearLogSNR(self.log_snr_max, self.log_snr_min), self.num_steps)

    def condition(self, level: NoiseLevel) -> Array:
        """The noise level as the network takes it: Ho et al.'s 0-based timestep, or the log-SNR."""
        return jnp.asarray(level.t) - 1.0 if self.network.embedding == "sinusoidal" else level.log_snr


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the model as equations take it."""

    def __init__(self, config: DDPM, data: DataSpec):
        self.config, self.data = config, data
        self.network, self.schedule, self.scaling = config.module(), config.discrete_schedule(), scaling(data)
        self.num_classes, self.num_dims = config.network.num_classes, int(np.prod(data.shape))

    def experiment(self) -> Experiment:
        config = self.config
        terms = config.eval_terms or config.num_steps - 1
        cost = Cost(evaluate=1 + terms, sample=config.sampling.network_evaluations(config.num_steps))
        functions = (self.init, self.loss, self.sample, self.evaluate, cost)
        model = {"diffusion": self.diffusion, "num_classes": self.num_classes}
        if self.num_classes and not config.label_dropout:
            return Experiment(*functions, **model)  # without label dropout there is no unconditional model to report on
        rows, curve = likelihood_rows(self.diffusion, self.data, config.likelihood_report)
        return Experiment(*functions, rows, curve, **model)

    def init(self, key):
        x, label = jnp.zeros((1, *self.data.shape)), jnp.zeros(1, jnp.int32) if self.num_classes else None
        return self.network.init(key, x, jnp.zeros(1), label)["params"]

    @partial(jax.jit, static_argnums=0, inline=True)
    def predict(self, params, key, label, x_t, level):
        """Apply the network. With a key, dropout is on; without a label, the class is "no label"."""
        options = {} if key is None else {"train": True, "rngs": {"dropout": key}}
        if self.num_classes:
            label = jnp.broadcast_to(jnp.asarray(self.num_classes if label is None else label), len(x_t))
        return self.network.apply({"params": params}, x_t, self.config.condition(level), label, **options)

    def denoiser(self, params, key=None, label=None):
        """The network as equations and samplers take it: x_t, level -> prediction."""
        return Partial(self.predict, params, key, label if self.num_classes else None)

    def loss(self, params, key, batch, step):
        """L_simple per dimension."""
        del step
        key_dropout, key_loss, key_label = jax.random.split(key, 3)
        x_0 = self.scaling.scale(batch["image"])
        dropped = jax.random.bernoulli(key_label, self.config.label_dropout, batch["label"].shape)
        label = jnp.where(dropped, self.num_classes, batch["label"])
        terms = losses.simple_loss(
            self.denoiser(params, key_dropout, label),
            key_loss,
            x_0,
            self.schedule,
            prediction_type=self.config.prediction_type,
            time_sampling=self.config.time_sampling,
        )
        return terms.mean() / self.num_dims, {}

    def sample(self, params, key, n):
        """n samples, with guidance where the options ask for it."""
        config = self.config
        key_T, key_chain = jax.random.split(key)
        x_T, label = jax.random.normal(key_T, (n, *self.data.shape)), self.labels(n)
        denoiser = self.denoiser(params, label=label)
        if config.sampling.guidance_scale != 1.0:
            denoiser = ClassifierFreeGuidance(denoiser, self.denoiser(params), config.sampling.guidance_scale)
        samples = config.sampling.sample(
            denoiser,
            key_chain,
            x_T,
            self.schedule,
            InterpolatedSchedule(self.schedule),
            prediction_type=config.prediction_type,
            clip=self.scaling.clip,
            snapshots=config.snapshots,
        )
        return self.scaling.samples(samples, label)

    def labels(self, n: int) -> Array | None:
        """The classes of n samples: one class, or every class in turn; None for an unconditional network."""
        if not self.num_classes:
            return None
        label = self.config.sampling.label
        return jnp.arange(n) % self.num_classes if label is None else jnp.full(n, label)

    def evaluate(self, params, key, batch):
        """The variational bound and its terms, of P(x | label) for a conditional network."""
        terms = elbo.bound(
            self.denoiser(params, label=batch["label"]),
            key,
            self.scaling.scale(batch["image"]),
            self.schedule,
            self.scaling.decoder,
            prediction_type=self.config.prediction_type,
            terms=self.config.eval_terms or None,
        )
        return self.scaling.report(terms)

    def diffusion(self, params, label=None):
        """The model as equations take it; without a label, that of P(x)."""
        continuous, kind = InterpolatedSchedule(self.schedule), self.config.prediction_type
        return DiffusionModel(self.denoiser(params, label=label), continuous, self.scaling.decoder, kind, self.schedule)
