"""The commands that use a trained diffusion model on given images: interpolate and restore."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.training.experiments import known
from vdm_jax.training import run as runs
from vdm_jax.training.cli import interpolate, restore
from vdm_jax.training.data import sources
from vdm_jax.training.loop import train
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.runtime.errors import UserError


@pytest.fixture
def folder(command, tmp_path):
    """The folder of a trained run of the known recipe."""
    del command
    run = runs.open_run("known", dataclasses.replace(known.CONFIG, workdir=str(tmp_path)), make_mesh(1))
    train(run)
    return run.folder


@pytest.mark.slow
def test_interpolation_is_written_between_the_images(folder, command):
    code, printed = command(
        interpolate.main, "known", "test", "--pairs", "2", "--columns", "3", "--label", "1", "--tolerance", "1e-3"
    )
    assert code == 0, printed
    assert "the ends of 2 rows equal the given images in 100.0% of the pixels" in printed
    with Image.open(folder / "interpolation.png") as sheet:
        assert sheet.size == (3 * 50 + 2, 2 * 50 + 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [(["--measurement", "box"], 0.3), (["--method", "repaint", "--resamplings", "1"], 0.0)],
)
def test_restored_images_and_their_errors_are_written(folder, command, options, least):
    code, printed = command(restore.main, "known", "test", "--images", "3", "--samples", "2", "--steps", "20", *options)
    assert code == 0, printed
    report = json.loads((folder / "restored.json").read_text())
    assert (report["n_images"], report["samples"], report["steps"]) == (3, 2, 20)
    # pixels are independent and nearly uniform on 0..16: an error of a sample is sqrt(2) of that of the mean
    spread = np.sqrt(np.mean(np.arange(17) ** 2) - 8.0**2)
    assert spread < report["sample"]["mean"] < 3 * spread
    missing = np.zeros((8, 8), bool)
    missing[(slice(2, 6), slice(2, 6)) if "box" in options else (slice(None), slice(4, 8))] = True
    pixels = sources.load("digits").train.take(np.arange(1_000))["image"][..., 0] / 8.0 - 1.0
    assert report["data_variance"] == pytest.approx(pixels.var(0)[~missing].mean(), rel=1e-4)
    assert report["mean"]["mean"] < report["sample"]["mean"]
    assert report["known_pixels_off"] < 2.0
    assert (report["known_pixels_off"] == pytest.approx(0.0, abs=1e-5)) == (least == 0.0)
    assert "mean of  2 samples" in printed
    with Image.open(folder / "restored.png") as sheet:
        assert sheet.size == (5 * 50 + 2, 3 * 50 + 2)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (interpolate.main, ["known"], "usage: vdm-jax interpolate known INPUT"),
        (interpolate.main, ["known", "test", "--columns", "1"], "--columns 1: it must be at least 2"),
        (interpolate.main, ["known", "test", "--tolerance", "0"], "--tolerance 0: it must be above 0"),
        (interpolate.main, ["known", "test", "--label", "10"], "--label 10: known has 10 classes (0..9)"),
        (restore.main, ["known", "test", "--steps", "1"], "--steps 1: it must be at least 2"),
        (
            restore.main,
            ["known", "test", "--method", "repaint", "--measurement", "super_resolution"],
            "--method repaint is for missing pixels: use reconstruction for super_resolution",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_done_is_said(command, main, arguments, message):
    code, printed = command(main, *arguments)
    assert code == 1
    assert message in printed


def test_a_single_image_has_no_other(folder, command, tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    code, printed = command(interpolate.main, "known", str(tmp_path / "one.npy"))
    assert code == 1
    assert "one.npy has a single image: give two or more" in printed


@pytest.mark.parametrize("main", [interpolate.main, restore.main])
def test_a_label_is_enough_where_there_is_no_unconditional_model(command, tmp_path, main, monkeypatch):
    del command
    module = sys.modules[main.__module__]
    config = dataclasses.replace(known.CONFIG, label_dropout=0.0, workdir=str(tmp_path))
    monkeypatch.setattr(module, "stored_config", lambda recipe, workdir: config)
    np.save(tmp_path / "two.npy", np.zeros((2, 8, 8), np.uint8))
    arguments = ["known", str(tmp_path / "two.npy")]
    with pytest.raises(UserError, match="the images have no labels: --label"):
        main(arguments)
    with pytest.raises(UserError, match="has no checkpoint yet"):  # nothing is wrong with the images
        main([*arguments, "--label", "1"])
