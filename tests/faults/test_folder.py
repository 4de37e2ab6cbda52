"""A second run in a folder and a run with changed options are refused, and change nothing."""

import hashlib

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

pytestmark = pytest.mark.slow
QUIET = ("--num-samples", "0")


def contents(folder):
    """The digests of all files of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in files}


def test_a_second_run_in_a_folder_is_refused_and_the_first_continues(tmp_path, whole):
    first = RunningProcess(tmp_path / "run", *QUIET, *OPTIONS, "--steps", "6000", "--checkpoint-every", "1000")
    first.until_printed("step 10/")
    seconds = [RunningProcess(tmp_path / "run", *QUIET, *OPTIONS, *fresh) for fresh in ((), ("--fresh",))]
    for second in seconds:
        assert second.end() == 1, second.output()[-3000:]
        assert_one_message(second.output(), rf"Another run is using .* \(process {first.popen.pid} on ")
    assert first.popen.poll() is None, "it ended before the others came"
    assert first.end() == 0, first.output()[-3000:]
    train(tmp_path / "alone", *OPTIONS, "--steps", "6000", "--checkpoint-every", "1000")
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_other_options_are_refused_and_shown_and_nothing_is_changed(tmp_path, whole):
    train(tmp_path / "run", *OPTIONS, "--steps", "20")
    before = contents(tmp_path / "run")
    process = RunningProcess(tmp_path / "run", *QUIET, *OPTIONS, "--learning-rate", "0.5", "--widths.hidden", "8")
    assert process.end() == 1
    assert_one_message(
        process.output(),
        r"(?s)options differ from those of the run in .* \(saved -> now\):\n  --learning-rate: 0\.001 -> 0\.5\n"
        r"  --widths: {'hidden': 16} -> {'hidden': 8}\n.*--fresh",
    )
    lock = tmp_path / "run/tiny/lock"
    assert contents(tmp_path / "run") | {lock: 0} == before | {lock: 0}
    train(tmp_path / "run", *OPTIONS)
    assert_same_run(tmp_path / "run", whole)


def test_changeable_options_are_accepted(tmp_path, whole):
    train(tmp_path / "run", *OPTIONS, "--steps", "20")
    free = ("--checkpoint-every", "7", "--keep", "2", "--eval-batch-size", "104", "--picture-every", "0")
    train(tmp_path / "run", *OPTIONS, *free)
    assert checkpoints(tmp_path / "run/tiny")[-1] == STEPS
    assert_same_run(tmp_path / "run", whole, means=False)
