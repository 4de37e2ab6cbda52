"""Invalid sizes in a network's config are refused by the name of the field."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from vdm_jax.networks.autoencoder import AutoencoderConfig
from vdm_jax.networks.blocks import LevelEmbedding
from vdm_jax.networks.classifier import ClassifierConfig
from vdm_jax.networks.mlp import MLP, MLPConfig
from vdm_jax.networks.unet import UNetConfig
from vdm_jax.networks.very_deep_vae import VeryDeepVAEConfig

WITH_RESOLUTIONS = [UNetConfig(), AutoencoderConfig(), ClassifierConfig()]


@pytest.mark.parametrize("config", WITH_RESOLUTIONS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups is 0: set it to 1 or more"),
        ({"groups": -8}, "groups is -8"),
        ({"multipliers": (1, 0)}, r"multipliers is \(1, 0\)"),
        ({"blocks": -1}, "blocks is -1: set it to 0 or more"),
        ({"dropout": 1.0}, r"dropout is 1.0: .* \[0, 1\)"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_invalid_sizes_of_networks_with_several_resolutions(config, options, message):
    config.check((32, 32, 3))
    with pytest.raises(ValueError, match=message):
        replace(config, **options).check((32, 32, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AutoencoderConfig(multipliers=()), r"multipliers is \(\): set one number"),
        (ClassifierConfig(multipliers=()), r"multipliers is \(\): set one number"),
        (UNetConfig(channels=0), "channels is 0"),
        (UNetConfig(out_channels=-1), "out_channels is -1"),
        (UNetConfig(num_classes=-1), "num_classes is -1"),
        (AutoencoderConfig(width=0), "width is 0"),
        (AutoencoderConfig(architecture="mlp", width=0), "width is 0"),
        (AutoencoderConfig(latent=0), "latent is 0"),
        (ClassifierConfig(channels=0), "channels is 0"),
        (ClassifierConfig(features=0), "features is 0"),
        (VeryDeepVAEConfig(layers=(), encoder=()), r"layers have resolutions \[\]"),
        (
            VeryDeepVAEConfig(layers=((0, 1), (32, 1)), encoder=((32, 1), (0, 1))),
            r"\[0, 32\]: set each to 1",
        ),
        (VeryDeepVAEConfig(layers=((-1, 1), (32, 1)), encoder=((32, 1), (-1, 1))), r"resolutions \[-1, 32\]"),
        (VeryDeepVAEConfig(out_channels=0), "out_channels is 0"),
    ],
)
def test_invalid_sizes_of_image_networks(config, message):
    with pytest.raises(ValueError, match=message):
        config.check((32, 32, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, "width is 7: set an even number"),
        ({"width": 0}, "width is 0"),
        ({"blocks": -1}, "blocks is -1"),
        ({"out_features": -1}, "out_features is -1"),
    ],
)
def test_invalid_sizes_of_a_perceptron(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MLP(MLPConfig(**options)).init, jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))


def test_an_unknown_embedding_is_refused():
    embedding = LevelEmbedding("fourier", 8, 8, 0, jnp.float32)
    with pytest.raises(ValueError, match="embedding is 'fourier': set it to 'sinusoidal' or 'log_snr'"):
        jax.eval_shape(lambda key: embedding.init(key, jnp.zeros(1), None), jax.random.key(0))
