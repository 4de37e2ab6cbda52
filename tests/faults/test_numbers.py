"""NaN in the loss or in the gradient alone stops the run with a message, and is never saved."""

import json

import jax
import numpy as np
import pytest

from tests.faults.harness import RunningProcess, assert_one_message, newest, read
from tests.training.experiments.tiny import CONFIG
from vdm_jax.training.data import sources
from vdm_jax.training.data.batches import train_iterator

pytestmark = pytest.mark.slow
EVERY = 4


def first_bad(poison):
    """The first step with this many zeros in its batch."""
    batches = train_iterator(sources.load("digits").train, CONFIG.batch_size, CONFIG.seed)
    return next(step for step in range(1, 1000) if (next(batches)["label"] == 0).sum() >= poison)


@pytest.mark.parametrize("experiment", ["tiny", "bad_gradient"])
def test_a_nan_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path, experiment):
    poison, bad = next((n, first_bad(n)) for n in range(3, 20) if first_bad(n) > 12)
    options = ("--num-samples", "0", "--steps", str(bad + 20), "--poison", str(poison))
    options = (*options, "--checkpoint-every", str(EVERY), "--log-every", "1")
    good = (bad - 1) // EVERY * EVERY
    what = "loss nan and gradient norm nan" if experiment == "tiny" else r"loss 0\.\d+ and gradient norm nan"
    for _ in range(2):  # the same command fails at the same step
        process = RunningProcess(tmp_path, *options, experiment=experiment)
        assert process.end() == 1, process.output()[-3000:]
        message = rf"{what} at step {bad}; training stopped\. The last good checkpoint is .*/{good}\.\n.*--fresh"
        assert_one_message(process.output(), message)
        assert newest(tmp_path / experiment) == good
    lines = (tmp_path / experiment / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, bad))
    (tmp_path / experiment).rename(tmp_path / "tiny") if experiment != "tiny" else None
    saved = read(tmp_path)
    assert saved.notes["step"] == good
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(saved.state)))
