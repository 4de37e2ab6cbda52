"""What the plain autoencoder recipes share: a code, with or without noise on the way in, and no law of it.

Source: Hinton & Salakhutdinov 2006; Vincent et al. 2008.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import autoencoder
from vdm_jax.likelihoods import normalize
from vdm_jax.models.images import pixels
from vdm_jax.networks.autoencoder import AutoencoderConfig, Decoder, Encoder
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import DataSpec, Experiment, SampleBatch


@dataclass(frozen=True)
class Autoencoder(TrainConfig):
    """An autoencoder, denoising where sigma is not 0."""

    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Encoder and decoder."""
    sigma: float = 0.0
    """Standard deviation of the noise that the encoder sees its image in, on [-1, 1]."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        if not self.sigma >= 0.0:
            raise ValueError("--sigma must be at least 0")
        enc, dec, init = networks(self.network, data, data.shape[-1])

        def encode(params, key, x):
            return enc.apply({"params": params}, x, **dropout(key))[0]

        def decode(params, key, z):
            return dec.apply({"params": params}, z, **dropout(key))

        def maps(params, key=None):
            keys = (None, None) if key is None else jax.random.split(key)
            return Partial(encode, params["encoder"], keys[0]), Partial(decode, params["decoder"], keys[1])

        def errors(params, key_dropout, key, batch, sigma):
            x = normalize(batch["image"], data.levels)
            encoder, decoder = maps(params, key_dropout)
            error = autoencoder.denoising_reconstruction_error(encoder, decoder, key, x, sigma)
            return error / int(np.prod(data.shape))

        def loss(params, key, batch, step):
            del step
            key_dropout, key_eps = jax.random.split(key)
            return errors(params, key_dropout, key_eps, batch, self.sigma).mean(), {}

        def sample(params, key, n):
            return SampleBatch(pixels(maps(params)[1](jax.random.normal(key, (n, self.network.latent))), data.levels))

        def evaluate(params, key, batch):
            clean = {"reconstruction_error": errors(params, None, key, batch, 0.0)}
            return clean | ({"denoising_error": errors(params, None, key, batch, self.sigma)} if self.sigma else {})

        def reconstructions(params, key, batch):
            encoder, decoder = maps(params)
            x = normalize(batch["image"], data.levels)
            noisy = x + self.sigma * jax.random.normal(key, x.shape)
            rows = [x, noisy, decoder(encoder(noisy))] if self.sigma else [x, decoder(encoder(x))]
            return pixels(jnp.stack(rows), data.levels)

        def codes(params, key, batch):
            return maps(params)[0](normalize(batch["image"], data.levels))

        pictures = {"reconstructions": reconstructions}
        return Experiment(
            init, loss, sample, evaluate, pictures=pictures, codes=codes if self.network.latent == 2 else None
        )


def networks(config: AutoencoderConfig, data: DataSpec, features: int) -> tuple[Encoder, Decoder, Callable]:
    """Encoder, decoder of so many features a pixel, and key -> {"encoder": params, "decoder": params}."""
    encoder, decoder = Encoder(config), Decoder(config, features, data.shape)

    def init(key):
        key_phi, key_theta = jax.random.split(key)
        phi = encoder.init(key_phi, jnp.zeros((1, *data.shape)))["params"]
        theta = decoder.init(key_theta, jnp.zeros((1, config.latent)))["params"]
        return {"encoder": phi, "decoder": theta}

    return encoder, decoder, init


def dropout(key) -> dict:
    """What a network's `apply` wants to know: whether it is trained, and from which key its dropout is."""
    return {} if key is None else {"train": True, "rngs": {"dropout": key}}
