"""Signals: asked to stop, it saves and says how to go on; and then ends as if nothing had been."""

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
    Going,
    assert_one_message,
    assert_same_run,
    newest,
    read,
    train,
)

pytestmark = pytest.mark.slow
SLOWLY = ("--num-samples", "0", "--steps", str(STEPS), "--checkpoint-every", "1", "--log-every", "5")


def stopped(process, folder, signum):
    """The step at which it stopped, said in one message."""
    assert process.end() == 128 + signum, process.told()[-3000:]
    reached = newest(folder)
    assert_one_message(process.told(), rf"Stopped and saved at step {reached}\. The same command resumes from there")
    return reached


def go_on(workdir, whole):
    told = train(workdir, *OPTIONS)
    assert f"Resuming from step {newest_of(told)} of {STEPS}." in told
    assert_same_run(workdir, whole, means=False)


def newest_of(told):
    return told.split("Resuming from step ")[1].split()[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda signum: signum.name)
def test_a_signal_while_training(tmp_path, whole, signum):
    process = Going(tmp_path / "run", *SLOWLY)
    process.until_saved(beyond=2)
    process.send(signum)
    assert 0 < stopped(process, tmp_path / "run/tiny", signum) < STEPS
    go_on(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_while_the_first_step_compiles(tmp_path, whole, signum):
    process = Going(tmp_path / "run", *SLOWLY)
    process.until_told("parameters |")  # the first line; the first step comes next
    process.send(signum)
    assert stopped(process, tmp_path / "run/tiny", signum) < STEPS
    go_on(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_while_starting_leaves_nothing(tmp_path, whole, signum):
    for delay in (0.2, 0.5, 0.9, 1.3, 1.7):
        process = Going(tmp_path / "run", *SLOWLY)
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(delay)
        process.send(signum)
        assert process.end() in (-signum, 128 + signum), process.told()[-3000:]
        assert "Traceback" not in process.told(), (delay, process.told()[-3000:])
    train(tmp_path / "run", *OPTIONS)
    assert_same_run(tmp_path / "run", whole, means=False)  # on a quick machine the last one stops a first step


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05])
def test_a_second_ctrl_c_while_saving_ends_at_once_and_loses_nothing_saved(tmp_path, whole, delay):
    process = Going(tmp_path / "run", *SLOWLY)
    process.until_saved(beyond=2)
    process.send(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.popen.wait(delay)
    process.send(signal.SIGINT)
    assert process.end(20) in (128 + signal.SIGINT, -signal.SIGINT), process.told()[-3000:]
    assert "Traceback" not in process.told(), process.told()[-3000:]
    assert "Exception ignored" not in process.told(), process.told()[-3000:]
    go_on(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signum.name)
def test_more_of_them_while_saving_change_nothing(tmp_path, whole, signum):
    process = Going(tmp_path / "run", *SLOWLY)
    process.until_saved(beyond=2)
    for _ in range(4):
        process.send(signum)
        time.sleep(0.002)
    stopped(process, tmp_path / "run/tiny", signum)
    go_on(tmp_path / "run", whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_to_make_and_all_that_it_started(tmp_path, whole, signum):
    makefile = tmp_path / "Makefile"
    makefile.write_text(
        f"train:\n\t@{sys.executable} -m vdm_jax train experiments/tiny.py "
        f"--workdir {tmp_path / 'run'} {' '.join(SLOWLY)}\n"
    )
    process = Going(tmp_path / "run", under=("sh", "-c", f"exec make -f {makefile} train"))
    process.until_saved(beyond=2)
    os.killpg(process.popen.pid, signum)
    assert process.end() != 0
    assert "Traceback" not in process.told(), process.told()[-3000:]
    assert f"Stopped and saved at step {newest(tmp_path / 'run/tiny')}." in process.told()[-3000:]
    go_on(tmp_path / "run", whole)


def test_the_terminal_is_closed(tmp_path, whole):
    main, terminal = pty.openpty()
    process = Going(tmp_path / "run", *SLOWLY, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    process.until_saved(beyond=2)
    os.close(main)  # from now on what it says goes nowhere
    process.send(signal.SIGHUP)
    assert process.end() == 128 + signal.SIGHUP
    assert read(tmp_path / "run").notes["step"] == newest(tmp_path / "run/tiny") < STEPS
    go_on(tmp_path / "run", whole)


def test_signals_that_were_ignored_stay_so(tmp_path, whole):
    ignoring = ("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh")
    process = Going(tmp_path / "run", *SLOWLY, under=ignoring)
    process.until_saved(beyond=2)
    process.send(signal.SIGHUP)
    process.send(signal.SIGINT)
    assert process.end() == 0, process.told()[-3000:]
    assert_same_run(tmp_path / "run", whole)
