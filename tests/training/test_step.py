import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.bits import assert_same_bits
from vdm_jax.training import optimizer, state
from vdm_jax.training.experiment import Experiment
from vdm_jax.training.run import initial_state
from vdm_jax.training.runtime.devices import batch_sharding, make_mesh, replicated
from vdm_jax.training.step import accumulated_gradient, make_step


def test_the_batch_is_split():
    batch = jax.device_put(np.zeros((32, 8, 8, 1)), batch_sharding(make_mesh(8)))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(4, 8, 8, 1)}


@pytest.mark.parametrize("devices", [1, 8])
def test_accumulated_gradient_is_that_of_the_whole_batch(devices):
    def loss(params, key, batch, step):
        x = batch["image"].astype(jnp.float32)
        value = jnp.square(x @ params - batch["label"].astype(jnp.float32)).mean()
        return value, {"mean": x.mean()}

    mesh = make_mesh(devices)
    rng = np.random.RandomState(0)
    batch = {"image": rng.randint(0, 17, (32, 5)), "label": rng.randint(0, 9, 32)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    params = jax.device_put(jnp.arange(5.0), replicated(mesh))
    key, step = jax.random.key(0), jnp.asarray(0)
    whole = jax.jit(accumulated_gradient(loss, 1))(params, key, batch, step)
    parts = jax.jit(accumulated_gradient(loss, 4))(params, key, batch, step)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), whole, parts)
    exact = jax.jit(jax.grad(lambda p: loss(p, key, batch, step)[0]))(params)
    np.testing.assert_allclose(parts[0], exact, rtol=1e-5)


def test_micro_batches_have_different_noise():
    def loss(params, key, batch, step):
        return params * jax.random.normal(key), {"square": jnp.square(jax.random.normal(key))}

    batch = {"image": jnp.zeros((4, 1))}
    gradient = jax.jit(accumulated_gradient(loss, 4))
    grads, metrics = gradient(jnp.float32(1.0), jax.random.key(0), batch, jnp.asarray(0))
    assert float(metrics["square"]) > float(grads) ** 2 * 1.01  # equal if all four had the same noise


def test_one_update_by_hand():
    def loss(params, key, batch, step):
        return jnp.square(params - 3.0).sum(), {}

    experiment = Experiment(lambda key: jnp.zeros(()), loss, None, None)
    mesh, sgd = make_mesh(1), optax.sgd(0.1)
    start = jax.device_put(state.create(experiment, sgd, 0), replicated(mesh))
    step = make_step(experiment, sgd, mesh, seed=0, ema_decay=0.75)
    new, metrics = step(start, {"image": jnp.zeros((1, 1))})
    assert int(new.step) == 1
    assert float(new.params) == pytest.approx(0.6)
    assert float(new.ema) == pytest.approx(0.9 * 0.6)  # the average is taken after the update, its first decay is 0.1
    assert float(metrics["loss"]) == pytest.approx(9.0)
    assert float(metrics["grad_norm"]) == pytest.approx(6.0)
    new, _ = step(new, {"image": jnp.zeros((1, 1))})
    assert float(new.params) == pytest.approx(1.08)
    assert float(new.ema) == pytest.approx(2 / 11 * 0.54 + 9 / 11 * 1.08)
    new, _ = step(new._replace(step=jnp.asarray(26)), {"image": jnp.zeros((1, 1))})  # (1 + 26) / (10 + 26) = 0.75
    assert float(new.ema) == pytest.approx(0.75 * (2 / 11 * 0.54 + 9 / 11 * 1.08) + 0.25 * 1.464)


def test_the_noise_of_an_update_depends_on_seed_and_step():
    experiment = Experiment(
        lambda key: jnp.zeros(()),
        lambda params, key, batch, step: (params * 0.0, {"noise": jax.random.normal(key)}),
        None,
        None,
    )
    mesh, sgd = make_mesh(1), optax.sgd(0.1)

    def noise(seed, number=3):
        step = make_step(experiment, sgd, mesh, seed=seed, ema_decay=0.0)
        current, sampled = jax.device_put(state.create(experiment, sgd, seed), replicated(mesh)), []
        for _ in range(number):
            current, metrics = step(current, {"image": jnp.zeros((1, 1))})
            sampled.append(float(metrics["noise"]))
        return sampled

    assert noise(0) == noise(0)
    assert len({*noise(0), *noise(1)}) == 6


def test_the_loss_gets_the_number_of_updates_made():
    experiment = Experiment(
        lambda key: jnp.zeros(()), lambda params, key, batch, step: (params, {"at": step}), None, None
    )
    mesh, sgd = make_mesh(1), optax.sgd(0.1)
    step = make_step(experiment, sgd, mesh, seed=0, ema_decay=0.0)
    current, output = jax.device_put(state.create(experiment, sgd, 0), replicated(mesh)), []
    for _ in range(3):
        current, metrics = step(current, {"image": jnp.zeros((1, 1))})
        output.append(int(metrics["at"]))
    assert output == [0, 1, 2]


def test_the_old_state_is_given_back_to_the_device_and_the_same_update_gives_the_same_bits(tiny):
    run = tiny(1)
    step = make_step(run.experiment, optimizer.optimizer(run.config), run.mesh, seed=0, ema_decay=0.9)
    batch = jax.device_put(run.data.train.take(np.arange(32)), batch_sharding(run.mesh))
    news = []
    for _ in range(2):
        old = initial_state(run)
        news.append(step(old, batch)[0])
        assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.ema, old.opt_state)))
    assert_same_bits(*news)
