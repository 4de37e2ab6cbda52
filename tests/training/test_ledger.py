import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.evaluation import report
from vdm_jax.training.evaluation.likelihood_report import choose, fill
from vdm_jax.training.evaluation.report import write_report
from vdm_jax.training.experiment import LikelihoodCurve, LikelihoodRow
from vdm_jax.training.loop import train
from vdm_jax.training.run import first_state
from vdm_jax.training.runtime.errors import UserError

DIMS = 64


def _squares(params, key, batch):
    """Something of each image alone."""
    return 10.0 * jnp.square(batch["image"].astype(jnp.float32) / 16).mean(axis=(1, 2, 3))


def _points(params, key, batch):
    images = batch["image"].astype(jnp.float32).reshape(-1, DIMS)
    return {"x": jnp.broadcast_to(jnp.arange(8.0), (len(images), 8)), "y": images[:, ::8]}


ROWS = {
    "bound, near": LikelihoodRow("it and more", _squares, 3),
    "bound, far": LikelihoodRow("it and much more", lambda *given: 2 * _squares(*given)),
    "ode": LikelihoodRow("it", lambda *given: 0 * _squares(*given)),
}


def with_ledger(run):
    curve = LikelihoodCurve("level", "nats", _points, 2)
    return run._replace(experiment=run.experiment._replace(ledger=ROWS, curve=curve))


def filled(run, names=None):
    saved = Saved(first_state(run), {"seconds": 1.0}, [])
    result = {}
    run.folder.mkdir(parents=True, exist_ok=True)
    return fill(run, saved, choose(run.experiment, names), result), result


def test_rows_are_means_over_all_examples_with_their_errors(tiny, capsys):
    run = with_ledger(tiny(1))
    paths, result = filled(run)
    values = np.asarray(_squares(None, None, run.data.test.take(np.arange(360))), np.float64)
    entry = result["ledger"]["bound, near"]
    assert entry["nats"]["mean"] == pytest.approx(values.mean())
    assert entry["nats"]["standard_error"] == pytest.approx(values.std(ddof=1) / 360**0.5)
    assert entry["bits_per_dim"]["mean"] == pytest.approx(values.mean() / DIMS / np.log(2))
    assert entry["what"] == "it and more"
    assert result["ledger"]["bound, far"]["nats"]["mean"] == pytest.approx(2 * values.mean())
    printed = capsys.readouterr().out
    assert "ledger of 360 images" in printed
    assert f"{values.mean():.3f} ±" in printed
    assert json.loads((run.folder / "report.json").read_text())["ledger"] == result["ledger"]
    pixels = run.data.test.take(np.arange(360))["image"].reshape(360, DIMS)[:, ::8].astype(np.float64)
    np.testing.assert_allclose(result["curve"]["mean"], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result["curve"]["standard_error"], pixels.std(0, ddof=1) / 360**0.5, rtol=1e-5)
    assert result["curve"]["x"] == list(range(8))
    assert [path.name for path in paths] == ["ledger.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_of_one_image_there_is_a_ledger_without_errors(tiny, capsys):
    run = with_ledger(tiny(1, eval_examples=1))
    paths, result = filled(run)
    mean = float(_squares(None, None, run.data.test.take(np.arange(1)))[0])
    assert result["ledger"]["bound, near"]["nats"] == {"mean": pytest.approx(mean), "standard_error": None}
    assert f"{mean:10.3f} ±     n/a  {mean / DIMS / np.log(2):8.4f} ±    n/a  it and more" in capsys.readouterr().out
    assert result["curve"]["standard_error"] == [None] * 8
    assert json.loads((run.folder / "report.json").read_text(), parse_constant=pytest.fail) == result
    assert [path.name for path in paths] == ["ledger.png"]


def test_devices_do_not_matter(tiny):
    one, eight = (filled(with_ledger(tiny(devices)))[1]["ledger"] for devices in (1, 8))
    for name in ROWS:
        assert eight[name]["nats"] == pytest.approx(one[name]["nats"], rel=1e-6)


def test_rows_by_the_beginnings_of_their_names(tiny):
    experiment = with_ledger(tiny(1)).experiment
    assert list(choose(experiment, None)) == list(ROWS)
    assert list(choose(experiment, ("bound",))) == ["bound, near", "bound, far"]
    assert choose(experiment, ("none",)) == {}
    with pytest.raises(
        UserError, match=r"No row of this experiment's ledger begins with 'odd'. There are:\n  bound, near"
    ):
        choose(experiment, ("ode", "odd"))


def test_a_model_without_a_ledger_has_none(tiny):
    run = tiny(1)
    assert filled(run) == ([], {})


def test_the_command_keeps_the_report_and_adds_the_ledger(tiny, command, monkeypatch):
    run = tiny(1, steps=10)
    write_report(run, train(run))
    opened = report.open_run
    monkeypatch.setattr(report, "open_run", lambda *given: with_ledger(opened(*given)))
    code, printed = command(report.main, "tiny", "--rows", "ode", "--eval-examples", "104")
    assert code == 0, printed
    result = json.loads((run.folder / "report.json").read_text())
    assert list(result["ledger"]) == ["ode"]
    assert result["n_examples"] == 104
    assert result["steps"] == 10
    assert dataclasses.asdict(run.config)["steps"] == 10
