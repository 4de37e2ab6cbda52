"""The commands as a user types them: in this process to test messages, in a separate one to test signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.bits import assert_same_bits
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.cli import evaluate, sample
from vdm_jax.training.cli import train as training
from vdm_jax.training.run import abstract_state

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TINY = HERE / "experiments" / "tiny.py"
TIMEOUT = 600  # seconds, also on a busy machine


def start(workdir, *options):
    """Start `python -m vdm_jax.training experiments/tiny.py ...` in a separate process."""
    options = ("--workdir", str(workdir), "--num-samples", "0", *options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "vdm_jax.training", "experiments/tiny.py", *options]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=HERE, env=environment, **pipe)


def wait_for_checkpoint(process, workdir, after=0):
    """Wait until the process has saved a checkpoint beyond a step; returns its step."""
    for _ in range(20 * TIMEOUT):
        steps = [int(path.name) for path in (workdir / "tiny" / "checkpoints").glob("*") if path.name.isdigit()]
        if steps and max(steps) > after:
            return max(steps)
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint in {TIMEOUT} seconds")


def final_state(tiny, workdir):
    run = tiny(workdir=str(workdir))
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        return checkpoints.restore(abstract_state(run))


@pytest.mark.slow
def test_kill_9_then_the_same_command_ends_in_the_same_bits(tiny, tmp_path):
    process = start(tmp_path / "killed", "--steps", "1000000", "--checkpoint-every", "100", "--log-every", "10")
    wait_for_checkpoint(process, tmp_path / "killed", after=200)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = max(int(path.name) for path in (tmp_path / "killed/tiny/checkpoints").glob("*") if path.name.isdigit())
    options = ("--steps", str(reached + 50), "--checkpoint-every", "1000000")
    both = [start(tmp_path / name, *options) for name in ("killed", "whole")]
    output = [process.communicate(timeout=TIMEOUT)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert f"Resuming from step {reached} of {reached + 50}." in output[0]
    assert "RunningProcess on" not in output[1]
    killed, whole = (final_state(tiny, tmp_path / name) for name in ("killed", "whole"))
    assert int(whole.state.step) == reached + 50
    assert_same_bits(killed.state, whole.state)
    assert killed.notes["data"] == whole.notes["data"]
    rows = [json.loads(line)["step"] for line in (tmp_path / "killed/tiny/metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows))
    reports = [json.loads((tmp_path / name / "tiny/report.json").read_text()) for name in ("killed", "whole")]
    assert reports[0]["test"] == reports[1]["test"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("default_signals")
def test_a_signal_saves_prints_how_to_resume_and_sets_the_exit_code(tiny, tmp_path, signum, code):
    process = start(tmp_path, "--steps", "1000000", "--checkpoint-every", "100", "--log-every", "1000")
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signum)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == code, output
    assert "The same command resumes from there." in output
    assert "Traceback" not in output
    assert f"saved at step {int(final_state(tiny, tmp_path).state.step)}." in output


def test_the_default_recipe_trains_and_samples_as_make_calls_it(tmp_path):
    """`make train` and `make sample` in processes of their own, with fewer steps and examples."""

    def make(command, *options):
        line = [sys.executable, "-m", "vdm_jax", command, "ddpm_digits", "--workdir", str(tmp_path), *options]
        environment = {**os.environ, "VDM_JAX_MAKE": "1", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(line, cwd=ROOT, env=environment, **pipe)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    few = ("--steps", "3", "--eval-examples", "8", "--eval-terms", "2", "--sampling.steps", "5", "--num-samples", "4")
    printed, folder = make("train", *few), tmp_path / "ddpm_digits"
    assert "ddpm_digits: 3 steps in" in printed
    assert "step 3/3  loss" in printed
    assert "likelihood report and sample quality: make eval EXP=ddpm_digits" in printed
    report = json.loads((folder / "report.json").read_text())
    assert 3.0 < report["test"]["bits_per_dim"]["mean"] < 10.0  # nothing is learned yet; log2 of 17 values is 4.1
    assert report["n_examples"] == 8
    assert report["pipeline_images_per_second"] > 0
    assert (folder / "trajectory.png").exists()
    first = (folder / "samples.png").read_bytes()
    (folder / "samples.png").unlink()
    assert str(folder / "samples.png") in make("sample")
    assert (folder / "samples.png").read_bytes() == first


def test_train_evaluate_sample_finish(command, tmp_path):
    folder = tmp_path / "tiny"
    code, output = command(training.main, "tiny", "--steps", "6", "--widths.hidden", "5")
    assert code == 0
    assert "tiny: 6 steps" in output
    assert "pixel histogram" in output
    for name in ("samples.png", "trajectory.png", "report.json"):
        assert str(folder / name) in output
        assert (folder / name).exists()
    report = json.loads((folder / "report.json").read_text())
    assert report["parameters"] == 10 * 5 + 5 * 64 + 1

    code, output = command(training.main, "tiny", "--steps", "6", "--widths.hidden", "5")
    assert code == 0
    assert "is finished" in output
    assert "--fresh" in output

    for name in ("samples.png", "trajectory.png", "report.json"):
        (folder / name).unlink()
    code, output = command(
        evaluate.main, str(TINY), "--quality", "0"
    )  # uses the run's options, whose network has another width
    assert code == 0
    assert json.loads((folder / "report.json").read_text())["test"] == report["test"]
    code, output = command(sample.main, str(TINY), "--num-samples", "9", "--seed", "4")
    assert code == 0
    assert str(folder / "samples.png") in output
    assert (folder / "trajectory.png").exists()

    code, output = command(training.main, "tiny", "--steps", "6")
    assert code == 1
    assert "--widths: {'hidden': 5} -> {'hidden': 16}" in output
    code, output = command(training.main, "tiny", "--steps", "3", "--fresh")
    assert code == 0
    assert "tiny: 3 steps" in output


def test_unknown_recipe_lists_all_and_the_nearest(command):
    for main in (training.main, sample.main, evaluate.main):
        code, output = command(main, "tinny")
        assert code == 1
        assert "Unknown recipe 'tinny'. Did you mean tiny?" in output
        assert "Recipes: known, tiny," in output


def test_no_recipe_shows_the_usage(command):
    code, output = command(training.main, workdir=False)
    assert code == 1
    assert "usage: vdm-jax train RECIPE" in output
    assert "tiny" in output
    code, _ = command(training.main, "--help", workdir=False)
    assert code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bach-size", "3"), "--batch-size"),
        (("--steps", "many"), "--steps"),
        (("--lr-schedule", "linear"), "cosine"),
        (("--widths.depth", "3"), "--widths.depth"),
    ],
)
def test_unknown_or_ill_typed_option_is_one_message(command, options, message):
    code, output = command(training.main, "tiny", *options)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


def test_help_shows_every_option_with_its_meaning(command):
    code, output = command(training.main, "tiny", "--help", workdir=False)
    assert code == 0
    output = " ".join(output.replace("│", " ").split())
    for text in (
        "--batch-size",
        "Global batch size",
        "--widths.hidden",
        "--scales",
        "--fresh",
        "start over",
    ):
        assert text in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--side", "28"), "cannot be built for digits: the model is for 28x28 images, not (8, 8, 1)"),
        (("--batch-size", "33"), "--batch-size 33 is not divisible by 8 device(s)"),
        (("--data", "mnits"), "Did you mean mnist"),
        (("--steps", "0"), "--steps must be at least 1"),
    ],
)
def test_an_error_of_the_user_is_one_message_and_writes_nothing(command, tmp_path, options, message):
    code, output = command(training.main, "tiny", *options)
    assert code == 1
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "tiny").exists()


def test_sampling_before_training_is_refused_with_the_remedy(command):
    for main in (sample.main, evaluate.main):
        code, output = command(main, "tiny")
        assert code == 1
        assert "Train first: `vdm-jax train tiny`" in output


def test_fresh_never_deletes_a_folder_that_is_not_a_run(command, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("years of work")
    code, output = command(training.main, "tiny", "--fresh")
    assert code == 1
    assert "not the folder of a run" in output
    assert (tmp_path / "tiny" / "thesis.tex").exists()


def test_a_full_disk_is_one_message(command, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    code, output = command(training.main, "tiny", "--steps", "3")
    assert code == 1
    assert "The disk is full" in output
    assert "Traceback" not in output
