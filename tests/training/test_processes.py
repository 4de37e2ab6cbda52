"""Several processes on this machine that train one run together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vdm_jax.training.loop import train
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.processes import is_first_process, is_multiprocess, on_first_process

HERE = Path(__file__).parent
ENDLESS = ("--steps", "1000000", "--checkpoint-every", "20")
TIMEOUT = 600  # seconds, also on a busy machine


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(number, workdir, *options, devices=1, environment=None):
    """Start `number` processes of the test experiment with this many devices each; they are killed at the end.

    `environment(place)` returns the variables of a process; by default those that a user sets by hand.
    """
    address = f"localhost:{free_port()}"

    def by_hand(place):
        return {
            "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number), "JAX_PROCESS_ID": str(place)
        }  # fmt: skip

    environment = environment or by_hand
    command = [
        sys.executable,
        "-m",
        "vdm_jax.training",
        "experiments/tiny.py",
        "--workdir",
        str(workdir),
        "--num-samples",
        "0",
    ]
    shared = {"PYTHONPATH": str(HERE.parent.parent), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": HERE}
    all_ = [
        subprocess.Popen(
            [*command, *options], env={**os.environ, **shared, **(environment(place) if number > 1 else {})}, **pipe
        )
        for place in range(number)
    ]
    try:
        yield all_
    finally:
        for process in all_:
            process.kill()
            if not process.stdout.closed:
                process.communicate()


def ended(processes):
    """The outputs and exit codes of all processes."""
    output = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    return output, [process.returncode for process in processes]


def run_to_end(number, workdir, *options, devices=1, environment=None):
    with started(number, workdir, *options, devices=devices, environment=environment) as processes:
        output, codes = ended(processes)
    assert codes == [0] * number, output
    return output


def wait_for_step(workdir, step):
    for _ in range(20 * TIMEOUT):
        if any(int(path.name) >= step for path in (workdir / "tiny/checkpoints").glob("[0-9]*") if path.name.isdigit()):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step} in {TIMEOUT} seconds")


def last_notes(workdir):
    """The notes of the newest checkpoint: its step, data position, and the checksum of all bits of the state."""
    newest = max(int(path.name) for path in (workdir / "tiny/checkpoints").iterdir() if path.name.isdigit())
    notes = json.loads((workdir / f"tiny/checkpoints/{newest}/notes/metadata").read_text())
    return {name: notes[name] for name in ("step", "data", "checksum")}


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "tiny/metrics.jsonl").read_text().splitlines()]


def bits_per_dim(workdir):
    return json.loads((workdir / "tiny/report.json").read_text())["test"]["bits_per_dim"]


def test_two_processes_make_the_bits_of_one_and_only_the_first_prints(tiny, tmp_path):
    output = run_to_end(2, tmp_path / "two", "--flip", "--steps", "15")
    train(tiny(2, workdir=str(tmp_path / "one"), num_samples=0, flip=True, steps=15))
    assert last_notes(tmp_path / "two") == last_notes(tmp_path / "one")
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert "2 x cpu" in output[0]
    assert "bits per dim" in output[0]
    assert [line for line in output[1].splitlines() if not ("Gloo" in line or "connects to the others" in line)] == []


@pytest.mark.slow
def test_if_one_is_killed_the_other_exits_and_any_number_resumes(tiny, tmp_path):
    """Immediately during a step; after the heartbeat timeout if it waits to save a checkpoint."""
    with started(2, tmp_path / "parts", *ENDLESS) as processes:
        wait_for_step(tmp_path / "parts", 40)
        processes[1].kill()
        output, codes = ended(processes)
    assert codes[0] != 0
    assert codes[1] == -signal.SIGKILL
    if codes[0] == 1:  # otherwise XLA ended it with its own message
        assert "Process 0 of 2 lost its connection" in output[0]
        assert "restart all processes" in output[0]
        assert "Traceback" not in output[0]
    steps = str(last_notes(tmp_path / "parts")["step"] + 17)
    assert "Resuming from step" in run_to_end(1, tmp_path / "parts", "--steps", steps, devices=2)[0]
    train(tiny(2, workdir=str(tmp_path / "whole"), num_samples=0, steps=int(steps)))
    assert last_notes(tmp_path / "parts") == last_notes(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "parts/tiny").iterdir()) == [
        "checkpoints", "config.json", "lock", "metrics.jsonl", "report.json", "tensorboard",
    ]  # fmt: skip


@pytest.mark.slow
def test_four_processes_resume_as_two_and_as_one(tmp_path):
    """Up to rounding: four devices add in another order than two."""
    for number, steps in ((4, "20"), (2, "40"), (1, "60"), (4, "80")):
        run_to_end(number, tmp_path / "many", "--steps", steps, "--shard")
    run_to_end(1, tmp_path / "one", "--steps", "80")
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-5)
    many, one = (bits_per_dim(tmp_path / name)["mean"] for name in ("many", "one"))
    assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.usefixtures("default_signals")
def test_a_signal_to_any_of_four_stops_all_at_one_step(tmp_path, place):
    with started(4, tmp_path, *ENDLESS) as processes:
        wait_for_step(tmp_path, 20)
        processes[place].send_signal(signal.SIGTERM)
        output, codes = ended(processes)
    assert codes == [128 + signal.SIGTERM] * 4, output
    step = last_notes(tmp_path)["step"]
    assert all(f"Stopped and saved at step {step}. The same command resumes from there." in text for text in output)
    assert not any("Traceback" in text for text in output)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 2])
def test_killing_one_of_four_ends_all_and_they_resume_to_the_same_bits(tmp_path, place):
    with started(4, tmp_path / "parts", *ENDLESS, "--shard") as processes:
        wait_for_step(tmp_path / "parts", 60)
        processes[place].kill()
        _, codes = ended(processes)
    assert codes[place] == -signal.SIGKILL
    assert all(codes)
    steps = str(last_notes(tmp_path / "parts")["step"] + 13)
    for name in ("parts", "whole"):
        run_to_end(4, tmp_path / name, "--steps", steps, "--shard")
    assert last_notes(tmp_path / "parts") == last_notes(tmp_path / "whole")


@pytest.mark.slow
def test_the_variables_of_slurm_are_enough(tmp_path):
    """The variables that srun gives to each task of a step; the address follows from them."""

    def by_slurm(place):
        step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
        return step | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(place), "SLURM_LOCALID": str(place)}

    job = os.getpid()
    output = run_to_end(2, tmp_path, "--steps", "10", environment=by_slurm)
    assert "2 x cpu" in output[0]
    assert "bits per dim" not in output[1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["notes", 0, 1])
def test_a_damaged_checkpoint_is_skipped_by_all(tmp_path, damage):
    """Also if only one process reads the damaged part."""
    run_to_end(2, tmp_path, "--steps", "40", "--shard")
    newest = tmp_path / "tiny/checkpoints/40"
    if damage == "notes":
        notes = newest / "notes/metadata"
        notes.write_text(notes.read_text().replace('"step": 40', '"step": 41'))
    else:
        arrays = (newest / f"state/ocdbt.process_{damage}/d").iterdir()
        largest = max(arrays, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    output = run_to_end(2, tmp_path, "--steps", "45", "--shard")
    assert "The checkpoint of step 40 cannot be read" in output[0]
    assert "Resuming from step 30 of 45." in output[0]


@pytest.mark.slow
def test_a_second_job_in_the_folder_is_refused_and_the_first_unharmed(tmp_path):
    with started(2, tmp_path, *ENDLESS) as first:
        wait_for_step(tmp_path, 20)
        with started(2, tmp_path, *ENDLESS) as second:
            output, codes = ended(second)
        assert codes == [1, 1]
        assert "Another run is using" in output[0]
        assert "The first process of this job failed; see its message." in output[1]
        assert [process.poll() for process in first] == [None, None]


def test_the_variables_that_declare_several_processes():
    assert not is_multiprocess({})
    assert not is_multiprocess(
        {"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_NUM_PROCESSES": "1"}
    )
    assert is_multiprocess({"SLURM_STEP_NUM_TASKS": "8"})
    assert is_multiprocess({"OMPI_COMM_WORLD_SIZE": "2"})
    assert is_multiprocess({"TPU_WORKER_HOSTNAMES": "t0,t1"})
    assert is_multiprocess({"VDM_JAX_DISTRIBUTED": "1"})


def test_a_single_process_is_the_first_and_raises_its_error():
    assert is_first_process()
    acted = []
    on_first_process(lambda: acted.append(1))
    assert acted == [1]

    def fail():
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        on_first_process(fail)


@pytest.mark.slow
def test_processes_that_cannot_connect_print_a_message(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "vdm_jax.training", "experiments/tiny.py", "--workdir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 1
    assert "could not connect" in done.stderr
    assert "JAX_COORDINATOR_ADDRESS" in done.stderr
    assert "Traceback" not in done.stderr


def test_augmentation_does_not_depend_on_the_rows_of_a_process():
    from vdm_jax.training.data import batches, sources
    from vdm_jax.training.data.augmentation import augmentations

    augment = augmentations(flip=True, rotation=True, channels=True)
    images = np.arange(50 * 12, dtype=np.uint16).reshape(50, 2, 2, 3)
    records = [{"image": image, "label": place} for place, image in enumerate(images)]
    held = sources.Images(records, (2, 2, 3), np.uint16)

    def some(rows):
        iterator = batches.train_iterator(held, 16, 3, augment, rows)
        return [next(iterator)["image"] for _ in range(5)]

    whole, parts = some(slice(None)), [some(rows) for rows in (np.arange(5), np.arange(5, 16))]
    np.testing.assert_array_equal(np.stack(whole), np.concatenate(parts, axis=1))
