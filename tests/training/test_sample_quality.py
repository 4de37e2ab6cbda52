"""Sample quality of test images and of noise; the classifier for features; files of weights."""

import dataclasses
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vdm_jax.networks.classifier import ClassifierConfig
from vdm_jax.training import loop
from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.data import sources
from vdm_jax.training.evaluation import features, sample_quality
from vdm_jax.training.evaluation.features import Extractor
from vdm_jax.training.experiment import Cost, DataSpec, SampleBatch
from vdm_jax.training.run import initial_state
from vdm_jax.training.runtime.errors import UserError

DIGITS = sources.load("digits")
TEST = DIGITS.test.take(np.arange(360))
TRAIN = DIGITS.train.take(np.arange(1437))
SMALL = features.ClassifierTraining(
    steps=60, num_samples=0, picture_every=0, warmup_steps=10, learning_rate=3e-3, ema_decay=0.9, log_every=60,
    network=ClassifierConfig(channels=8, multipliers=(1,), groups=4, features=16),
)  # fmt: skip
PIXELS = Extractor("pixels", lambda images: (images.reshape(len(images), -1).astype(jnp.float32), None))
LABELS = jnp.asarray(TEST["label"])
KNOWING = PIXELS._replace(extract=lambda images: (PIXELS.extract(images)[0], _look_up(images)))


class Labelled(NamedTuple):
    """Samples of a conditional recipe."""

    images: Any
    labels: Any


def _look_up(images):
    """The label of the nearest test image."""
    real = jnp.asarray(TEST["image"], jnp.float32).reshape(360, -1)
    seen = images.reshape(len(images), -1).astype(jnp.float32)
    return LABELS[jnp.argmin(jnp.sum((seen[:, None] - real[None]) ** 2, axis=-1), axis=1)]


def sampled_by(run, sample):
    """The run with this sampler."""
    return run._replace(experiment=run.experiment._replace(sample=sample))


def measured(run, by=PIXELS, samples=0):
    return sample_quality.measure_quality(run, initial_state(run).ema, by, samples)


def noise_images(params, key, n):
    return SampleBatch(jax.random.randint(key, (n, 8, 8, 1), 0, 17).astype(jnp.uint8))


def real_images(params, key, n):
    """Random test images."""
    index = jax.random.randint(key, (n,), 0, 360)
    return SampleBatch(jnp.asarray(TEST["image"])[index])


def test_an_extractor_sees_every_image_once_and_in_order():
    seen, labels = PIXELS(TEST["image"])  # 360 = 3 x 120
    assert labels is None
    np.testing.assert_array_equal(seen, TEST["image"].reshape(360, 64))
    seen, labels = KNOWING(TEST["image"][:130])
    np.testing.assert_array_equal(seen, TEST["image"][:130].reshape(130, 64))
    assert np.mean(labels == TEST["label"][:130]) == 1.0


def test_samples_that_are_the_test_images(tiny):
    run = sampled_by(tiny(1, eval_batch_size=360), lambda params, key, n: SampleBatch(jnp.asarray(TEST["image"])[:n]))
    result = measured(run)
    assert result["samples"] == result["test_images"] == 360
    assert result["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert (result["precision"], result["recall"]) == (1.0, 1.0)
    assert result["kernel"]["mean"] < 3 * result["kernel"]["standard_error"]
    assert result["training_images"]["samples"] == 360
    assert result["training_images"]["frechet"] > 1.0
    assert "agreement" not in result


@pytest.mark.slow
def test_samples_that_are_random_test_images_or_noise(tiny):
    run = tiny(1, eval_batch_size=104)
    good = measured(sampled_by(run, real_images), samples=250)
    noise = measured(sampled_by(run, noise_images), samples=250)
    assert good["samples"] == noise["samples"] == good["training_images"]["samples"] == 250
    assert good["training_images"] == noise["training_images"]
    assert (good["precision"], noise["precision"], noise["recall"]) == (1.0, 0.0, 0.0)
    assert good["frechet"] < noise["frechet"] / 10
    assert abs(good["kernel"]["mean"]) < 4 * good["kernel"]["standard_error"]
    assert noise["kernel"]["mean"] > 10 * noise["kernel"]["standard_error"]


def test_blocks_have_different_noise_and_repeat(tiny):
    run = sampled_by(tiny(1, eval_batch_size=104), real_images)
    params = initial_state(run).ema
    images, labels = sample_quality.sample_in_blocks(run, params, 250)
    assert images.shape == (250, 8, 8, 1)
    assert labels is None
    assert (images[:104] != images[104:208]).any(axis=(1, 2, 3)).mean() > 0.9
    np.testing.assert_array_equal(sample_quality.sample_in_blocks(run, params, 250)[0], images)
    eight = sampled_by(tiny(8, eval_batch_size=104), real_images)
    np.testing.assert_array_equal(sample_quality.sample_in_blocks(eight, initial_state(eight).ema, 250)[0], images)


def test_the_share_of_labels_the_classifier_agrees_with(tiny):
    # The first of every five images has a wrong label.
    def sample(params, key, n):
        index = jnp.arange(n)
        label = jnp.where(index % 5 == 0, LABELS[index] + 1, LABELS[index]) % 10
        return Labelled(jnp.asarray(TEST["image"])[index], label)

    result = measured(sampled_by(tiny(1, eval_batch_size=100), sample), KNOWING, 100)
    assert result["agreement"]["mean"] == pytest.approx(0.8)
    assert result["agreement"]["standard_error"] == pytest.approx((0.16 / 99) ** 0.5)
    assert "label agreement" in sample_quality.summary(result)
    assert "80.0%" in sample_quality.summary(result)


def test_summary_holds_the_numbers(tiny):
    result = measured(sampled_by(tiny(1, eval_batch_size=120), real_images))
    text = sample_quality.summary(result)
    assert text.startswith("  sample quality by pixels\n  against 360 test images  360 samples")
    for part in (f"{result['frechet']:.4f}", f"{result['training_images']['recall']:.3f}", "±"):
        assert part in text
    assert json.loads(json.dumps(result)) == result


def test_too_few_are_refused(tiny):
    for options, samples in (({}, 19), ({"eval_examples": 19}, 100)):
        with pytest.raises(UserError, match=f"--quality {samples} with .* at least 20 of each"):
            measured(sampled_by(tiny(1, **options), real_images), samples=samples)


def filled(run, monkeypatch, capsys, samples=None, **notes):
    monkeypatch.setattr(sample_quality, "extractor", lambda run, file: PIXELS._replace(name=f"pixels {file}"))
    run.folder.mkdir(parents=True, exist_ok=True)
    saved = Saved(initial_state(run), {"seconds": 1.0, "training_images_per_second": 100.0, **notes}, [])
    result = {"steps": 1}
    sample_quality.add_quality(run, saved, result, samples, "file")
    return result, capsys.readouterr().out


def test_the_report_gets_the_quality(tiny, monkeypatch, capsys):
    run = sampled_by(tiny(1, eval_examples=40), real_images)
    result, printed = filled(run, monkeypatch, capsys)
    assert json.loads((run.folder / "report.json").read_text()) == result
    assert result["steps"] == 1
    assert result["quality"]["samples"] == result["quality"]["test_images"] == 40
    assert result["quality"]["features"] == "pixels file"
    assert sample_quality.summary(result["quality"]) in printed
    assert filled(run, monkeypatch, capsys, 30)[0]["quality"]["samples"] == 30
    assert filled(run, monkeypatch, capsys, 0) == ({"steps": 1}, "")


@pytest.mark.slow
def test_quality_is_skipped_if_it_takes_longer_than_training(tiny, monkeypatch, capsys):
    # 100 images a second in training are 300 passes: 30,000 passes for each of 40 images take 4,000 seconds
    run = sampled_by(tiny(1, eval_examples=40), real_images)
    slow = run._replace(experiment=run.experiment._replace(cost=Cost(sample=30_000)))
    result, printed = filled(slow, monkeypatch, capsys)
    assert "quality" not in result
    assert "not measured: 40 samples would take about 1:06:40; use fewer: --quality 20" in printed
    assert "quality" in filled(slow, monkeypatch, capsys, seconds=4000.0)[0]
    assert "quality" in filled(slow, monkeypatch, capsys, 40)[0]
    assert "quality" in filled(slow, monkeypatch, capsys, training_images_per_second=None)[0]


def test_quality_is_skipped_if_it_cannot_be_measured(tiny):
    saved = Saved(initial_state(tiny(1)), {"seconds": 1.0, "training_images_per_second": None}, [])
    assert (
        sample_quality.reason_to_skip(tiny(1, eval_examples=19), saved) == "it needs 20 test images, and there are 19"
    )
    run = tiny(1)
    assert sample_quality.reason_to_skip(run, saved) is None
    unlabelled = run._replace(data=run.data._replace(spec=run.data.spec._replace(num_classes=0)))
    assert "digits has no labels" in str(sample_quality.reason_to_skip(unlabelled, saved))
    assert sample_quality.reason_to_skip(unlabelled, saved, "file") is None


@pytest.mark.slow
def test_a_classifier_is_trained_once_and_then_read(tmp_path, monkeypatch):
    folder = tmp_path / ".features" / "digits"
    first = features.train_classifier(DIGITS, folder, SMALL)
    accuracy = json.loads((folder / "report.json").read_text())["test"]["accuracy"]
    found, labels = first(TEST["image"])
    assert found.shape == (360, 16)
    assert np.mean(labels == TEST["label"]) == pytest.approx(accuracy["mean"])
    assert accuracy["mean"] > 0.5
    assert f"16 features of a classifier trained on digits (test accuracy {accuracy['mean']:.1%})" == first.name
    trained = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda run: trained.append(run.config.steps) or train(run))
    again = features.train_classifier(DIGITS, folder, SMALL)
    assert not trained
    np.testing.assert_array_equal(again(TEST["image"])[0], found)
    others = dataclasses.replace(SMALL, steps=5)  # need another classifier
    features.train_classifier(DIGITS, folder, others)
    assert trained == [5]


def test_the_extractor_of_a_run(tiny, monkeypatch):
    run = tiny(1)
    points = run._replace(data=run.data._replace(spec=DataSpec("moons", (2,), 0, 0, 10, 10)))
    x = np.random.RandomState(0).standard_normal((30, 2)).astype(np.float32)
    np.testing.assert_array_equal(features.extractor(points)(x)[0], x)
    unlabelled = run._replace(data=run.data._replace(spec=run.data.spec._replace(num_classes=0)))
    with pytest.raises(
        UserError, match=r"no labels to train a classifier on. Give Inception's weights with --inception"
    ):
        features.extractor(unlabelled)
    monkeypatch.setattr(
        features, "train_classifier", lambda data, folder: Extractor(f"{data.spec.name} {folder}", None)
    )
    assert features.extractor(run).name == f"digits {run.folder.parent / '.features' / 'digits'}"


def test_inception_files_that_cannot_be_used(tiny, tmp_path, monkeypatch):
    run = tiny(1)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(UserError, match=r"--inception needs safetensors: .*pip install safetensors"):
        features.extractor(run, "weights.safetensors")
    points = run._replace(data=run.data._replace(spec=DataSpec("moons", (2,), 0, 0, 10, 10)))
    with pytest.raises(UserError, match=r"--inception .* moons does not have: remove it"):
        features.extractor(points, "weights.safetensors")


def test_inception_from_a_file(tiny, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    run, path = tiny(1), tmp_path / "odd.safetensors"
    with pytest.raises(UserError, match="cannot be used"):
        features.extractor(run, str(path))
    numpy.save_file({"odd": np.zeros(3)}, path)
    with pytest.raises(UserError, match="missing: Conv2d_1a_3x3"):
        features.extractor(run, str(path))


@pytest.mark.slow
def test_the_classifier_of_the_digits_is_right_and_its_features_order_images_by_quality(tmp_path):
    by = features.train_classifier(DIGITS, tmp_path / "digits")
    test, labels = by(TEST["image"])
    assert np.mean(labels == TEST["label"]) >= 0.97
    blurred = np.round(ndimage.gaussian_filter(TEST["image"].astype(float), (0, 0.8, 0.8, 0))).astype(np.uint8)
    noise = np.random.RandomState(0).randint(0, 17, (360, 8, 8, 1)).astype(np.uint8)
    found = [sample_quality.distances(test, by(images)[0]) for images in (TRAIN["image"][:360], blurred, noise)]
    frechet = [numbers["frechet"] for numbers in found]
    kernel = [numbers["kernel"]["mean"] for numbers in found]
    assert frechet[0] < frechet[1] / 3 < frechet[2] / 6
    assert kernel[0] < kernel[1] < kernel[2]
    assert found[0]["precision"] > 0.8 > found[2]["precision"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (25, 25, 1), (30, 28, 3), (64, 48, 3)])
def test_the_classifier_fits_images_of_any_size(shape):
    options = features.classifier_options(DataSpec("mine", shape, 256, 3, 10, 10))
    options.network.check(shape)
