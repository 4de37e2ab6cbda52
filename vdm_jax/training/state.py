"""The training state and the exponential moving average of the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int

from vdm_jax.training.experiment import Experiment, Params
from vdm_jax.training.keys import stream


class TrainState(NamedTuple):
    """What an update reads and writes; with the position in the data, all that a resumed run needs.

    step: number of updates made.
    params, ema: the parameters and their exponential moving average.
    opt_state: the state of the optimizer.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState


def create(experiment: Experiment, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update; the average starts at the parameters."""
    params = experiment.init(stream(seed, "init"))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def moving_average(ema: Params, params: Params, decay: float, updates: ArrayLike) -> Params:
    """The moving average after one more update, with a warmed-up decay.

        d ema + (1 - d) params        d = min(decay, (1 + n) / (10 + n))

    Without the warm-up, the initial parameters have weight decay^N after N updates: 0.96 after 400 updates at 0.9999.
    With it their weight is at most N! 9! / (N + 9)!, below 1e-6 from N = 15 on. From n = (10 decay - 1) / (1 - decay)
    on, d equals decay.

    Args:
        ema: the average so far.
        params: the parameters after this update.
        decay: the maximum decay; 0 returns the parameters.
        updates: n, the number of updates before this one.

    Source: TensorFlow's `tf.train.ExponentialMovingAverage(decay, num_updates)`.
    """
    # In this form constant parameters stay exactly constant, and 1 - decay is not rounded to float32.
    rate = jnp.maximum(1.0 - decay, 9.0 / (10.0 + jnp.asarray(updates, jnp.float32)))
    return jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), ema, params)


def count(params: Params) -> int:
    """Number of scalars in a pytree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))
