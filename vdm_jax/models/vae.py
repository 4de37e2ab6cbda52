"""Variational autoencoders with one latent.

Source: Kingma & Welling 2013, arXiv:1312.6114.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax import hvae
from vdm_jax.gaussian import Normal
from vdm_jax.models.autoencoder import EncoderDecoder
from vdm_jax.models.latent_variable import LatentVariableFunctions, LatentVariableModel
from vdm_jax.networks.autoencoder import AutoencoderConfig
from vdm_jax.training.experiment import DataSpec, Experiment

__all__ = ["VAE"]


@dataclass(frozen=True)
class VAE(LatentVariableModel):
    """A variational autoencoder."""

    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Options of the encoder and the decoder."""
    alternate_every: int = 0
    """Variational EM: number of updates of the encoder alone, then of the decoder alone, in turn; 0 trains both at
    once."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        self.check()
        functions = _Functions(self, data)
        return functions.experiment(functions.latent_codes if self.network.latent == 2 else None)

    def check(self) -> None:
        """Reject options that contradict each other.

        Raises:
            ValueError: names them and the remedy.
        """
        if self.alternate_every and (self.b1 or self.weight_decay):
            raise ValueError(
                f"--alternate-every {self.alternate_every} keeps one network fixed, but momentum and weight decay "
                "would still change it: set --b1 0 and --weight-decay 0"
            )


class _Functions(LatentVariableFunctions):
    """init and the hierarchy of one layer; the rest is `LatentVariableFunctions`."""

    def __init__(self, config: VAE, data: DataSpec):
        super().__init__(config, data, num_levels=1)
        self.vae = config
        self.networks = EncoderDecoder(config.network, data.shape, config.likelihood.num_features(data.shape[-1]))

    def init(self, key):
        return self.networks.init(key)

    def hierarchy(self, params, key=None, step=None):
        params = self.trained_part(params, step)
        key_encoder, key_decoder = (None, None) if key is None else jax.random.split(key)
        posterior = Partial(self.posterior, params["encoder"], key_encoder)
        decoder = Partial(self.networks.decode, params["decoder"], key_decoder)
        return hvae.top_down((self.vae.network.latent,), [posterior], [], decoder)

    def posterior(self, params, key, _, x):
        """q(z|x); there is no latent above it to condition on."""
        mean, log_var = self.networks.encode(params, key, x)
        return Normal(mean, var=jnp.exp(jnp.asarray(log_var)))

    def trained_part(self, params, step):
        """The parameters; in variational EM, without the gradient of the network that is fixed in this update."""
        every = self.vae.alternate_every
        if not every or step is None:
            return params
        train_decoder = (step // every) % 2 == 1

        def fix(part, fixed):
            return jax.tree.map(lambda a: jnp.where(fixed, jax.lax.stop_gradient(a), a), part)

        return {"encoder": fix(params["encoder"], train_decoder), "decoder": fix(params["decoder"], ~train_decoder)}

    def latent_codes(self, params, key, batch):
        """The means of q(z|x)."""
        del key
        return self.posterior(params["encoder"], None, None, self.x(batch)).mean
