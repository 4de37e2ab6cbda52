"""What the DDPM recipes share: the forward process, Ho et al.'s network, L_simple, ancestral sampling, the bound.

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from vdm_jax import elbo, losses
from vdm_jax.discrete_schedules import InterpolatedSchedule, TabulatedSchedule, discretize, linear_betas
from vdm_jax.guidance import ClassifierFreeGuidance
from vdm_jax.likelihoods import DiscretizedGaussian, normalize
from vdm_jax.models.images import pictures
from vdm_jax.models.likelihood_rows import LikelihoodRows, likelihood_rows
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.schedules import Cosine, LinearLogSNR, Sigmoid
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment


@dataclass(frozen=True)
class DDPM(TrainConfig):
    """A denoising diffusion probabilistic model."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """The denoiser."""
    prediction_type: Literal["eps", "x_0", "v"] = "eps"
    """What the network predicts."""
    noise_schedule: Literal["linear", "cosine", "sigmoid", "log_snr"] = "linear"
    """Noise schedule: Ho et al.'s linear beta, cosine, sigmoid, or linear log-SNR."""
    num_steps: int = 1000
    """T, the steps of the forward process."""
    log_snr_max: float = 9.0
    """Log-SNR of step 1 (noise log_snr only)."""
    log_snr_min: float = -4.0
    """Log-SNR of step T (noise log_snr only)."""
    time_sampling: Literal["independent", "low_discrepancy", "antithetic"] = "independent"
    """How the timesteps of a batch are sampled; low_discrepancy has the least variance."""
    label_dropout: float = 0.1
    """Share of the labels that are hidden in training, where the network has classes, so that it learns to do without:
    what guidance needs, and the ledger, which is about P(x)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How samples are drawn."""
    eval_terms: int = 0
    """Diffusion terms of the bound evaluated for each test image, spread evenly over t; 0 is all of them."""
    snapshots: int = 9
    """Rows of the trajectory picture before the finished samples."""
    ledger: LikelihoodRows = field(default_factory=LikelihoodRows)
    """What `make eval` looks at."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        self.check(data)
        schedule, classes, network = self.discrete_schedule(), self.network.num_classes, UNet(self.network)
        num_dims = data.shape[0] * data.shape[1] * data.shape[2]

        def init(key):
            image, label = jnp.zeros((1, *data.shape)), jnp.zeros(1, jnp.int32) if classes else None
            return network.init(key, image, jnp.zeros(1), label)["params"]

        @partial(jax.jit, inline=True)
        def predict(params, key, label, x_t, level):
            options = {} if key is None else {"train": True, "rngs": {"dropout": key}}
            if classes and label is None:
                label = jnp.full(len(x_t), classes)
            return network.apply({"params": params}, x_t, self.condition(level), label, **options)

        def known(batch):
            return batch["label"] if classes else None

        def loss(params, key, batch, step):
            del step
            key_dropout, key_loss, key_label = jax.random.split(key, 3)
            x_0 = normalize(batch["image"], data.levels)
            hidden = jax.random.bernoulli(key_label, self.label_dropout, batch["label"].shape)
            label = known({"label": jnp.where(hidden, classes, batch["label"])})
            denoiser = Partial(predict, params, key_dropout, label)
            terms = losses.simple_loss(
                denoiser,
                key_loss,
                x_0,
                schedule,
                prediction_type=self.prediction_type,
                time_sampling=self.time_sampling,
            )
            return terms.mean() / num_dims, {}

        def sample(params, key, n):
            key_T, key_chain = jax.random.split(key)
            x_T, label = jax.random.normal(key_T, (n, *data.shape)), self.labels(n)
            denoiser = Partial(predict, params, None, label)
            if self.sampling.guidance != 1.0:
                denoiser = ClassifierFreeGuidance(
                    denoiser, Partial(predict, params, None, None), self.sampling.guidance
                )
            options = {"prediction_type": self.prediction_type, "clip": 1.0, "snapshots": self.snapshots}
            drawn = self.sampling.draw(denoiser, key_chain, x_T, schedule, InterpolatedSchedule(schedule), **options)
            return pictures(drawn, data.levels, label)

        def evaluate(params, key, batch):
            x_0 = normalize(batch["image"], data.levels)
            denoiser, count = Partial(predict, params, None, known(batch)), self.eval_terms or None
            terms = elbo.bound(
                denoiser, key, x_0, schedule, _decoder(data.levels), prediction_type=self.prediction_type, terms=count
            )
            bits = {name: elbo.bits_per_dim(nats, num_dims) for name, nats in terms._asdict().items()}
            return {"bits_per_dim": elbo.bits_per_dim(terms.total, num_dims), **bits}

        passes = self.sampling.passes(self.num_steps)
        cost = Cost(evaluate=1 + (self.eval_terms or self.num_steps - 1), sample=passes)

        def model(params):
            return Partial(predict, params, None, None), InterpolatedSchedule(schedule)

        if classes and not self.label_dropout:  # the ledger would be that of a model that was never trained
            return Experiment(init, loss, sample, evaluate, cost)
        rows = likelihood_rows(model, _decoder(data.levels), data, self.prediction_type, self.ledger)
        return Experiment(init, loss, sample, evaluate, cost, *rows)

    def check(self, data: DataSpec) -> None:
        """Refuse options that no model has.

        Raises:
            ValueError: names the option and its remedy.
        """
        classes = self.network.num_classes
        if self.num_steps < 2:
            raise ValueError("--num-steps must be at least 2: one step is a decoder alone, and has nothing to denoise")
        if self.noise_schedule == "linear" and self.num_steps <= 20:
            raise ValueError(
                f"--noise-schedule linear has a beta of 20 / {self.num_steps}: take --num-steps 21 or more"
            )
        self.sampling.check(self.num_steps, classes)
        if classes not in (0, data.num_classes):
            raise ValueError(f"--network.num-classes is {classes}: {data.name} has {data.num_classes}, and 0 is none")
        if not 0.0 <= self.label_dropout < 1.0:
            raise ValueError("--label-dropout must be in [0, 1)")
        if classes and not self.label_dropout and self.sampling.guidance != 1.0:
            raise ValueError(
                f"guidance {self.sampling.guidance:g} needs the model without labels, which --label-dropout 0 never "
                "trains: take guidance 1, or train with a --label-dropout such as 0.1"
            )

    def labels(self, n: int) -> Array | None:
        """Of n samples: the class asked for, or all in turn; None where the network has no classes."""
        classes, asked = self.network.num_classes, self.sampling.label
        if not classes:
            return None
        return jnp.arange(n) % classes if asked is None else jnp.full(n, asked)

    def discrete_schedule(self) -> TabulatedSchedule:
        """The discrete schedule."""
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
        """What the network is told of the noise: Ho et al.'s 0-based step, or the log-SNR."""
        return jnp.asarray(level.t) - 1.0 if self.network.embedding == "sinusoidal" else level.log_snr


def _decoder(levels: int):
    """Ho et al.'s p(x_0 | x_1): around the predicted x_0, as wide as the noise of x_1."""
    return lambda x_hat, x_1, level: DiscretizedGaussian(x_hat, scale=level.sigma, levels=levels)
