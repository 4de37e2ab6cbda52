"""Learning rate schedule, gradient clipping and Adam."""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from vdm_jax.training.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update i = 0, 1, ...: linear warm-up, then constant or cosine decay to zero.

    lr(i) = learning_rate * min(1, (i + 1) / warmup) * (1 + cos(pi * (i - warmup) / (steps - warmup))) / 2
    """

    def schedule(count: ArrayLike) -> Array:
        i = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (i + 1.0) / max(config.warmup_steps, 1))
        if config.lr_schedule == "constant":
            return config.learning_rate * warm
        done = (i - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        return config.learning_rate * warm * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))

    return schedule


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm (unless 0), then Adam, or AdamW with weight decay.

    With config.grad_skip, an update whose gradient norm is larger or NaN changes neither the parameters nor the
    optimizer state (Child 2020, arXiv:2011.10650). Scalar parameters, such as an end point of a noise schedule, are
    exempt from weight decay: 0 is not a neutral value for them.
    """
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    if config.weight_decay:
        decay = {"weight_decay": config.weight_decay, "mask": _is_array}
        adam = optax.adamw(learning_rate(config), b1=config.b1, b2=config.b2, **decay)
    else:
        adam = optax.adam(learning_rate(config), b1=config.b1, b2=config.b2)
    chain = optax.chain(clip, adam)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats, which strict promotion rejects
            new = chain.update(updates, state, params)
        if not config.grad_skip:
            return new
        keep = optax.tree.norm(updates) <= config.grad_skip  # false for NaN
        old = optax.tree.zeros_like(updates), state
        return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)

    return optax.GradientTransformation(chain.init, update)


def _is_array(params):
    return jax.tree.map(lambda x: jnp.ndim(x) > 0, params)
