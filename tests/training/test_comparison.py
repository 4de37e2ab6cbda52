"""Several experiments in one table and one figure."""

import dataclasses
import json

import numpy as np
import pytest

from tests.training.experiments.tiny import CONFIG
from vdm_jax.training.cli import compare
from vdm_jax.training.evaluation import comparison


@pytest.mark.slow
def test_a_finished_comparison_is_not_trained_again(command, monkeypatch, tmp_path):
    arguments = ("tiny:6", "--eval-examples", "16", "--workdir", str(tmp_path))
    code, output = command(compare.main, *arguments, workdir=False)
    assert code == 0, output
    (row,) = json.loads((tmp_path / "comparison.json").read_text())
    assert row["steps"] == 6
    line = (tmp_path / "comparison.md").read_text().splitlines()[-1]
    assert f"| tiny | {row['test']['bits_per_dim']['mean']:.4f} ± " in line
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "train", lambda run, **_: pytest.fail("trained again"))
        code, again = command(compare.main, *arguments, workdir=False)
    assert code == 0
    assert line in again
    code, refused = command(compare.main, "tiny:4", *arguments[1:], workdir=False)
    assert code == 1
    assert "--fresh" in refused


@pytest.mark.slow
def test_a_fresh_comparison_starts_over(command, tmp_path):
    for steps in (6, 4):
        arguments = (f"tiny:{steps}", "--eval-examples", "16", "--workdir", str(tmp_path), "--fresh")
        code, output = command(compare.main, *arguments, workdir=False)
        assert code == 0, output
    (row,) = json.loads((tmp_path / "comparison.json").read_text())
    assert row["steps"] == 4


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["tiny"], "RECIPE:STEPS, such as vae_digits:2000, got 'tiny'"),
        (["tiny:0"], "got 'tiny:0'"),
        (["tinny:5"], "Did you mean tiny?"),
        ([], "at least one RECIPE:STEPS"),
    ],
)
def test_a_comparison_of_nothing_is_refused(command, items, message):
    code, output = command(compare.main, *items)
    assert code == 1
    assert message in output


def test_a_shorter_run_warms_up_and_averages_over_the_same_part_of_it():
    recipe = dataclasses.replace(CONFIG, steps=1000, warmup_steps=100, ema_decay=0.99)
    short = comparison.shortened(recipe, 200)
    assert (short.steps, short.warmup_steps) == (200, 20)
    assert short.ema_decay == pytest.approx(0.95)
    assert comparison.shortened(recipe, 2).ema_decay == pytest.approx(0.9)
    assert comparison.shortened(recipe, 3000) == dataclasses.replace(recipe, steps=3000)
    assert comparison.shortened(dataclasses.replace(recipe, ema_decay=0.0), 200).ema_decay == 0.0


def test_numbers_that_a_model_lacks_are_dashes():
    result = {
        "experiment": "ae", "test": {"reconstruction_error": {"mean": 0.25, "standard_error": 0.01}}, "likelihood": {},
        "parameters": 1234, "steps": 10, "seconds": 61.0,
    }  # fmt: skip
    row = comparison.Comparison(result, np.zeros((1, 2, 2, 1)))
    assert comparison.table([row]).splitlines()[-1] == "| ae | - | - | 0.2500 ± 0.0100 | 1,234 | 10 | 1:01 |"
    result["test"]["reconstruction_error"]["standard_error"] = None
    assert comparison.table([row]).splitlines()[-1] == "| ae | - | - | 0.2500 ± n/a | 1,234 | 10 | 1:01 |"
