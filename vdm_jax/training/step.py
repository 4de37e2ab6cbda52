"""One update as one `jit` over a device mesh: the batch is split, the parameters are replicated or sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from vdm_jax.training.experiment import Batch, Experiment, Params
from vdm_jax.training.keys import stream
from vdm_jax.training.runtime.devices import batch_sharding, replicated
from vdm_jax.training.state import TrainState, moving_average

Metrics = dict[str, Array]
Loss = Callable[[Params, Array, Batch, Array], tuple[Array, Metrics]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    place: Any = None,
) -> Step:
    """The compiled update (state, batch) -> (state, metrics); it donates the buffers of the state.

    Update i uses the key folded with i, so that a resumed run repeats the noise of an uninterrupted one. The metrics
    are the loss, the global norm of the gradient before clipping, and those of the experiment's loss. If the state is
    sharded (`place`, a sharding for each array; replicated by default), the devices gather the parameters for the
    gradient only, and each updates its shard.
    """
    everywhere, parts = replicated(mesh), batch_sharding(mesh)
    place = place or TrainState._make([everywhere] * 4)
    gradient = accumulated_gradient(experiment.loss, accumulate)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(stream(seed, "train"), state.step)
        gathered = jax.lax.with_sharding_constraint(state.params, everywhere)
        grads, metrics = gradient(gathered, key, batch, state.step)
        grads = jax.lax.with_sharding_constraint(grads, place.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, params, ema_decay, state.step)
        metrics = {"grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(step, donate_argnums=0, in_shardings=(place, parts), out_shardings=(place, everywhere))


def accumulated_gradient(loss: Loss, parts: int) -> Callable[[Params, Array, Batch, Array], tuple[Params, Metrics]]:
    """The gradient and the metrics averaged over `parts` micro-batches, computed one after the other."""

    def gradient(params: Params, key: Array, batch: Batch, step: Array) -> tuple[Params, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key, batch, step)
        return grads, {"loss": value, **metrics}

    def accumulated(params: Params, key: Array, batch: Batch, step: Array) -> tuple[Params, Metrics]:
        def add(total, part):
            index, micro = part
            new = gradient(params, jax.random.fold_in(key, index), micro, step)
            return jax.tree.map(jnp.add, total, new), None

        micros = jax.tree.map(lambda x: _micro_batches(x, parts), batch)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, params, key, jax.tree.map(lambda x: x[0], micros), step),
        )
        total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), micros))
        return jax.tree.map(lambda x: x / parts, total)

    return gradient if parts == 1 else accumulated


def _micro_batches(x: Array, parts: int) -> Array:
    """(B, ...) -> (parts, B / parts, ...) with every parts-th example, so that no example moves between devices."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
