"""The state of training, and the moving average of the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Int

from vdm_jax.training.contract import Experiment, Params
from vdm_jax.training.keys import stream


class TrainState(NamedTuple):
    """All that an update reads and writes; with the data's position, all that a resumed run needs.

    step: number of updates made.
    params, ema: the parameters and their moving average.
    opt_state: the optimiser's own.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState


def create(experiment: Experiment, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update; the average starts at the parameters."""
    params = experiment.init(stream(seed, "init"))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def moving_average(ema: Params, params: Params, decay: float) -> Params:
    """decay * ema + (1 - decay) * params, written so that constant parameters stay exactly constant."""
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)


def count(params: Params) -> int:
    """Number of scalars in a pytree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))
