"""Several experiments in one table and one picture."""

import dataclasses
import json

import numpy as np
import pytest

from tests.training.experiments.tiny import CONFIG
from vdm_jax.training.cli import compare


@pytest.mark.slow
def test_a_ladder_is_climbed_once(command, monkeypatch, tmp_path):
    arguments = ("tiny:6", "--eval-examples", "16", "--workdir", str(tmp_path))
    code, told = command(compare.main, *arguments, workdir=False)
    assert code == 0, told
    (row,) = json.loads((tmp_path / "ladder.json").read_text())
    assert row["steps"] == 6
    line = (tmp_path / "ladder.md").read_text().splitlines()[-1]
    assert f"| tiny | {row['test']['bits_per_dim']['mean']:.4f} ± " in line
    assert (tmp_path / "ladder.png").stat().st_size > 1000
    with monkeypatch.context() as patch:
        patch.setattr(compare, "train", lambda run: pytest.fail("trained again"))
        code, again = command(compare.main, *arguments, workdir=False)
    assert code == 0
    assert line in again
    code, refused = command(compare.main, "tiny:4", *arguments[1:], workdir=False)
    assert code == 1
    assert "start anew with --fresh" in refused


@pytest.mark.slow
def test_a_fresh_ladder_starts_anew(command, tmp_path):
    for steps in (6, 4):
        arguments = (f"tiny:{steps}", "--eval-examples", "16", "--workdir", str(tmp_path), "--fresh")
        code, told = command(compare.main, *arguments, workdir=False)
        assert code == 0, told
    (row,) = json.loads((tmp_path / "ladder.json").read_text())
    assert row["steps"] == 4


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        (["tiny"], "'tiny' is no rung: give an experiment and its number of steps"),
        (["tiny:0"], "'tiny:0' is no rung"),
        (["tinny:5"], "Did you mean tiny?"),
        ([], "A ladder needs rungs"),
    ],
)
def test_what_is_no_ladder(command, rungs, message):
    code, told = command(compare.main, *rungs)
    assert code == 1
    assert message in told


def test_a_shorter_run_warms_up_and_averages_over_the_same_part_of_it():
    recipe = dataclasses.replace(CONFIG, steps=1000, warmup_steps=100, ema_decay=0.99)
    short = compare.shortened(recipe, 200)
    assert (short.steps, short.warmup_steps) == (200, 20)
    assert short.ema_decay == pytest.approx(0.95)
    assert compare.shortened(recipe, 2).ema_decay == pytest.approx(0.9)
    assert compare.shortened(recipe, 3000) == dataclasses.replace(recipe, steps=3000)
    assert compare.shortened(dataclasses.replace(recipe, ema_decay=0.0), 200).ema_decay == 0.0


def test_numbers_that_a_model_lacks_are_dashes():
    result = {
        "experiment": "ae", "test": {"reconstruction_error": {"mean": 0.25, "standard_error": 0.01}}, "ledger": {},
        "parameters": 1234, "steps": 10, "seconds": 61.0,
    }  # fmt: skip
    rung = compare.Rung(result, np.zeros((1, 2, 2, 1)))
    assert compare.table([rung]).splitlines()[-1] == "| ae | - | - | 0.2500 ± 0.0100 | 1,234 | 10 | 1:01 |"
    result["test"]["reconstruction_error"]["standard_error"] = None
    assert compare.table([rung]).splitlines()[-1] == "| ae | - | - | 0.2500 ± n/a | 1,234 | 10 | 1:01 |"
