"""Training continues when its output is closed; files beside the checkpoints are complete or absent."""

import json
import os
import random
import subprocess
import time

import pytest

from tests.faults.harness import OPTIONS, ROOT, RunningProcess, assert_same_run, rows, train, unfinished

pytestmark = pytest.mark.slow
QUIET = ("--num-samples", "0", *OPTIONS)


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_the_pipe_is_closed(tmp_path, whole, which):
    train(tmp_path / "run", *OPTIONS, "--steps", "20")  # so that it prints on stdout when it resumes
    reads, writes = os.pipe()
    streams = {name: writes for name in ("stdout", "stderr") if which in (name, "both")}
    process = RunningProcess(tmp_path / "run", *QUIET, **({"stderr": subprocess.DEVNULL} | streams))
    os.close(writes)
    os.close(reads)  # as `| head -1` does after one line
    assert process.end() == 0
    assert_same_run(tmp_path / "run", whole)


def test_the_output_s_disk_is_full(tmp_path, whole):
    with open("/dev/full", "w") as full:
        process = RunningProcess(tmp_path / "run", *QUIET, stdout=full, stderr=full)
    assert process.end() == 0
    assert_same_run(tmp_path / "run", whole)


def test_output_streams_that_are_closed(tmp_path, whole):
    process = RunningProcess(tmp_path / "run", *QUIET, under=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"))
    assert process.end() == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("terminal", [{"TERM": "dumb"}, {"TERM": "", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_terminals_without_features(tmp_path, whole, terminal):
    train(tmp_path / "run", *OPTIONS, environment=terminal)
    assert_same_run(tmp_path / "run", whole)


BACKWARDS = """
import time
true, start = time.time, time.time()
time.time = lambda: true() - (3600 if true() < start + 3 else 7200)  # an hour slow, then two
time.time_ns = lambda: int(1e9 * time.time())
"""


def test_the_clock_goes_backwards(tmp_path, whole):
    (tmp_path / "early").mkdir()
    (tmp_path / "early/sitecustomize.py").write_text(BACKWARDS)
    clock = {"PYTHONPATH": f"{tmp_path / 'early'}:{ROOT}"}
    train(tmp_path / "run", *OPTIONS, "--steps", "20")
    train(tmp_path / "run", *OPTIONS, environment=clock)
    assert_same_run(tmp_path / "run", whole)


def lose_metrics(folder):
    (folder / "metrics.jsonl").unlink()


def cut_metrics(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])


def spoil_metrics(folder):
    (folder / "metrics.jsonl").write_bytes(b'{"step": 5, "loss": 1.0}\n{"st\xff\x00p": }\n[]\n')


def spoil_config(folder):
    (folder / "config.json").write_text('{"experiment": "ti')


def spoil_report(folder):
    (folder / "report.json").write_text("")


@pytest.mark.parametrize("damage", [lose_metrics, cut_metrics, spoil_metrics, spoil_config, spoil_report])
def test_a_text_file_of_the_run_is_damaged(tmp_path, whole, damage):
    train(tmp_path / "run", *OPTIONS, "--steps", "20")
    damage(tmp_path / "run/tiny")
    train(tmp_path / "run", *OPTIONS)
    assert max(rows(tmp_path / "run")) == max(rows(whole))
    assert_same_report(tmp_path / "run", whole)


def assert_same_report(workdir, whole):
    ours, theirs = (json.loads((folder / "tiny/report.json").read_text())["test"] for folder in (workdir, whole))
    assert ours == theirs


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_sigkill_while_evaluating_and_sampling(tmp_path, whole, command):
    from PIL import Image

    train(tmp_path / "run", *OPTIONS)
    folder, moments = tmp_path / "run/tiny", random.Random(0)
    options = {"evaluate": ("--quality", "0"), "sample": ("--num-samples", "400")}[command]
    module = ("vdm_jax", command)
    for _ in range(8):
        process = RunningProcess(tmp_path / "run", *options, command=module)
        time.sleep(moments.uniform(2.0, 4.5))
        process.kill()
        json.loads((folder / "report.json").read_text())
        for path in folder.glob("*.png"):
            Image.open(path).load()
    process = RunningProcess(tmp_path / "run", *options, command=module)
    assert process.end() == 0, process.output()[-3000:]
    assert not unfinished(folder)
    assert_same_report(tmp_path / "run", whole)
