"""Scores of single examples and classification by Bayes' rule, where the probability of every image is known."""

import csv
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.experiments import known
from vdm_jax.training import run as runs
from vdm_jax.training.cli import score as scoring_command
from vdm_jax.training.data.given_images import Relabeled
from vdm_jax.training.data.sources import Dataset, Images
from vdm_jax.training.evaluation import classification, scoring
from vdm_jax.training.experiment import DataSpec, LikelihoodRow
from vdm_jax.training.loop import train
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.runtime.errors import UserError

SPEC = DataSpec("known", (2, 2, 1), 3, 3, 24, 24)


def world(tmp_path, contrast=1.5, **options):
    """A run whose test images have known probabilities: drawn from their label's distribution."""
    config = dataclasses.replace(known.CONFIG, workdir=str(tmp_path), contrast=contrast, **options)
    experiment = config.build(SPEC)
    table = np.asarray(known.tables(SPEC, contrast))
    generator = np.random.RandomState(0)
    labels = generator.randint(3, size=24)
    uniform = generator.uniform(size=(24, *SPEC.shape, 1))
    images = (uniform > np.exp(table[labels]).cumsum(-1)[..., :-1]).sum(-1).astype(np.uint8)
    records = [{"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True)]
    examples = Images(records, SPEC.shape)
    run = runs.Run("known", config, tmp_path / "known", Dataset(SPEC, examples, examples), experiment, make_mesh(1))
    log_probs = np.take_along_axis(table.astype(np.float64)[:, None], images[None, ..., None], -1)
    exact = -log_probs.sum((2, 3, 4, 5)).T  # (N, classes + 1)
    return run, {"tables": jnp.asarray(table), "trained": jnp.ones(())}, exact, labels


def test_scores_are_the_probabilities_within_their_error_bars(tmp_path):
    run, params, exact, labels = world(tmp_path, eval_batch_size=16)  # two blocks, the last one padded
    names = [f"image {i}" for i in range(24)]
    scores = scoring.score(run, params, scoring.model_bound(run), names, labels, samples=48)
    truth = exact[np.arange(24), labels]
    off = (scores.mean - truth) / scores.error
    assert scores.error.max() < 0.3  # labels differ by more than that
    assert np.abs(exact[np.arange(24), (labels + 1) % 3] - truth).mean() > 1.2
    assert np.abs(off).max() < 4.0
    assert 0.7 < np.sqrt(np.mean(off**2)) < 1.4
    assert abs(off.mean()) < 4.0 / 24**0.5
    np.testing.assert_allclose(scores.error, scores.nats.std(1, ddof=1) / 48**0.5)

    paths = scoring.write_scores(tmp_path, scores, {"input": "test"})
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [row["example"] for row in rows] == names
    assert [int(row["label"]) for row in rows] == labels.tolist()
    np.testing.assert_allclose([float(row["nats"]) for row in rows], scores.mean, rtol=1e-5)
    np.testing.assert_allclose([float(row["bits_per_dim_error"]) for row in rows], scores.error / 4 / np.log(2), 1e-5)
    report = json.loads(paths[1].read_text())
    assert report["input"] == "test"
    assert report["nats"]["mean"] == pytest.approx(scores.mean.mean())
    assert report["bits_per_dim"]["standard_error"] == pytest.approx(scores.mean.std(ddof=1) / 24**0.5 / 4 / np.log(2))
    assert report["by_label"]["2"]["nats"]["mean"] == pytest.approx(scores.mean[labels == 2].mean())
    assert report["by_label"]["2"]["n_examples"] == np.sum(labels == 2)
    assert report["examples"][3]["nats"] == pytest.approx(scores.mean[3])
    text = scoring.table(scores)
    assert f"{scores.mean[3]:.3f} ± {scores.error[3]:7.3f}" in text
    assert "... 4 more in scores.csv" in text
    assert f"label 2 ({np.sum(labels == 2)})" in text


def test_one_noise_sample_has_no_error_bar(tmp_path):
    scores = scoring.Scores(["a", "b"], None, np.array([[1.0], [3.0]]), 2)
    assert np.isnan(scores.error).all()
    (table, report) = scoring.write_scores(tmp_path, scores, {})
    assert table.read_text().splitlines()[1] == "a,,1,,0.721348,"
    assert json.loads(report.read_text(), parse_constant=pytest.fail)["examples"][0]["nats_error"] is None
    assert "label" not in scoring.table(scores)
    assert f"{1.0:9.3f} ±     n/a" in scoring.table(scores)
    density = scores._replace(num_dims=None)  # bits per dimension would depend on the units of the data
    (table, report) = scoring.write_scores(tmp_path, density, {})
    assert table.read_text().splitlines() == ["example,label,nats,nats_error", "a,,1,", "b,,3,"]
    assert "bits_per_dim" not in json.loads(report.read_text())
    assert "bits" not in scoring.table(density)


def test_classes_are_those_of_bayes_rule(tmp_path):
    run, params, exact, labels = world(tmp_path, eval_batch_size=24)
    nats = classification.class_nats(run, params, scoring.model_bound(run), samples=128)
    prior = np.array([0.5, 0.3, 0.2])
    joint = prior * np.exp(-exact[:, :3])
    truth = joint / joint.sum(1, keepdims=True)
    assert np.abs(truth - truth.mean(0)).max() > 0.3
    np.testing.assert_allclose(classification.posterior(nats, prior), truth, atol=0.06)
    np.testing.assert_allclose(classification.posterior(exact[:, :3], prior), truth, rtol=1e-6)
    np.testing.assert_allclose(classification.posterior(exact[:, :3] + 2000.0), classification.posterior(exact[:, :3]))

    summary, paths = classification.write_classes(tmp_path, [str(i) for i in range(24)], labels, nats, {"step": 2})
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    uniform = classification.posterior(nats)
    np.testing.assert_allclose([float(row["p(1)"]) for row in rows], uniform[:, 1], rtol=1e-5)
    assert [int(row["predicted"]) for row in rows] == uniform.argmax(1).tolist()
    report = json.loads(paths[1].read_text())
    assert report["step"] == 2
    assert report["accuracy"]["mean"] == pytest.approx(np.mean(uniform.argmax(1) == labels))
    assert f"accuracy {report['accuracy']['mean']:.4f}" in summary
    summary, paths = classification.write_classes(tmp_path, ["a"], None, np.array([[3.0, 1.0]]), {})
    assert "1 examples without labels, classified as 1 x 1" in summary
    assert "accuracy" not in json.loads(paths[1].read_text())


def test_all_classes_have_the_same_noise(tmp_path):
    # classes with one distribution have one probability, whatever the noise; the estimates differ between examples
    run, params, _, _ = world(tmp_path, contrast=0.0)
    nats = classification.class_nats(run, params, scoring.model_bound(run), samples=1)
    np.testing.assert_allclose(nats, nats[:, :1].repeat(3, 1), rtol=1e-6)
    assert nats[:, 0].std() > 0.01


def test_accuracy_and_calibration_by_hand():
    probabilities = np.array([[0.92, 0.08], [0.97, 0.03], [0.35, 0.65], [0.62, 0.38], [0.0, 1.0]])
    found = classification.assess(probabilities, np.array([0, 1, 1, 0, 1]))
    assert found["accuracy"]["mean"] == pytest.approx(4 / 5)
    assert found["nats"]["mean"] == pytest.approx(-np.mean(np.log([0.92, 0.03, 0.65, 0.62, 1.0])))
    # bins of confidence: 0.6..0.7 has 0.65 and 0.62, both right; 0.9..1 has 0.92, 0.97 (wrong) and 1
    assert [part["n_examples"] for part in found["calibration"]] == [2, 3]
    assert found["calibration"][1]["accuracy"] == pytest.approx(2 / 3)
    gaps = [abs(1.0 - 0.635), abs(2 / 3 - (0.92 + 0.97 + 1.0) / 3)]
    assert found["calibration_error"] == pytest.approx((2 * gaps[0] + 3 * gaps[1]) / 5)
    assert found["by_label"]["1"]["mean"] == pytest.approx(2 / 3)
    assert found["confusion"] == [[2, 0], [1, 2]]
    certain = classification.assess(np.array([[1.0, 0.0]]), np.array([1]))
    assert certain["nats"]["mean"] == np.inf


def test_the_row_and_the_label_that_are_scored(tmp_path):
    run, _, _, _ = world(tmp_path)
    assert scoring.select_score(run, None)[0] == "bound of report.json"
    assert scoring.select_score(run, "ex")[0] == "exact"
    with pytest.raises(UserError, match=r"--row 'odd' begins no row .*\n  exact"):
        scoring.select_score(run, "odd")
    twice = {"bound, T = 10": LikelihoodRow("", max), "bound, T = 100": LikelihoodRow("", max)}
    two = run._replace(experiment=run.experiment._replace(likelihood_rows=twice))
    assert scoring.select_score(two, "bound, T = 10")[0] == "bound, T = 10"
    with pytest.raises(UserError, match=r"--row 'bound' begins 2 rows"):
        scoring.select_score(two, "bound")
    assert scoring.conditional_labels(run, True, None) == (None, "P(x | label)")
    assert scoring.conditional_labels(run, True, 2) == (2, "P(x | label 2)")
    assert scoring.conditional_labels(run, False, None) == (3, "P(x)")  # "no label"
    with pytest.raises(UserError, match=r"--label 3: known has 3 classes \(0..2\)"):
        scoring.conditional_labels(run, True, 3)
    plain = run._replace(experiment=run.experiment._replace(num_classes=0))
    assert scoring.conditional_labels(plain, True, None) == (None, "P(x)")
    with pytest.raises(UserError, match="--label 1: known is unconditional"):
        scoring.conditional_labels(plain, True, 1)
    with pytest.raises(UserError, match="known is not class-conditional"):
        classification.class_nats(plain, None, scoring.model_bound(run))
    never = run._replace(config=dataclasses.replace(run.config, label_dropout=0.0))
    with pytest.raises(UserError, match=r"known has no model of P\(x\)"):
        scoring.conditional_labels(never, False, None)
    silent = run._replace(experiment=run.experiment._replace(evaluate=lambda *_: {"error": jnp.zeros(1)}))
    with pytest.raises(UserError, match="known has no likelihood: `evaluate` computes error"):
        scoring.model_bound(silent)


def test_relabeled_examples_keep_their_images():
    images = Images([{"image": np.full((1, 1, 1), i, np.uint8), "label": i} for i in range(3)], (1, 1, 1))
    other = Relabeled(images, np.array([5, 6, 7]))
    batch = other.take(np.array([2, 0]))
    assert (batch["image"].ravel().tolist(), batch["label"].tolist(), len(other)) == ([2, 0], [7, 5], 3)


@pytest.fixture
def trained(command, tmp_path):
    """The known recipe, trained, and a file with three of its images: the command with arguments and its result."""
    run = runs.open_run("known", dataclasses.replace(known.CONFIG, workdir=str(tmp_path), contrast=2.0), make_mesh(1))
    train(run)
    batch = run.data.test.take(np.arange(3))
    np.savez(tmp_path / "three.npz", x=batch["image"], y=batch["label"])
    np.save(tmp_path / "three.npy", batch["image"])

    def call(given, *options):
        code, printed = command(
            scoring_command.main, "known", str(tmp_path / given) if "." in given else given, *options
        )
        assert code == 0, printed
        return printed, {path.name: path for path in run.folder.iterdir()}

    return call, batch, np.asarray(known.tables(run.data.spec, 2.0))


@pytest.mark.slow
def test_the_command_scores_what_a_conditional_model_is_asked_for(trained):
    call, batch, table = trained
    exact = np.array([[-float(known.log_prob(jnp.asarray(t), image)) for t in table] for image in batch["image"]])
    for given, options, which, about in [
        ("three.npz", [], batch["label"], "P(x | label)"),
        ("three.npy", [], 10, "P(x)"),
        ("three.npz", ["--label", "4"], 4, "P(x | label 4)"),
    ]:
        printed, files = call(given, "--noise-samples", "6", *options)
        assert f"known, step 2, -log {about}: bound of report.json" in printed
        report = json.loads(files["scores.json"].read_text())
        assert (report["probability"], report["noise_samples"], report["step"]) == (about, 6, 2)
        nats = np.array([example["nats"] for example in report["examples"]])
        assert np.abs(nats - exact[np.arange(3), which]).max() < 8.0
        others = [exact[np.arange(3), other] for other in (batch["label"], 4, 10) if other is not which]
        assert min(np.abs(nats - other).max() for other in others) > 10.0
    printed, files = call("test", "--classify", "--noise-samples", "1", "--examples", "3")
    assert "classes of test by Bayes' rule" in printed
    assert json.loads(files["classes.json"].read_text())["n_examples"] == 3


def test_the_command_scores_files(trained, command):
    call, batch, table = trained
    exact = np.array([-float(known.log_prob(jnp.asarray(table[10]), image)) for image in batch["image"]])
    printed, files = call("three.npz", "--row", "exact", "--examples", "2")
    assert "known, step 2, -log P(x): exact" in printed
    report = json.loads(files["scores.json"].read_text())
    np.testing.assert_allclose([each["nats"] for each in report["examples"]], exact[:2], rtol=1e-5)
    assert [each["label"] for each in report["examples"]] == batch["label"][:2].tolist()
    for arguments, message in [
        (["known"], "usage: vdm-jax score known INPUT"),
        (["known", "test", "--noise-samples", "0"], "--noise-samples 0: it must be at least 1"),
        (["known", "test", "--classify", "--label", "1"], "omit --row and --label"),
        (["known", "none.npy"], "none.npy: there is no such file or folder"),
    ]:
        code, printed = command(scoring_command.main, *arguments)
        assert code == 1
        assert message in printed
