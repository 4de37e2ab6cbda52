import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.bits import assert_same_bits
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.integrity import NonFiniteState, is_readable, summarize
from vdm_jax.training.runtime.errors import UserError, disk_is_full
from vdm_jax.training.state import TrainState

NOTES = {"config": {"a": [1, 2]}, "data": {"next_index": 7}, "seconds": 1.5}


def numbered(step):
    """A state of random numbers that depend on the step."""
    weights, biases = np.random.RandomState(step).normal(size=(64, 64)), np.full(3, step)
    params, ema = (
        {"w": jnp.asarray(scale * weights, jnp.float32), "b": jnp.asarray(scale * biases, jnp.bfloat16)}
        for scale in (1, 2)
    )
    return TrainState(jnp.asarray(step, jnp.int32), params, ema, (jnp.asarray(step, jnp.int32), ema))


def fill(folder, losses, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, numbered(step), NOTES, loss)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def break_array(folder, step):
    """Cut the largest file of a checkpoint to half its length."""
    largest = max((folder / str(step) / "state").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_a_saved_state_is_restored_bit_for_bit(tmp_path):
    fill(tmp_path, {3: 1.0})
    with Checkpoints(tmp_path) as checkpoints:
        saved = checkpoints.restore(numbered(0))
    assert_same_bits(saved.state, numbered(3))
    assert type(saved.state) is TrainState
    assert saved.notes == NOTES
    assert saved.unreadable == []


def test_the_newest_and_the_best_are_kept_also_across_a_restart(tmp_path):
    fill(tmp_path, {1: 5.0, 2: 0.5, 3: 4.0, 4: 3.0})
    assert steps(tmp_path) == [2, 3, 4]
    fill(tmp_path, {5: 2.0, 6: 1.0})
    assert steps(tmp_path) == [2, 5, 6]
    fill(tmp_path, {7: 0.1, 8: 1.0, 9: 1.0})
    assert steps(tmp_path) == [7, 8, 9]


def test_saving_in_the_background_survives_donation_of_the_state(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        state = jax.tree.map(jnp.copy, numbered(0))
        for step in range(3):
            checkpoints.save(step, state, NOTES, 1.0)
            state = overwrite(state)
    for step in range(3):
        with Checkpoints(tmp_path, keep=5) as checkpoints:
            read, _ = checkpoints._read(step, numbered(0))
        expected = numbered(0)
        for _ in range(step):
            expected = overwrite(jax.tree.map(jnp.copy, expected))
        assert_same_bits(read, expected)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(numbered(0)) is None
        assert checkpoints.latest is None


@pytest.mark.parametrize(
    "damage",
    ["array", "metrics", *(pytest.param(name, marks=pytest.mark.slow) for name in ("notes", "metadata", "gone")),
     "description"],
)  # fmt: skip
def test_an_unreadable_checkpoint_is_skipped(tmp_path, damage):
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 3.0, 2: 2.0, 3: 1.0})
    newest = folder / "3"
    if damage == "array":
        break_array(folder, 3)
    elif damage == "gone":
        for path in (newest / "state").rglob("*"):
            if path.is_file():
                path.unlink()
    else:
        name = {
            "notes": "notes/metadata",
            "metrics": "metrics/metrics",
            "metadata": "state/_METADATA",
            "description": "_CHECKPOINT_METADATA",
        }[damage]
        (newest / name).write_text('{"cut off')
    with Checkpoints(folder, 2) as checkpoints:
        saved = checkpoints.restore(numbered(0))
        assert_same_bits(saved.state, numbered(2))
        assert saved.unreadable == [3]
        checkpoints.set_aside(saved.unreadable)
        checkpoints.save(3, numbered(3), NOTES, 1.0)
    assert (tmp_path / "unreadable" / "3").is_dir()
    with Checkpoints(folder, 2) as checkpoints:
        assert_same_bits(checkpoints.restore(numbered(0)).state, numbered(3))


def test_a_checkpoint_that_can_be_read_and_is_not_what_was_saved_is_skipped(tmp_path):
    folder, other = tmp_path / "checkpoints", tmp_path / "other"
    fill(folder, {1: 3.0, 2: 2.0, 3: 1.0}, keep=3)
    fill(other, {3: 1.0})
    changed = numbered(3)._replace(ema={**numbered(3).ema, "b": numbered(3).ema["b"].at[2].add(1.0)})
    with Checkpoints(other) as checkpoints:
        checkpoints.save(4, changed, NOTES, 1.0)
    shutil.rmtree(folder / "3" / "state")
    shutil.copytree(other / "4" / "state", folder / "3" / "state")  # all but one number is right
    notes = folder / "2" / "notes" / "metadata"
    notes.write_text(notes.read_text().replace('"next_index": 7', '"next_index": 8'))
    with Checkpoints(folder) as checkpoints:
        saved = checkpoints.restore(numbered(0))
        assert saved.unreadable == [3, 2]
        assert_same_bits(saved.state, numbered(1))
        assert checkpoints.notes() == NOTES | {"checksum": summarize(numbered(3)).checksum}


def test_arrays_that_do_not_decode_are_detected_without_restoring(tmp_path):
    fill(tmp_path, {1: 3.0, 2: 2.0})
    break_array(tmp_path, 2)
    assert is_readable(tmp_path / "1" / "state")
    assert not is_readable(tmp_path / "2" / "state")


def test_a_copy_under_another_number_is_skipped(tmp_path):
    """A copy would hide all later checkpoints."""
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 3.0, 2: 2.0})
    shutil.copytree(folder / "2", folder / "90")
    (folder / "1²").mkdir()  # str.isdigit, but not a number
    with Checkpoints(folder) as checkpoints:
        saved = checkpoints.restore(numbered(0))
    assert saved.unreadable == [90]
    assert_same_bits(saved.state, numbered(2))


def test_a_state_with_a_number_that_is_not_finite_is_not_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for bad in (jnp.nan, jnp.inf):
            with pytest.raises(NonFiniteState):
                checkpoints.save(1, numbered(1)._replace(opt_state=(jnp.full((2, 2), bad),)), NOTES, 1.0)
    assert steps(tmp_path) == []


def test_a_message_reports_that_no_checkpoint_can_be_read(tmp_path):
    fill(tmp_path, {1: 3.0, 2: 2.0})
    for step in (1, 2):
        break_array(tmp_path, step)
    message = r"No checkpoint in .* can be read \(step 2.*--fresh"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(numbered(0))


def test_a_state_of_another_shape_is_not_read(tmp_path):
    fill(tmp_path, {1: 3.0})
    other = numbered(0)._replace(params={"w": jnp.zeros((3, 3)), "b": jnp.zeros(3, jnp.bfloat16)})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="can be read"):
        checkpoints.restore(other)


def test_an_incomplete_checkpoint_of_a_killed_run_is_ignored_and_removed(tmp_path):
    fill(tmp_path, {1: 3.0})
    half = tmp_path / "2.orbax-checkpoint-tmp-123"
    (half / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(numbered(0)).state.step) == 1
        checkpoints.save(2, numbered(2), NOTES, 1.0)
    assert not half.exists()
    assert steps(tmp_path) == [2]


def test_a_full_disk_is_recognized_behind_other_errors():
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk_is_full(error)
    assert disk_is_full(ValueError("RESOURCE_EXHAUSTED: write: No space left on device"))
    assert not disk_is_full(OSError(errno.ENOENT, "gone"))


def test_notes_are_plain_json(tmp_path):
    fill(tmp_path, {1: 3.0})
    written = json.loads((tmp_path / "1" / "notes" / "metadata").read_text())
    assert NOTES.items() <= written.items()
    assert written.keys() - NOTES.keys() == {"checksum", "digest"}
    assert np.isclose(json.loads((tmp_path / "1" / "metrics" / "metrics").read_text())["loss"], 3.0)
