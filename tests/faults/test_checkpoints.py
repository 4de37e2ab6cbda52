"""Damaged checkpoints are skipped with a message, and the run ends in the same state; no wrong state is restored."""

import dataclasses
import random
import shutil
import threading

import pytest

from tests.faults.harness import (
    OPTIONS,
    STEPS,
    RunningProcess,
    assert_one_message,
    assert_same_run,
    checkpoints,
    train,
)
from tests.training.bits import assert_same_bits
from tests.training.experiments.tiny import CONFIG
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.run import abstract_state, open_run
from vdm_jax.training.runtime.devices import make_mesh

PATIENCE = 600  # seconds after which a reader counts as hanging, also on a busy machine


@pytest.fixture
def copy(tmp_path, whole):
    """A copy of the undisturbed run without its report."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy/tiny/report.json").unlink()
    return tmp_path / "copy"


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def truncate(checkpoint):
    for path in files(checkpoint / "state"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(checkpoint):
    max(files(checkpoint / "state"), key=lambda path: path.stat().st_size).unlink()


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def zero(checkpoint):
    """Files of the right length full of zeros, as after a power failure."""
    for path in files(checkpoint):
        path.write_bytes(bytes(path.stat().st_size))


def flip(path, moments):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    bit = moments.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def spoil_arrays(checkpoint):
    """Flip a bit in every 50 bytes of the arrays' files; a single flipped bit may be harmless (see below)."""
    for path in (checkpoint / "state").rglob("d/*"):
        path.write_bytes(bytes(byte ^ (place % 50 == 0) for place, byte in enumerate(path.read_bytes())))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, lose_a_file, empty, zero, spoil_arrays])
@pytest.mark.parametrize("number", [1, 2])
def test_damaged_newest_checkpoints_are_skipped(copy, whole, damage, number):
    bad = checkpoints(copy / "tiny")[-number:]
    for step in bad:
        damage(copy / f"tiny/checkpoints/{step}")
    output = train(copy, *OPTIONS)
    for step in bad:
        assert output.count(f"The checkpoint of step {step} cannot be read; moved to {copy}/tiny/unreadable.") == 1
    assert f"Resuming from step {STEPS - 10 * number} of {STEPS}." in output
    assert_same_run(copy, whole, beside=["unreadable/"])
    assert sorted(path.name for path in (copy / "tiny/unreadable").iterdir()) == sorted(map(str, bad))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, empty, zero])
def test_all_checkpoints_damaged(copy, damage):
    for step in checkpoints(copy / "tiny"):
        damage(copy / f"tiny/checkpoints/{step}")
    process = RunningProcess(copy, "--num-samples", "0", *OPTIONS)
    before = {path.name for path in (copy / "tiny").rglob("*")}
    assert process.end() == 1
    assert_one_message(process.output(), r"No checkpoint in .* can be read .*--fresh")
    assert {path.name for path in (copy / "tiny").rglob("*")} >= before


@pytest.mark.slow
def test_an_incomplete_checkpoint(copy, whole):
    folder = copy / "tiny/checkpoints"
    (folder / str(STEPS)).rename(folder / f"{STEPS}.orbax-checkpoint-tmp")
    for path in files(folder / f"{STEPS}.orbax-checkpoint-tmp")[::2]:
        path.unlink()
    assert f"Resuming from step {STEPS - 10} of {STEPS}." in train(copy, *OPTIONS)
    assert_same_run(copy, whole)


class Reader:
    """Reads the checkpoints of a copy of a run repeatedly, from a thread that may hang."""

    def __init__(self, workdir):
        self.run = open_run("tiny", dataclasses.replace(CONFIG, workdir=str(workdir)), make_mesh(1))
        self.like = abstract_state(self.run)
        self.folder = self.run.folder / "checkpoints"
        self.good = self.folder.with_name("good")
        shutil.copytree(self.folder, self.good)

    def read(self):
        found = []

        def restore():
            with Checkpoints(self.folder, keep=3) as saved:
                found.append(saved.restore(self.like))

        thread = threading.Thread(target=restore, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it hangs"
        assert found, "it raised"
        return found[0]

    def mend(self):
        shutil.rmtree(self.folder)
        shutil.rmtree(self.folder.with_name("unreadable"), ignore_errors=True)
        shutil.copytree(self.good, self.folder)


def fuzz(workdir, seed, times):
    """Flip this many bits of the newest checkpoint, one at a time; returns how often it was skipped."""
    reader, moments = Reader(workdir), random.Random(seed)
    newest = reader.read()
    shutil.rmtree(reader.folder / str(STEPS))
    before = reader.read()
    names = [path.relative_to(reader.good) for path in files(reader.good / str(STEPS)) if path.stat().st_size]
    passed = dict.fromkeys(names, 0)
    for number in range(times):
        name = names[number % len(names)]
        reader.mend()
        flip(reader.folder / name, moments)
        read = reader.read()
        assert read.unreadable in ([], [STEPS])
        expected = before if read.unreadable else newest
        assert_same_bits(read.state, expected.state)
        assert read.notes == expected.notes
        passed[name] += bool(read.unreadable)
    return passed


def test_a_flipped_bit_is_noticed_or_harmless(copy):
    fuzz(copy, seed=0, times=3)


@pytest.mark.slow
def test_many_flipped_bits_are_each_noticed_or_harmless(copy):
    passed = fuzz(copy, seed=1, times=400)
    print(f"400 bits flipped in {len(passed)} files, {sum(passed.values())} times passed over")
    for name, times in passed.items():
        print(f"  {times:3} of {400 // len(passed)}  {name}")
    assert sum(passed.values()) > 100
