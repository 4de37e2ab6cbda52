"""A diffusion model of images with independent pixels, whose denoiser and likelihood are known: a trained run's truth.

Each class has its own distribution of every pixel, and the last table, that of "no label", is another one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import elbo
from vdm_jax.closed_form import Empirical, Independent, optimal_prediction
from vdm_jax.likelihoods import Categorical, normalize
from vdm_jax.models.images import to_pixels
from vdm_jax.schedules import LinearLogSNR
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import DiffusionModel, Experiment, LikelihoodRow, SampleBatch

SCHEDULE = LinearLogSNR(9.0, -9.0)


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Options of the known experiment."""

    steps: int = 2
    batch_size: int = 8
    num_samples: int = 4
    picture_every: int = 0
    eval_batch_size: int = 24
    contrast: float = 0.3
    """How far the classes are from one another."""
    eval_terms: int = 64
    """Diffusion terms of the bound."""
    label_dropout: float = 0.1
    """0: there is no unconditional model."""

    def build(self, data):
        return experiment(data, self.contrast, self.eval_terms)


def tables(data, contrast):
    """Log-probabilities of every pixel's values, for each class and for no label."""
    logits = np.random.RandomState(0).normal(size=(data.num_classes + 1, *data.shape, data.levels)) * contrast
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))


def log_prob(table, image):
    """log P(image) in nats, of a table."""
    return jnp.take_along_axis(table, jnp.asarray(image, jnp.int32)[..., None], -1).sum()


def distribution(table):
    values = normalize(jnp.arange(table.shape[-1]), table.shape[-1])
    return Independent(Empirical(table, jnp.broadcast_to(values, table.shape)))


def predict(params, label, x_t, level):
    label = jnp.broadcast_to(label, len(x_t))
    return jax.vmap(lambda table, x, lv: optimal_prediction(distribution(table), x, lv, "eps"))(
        params["tables"][label], x_t, level
    )


def experiment(data, contrast, terms):
    def init(key):
        del key
        return {"tables": tables(data, contrast), "trained": jnp.ones(())}

    def loss(params, key, batch, step):
        return jnp.square(params["trained"]), {}  # the tables stay as they are

    def sample(params, key, n):
        images = jax.vmap(distribution(params["tables"][-1]).sample)(jax.random.split(key, n))
        return SampleBatch(to_pixels(images, data.levels))

    def decoder(x_hat, z_0, level):
        return Categorical(z_0, level, data.levels)

    def diffusion(params, label=None):
        denoiser = Partial(predict, params, jnp.asarray(data.num_classes if label is None else label))
        return DiffusionModel(denoiser, SCHEDULE, decoder, "eps", None)

    def nats(params, key, batch):
        denoiser = Partial(predict, params, batch["label"])
        x_0 = normalize(batch["image"], data.levels)
        return elbo.continuous_bound(denoiser, key, x_0, SCHEDULE, decoder, terms=terms).total

    def evaluate(params, key, batch):
        return {"bits_per_dim": elbo.bits_per_dim(nats(params, key, batch), int(np.prod(data.shape)))}

    rows = {"exact": LikelihoodRow("-log P(x)", lambda params, key, batch: _exact(params, batch))}
    functions = (init, loss, sample, evaluate)
    return Experiment(*functions, likelihood_rows=rows, diffusion=diffusion, num_classes=data.num_classes)


def _exact(params, batch):
    return -jax.vmap(log_prob, (None, 0))(params["tables"][-1], batch["image"])


CONFIG = Config()
