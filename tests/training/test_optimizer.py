import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdm_jax.training.config import TrainConfig
from vdm_jax.training.optimizer import learning_rate, optimizer

CONFIG = TrainConfig(steps=10, learning_rate=0.1, warmup_steps=4, grad_clip=0.0)


def rates(config):
    return [float(learning_rate(config)(jnp.asarray(i))) for i in range(config.steps)]


def test_warm_up_is_linear_then_constant():
    assert rates(CONFIG) == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 7)


def test_no_warm_up_starts_at_the_learning_rate():
    assert rates(dataclasses.replace(CONFIG, warmup_steps=0)) == pytest.approx([0.1] * 10)


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero():
    expected = [0.025, 0.05, 0.075, 0.1] + [0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    config = dataclasses.replace(CONFIG, lr_schedule="cosine")
    assert rates(config) == pytest.approx(expected)
    assert float(learning_rate(config)(jnp.asarray(10))) == pytest.approx(0.0, abs=1e-8)
    assert float(learning_rate(config)(jnp.asarray(99))) == pytest.approx(0.0, abs=1e-8)


def moments(config, grads, params=(3.0, -2.0)):
    """First and second moment and new parameters after one update."""
    params = jnp.asarray(params)
    adam = optimizer(config)
    updates, state = jax.jit(adam.update)(jnp.asarray(grads), adam.init(params), params)
    return optax.tree.get(state, "mu"), optax.tree.get(state, "nu"), params + updates


def test_clipping_scales_the_gradient_to_the_norm():
    mu, nu, _ = moments(dataclasses.replace(CONFIG, grad_clip=1.0, b2=0.9), [3.0, 4.0])
    np.testing.assert_allclose(mu, [0.1 * 0.6, 0.1 * 0.8], rtol=1e-6)
    np.testing.assert_allclose(nu, [0.1 * 0.36, 0.1 * 0.64], rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 5.1])
def test_no_clipping_at_zero_nor_below_the_norm(clip):
    mu, _, _ = moments(dataclasses.replace(CONFIG, grad_clip=clip), [3.0, 4.0])
    np.testing.assert_allclose(mu, [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize(("gradient", "moves"), [([3.0, 4.0], True), ([3.0, 4.1], False), ([jnp.nan, 0.0], False)])
def test_an_update_of_too_large_a_gradient_changes_nothing(gradient, moves):
    adam = optimizer(dataclasses.replace(CONFIG, grad_skip=5.0))
    params = jnp.asarray([3.0, -2.0])
    state = adam.update(jnp.asarray([0.1, 0.2]), adam.init(params), params)[1]
    updates, new = jax.jit(adam.update)(jnp.asarray(gradient), state, params)
    assert np.all(updates != 0.0) == moves
    for part in ("mu", "nu", "count"):
        same = np.array_equal(
            optax.tree.get_all_with_path(new, part)[0][1], optax.tree.get_all_with_path(state, part)[0][1]
        )
        assert same != moves


def test_without_averaged_gradients_a_part_at_rest_stays_where_it_is():
    adam = optimizer(dataclasses.replace(CONFIG, b1=0.0))
    params = jnp.asarray([3.0, -2.0])
    state = adam.update(jnp.asarray([1.0, 2.0]), adam.init(params), params)[1]
    updates, _ = adam.update(jnp.asarray([1.0, 0.0]), state, params)
    assert updates[0] != 0.0
    assert updates[1] == 0.0


def test_first_update_is_the_warmed_up_rate_against_the_gradient():
    _, _, params = moments(CONFIG, [3.0, -4.0])
    np.testing.assert_allclose(params, [3.0 - 0.025, -2.0 + 0.025], rtol=1e-6)


def test_weight_decay_is_decoupled_from_the_gradient():
    _, _, params = moments(dataclasses.replace(CONFIG, weight_decay=0.2), [3.0, -4.0])
    np.testing.assert_allclose(params, [3.0 - 0.025 * (1 + 0.2 * 3.0), -2.0 + 0.025 * (1 + 0.2 * 2.0)], rtol=1e-6)


def test_single_numbers_do_not_decay():
    adam = optimizer(dataclasses.replace(CONFIG, weight_decay=0.5, warmup_steps=0))
    params = {"end": jnp.asarray(-8.0), "weights": jnp.asarray([2.0, -4.0])}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = adam.update(zero, adam.init(params), params)
    np.testing.assert_allclose(updates["end"], 0.0)
    np.testing.assert_allclose(updates["weights"], [-0.1, 0.2], rtol=1e-6)  # -lr * decay * weight
