"""A minimal DDPM in plain JAX, as tutorials write it: what the library is compared with, not a part of it.

A jitted update, a jitted reverse step, and Python loops around both; the schedule by `jnp.cumprod`; nothing donated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

NUM_STEPS = 1000
BETA = jnp.linspace(1e-4, 0.02, NUM_STEPS)
ABAR = jnp.cumprod(1.0 - BETA)
Apply = Callable[..., jax.Array]  # (params, x, t, **options) -> eps


class State(NamedTuple):
    """What training updates."""

    params: Any
    ema: Any
    opt_state: Any


def q_sample(x_0, t, eps):
    """x_t from x_0."""
    abar = ABAR[t][:, None, None, None]
    return jnp.sqrt(abar) * x_0 + jnp.sqrt(1.0 - abar) * eps


def make_update(apply: Apply, optimizer: optax.GradientTransformation, decay: float) -> Callable[..., Any]:
    """The jitted update ((state, key), x_0) -> ((state, key), loss)."""

    def loss(params, key, x_0):
        key_t, key_eps, key_dropout = jax.random.split(key, 3)
        t = jax.random.randint(key_t, (x_0.shape[0],), 0, NUM_STEPS)
        eps = jax.random.normal(key_eps, x_0.shape)
        predicted = apply(params, q_sample(x_0, t, eps), t, train=True, rngs={"dropout": key_dropout})
        return jnp.mean((eps - predicted) ** 2)

    @jax.jit
    def update(carry, x_0):
        state, key = carry
        key, use = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(state.params, use, x_0)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
        return (State(params, ema, opt_state), key), value

    return update


def make_ancestral(apply: Apply) -> Callable[..., jax.Array]:
    """Ho et al.'s sampler (params, key, x) -> x_0, a Python loop of jitted steps."""

    @jax.jit
    def p_sample(params, key, x, t):
        eps = apply(params, x, jnp.full(x.shape[0], t))
        x_0 = jnp.clip((x - jnp.sqrt(1.0 - ABAR[t]) * eps) / jnp.sqrt(ABAR[t]), -1.0, 1.0)
        before = jnp.where(t > 0, ABAR[t - 1], 1.0)
        mean = jnp.sqrt(before) * BETA[t] * x_0 + jnp.sqrt(1.0 - BETA[t]) * (1.0 - before) * x
        variance = BETA[t] * (1.0 - before) / (1.0 - ABAR[t])
        return mean / (1.0 - ABAR[t]) + jnp.sqrt(variance) * jax.random.normal(key, x.shape)

    def sample(params, key, x):
        for t in reversed(range(NUM_STEPS)):
            key, use = jax.random.split(key)
            x = p_sample(params, use, x, t)
        return x

    return sample


def make_ddim(apply: Apply, count: int) -> Callable[..., jax.Array]:
    """DDIM without noise (params, key, x) -> x_0 in `count` steps, a Python loop of jitted steps."""

    @jax.jit
    def step(params, x, t, s):
        eps = apply(params, x, jnp.full(x.shape[0], t))
        x_0 = jnp.clip((x - jnp.sqrt(1.0 - ABAR[t]) * eps) / jnp.sqrt(ABAR[t]), -1.0, 1.0)
        eps = (x - jnp.sqrt(ABAR[t]) * x_0) / jnp.sqrt(1.0 - ABAR[t])
        before = jnp.where(s >= 0, ABAR[s], 1.0)
        return jnp.sqrt(before) * x_0 + jnp.sqrt(1.0 - before) * eps

    def sample(params, key, x):
        del key
        times = list(range(NUM_STEPS - 1, -1, -NUM_STEPS // count))
        for t, s in zip(times, [*times[1:], -1], strict=True):
            x = step(params, x, t, s)
        return x

    return sample
