"""What the deep hierarchical VAE recipes share: Child's top-down network.

Source: Child 2021, arXiv:2011.10650.
"""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax import hvae
from vdm_jax.gaussian import Normal
from vdm_jax.models.latent_variable import Hierarchical
from vdm_jax.networks.very_deep_vae import VeryDeepVAE, VeryDeepVAEConfig
from vdm_jax.training.experiment import DataSpec, Experiment


@dataclass(frozen=True)
class HVAE(Hierarchical):
    """A hierarchical variational autoencoder."""

    network: VeryDeepVAEConfig = field(default_factory=VeryDeepVAEConfig)
    """Encoder and decoder."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        channels = self.observation.features(data.shape[-1])
        network = VeryDeepVAE(replace(self.network, out_channels=channels), data.shape)

        def init(key):
            return network.init(key, jnp.zeros((1, *data.shape)), lambda i, q, p: p[0])["params"]

        def go(params, x, draw):
            def ask(i, q, p):
                return draw(i, q and _normal(q), _normal(p))

            levels, features = network.apply({"params": params}, x, ask)
            return [hvae.Latent(z, q and _normal(q), _normal(p)) for z, q, p in levels], features

        return self.assemble(data, init, lambda params, *_: Partial(go, params), self.network.depth)


def _normal(moments) -> Normal:
    return Normal(moments[0], var=jnp.exp(moments[1]))
