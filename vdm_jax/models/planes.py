"""What the recipes of points in a plane share: the truth, and the pictures that hold a model against it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vdm_jax import closed_form
from vdm_jax.networks.mlp import MLPConfig
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.experiment import DataSpec, Panel

SIDE = 2.2  # half of a picture's, in which nearly all points lie
FINE, COARSE = 160, 18  # positions across, of the colours and of the arrows


@dataclass(frozen=True)
class PlaneConfig(TrainConfig):
    """A model of points in a plane."""

    points: ClassVar[bool] = True


def check_network(config: MLPConfig) -> None:
    """Refuse a network that points in a plane have no use for.

    Raises:
        ValueError: names the option and its remedy.
    """
    if config.width < 4 or config.width % 2:
        raise ValueError(f"--network.width {config.width} must be even, and 4 or more")
    if config.num_classes:
        raise ValueError("--network.num-classes: models of points take no labels here")


def truth(data: DataSpec) -> closed_form.Mixture:
    """The law that the points are drawn from."""
    return closed_form.mixture(*PLANES[data.name]())


def grid(count: int, side: float = SIDE) -> jax.Array:
    """The middles of count x count equal squares, shape (count, count, 2)."""
    edge = side * (1.0 - 1.0 / count)
    middles = jnp.linspace(-edge, edge, count)
    return jnp.stack(jnp.meshgrid(middles, middles), axis=-1)


def landscape(log_prob: Callable[[Any], Any], **more) -> Panel:
    """A log-density as colours; (B, 2) -> (B,)."""
    x = grid(FINE)
    return Panel(x, log_prob(x.reshape(-1, 2)).reshape(FINE, FINE), **more)


def field(log_prob: Callable[[Any], Any], **scores: Callable[[Any], Any]) -> Panel:
    """Scores as arrows on a log-density; (B, 2) -> (B, 2)."""
    places = grid(COARSE)
    arrows = {name: score(places.reshape(-1, 2)).reshape(places.shape) for name, score in scores.items()}
    return landscape(log_prob, places=places, arrows=arrows)
