"""What the VAE recipes share: one latent, a network either way.

Source: Kingma & Welling 2013, arXiv:1312.6114.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax import hvae
from vdm_jax.gaussian import Normal
from vdm_jax.models.autoencoder import dropout, networks
from vdm_jax.models.latent_variable import Hierarchical
from vdm_jax.networks.autoencoder import AutoencoderConfig
from vdm_jax.training.experiment import DataSpec, Experiment


@dataclass(frozen=True)
class VAE(Hierarchical):
    """A variational autoencoder."""

    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Encoder and decoder."""
    turns: int = 0
    """Variational EM: updates of the encoder alone, then as many of the decoder alone, and so on; 0 is both at once."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        self.check()
        encoder, decoder, init = networks(self.network, data, self.observation.features(data.shape[-1]))

        def encode(params, key, _, x):
            mean, log_var = encoder.apply({"params": params}, x, **dropout(key))
            return Normal(mean, var=jnp.exp(jnp.asarray(log_var)))

        def decode(params, key, z):
            return decoder.apply({"params": params}, z, **dropout(key))

        def model(params, key, step):
            params = self.held(params, step)
            keys = (None, None) if key is None else jax.random.split(key)
            posterior = Partial(encode, params["encoder"], keys[0])
            return hvae.top_down((self.network.latent,), [posterior], [], Partial(decode, params["decoder"], keys[1]))

        def codes(params, x):
            return encode(params["encoder"], None, None, x).mean

        return self.assemble(data, init, model, 1, codes if self.network.latent == 2 else None)

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ValueError: names them and the remedy.
        """
        if self.turns and (self.b1 or self.weight_decay):
            raise ValueError("--turns holds one network still: that needs --b1 0 and --weight-decay 0")

    def held(self, params: dict, step) -> dict:
        """The parameters, the gradient of those whose turn it is not taken away."""
        if not self.turns or step is None:
            return params
        decoders_turn = (step // self.turns) % 2 == 1

        def hold(part, still):
            return jax.tree.map(lambda a: jnp.where(still, jax.lax.stop_gradient(a), a), part)

        return {"encoder": hold(params["encoder"], decoders_turn), "decoder": hold(params["decoder"], ~decoders_turn)}
