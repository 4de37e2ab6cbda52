"""SIGKILL, once with a signal that stops the resumed run, and at random moments, many times in one run."""

import random
import signal
import time

import pytest

from tests.faults.harness import (
    ENDLESS,
    OPTIONS,
    RunningProcess,
    assert_one_message,
    assert_same_run,
    newest,
    train,
    train_here,
    unfinished,
)

START = 3.5  # seconds until the first step, approximately


def kill_over_and_over(workdir, times, seed, options):
    """Start and kill a run this many times: one in four during startup, the others while it trains and saves.

    Returns:
        the newest checkpoint, and how many kills left an incomplete one.
    """
    moments, inside = random.Random(seed), 0
    folder = workdir / "tiny"
    for number in range(times):
        process = RunningProcess(workdir, "--num-samples", "0", *options)
        if starts := number % 4 == 3:
            time.sleep(moments.uniform(0.0, START))
        else:
            process.until_saved(beyond=newest(folder))
            time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        assert "Traceback" not in process.output()[-3000:]
        inside += bool(unfinished(folder / "checkpoints")) and not starts  # possibly left by the previous kill
    return newest(folder), inside


def test_killed_and_later_stopped_by_a_signal_it_ends_in_the_same_bits(tmp_path):
    workdir, folder = tmp_path / "run", tmp_path / "run" / "tiny"
    often = ("--num-samples", "0", *ENDLESS, "--checkpoint-every", "5", "--log-every", "5")
    killed = RunningProcess(workdir, *often)
    killed.until_saved(beyond=5)
    killed.kill()
    reached = newest(folder)
    stopped = RunningProcess(workdir, *often)
    stopped.until_saved(beyond=reached)
    stopped.send(signal.SIGTERM)
    assert stopped.end() == 128 + signal.SIGTERM, stopped.output()[-3000:]
    assert f"Resuming from step {reached} of " in stopped.output()
    reached = newest(folder)
    message = rf"Stopped and saved at step {reached}\. The same command resumes from there"
    assert_one_message(stopped.output(), message)
    output = train(workdir, "--steps", str(reached + 10), "--log-every", "5")
    assert f"Resuming from step {reached} of {reached + 10}." in output
    train_here(tmp_path / "whole", steps=reached + 10, log_every=5, checkpoint_every=1_000_000)
    assert_same_run(workdir, tmp_path / "whole", means=False)


@pytest.mark.slow
def test_killed_a_few_times_it_ends_in_the_same_bits(tmp_path, whole):
    kill_over_and_over(tmp_path / "killed", 4, seed=1, options=(*OPTIONS, "--checkpoint-every", "1"))
    train(tmp_path / "killed", *OPTIONS)
    assert_same_run(tmp_path / "killed", whole, means=False)


@pytest.mark.slow
def test_killed_fifty_times_it_ends_in_the_same_bits(tmp_path):
    options = ("--checkpoint-every", "5", "--log-every", "5")
    reached, inside = kill_over_and_over(tmp_path / "killed", 50, seed=0, options=(*ENDLESS, *options))
    print(f"50 kills, {inside} of them inside a checkpoint, up to step {reached}")
    last = ("--steps", str(reached + 50))
    train(tmp_path / "killed", *last, *options)
    train(tmp_path / "whole", *last, "--checkpoint-every", "1000000", "--log-every", "5")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert inside >= 5
