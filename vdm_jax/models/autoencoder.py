"""Plain and denoising autoencoders: a code without a distribution.

Source: Hinton & Salakhutdinov 2006; Vincent et al. 2008.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import autoencoder
from vdm_jax.likelihoods import normalize
from vdm_jax.models.images import to_pixels
from vdm_jax.networks.autoencoder import AutoencoderConfig, Decoder, Encoder
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import DataSpec, Experiment, SampleBatch

__all__ = ["Autoencoder", "EncoderDecoder"]


@dataclass(frozen=True)
class Autoencoder(TrainConfig):
    """An autoencoder; a denoising autoencoder if sigma is above 0."""

    network: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Options of the encoder and the decoder."""
    sigma: float = 0.0
    """Standard deviation of the noise added to the encoder's input, on [-1, 1]."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        if not self.sigma >= 0.0:
            raise ValueError(f"--sigma {self.sigma:g} must be at least 0")
        return _Functions(self, data).experiment()


class EncoderDecoder:
    """The encoder and decoder of a config, with their parameters in {"encoder": ..., "decoder": ...}."""

    def __init__(self, config: AutoencoderConfig, image_shape: tuple[int, ...], out_channels: int):
        self.encoder, self.decoder = Encoder(config), Decoder(config, out_channels, image_shape)
        self.latent, self.image_shape = config.latent, image_shape

    def init(self, key):
        key_phi, key_theta = jax.random.split(key)
        phi = self.encoder.init(key_phi, jnp.zeros((1, *self.image_shape)))["params"]
        theta = self.decoder.init(key_theta, jnp.zeros((1, self.latent)))["params"]
        return {"encoder": phi, "decoder": theta}

    def encode(self, params, key, x):
        """Mean and log-variance of q(z|x). With a key, dropout is on."""
        return self.encoder.apply({"params": params}, x, **_dropout(key))

    def decode(self, params, key, z):
        """The decoder's output. With a key, dropout is on."""
        return self.decoder.apply({"params": params}, z, **_dropout(key))


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the figures."""

    def __init__(self, config: Autoencoder, data: DataSpec):
        self.config, self.data = config, data
        self.networks = EncoderDecoder(config.network, data.shape, data.shape[-1])

    def experiment(self) -> Experiment:
        return Experiment(
            self.networks.init,
            self.loss,
            self.sample,
            self.evaluate,
            image_grids={"reconstructions": self.reconstructions},
            latent_codes=self.latent_codes if self.config.network.latent == 2 else None,
        )

    def encode(self, params, key, x):
        return self.networks.encode(params, key, x)[0]

    def encoder_and_decoder(self, params, key=None):
        """x -> z and z -> x with these parameters."""
        key_encoder, key_decoder = (None, None) if key is None else jax.random.split(key)
        encoder = Partial(self.encode, params["encoder"], key_encoder)
        return encoder, Partial(self.networks.decode, params["decoder"], key_decoder)

    def errors(self, params, key_dropout, key, batch, sigma):
        """Squared reconstruction error per dimension from noisy inputs; shape (B,)."""
        x = normalize(batch["image"], self.data.levels)
        encoder, decoder = self.encoder_and_decoder(params, key_dropout)
        error = autoencoder.denoising_reconstruction_error(encoder, decoder, key, x, sigma)
        return error / int(np.prod(self.data.shape))

    def loss(self, params, key, batch, step):
        """The (denoising) reconstruction error."""
        del step
        key_dropout, key_eps = jax.random.split(key)
        return self.errors(params, key_dropout, key_eps, batch, self.config.sigma).mean(), {}

    def sample(self, params, key, n):
        """Decoded codes from N(0, I); an autoencoder has no better distribution of its codes (AE-3)."""
        _, decoder = self.encoder_and_decoder(params)
        z = jax.random.normal(key, (n, self.config.network.latent))
        return SampleBatch(to_pixels(decoder(z), self.data.levels))

    def evaluate(self, params, key, batch):
        """The reconstruction error from clean inputs, and from noisy ones if the model is trained on them."""
        errors = {"reconstruction_error": self.errors(params, None, key, batch, 0.0)}
        if self.config.sigma:
            errors["denoising_error"] = self.errors(params, None, key, batch, self.config.sigma)
        return errors

    def reconstructions(self, params, key, batch):
        """Rows: clean, noisy if the model is trained on noisy images, reconstructed."""
        encoder, decoder = self.encoder_and_decoder(params)
        x = normalize(batch["image"], self.data.levels)
        noisy = x + self.config.sigma * jax.random.normal(key, x.shape)
        rows = [x, noisy, decoder(encoder(noisy))] if self.config.sigma else [x, decoder(encoder(x))]
        return to_pixels(jnp.stack(rows), self.data.levels)

    def latent_codes(self, params, key, batch):
        del key
        encoder, _ = self.encoder_and_decoder(params)
        return encoder(normalize(batch["image"], self.data.levels))


def _dropout(key) -> dict:
    """Arguments of a network's `apply`: with a key, dropout is on."""
    return {} if key is None else {"train": True, "rngs": {"dropout": key}}
