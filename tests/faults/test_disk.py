"""A full, read-only or removed disk is one message; the run then resumes to the same bits."""

import shutil
import time

import pytest

from tests.faults.disks import Disk
from tests.faults.harness import (
    ENDLESS,
    OPTIONS,
    RunningProcess,
    assert_one_message,
    assert_same_run,
    paths,
    train,
)

pytestmark = pytest.mark.slow
QUIET = ("--num-samples", "0")
FULL = r"The disk is full\. Free some space or use another --workdir"
READ_ONLY = (
    r"The file system is not writable \(.*Read-only file system.*\)\. Make it writable, or use another --workdir"
)


def end_on(disk, tmp_path, whole, means=True):
    """Finish the run and compare a copy of it."""
    train(disk.place, *OPTIONS, under=disk.under)
    shutil.copytree(disk.inside, tmp_path / "copy")
    assert_same_run(tmp_path / "copy", whole, means)


@pytest.mark.parametrize(
    "what", [("--checkpoint-every", "1", "--log-every", "5"), ("--log-every", "1", "--checkpoint-every", "100000")]
)
def test_the_disk_fills_up(tmp_path, whole, what):
    with Disk(tmp_path / "disk", 3000) as disk:
        process = RunningProcess(disk.place, *QUIET, *ENDLESS, *what, under=disk.under)
        process.folder = disk.inside / "tiny"
        if what[0] == "--checkpoint-every":
            process.until_saved(beyond=2)
        else:
            process.until_printed("step 3/")
        disk.fill()
        assert process.end() == 1, process.output()[-3000:]
        assert_one_message(process.output(), FULL)
        disk.make_room()
        end_on(disk, tmp_path, whole, means=False)


def test_the_disk_is_full_from_the_start(tmp_path, whole):
    with Disk(tmp_path / "disk", 3000) as disk:
        disk.fill()
        for _ in range(2):
            process = RunningProcess(disk.place, *QUIET, *OPTIONS, under=disk.under)
            assert process.end() == 1, process.output()[-3000:]
            assert_one_message(process.output(), FULL)
        disk.make_room()
        end_on(disk, tmp_path, whole)


def test_the_disk_is_read_only(tmp_path, whole):
    with Disk(tmp_path / "disk", 3000) as disk:
        for steps in (None, "20"):
            if steps:
                train(disk.place, *OPTIONS, "--steps", steps, under=disk.under)
            disk.read_only()
            before = paths(disk.inside)
            process = RunningProcess(disk.place, *QUIET, *OPTIONS, under=disk.under)
            assert process.end() == 1, process.output()[-3000:]
            assert_one_message(process.output(), READ_ONLY)
            assert paths(disk.inside) == before
            disk.read_only(False)
        end_on(disk, tmp_path, whole)


@pytest.mark.parametrize("what", [("--checkpoint-every", "5"), ("--log-every", "1"), ("--log-every", "1000000")])
def test_the_folder_is_removed(tmp_path, whole, what):
    seldom = ("--log-every", "50", "--checkpoint-every", "1000")
    process = RunningProcess(tmp_path / "run", *QUIET, *ENDLESS, *seldom, *what)
    process.until(lambda: (tmp_path / "run/tiny/tensorboard").exists())
    time.sleep(1.5)
    while (tmp_path / "run/tiny").exists():  # while the run writes to it
        shutil.rmtree(tmp_path / "run/tiny", ignore_errors=True)
    assert process.end() == 1, process.output()[-3000:]
    assert_one_message(process.output(), r"was removed during the run.* The same command starts a new run")
    train(tmp_path / "run", *OPTIONS, "--fresh")
    assert_same_run(tmp_path / "run", whole)
