"""Shared by models of points in the plane: the data distribution in closed form, and panels of densities and scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vdm_jax import closed_form
from vdm_jax.networks.mlp import MLPConfig
from vdm_jax.training.config import DataKind, TrainConfig
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.experiment import DataSpec, Panel

__all__ = ["PlaneModel", "check_network", "data_distribution", "density_panel", "grid", "score_panel"]

SIDE = 2.2  # half the side of a panel; nearly all points are inside
FINE, COARSE = 160, 18  # grid points across, of the density and of the arrows


@dataclass(frozen=True)
class PlaneModel(TrainConfig):
    """A model of points in the plane."""

    data_kind: ClassVar[DataKind] = "planes"


def check_network(config: MLPConfig) -> None:
    """Reject a network that cannot take unlabeled points in the plane.

    Raises:
        ValueError: names the option and its remedy.
    """
    if config.width < 4 or config.width % 2:
        raise ValueError(f"--network.width {config.width} must be even, and 4 or more")
    if config.num_classes:
        raise ValueError(
            f"--network.num-classes {config.num_classes}: class conditioning is not implemented for recipes of points "
            "in the plane; set --network.num-classes 0"
        )


def data_distribution(data: DataSpec) -> closed_form.Mixture:
    """The distribution of the points."""
    return closed_form.mixture(*PLANES[data.name]())


def grid(count: int, side: float = SIDE) -> jax.Array:
    """The centers of count x count equal cells of [-side, side]^2, shape (count, count, 2)."""
    edge = side * (1.0 - 1.0 / count)
    centers = jnp.linspace(-edge, edge, count)
    return jnp.stack(jnp.meshgrid(centers, centers), axis=-1)


def density_panel(log_prob: Callable[[Any], Any], **more) -> Panel:
    """A log-density, (B, 2) -> (B,), as colors."""
    x = grid(FINE)
    return Panel(x, log_prob(x.reshape(-1, 2)).reshape(FINE, FINE), **more)


def score_panel(log_prob: Callable[[Any], Any], **scores: Callable[[Any], Any]) -> Panel:
    """Scores, (B, 2) -> (B, 2), as arrows on a log-density."""
    places = grid(COARSE)
    arrows = {name: score(places.reshape(-1, 2)).reshape(places.shape) for name, score in scores.items()}
    return density_panel(log_prob, places=places, arrows=arrows)
