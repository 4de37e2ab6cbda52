"""A small test experiment: each pixel is Gaussian with a mean that an MLP predicts from the label."""

import dataclasses

import jax
import jax.numpy as jnp

from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Experiment, SampleBatch


@dataclasses.dataclass(frozen=True)
class Widths:
    """A nested option."""

    hidden: int = 16


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Options of the test experiment."""

    steps: int = 40
    log_every: int = 5
    checkpoint_every: int = 10
    picture_every: int = 20
    num_samples: int = 4
    eval_batch_size: int = 104
    batch_size: int = 32
    ema_decay: float = 0.9
    widths: Widths = Widths()
    """Nested options."""
    scales: tuple[int, ...] = (1, 2)
    """A tuple, which is a list in JSON."""
    poison: int = 0
    """Make the loss NaN in batches with this many examples of label 0."""
    side: int = 8
    """Side of the images that the model accepts."""

    def build(self, data):
        if data.shape[:2] != (self.side, self.side):
            raise ValueError(f"the model is for {self.side}x{self.side} images, not {data.shape}")
        return experiment(data, self.widths.hidden, self.poison)


def experiment(data, hidden=16, poison=0):
    dims = data.shape[0] * data.shape[1] * data.shape[2]

    def init(key):
        first, second = jax.random.split(key)
        return {
            "w": jax.random.normal(first, (10, hidden)) * 0.1,
            "v": jax.random.normal(second, (hidden, dims)) * 0.1,
            "poison": jnp.zeros(()),
        }

    def predict(params, label):
        return jnp.tanh(params["w"][label]) @ params["v"]

    def errors(params, key, batch):
        x = batch["image"].reshape(-1, dims).astype(jnp.float32) / (data.levels - 1)
        noise = 0.01 * jax.random.normal(key, x.shape)
        return jnp.square(x + noise - predict(params, batch["label"])).mean(axis=1)

    def loss(params, key, batch, step):
        del step
        value = errors(params, key, batch).mean() + 0.01 * jnp.square(params["poison"])
        bad = (batch["label"] == 0).sum() >= (poison or 10**6)
        value = value * jnp.where(bad, jnp.nan, 1.0)
        return value, {"twice": 2.0 * value}

    def sample(params, key, n):
        label = jnp.arange(n) % 10
        x = jnp.clip(predict(params, label) + 0.05 * jax.random.normal(key, (n, dims)), 0.0, 1.0)
        images = jnp.round(x * (data.levels - 1)).astype(jnp.uint8).reshape(n, *data.shape)
        return SampleBatch(images, jnp.stack([images[:2] // 2, images[:2]]))

    def evaluate(params, key, batch):
        error = errors(params, key, batch)
        return {"error": error, "bits_per_dim": error, "label": batch["label"].astype(jnp.float32)}

    return Experiment(init, loss, sample, evaluate)


CONFIG = Config()
