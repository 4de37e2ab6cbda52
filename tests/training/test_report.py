import json

import numpy as np
import pytest

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.data import sources
from vdm_jax.training.data.sources import Dataset, Images
from vdm_jax.training.evaluation.baseline import histogram_bits_per_dim
from vdm_jax.training.evaluation.report import (
    evaluate_examples,
    format_mean_and_error,
    mean_and_error,
    summary,
    write_report,
)
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.keys import stream
from vdm_jax.training.loop import train
from vdm_jax.training.run import initial_state

KEY = stream(0, "evaluate")
NOTES = {"seconds": 1.0, "training_images_per_second": None, "pipeline_images_per_second": 1.0}


def test_padding_the_last_block_changes_no_number(tiny, monkeypatch):
    run = tiny(eval_batch_size=104)  # 360 = 3 x 104 + 48
    params = initial_state(run).ema
    values = evaluate_examples(run, params, KEY)["error"]
    take = Images.take

    def other_filling(self, indices):
        batch = take(self, indices)
        copies = indices == indices[-1]
        copies[np.argmax(copies)] = False
        batch["image"][copies] = 3
        return batch

    monkeypatch.setattr(Images, "take", other_filling)
    assert (evaluate_examples(run, params, KEY)["error"] == values).all()


def test_eval_examples_limits_the_examples_and_the_result_repeats(tiny):
    run = tiny(eval_examples=110)
    params = initial_state(run).ema
    values, again = (evaluate_examples(run, params, KEY) for _ in range(2))
    assert (values["label"] == run.data.test.take(np.arange(110))["label"]).all()
    assert (values["error"] == again["error"]).all()


def test_no_more_copies_are_evaluated_than_the_devices_need(tiny, monkeypatch):
    sizes, take = [], Images.take
    monkeypatch.setattr(Images, "take", lambda self, i: sizes.append(len(i)) or take(self, i))
    for examples, devices, block in [(3, 1, 3), (30, 8, 32), (300, 8, 104)]:
        run = tiny(devices, eval_examples=examples)
        sizes.clear()
        assert len(evaluate_examples(run, initial_state(run).ema, KEY)["label"]) == examples
        assert set(sizes) == {block}


def test_mean_and_standard_error():
    result = mean_and_error(np.array([1.0, 2.0, 3.0, 6.0], np.float32))
    assert result["mean"] == pytest.approx(3.0)
    assert result["standard_error"] == pytest.approx(np.sqrt(14 / 3 / 4))


def test_one_example_has_a_mean_and_no_error(tiny):
    assert mean_and_error(np.array([2.5])) == {"mean": 2.5, "standard_error": None}
    run = tiny(steps=1, eval_examples=1)
    result = write_report(run, Saved(initial_state(run), NOTES, []))
    assert result["test"]["error"]["standard_error"] is None
    assert f"{result['test']['error']['mean']:.4f} ± n/a" in summary(result)
    assert json.loads((run.folder / "report.json").read_text(), parse_constant=pytest.fail) == result


def test_an_infinite_mean_has_no_error():
    result = mean_and_error(np.array([1.0, np.inf]))
    assert result == {"mean": np.inf, "standard_error": None}
    assert format_mean_and_error(result) == "inf ± n/a"
    assert (
        format_mean_and_error({"mean": None, "standard_error": 1.0}, 2, 6, 5) == "   n/a ±  1.00"
    )  # as read from a report


def test_histogram_by_hand():
    """Two pixels, three levels; training values 0, 0, 1 and 2, 2, 2; test values (0, 2) and (2, 0)."""

    def images(values):
        return Images([{"image": np.array(v, np.uint8).reshape(1, 2, 1), "label": 0} for v in values], (1, 2, 1))

    train_set, test = images([(0, 2), (0, 2), (1, 2)]), images([(0, 2), (2, 0)])
    spec = DataSpec("hand", (1, 2, 1), 3, 0, 3, 2)
    expected = -np.mean(np.log2([3 / 6, 4 / 6, 1 / 6, 1 / 6]))
    assert histogram_bits_per_dim(Dataset(spec, train_set, test)) == pytest.approx(expected)
    assert histogram_bits_per_dim(Dataset(spec._replace(levels=2**27), train_set, test)) is None  # they take 2 GiB


def test_the_histogram_of_the_digits():
    assert histogram_bits_per_dim(sources.load("digits")) == pytest.approx(2.42, abs=0.005)


def test_the_report_is_complete(tiny):
    run = tiny(8, steps=10)
    result = write_report(run, train(run))
    assert (result["steps"], result["n_examples"], result["parameters"]) == (10, 360, 10 * 16 + 16 * 64 + 1)
    assert result["device"]["count"] == 8
    assert result["seconds"] > 0
    assert result["pipeline_images_per_second"] > 0
    assert result["training_images_per_second"] > 0
    assert result["test"]["label"]["mean"] == pytest.approx(run.data.test.take(np.arange(360))["label"].mean())
    text = summary(result)
    assert f"{result['test']['error']['mean']:.4f} ± {result['test']['error']['standard_error']:.4f}" in text
    assert "2.4212" in text
    assert text.startswith("tiny: 10 steps")
