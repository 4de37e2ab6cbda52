"""On a signal a run saves, prints how to resume, and later ends in the same state."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.harness import (
    OPTIONS,
    STEPS,
    RunningProcess,
    assert_one_message,
    assert_same_run,
    newest,
    read,
    train,
)

pytestmark = pytest.mark.slow
SLOWLY = ("--num-samples", "0", "--steps", str(STEPS), "--checkpoint-every", "1", "--log-every", "5")


def stopped(process, folder, signum):
    """The step at which the run stopped, from its single message."""
    assert process.end() == 128 + signum, process.output()[-3000:]
    reached = newest(folder)
    assert_one_message(process.output(), rf"Stopped and saved at step {reached}\. The same command resumes from there")
    return reached


def resume(workdir, whole):
    output = train(workdir, *OPTIONS)
    assert f"Resuming from step {newest_of(output)} of {STEPS}." in output
    assert_same_run(workdir, whole, means=False)


def newest_of(output):
    return output.split("Resuming from step ")[1].split()[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda signum: signum.name)
def test_a_signal_while_training(tmp_path, whole, signum):
    process = RunningProcess(tmp_path / "run", *SLOWLY)
    process.until_saved(beyond=2)
    process.send(signum)
    assert 0 < stopped(process, tmp_path / "run/tiny", signum) < STEPS
    resume(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_while_the_first_step_compiles(tmp_path, whole, signum):
    process = RunningProcess(tmp_path / "run", *SLOWLY)
    process.until_printed("parameters |")  # in the first line; the first step follows
    process.send(signum)
    assert stopped(process, tmp_path / "run/tiny", signum) < STEPS
    resume(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_while_starting_leaves_nothing(tmp_path, whole, signum):
    for delay in (0.2, 0.5, 0.9, 1.3, 1.7):
        process = RunningProcess(tmp_path / "run", *SLOWLY)
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(delay)
        process.send(signum)
        assert process.end() in (-signum, 128 + signum), process.output()[-3000:]
        assert "Traceback" not in process.output(), (delay, process.output()[-3000:])
    train(tmp_path / "run", *OPTIONS)
    assert_same_run(tmp_path / "run", whole, means=False)  # on a fast machine the last one stops the first step


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05])
def test_a_second_ctrl_c_while_saving_ends_at_once_and_loses_nothing_saved(tmp_path, whole, delay):
    process = RunningProcess(tmp_path / "run", *SLOWLY)
    process.until_saved(beyond=2)
    process.send(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.popen.wait(delay)
    process.send(signal.SIGINT)
    assert process.end() in (128 + signal.SIGINT, -signal.SIGINT), process.output()[-3000:]
    assert "Traceback" not in process.output(), process.output()[-3000:]
    assert "Exception ignored" not in process.output(), process.output()[-3000:]
    resume(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signum.name)
def test_more_signals_while_saving_change_nothing(tmp_path, whole, signum):
    process = RunningProcess(tmp_path / "run", *SLOWLY)
    process.until_saved(beyond=2)
    for _ in range(4):
        process.send(signum)
        time.sleep(0.002)
    stopped(process, tmp_path / "run/tiny", signum)
    resume(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_to_the_process_group_of_make(tmp_path, whole, signum):
    makefile = tmp_path / "Makefile"
    makefile.write_text(
        f"train:\n\t@{sys.executable} -m vdm_jax train experiments/tiny.py "
        f"--workdir {tmp_path / 'run'} {' '.join(SLOWLY)}\n"
    )
    process = RunningProcess(tmp_path / "run", under=("sh", "-c", f"exec make -f {makefile} train"))
    process.until_saved(beyond=2)
    os.killpg(process.popen.pid, signum)
    assert process.end() != 0
    assert "Traceback" not in process.output(), process.output()[-3000:]
    assert f"Stopped and saved at step {newest(tmp_path / 'run/tiny')}." in process.output()[-3000:]
    resume(tmp_path / "run", whole)


def test_the_terminal_is_closed(tmp_path, whole):
    main, terminal = pty.openpty()
    process = RunningProcess(tmp_path / "run", *SLOWLY, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    process.until_saved(beyond=2)
    os.close(main)  # its output is discarded from now on
    process.send(signal.SIGHUP)
    assert process.end() == 128 + signal.SIGHUP
    assert read(tmp_path / "run").notes["step"] == newest(tmp_path / "run/tiny") < STEPS
    resume(tmp_path / "run", whole)


def test_signals_that_were_ignored_stay_so(tmp_path, whole):
    ignoring = ("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh")
    process = RunningProcess(tmp_path / "run", *SLOWLY, under=ignoring)
    process.until_saved(beyond=2)
    process.send(signal.SIGHUP)
    process.send(signal.SIGINT)
    assert process.end() == 0, process.output()[-3000:]
    assert_same_run(tmp_path / "run", whole)
