"""Deep hierarchical VAEs: Child's top-down network.

Source: Child 2021, arXiv:2011.10650.
"""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax import hvae
from vdm_jax.gaussian import Normal
from vdm_jax.models.latent_variable import LatentVariableFunctions, LatentVariableModel
from vdm_jax.networks.very_deep_vae import VeryDeepVAE, VeryDeepVAEConfig
from vdm_jax.training.experiment import DataSpec, Experiment

__all__ = ["HVAE"]


@dataclass(frozen=True)
class HVAE(LatentVariableModel):
    """A hierarchical variational autoencoder."""

    network: VeryDeepVAEConfig = field(default_factory=VeryDeepVAEConfig)
    """Options of the encoder and the decoder."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        return _Functions(self, data).experiment()


class _Functions(LatentVariableFunctions):
    """init and the hierarchy of the very deep VAE; the rest is `LatentVariableFunctions`."""

    def __init__(self, config: HVAE, data: DataSpec):
        super().__init__(config, data, num_levels=config.network.depth)
        features = config.likelihood.num_features(data.shape[-1])
        self.network = VeryDeepVAE(replace(config.network, out_channels=features), data.shape)

    def init(self, key):
        def choose_mean(i, q, p):
            return p[0]

        return self.network.init(key, jnp.zeros((1, *self.data.shape)), choose_mean)["params"]

    def hierarchy(self, params, key=None, step=None):
        del key, step  # this network has no dropout
        return Partial(self.run, params)

    def run(self, params, x, choose):
        """Latents and decoder output for images x, or for a number x of images sampled from the prior."""

        def choose_latent(i, q, p):
            return choose(i, q and _normal(q), _normal(p))

        levels, features = self.network.apply({"params": params}, x, choose_latent)
        return [hvae.Latent(z, q and _normal(q), _normal(p)) for z, q, p in levels], features


def _normal(moments) -> Normal:
    mean, log_var = moments
    return Normal(mean, var=jnp.exp(log_var))
