import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.cli import evaluate
from vdm_jax.training.evaluation.likelihood_report import add_likelihood, select_rows
from vdm_jax.training.evaluation.report import write_report
from vdm_jax.training.experiment import LikelihoodCurve, LikelihoodRow
from vdm_jax.training.loop import train
from vdm_jax.training.run import initial_state
from vdm_jax.training.runtime.errors import UserError

DIMS = 64


def _squares(params, key, batch):
    """A number of each image."""
    return 10.0 * jnp.square(batch["image"].astype(jnp.float32) / 16).mean(axis=(1, 2, 3))


def _points(params, key, batch):
    images = batch["image"].astype(jnp.float32).reshape(-1, DIMS)
    return {"x": jnp.broadcast_to(jnp.arange(8.0), (len(images), 8)), "y": images[:, ::8]}


ROWS = {
    "bound, near": LikelihoodRow("it and more", _squares, 3),
    "bound, far": LikelihoodRow("it and much more", lambda *given: 2 * _squares(*given)),
    "ode": LikelihoodRow("it", lambda *given: 0 * _squares(*given)),
}


def with_likelihood(run):
    curve = LikelihoodCurve("level", "nats", _points, 2)
    return run._replace(experiment=run.experiment._replace(likelihood_rows=ROWS, likelihood_curve=curve))


def filled(run, names=None):
    saved = Saved(initial_state(run), {"seconds": 1.0}, [])
    result = {}
    run.folder.mkdir(parents=True, exist_ok=True)
    return add_likelihood(run, saved, select_rows(run.experiment, names), result), result


def test_rows_are_means_over_all_examples_with_their_errors(tiny, capsys):
    run = with_likelihood(tiny(1))
    paths, result = filled(run)
    values = np.asarray(_squares(None, None, run.data.test.take(np.arange(360))), np.float64)
    entry = result["likelihood"]["bound, near"]
    assert entry["nats"]["mean"] == pytest.approx(values.mean())
    assert entry["nats"]["standard_error"] == pytest.approx(values.std(ddof=1) / 360**0.5)
    assert entry["bits_per_dim"]["mean"] == pytest.approx(values.mean() / DIMS / np.log(2))
    assert entry["description"] == "it and more"
    assert result["likelihood"]["bound, far"]["nats"]["mean"] == pytest.approx(2 * values.mean())
    printed = capsys.readouterr().out
    assert "likelihood of 360 images" in printed
    assert f"{values.mean():.3f} ±" in printed
    assert json.loads((run.folder / "report.json").read_text())["likelihood"] == result["likelihood"]
    pixels = run.data.test.take(np.arange(360))["image"].reshape(360, DIMS)[:, ::8].astype(np.float64)
    np.testing.assert_allclose(result["likelihood_curve"]["mean"], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        result["likelihood_curve"]["standard_error"], pixels.std(0, ddof=1) / 360**0.5, rtol=1e-5
    )
    assert result["likelihood_curve"]["x"] == list(range(8))
    assert [path.name for path in paths] == ["likelihood.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_the_likelihood_of_one_image_has_no_standard_errors(tiny, capsys):
    run = with_likelihood(tiny(1, eval_examples=1))
    paths, result = filled(run)
    mean = float(_squares(None, None, run.data.test.take(np.arange(1)))[0])
    assert result["likelihood"]["bound, near"]["nats"] == {"mean": pytest.approx(mean), "standard_error": None}
    assert f"{mean:10.3f} ±     n/a  {mean / DIMS / np.log(2):8.4f} ±    n/a  it and more" in capsys.readouterr().out
    assert result["likelihood_curve"]["standard_error"] == [None] * 8
    assert json.loads((run.folder / "report.json").read_text(), parse_constant=pytest.fail) == result
    assert [path.name for path in paths] == ["likelihood.png"]


def test_devices_do_not_matter(tiny):
    one, eight = (filled(with_likelihood(tiny(devices)))[1]["likelihood"] for devices in (1, 8))
    for name in ROWS:
        assert eight[name]["nats"] == pytest.approx(one[name]["nats"], rel=1e-6)


def test_rows_are_selected_by_prefix(tiny):
    experiment = with_likelihood(tiny(1)).experiment
    assert list(select_rows(experiment, None)) == list(ROWS)
    assert list(select_rows(experiment, ("bound",))) == ["bound, near", "bound, far"]
    assert select_rows(experiment, ("none",)) == {}
    with pytest.raises(UserError, match=r"--rows 'odd': .*\n  bound, near"):
        select_rows(experiment, ("ode", "odd"))


def test_a_model_without_rows_has_no_likelihood_report(tiny):
    run = tiny(1)
    assert filled(run) == ([], {})


def test_the_command_keeps_the_report_and_adds_the_likelihood(tiny, command, monkeypatch):
    run = tiny(1, steps=10)
    write_report(run, train(run))
    opened = evaluate.open_run
    monkeypatch.setattr(evaluate, "open_run", lambda *given: with_likelihood(opened(*given)))
    code, printed = command(evaluate.main, "tiny", "--rows", "ode", "--eval-examples", "104")
    assert code == 0, printed
    result = json.loads((run.folder / "report.json").read_text())
    assert list(result["likelihood"]) == ["ode"]
    assert result["n_examples"] == 104
    assert result["steps"] == 10
    assert dataclasses.asdict(run.config)["steps"] == 10
