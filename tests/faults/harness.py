"""Real training processes of the stand-in experiment, to be broken, set going again and compared to the last bit."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.signals import heard
from tests.training.bits import assert_same_bits
from tests.training.experiments.tiny import CONFIG
from vdm_jax.training.checkpoint import Checkpoints, Saved
from vdm_jax.training.run import abstract_state, open_run
from vdm_jax.training.runtime.devices import make_mesh

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENDLESS = ("--steps", "1000000")
STEPS = 60
OPTIONS = ("--steps", str(STEPS), "--checkpoint-every", "10", "--log-every", "5", "--keep", "3")


class Going:
    """A process that a test has started, in a session of its own; what it says goes to a file.

    Args:
        workdir: where its runs are.
        options: of the command line.
        command: the module, and its arguments before the experiment.
        experiment: the name of a file in the folder `experiments` beside this one.
        under: a command that it runs under, such as `unshare`.
        environment: variables to add.
        streams: other places for its output.
    """

    def __init__(
        self, workdir, *options, command=("vdm_jax.training",), experiment="tiny", under=(), environment=None, **streams
    ):
        self.folder = Path(workdir) / experiment
        self.log = Path(f"{workdir}.{len(list(Path(workdir).parent.glob(f'{Path(workdir).name}.*.log')))}.log")
        line = [
            *under,
            sys.executable,
            "-m",
            *command,
            f"experiments/{experiment}.py",
            "--workdir",
            str(workdir),
            *options,
        ]
        variables = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "1000", **(environment or {})}
        with self.log.open("w") as log, heard():
            places = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, **streams}
            self.popen = subprocess.Popen(
                line, cwd=HERE, env={**os.environ, **variables}, start_new_session=True, **places
            )

    def told(self) -> str:
        """What it has said so far."""
        return self.log.read_text()

    def until(self, holds, seconds=90):
        """Wait until something is so, or it has ended well."""
        for _ in range(100 * seconds):
            if holds() or self.popen.poll() == 0:
                return
            assert self.popen.poll() is None, self.told()[-3000:]
            time.sleep(0.01)
        raise AssertionError(f"not so after {seconds} seconds: {self.told()[-3000:]}")

    def until_told(self, text):
        """Wait until it has said something."""
        self.until(lambda: text in self.told())

    def until_saved(self, beyond=0):
        """Wait until it has saved a checkpoint beyond a step."""
        self.until(lambda: newest(self.folder) > beyond)

    def send(self, signum):
        """Send it a signal."""
        self.popen.send_signal(signum)

    def end(self, seconds=120) -> int:
        """Wait until it has ended, and see that it leaves no process behind; returns its exit code."""
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            raise AssertionError(f"it hangs: {self.told()[-3000:]}") from None
        assert not has_processes(self.popen.pid), "it left a process behind"
        return code

    def kill(self):
        """kill -9."""
        self.send(signal.SIGKILL)
        assert self.end() in (-signal.SIGKILL, 0)


def has_processes(group: int) -> bool:
    """Whether a process group still has a process that is alive."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def checkpoints(folder) -> list[int]:
    """The steps of a run's finished checkpoints, as their names tell."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def newest(folder) -> int:
    """The newest of them, or 0."""
    return max(checkpoints(folder), default=0)


def unfinished(folder) -> list[Path]:
    """What is half written in a run's folder."""
    return [path for path in folder.rglob("*") if "tmp" in path.name]


def train(workdir, *options, **given) -> str:
    """Run a command to its end, which must be a good one; returns what it said."""
    process = Going(workdir, "--num-samples", "0", *options, **given)
    assert process.end() == 0, process.told()[-3000:]
    assert "Traceback" not in process.told()
    return process.told()


def assert_one_message(told: str, message: str):
    """It said what happened, once, last and without a traceback."""
    end = told[-3000:]
    assert "Traceback" not in told, end
    assert "Exception ignored" not in told, end
    assert len(re.findall(message, told)) == 1, end
    assert re.search(message, told.rstrip().split("\n\n")[-1]), end


def read(workdir) -> Saved:
    """The newest checkpoint of a run."""
    run = open_run("tiny", dataclasses.replace(CONFIG, workdir=str(workdir)), make_mesh(1))
    with Checkpoints(run.folder / "checkpoints", keep=1000) as saved:
        return saved.restore(abstract_state(run))


def rows(workdir) -> dict[int, float]:
    """The loss of each line of metrics.jsonl, by its step; every line is whole, and no step is there twice."""
    lines = (Path(workdir) / "tiny" / "metrics.jsonl").read_text().splitlines()
    found = [(row["step"], row["loss"]) for row in map(json.loads, lines)]
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    return dict(found)


def paths(workdir) -> set[str]:
    """All files of a run; those of every checkpoint, event and set-aside folder under one name."""
    folder = Path(workdir) / "tiny"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    found = {re.sub(r"checkpoints/\d+/", "checkpoints/N/", name) for name in found}
    found = {re.sub(r"/d/[0-9a-f]{32}$", "/d/DATA", name) for name in found}
    return {re.sub(r"tensorboard/events.*", "tensorboard/EVENTS", name) for name in found}


def assert_same_run(workdir, whole, means=True, beside=()):
    """A run that was broken ended as one that was not.

    The state's bits are compared: step, parameters, their average, the optimiser's. The keys are a function of the seed
    and the step, so that the parameters would differ if a key did.

    Args:
        workdir, whole: of the one and of the other.
        means: whether every line of metrics.jsonl is a mean over the same steps, because all stops were at one.
        beside: beginnings of paths that a run may have because it was broken.
    """
    extra = {path for path in paths(workdir) if not path.startswith(tuple(beside))} if beside else paths(workdir)
    assert extra == paths(whole)
    one, other = read(workdir), read(whole)
    assert one.unreadable == other.unreadable == []
    assert_same_bits(one.state, other.state)
    assert one.notes["data"] == other.notes["data"]
    ours, theirs = rows(workdir), rows(whole)
    assert ours == theirs if means else ours.keys() == theirs.keys()
    reports = [json.loads((Path(folder) / "tiny" / "report.json").read_text())["test"] for folder in (workdir, whole)]
    assert reports[0] == reports[1]
