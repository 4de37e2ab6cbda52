"""Training processes of the small test experiment that tests interrupt, restart and compare bit by bit."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.signals import default_signals
from tests.training.bits import assert_same_bits
from tests.training.experiments.tiny import CONFIG
from vdm_jax.training import loop
from vdm_jax.training.checkpoint import Checkpoints, Saved
from vdm_jax.training.evaluation.report import write_report
from vdm_jax.training.run import abstract_state, open_run
from vdm_jax.training.runtime.devices import make_mesh

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENDLESS = ("--steps", "1000000")
STEPS = 60
TIMEOUT = 600  # seconds, also on a busy machine
OPTIONS = ("--steps", str(STEPS), "--checkpoint-every", "10", "--log-every", "5", "--keep", "3")


class RunningProcess:
    """A process in a session of its own, with its output in a file.

    Args:
        workdir: the folder of its runs.
        options: options of the command line.
        command: the module, and its arguments before the experiment.
        experiment: the name of a file in the folder `experiments` beside this one.
        under: a command that runs it, such as `unshare`.
        environment: environment variables to add.
        streams: other targets for its output.
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
        with self.log.open("w") as log, default_signals():
            places = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, **streams}
            self.popen = subprocess.Popen(
                line, cwd=HERE, env={**os.environ, **variables}, start_new_session=True, **places
            )

    def output(self) -> str:
        """Its output so far."""
        return self.log.read_text()

    def until(self, holds, seconds=TIMEOUT):
        """Wait until a condition holds or the process has succeeded."""
        for _ in range(100 * seconds):
            if holds() or self.popen.poll() == 0:
                return
            assert self.popen.poll() is None, self.output()[-3000:]
            time.sleep(0.01)
        raise AssertionError(f"timeout after {seconds} seconds: {self.output()[-3000:]}")

    def until_printed(self, text):
        """Wait until its output contains a text."""
        self.until(lambda: text in self.output())

    def until_saved(self, beyond=0):
        """Wait until a checkpoint beyond this step is saved."""
        self.until(lambda: newest(self.folder) > beyond)

    def send(self, signum):
        """Send a signal to the process."""
        self.popen.send_signal(signum)

    def end(self, seconds=TIMEOUT) -> int:
        """Wait for its end and check that no child process remains; returns the exit code."""
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            raise AssertionError(f"it hangs: {self.output()[-3000:]}") from None
        assert not has_processes(self.popen.pid), "it left a process behind"
        return code

    def kill(self):
        """Send SIGKILL."""
        self.send(signal.SIGKILL)
        assert self.end() in (-signal.SIGKILL, 0)


def has_processes(group: int) -> bool:
    """Whether a process group has a live process."""
    for _ in range(50 * TIMEOUT):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def checkpoints(folder) -> list[int]:
    """The steps of a run's complete checkpoints, from their names."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def newest(folder) -> int:
    """The step of the newest checkpoint, or 0."""
    return max(checkpoints(folder), default=0)


def unfinished(folder) -> list[Path]:
    """Incomplete files in a run's folder."""
    return [path for path in folder.rglob("*") if "tmp" in path.name]


def train(workdir, *options, **given) -> str:
    """Run a command that must succeed; returns its output."""
    process = RunningProcess(workdir, "--num-samples", "0", *options, **given)
    assert process.end() == 0, process.output()[-3000:]
    assert "Traceback" not in process.output()
    return process.output()


def train_here(workdir, **options):
    """Train and evaluate in this process: the bits are those of a process of its own, and nothing is imported again."""
    config = dataclasses.replace(CONFIG, workdir=str(workdir), num_samples=0, **options)
    run = open_run("tiny", config, make_mesh(1))
    write_report(run, loop.train(run))


def assert_one_message(output: str, message: str):
    """The output ends with the message, which appears once and without a traceback."""
    end = output[-3000:]
    assert "Traceback" not in output, end
    assert "Exception ignored" not in output, end
    assert len(re.findall(message, output)) == 1, end
    assert re.search(message, output.rstrip().split("\n\n")[-1]), end


def read(workdir) -> Saved:
    """The newest checkpoint of a run."""
    run = open_run("tiny", dataclasses.replace(CONFIG, workdir=str(workdir)), make_mesh(1))
    with Checkpoints(run.folder / "checkpoints", keep=1000) as saved:
        return saved.restore(abstract_state(run))


def rows(workdir) -> dict[int, float]:
    """The losses in metrics.jsonl by step, after checking that all lines are complete and all steps distinct."""
    lines = (Path(workdir) / "tiny" / "metrics.jsonl").read_text().splitlines()
    found = [(row["step"], row["loss"]) for row in map(json.loads, lines)]
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    return dict(found)


def paths(workdir) -> set[str]:
    """All files of a run, with numbers and hashes in their paths replaced."""
    folder = Path(workdir) / "tiny"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    found = {re.sub(r"checkpoints/\d+/", "checkpoints/N/", name) for name in found}
    found = {re.sub(r"/d/[0-9a-f]{32}$", "/d/DATA", name) for name in found}
    return {re.sub(r"tensorboard/events.*", "tensorboard/EVENTS", name) for name in found}


def assert_same_run(workdir, whole, means=True, beside=()):
    """An interrupted run has the same result as an undisturbed one.

    The bits of the state are compared: step, parameters, EMA and optimizer state. The keys are a function of the seed
    and the step, so that a wrong key would change the parameters.

    Args:
        workdir, whole: folders of the interrupted and of the undisturbed run.
        means: whether the lines of metrics.jsonl average over the same steps, because the run stopped at log steps.
        beside: prefixes of additional paths that the interrupted run may have.
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
