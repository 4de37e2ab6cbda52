import jax
import numpy as np
import pytest

from tests.training.bits import assert_same_bits
from tests.training.experiments.tiny import Widths
from vdm_jax.training import optimizer
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.evaluation.report import evaluate_examples
from vdm_jax.training.keys import stream
from vdm_jax.training.loop import train
from vdm_jax.training.run import abstract_state, initial_state, state_sharding
from vdm_jax.training.runtime.devices import (
    batch_sharding,
    local_rows,
    longest_axis_sharding,
    make_global,
    make_mesh,
    on_one_device,
    replicate,
    replicated,
)
from vdm_jax.training.step import make_step


def updated(run, number=3):
    """The state and metrics after some updates of a run."""
    config = run.config
    options = {"seed": config.seed, "ema_decay": config.ema_decay, "place": state_sharding(run)}
    step = make_step(run.experiment, optimizer.optimizer(config), run.mesh, **options)
    state, metrics = initial_state(run), {}
    for place in range(number):
        batch = run.data.train.take(np.arange(32) + 32 * place)
        state, metrics = step(state, make_global(batch, batch_sharding(run.mesh)))
    return step, state, metrics


def assert_close(one, other, rtol):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), jax.device_get(one), jax.device_get(other)
    )


@pytest.mark.parametrize(
    ("devices", "shard"),
    [
        (8, False),
        (4, True),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in [(2, False), (4, False), (2, True), (8, True)]),
    ],
)
def test_any_number_of_devices_makes_the_same_updates_to_rounding(tiny, devices, shard):
    step, one, metrics = updated(tiny(1))
    assert step._cache_size() == 1
    step, state, others = updated(tiny(devices, shard=shard))
    assert step._cache_size() == 1
    assert_close(state, one, 2e-5)
    assert_close(others, metrics, 2e-6)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {devices}
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state)) != shard


def test_evaluation_does_not_depend_on_the_number_of_devices_the_last_ragged_batch_included(tiny):
    """360 test images in blocks of 104: the last one is padded."""
    run = tiny(1)
    params, key = initial_state(run).params, stream(0, "evaluate")
    one = evaluate_examples(run, params, key)
    assert len(one["bits_per_dim"]) == 360
    assert (one["label"] == run.data.test.take(np.arange(360))["label"]).all()
    other = tiny(8, shard=True)
    assert_close(evaluate_examples(other, initial_state(other).params, key), one, 1e-6)


def test_an_array_is_sharded_along_its_longest_divisible_axis():
    mesh = make_mesh(8)
    for shape, part in {
        (3, 3, 64, 128): (3, 3, 64, 16),
        (3, 3, 64, 12): (3, 3, 8, 12),
        (4096,): (512,),
        (1001, 33): (1001, 33),
        (16, 8): (16, 8),  # too small to be sharded
        (): (),
    }.items():
        assert longest_axis_sharding(mesh, shape).shard_shape(shape) == part
    assert longest_axis_sharding(make_mesh(1), (4096,)).shard_shape((4096,)) == (4096,)


def test_a_sharded_state_needs_a_fraction_of_the_memory(tiny):
    """The size of a compiled step's arguments (state and batch) on one device, by the compiler's analysis."""
    taken = {}
    for shard in (False, True):
        run = tiny(8, shard=shard, widths=Widths(512))
        step, state, _ = updated(run, 1)
        batch = make_global(run.data.train.take(np.arange(32)), batch_sharding(run.mesh))
        taken[shard] = step.lower(state, batch).compile().memory_analysis().argument_size_in_bytes
        held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(state))
        assert held <= taken[shard] < held + 2000
    assert taken[True] < 1.2 * taken[False] / 8


def test_a_sharded_run_ends_as_a_replicated_one_and_resumes_as_one(tiny, tmp_path):
    sharded_run = tiny(8, shard=True, steps=10, workdir=str(tmp_path / "sharded"))
    state = train(sharded_run).state
    plain = train(tiny(8, steps=10, workdir=str(tmp_path / "plain"))).state
    assert_close(state, plain, 2e-5)
    with Checkpoints(sharded_run.folder / "checkpoints") as checkpoints:
        back = checkpoints.restore(abstract_state(tiny(2, workdir=str(tmp_path / "sharded")))).state
    assert all(x.is_fully_replicated for x in jax.tree.leaves(back))
    assert_same_bits(jax.tree.map(np.asarray, back), jax.tree.map(np.asarray, state))


def test_parts_make_a_whole():
    mesh, x = make_mesh(8), jax.random.normal(jax.random.key(0), (16, 256))
    for array in (jax.device_put(x, longest_axis_sharding(mesh, x.shape)), jax.device_put(x, replicated(mesh)), x):
        assert replicate(array).is_fully_replicated
        assert (on_one_device(array) == x).all()
        assert len(on_one_device(array).devices()) == 1


def test_one_process_holds_every_row_in_order():
    assert local_rows(make_mesh(8), 16).tolist() == list(range(16))
    batch = make_global({"image": np.arange(16)}, batch_sharding(make_mesh(4)))
    assert [shard.data.tolist() for shard in batch["image"].addressable_shards][1] == [4, 5, 6, 7]
