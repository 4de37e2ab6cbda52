"""DDPMs of real-valued data: vectors and series, standardized, with a normal decoder.

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import flax.linen as nn

from vdm_jax.models.ddpm import DDPM
from vdm_jax.networks.mlp import MLP, MLPConfig
from vdm_jax.training.config import DataKind

__all__ = ["SeriesDDPM", "VectorDDPM"]


@dataclass(frozen=True)
class VectorDDPM(DDPM):
    """A denoising diffusion probabilistic model of vectors."""

    network: MLPConfig = field(default_factory=MLPConfig)
    """Options of the denoising network."""

    data_kind: ClassVar[DataKind] = "vectors"

    def module(self) -> nn.Module:
        """The denoising network."""
        return MLP(self.network)


@dataclass(frozen=True)
class SeriesDDPM(DDPM):
    """A denoising diffusion probabilistic model of series, with a U-Net whose convolutions run along time."""

    data_kind: ClassVar[DataKind] = "series"
