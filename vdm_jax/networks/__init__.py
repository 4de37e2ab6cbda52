"""Flax (linen) networks.

    unet             UNet            eps, x_0, v or score of images (DDPM, VDM)
    mlp              MLP             the same for vectors
    refinenet        RefineNet       score of images at discrete noise levels (NCSN)
    autoencoder      Encoder, Decoder
    very_deep_vae    VeryDeepVAE     hierarchical VAE
    schedule         MonotoneNetwork shape of a learned noise schedule
    classifier       Classifier      classifier guidance, features of sample quality
    inception        inception_features, of the FID
    blocks, embeddings               parts of the networks above

Networks import no equations, and equations import no networks: equations take a network as a callable.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdm_jax.networks import (
        autoencoder,
        blocks,
        classifier,
        embeddings,
        inception,
        mlp,
        refinenet,
        schedule,
        unet,
        very_deep_vae,
    )

__all__ = [
    "autoencoder",
    "blocks",
    "classifier",
    "embeddings",
    "inception",
    "mlp",
    "refinenet",
    "schedule",
    "unet",
    "very_deep_vae",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
