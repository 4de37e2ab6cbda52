"""A damaged shard of the data set is one message with its folder."""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import RunningProcess, assert_one_message

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="set TFDS_DATA_DIR to prepared data sets"),
]


def truncate(data):
    return data[: len(data) // 2]


def nothing(data):
    return b""


def garbage(data):
    return random.Random(0).randbytes(len(data))


def spoil_the_middle(data):
    """Overwrite a block of a file."""
    half = len(data) // 2
    return data[:half] + bytes(65536) + data[half + 65536 :]


@pytest.mark.parametrize("damage", [truncate, nothing, garbage, spoil_the_middle])
def test_a_shard_is_damaged(tmp_path, damage):
    shutil.copytree(Path(os.environ["TFDS_DATA_DIR"]) / "mnist", tmp_path / "tfds/mnist")
    shard = max((tmp_path / "tfds/mnist").rglob("*train*array_record*"), key=lambda path: path.stat().st_size)
    shard.chmod(0o644)
    shard.write_bytes(damage(shard.read_bytes()))
    options = ("--num-samples", "0", "--data", "mnist", "--side", "28", "--steps", "3000", "--picture-every", "0")
    process = RunningProcess(tmp_path / "run", *options, environment={"TFDS_DATA_DIR": str(tmp_path / "tfds")})
    assert process.end() == 1, process.output()[-3000:]
    assert_one_message(process.output(), rf"'train' of the data set 'mnist' cannot be read from {shard.parent}")
