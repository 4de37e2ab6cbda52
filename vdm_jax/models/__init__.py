"""Models: equations and networks put together. Each is a frozen dataclass of options with `build(data) -> Experiment`.

    ddpm             DDPM                  denoising diffusion, L_simple, ancestral sampling
    iddpm            IDDPM                 a DDPM with a learned reverse variance, L_hybrid or L_vlb
    real_valued      VectorDDPM and others a DDPM of real-valued vectors or series
    vdm              VDM                   variational diffusion with a learned noise schedule
    ncsn             NCSN                  noise-conditional score network, annealed Langevin dynamics
    vae              VAE                   variational autoencoder with one latent
    hvae             HVAE                  very deep hierarchical VAE
    autoencoder      Autoencoder           plain and denoising autoencoder
    denoiser         ImageDenoiser         denoiser at one noise level, trained by SURE or on clean images
    score_2d         Score2D               score model of points in the plane
    energy_2d        Energy2D              energy-based model of points in the plane

Options that several models share: `sampling` (samplers of diffusion models), `annealing` (noise scales, annealed
Langevin dynamics), `pixel_likelihood` (p(x|z) of VAEs), `likelihood_report` (rows of `make eval`), `latent_variable`
(VAEs of any depth). `scaling` turns examples into x_0 and gives -log p its unit. `interpolation` and `restoration` use
a trained diffusion model on given images. `images` and `planes` make the figures. The recipes are in `experiments`.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdm_jax.models import (
        annealing,
        autoencoder,
        ddpm,
        denoiser,
        energy_2d,
        hvae,
        iddpm,
        images,
        interpolation,
        latent_variable,
        likelihood_report,
        ncsn,
        pixel_likelihood,
        planes,
        restoration,
        sampling,
        score_2d,
        vae,
        vdm,
    )

__all__ = [
    "annealing",
    "autoencoder",
    "ddpm",
    "denoiser",
    "energy_2d",
    "hvae",
    "iddpm",
    "images",
    "interpolation",
    "latent_variable",
    "likelihood_report",
    "ncsn",
    "pixel_likelihood",
    "planes",
    "restoration",
    "sampling",
    "score_2d",
    "vae",
    "vdm",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
