"""The stand-in whose gradient, and not its loss, is NaN in batches that hold `poison` zeros of the first label."""

import dataclasses

import jax.numpy as jnp

from tests.training.experiments import tiny


@dataclasses.dataclass(frozen=True)
class Config(tiny.Config):
    """The stand-in's options."""

    def build(self, data):
        experiment = super().build(data)

        def loss(params, key, batch, step):
            value, metrics = tiny.experiment(data, self.widths.hidden).loss(params, key, batch, step)
            bad = (batch["label"] == 0).sum() >= (self.poison or 10**6)
            root = jnp.sqrt(jnp.where(bad, jnp.square(params["poison"]), 1.0))  # at 0 its slope is 0 * infinity
            return value + jnp.where(bad, root, 0.0), metrics

        return experiment._replace(loss=loss)


CONFIG = Config()
