"""A checkpoint that a killed run was deleting is removed."""

import shutil

from tests.training.bits import assert_same_bits
from tests.training.test_checkpoint import fill, numbered
from vdm_jax.training.checkpoint import METADATA, Checkpoints


def test_an_old_checkpoint_that_is_half_deleted_is_deleted_and_a_new_one_is_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}, keep=4)
    (folder / "1" / METADATA).unlink()
    shutil.rmtree(folder / "2/metrics")
    (folder / "4" / METADATA).unlink()  # the newest one, which runs never delete
    with Checkpoints(folder, 4) as checkpoints:
        saved = checkpoints.restore(numbered(0))
    assert_same_bits(saved.state, numbered(3))
    assert saved.unreadable == [4]
    assert [path.name for path in (tmp_path / "unreadable").iterdir()] == ["4"]
    assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["3"]
