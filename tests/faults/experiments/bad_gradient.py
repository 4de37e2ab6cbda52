"""The test experiment with a NaN gradient, but finite loss, in batches with `poison` examples of label 0."""

import dataclasses

import jax.numpy as jnp

from tests.training.experiments import tiny


@dataclasses.dataclass(frozen=True)
class Config(tiny.Config):
    """Options of the test experiment."""

    def build(self, data):
        experiment = super().build(data)

        def loss(params, key, batch, step):
            value, metrics = tiny.experiment(data, self.widths.hidden).loss(params, key, batch, step)
            bad = (batch["label"] == 0).sum() >= (self.poison or 10**6)
            root = jnp.sqrt(jnp.where(bad, jnp.square(params["poison"]), 1.0))  # the gradient at 0 is 0 * infinity
            return value + jnp.where(bad, root, 0.0), metrics

        return experiment._replace(loss=loss)


CONFIG = Config()
