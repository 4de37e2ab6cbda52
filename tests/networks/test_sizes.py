"""Sizes that no network can have are refused by name, wherever the config is made."""

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

PYRAMIDS = [UNetConfig(), AutoencoderConfig(), ClassifierConfig()]


@pytest.mark.parametrize("config", PYRAMIDS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups is 0: set it to 1 or more"),
        ({"groups": -8}, "groups is -8"),
        ({"multipliers": ()}, r"multipliers is \(\): give a number for each resolution"),
        ({"multipliers": (1, 0)}, r"multipliers is \(1, 0\)"),
        ({"blocks": -1}, "blocks is -1: set it to 0 or more"),
        ({"dropout": 1.0}, r"dropout is 1.0: it is a probability, in \[0, 1\)"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_a_pyramid_s_sizes(config, options, message):
    config.check((32, 32, 3))
    with pytest.raises(ValueError, match=message):
        replace(config, **options).check((32, 32, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (UNetConfig(channels=0), "0 channels"),
        (UNetConfig(out_channels=-1), "out_channels is -1"),
        (UNetConfig(num_classes=-1), "num_classes is -1"),
        (AutoencoderConfig(width=0), "width is 0"),
        (AutoencoderConfig(architecture="mlp", width=0), "width is 0"),
        (AutoencoderConfig(latent=0), "latent"),
        (ClassifierConfig(channels=0), "channels is 0"),
        (ClassifierConfig(features=0), "features is 0"),
        (VeryDeepVAEConfig(layers=(), encoder=()), "need layers"),
        (VeryDeepVAEConfig(layers=((0, 1), (32, 1)), encoder=((32, 1), (0, 1))), r"resolutions \[0, 32\]: each is 1"),
        (VeryDeepVAEConfig(layers=((-1, 1), (32, 1)), encoder=((32, 1), (-1, 1))), r"resolutions \[-1, 32\]"),
        (VeryDeepVAEConfig(out_channels=0), "out_channels is 0"),
    ],
)
def test_what_no_network_of_images_has(config, message):
    with pytest.raises(ValueError, match=message):
        config.check((32, 32, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, "width is 7: take an even number"),
        ({"width": 0}, "width is 0"),
        ({"blocks": -1}, "blocks is -1"),
        ({"out_features": -1}, "out_features is -1"),
    ],
)
def test_what_no_perceptron_has(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MLP(MLPConfig(**options)).init, jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))


def test_an_embedding_of_another_name_is_not_taken_for_the_log_snr():
    embedding = LevelEmbedding("fourier", 8, 8, 0, jnp.float32)
    with pytest.raises(ValueError, match="unknown embedding 'fourier': choose 'sinusoidal' or 'log_snr'"):
        jax.eval_shape(lambda key: embedding.init(key, jnp.zeros(1), None), jax.random.key(0))
