"""Samples that are not finite are counted and refused: they are neither plotted nor measured."""

import ast
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import unoptimized
from tests.test_experiments import SMALL, SPECS
from vdm_jax.likelihoods import denormalize
from vdm_jax.models.annealing import AnnealedLangevin
from vdm_jax.models.images import to_pixels
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.autoencoder import AutoencoderConfig
from vdm_jax.networks.refinenet import RefineNetConfig
from vdm_jax.training import registry
from vdm_jax.training import run as runs
from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.cli import compare, evaluate, sample
from vdm_jax.training.cli import train as training
from vdm_jax.training.evaluation import comparison, sample_quality, sampling
from vdm_jax.training.evaluation.features import Extractor
from vdm_jax.training.evaluation.plots import NotFinite, check_finite, plot_panels, plot_paths, plot_points, save_grid
from vdm_jax.training.experiment import NO_VALUE, DataSpec, Panel, SampleBatch
from vdm_jax.training.run import initial_state
from vdm_jax.training.runtime.errors import UserError

REMEDY = "Use more sampling steps, another sampler, a larger tolerance"
PIXELS = Extractor("pixels", lambda images: (images.reshape(len(images), -1).astype(jnp.float32), None))
BAD = [np.nan, np.inf, -np.inf]


def half_broken(params, key, n):
    """Gray images, every second one with a NaN pixel."""
    x = jnp.zeros((n, 8, 8, 1)).at[1::2, 3, 4, 0].set(jnp.nan)
    return SampleBatch(to_pixels(x, 17), jnp.full((2, 2, 8, 8, 1), 8))


def broken(run, sample=half_broken):
    return run._replace(experiment=run.experiment._replace(sample=sample))


@pytest.fixture
def all_broken(monkeypatch):
    """Half of the samples of every run are not finite."""
    opened = runs.open_run
    for module in (training, sample, evaluate, comparison):
        monkeypatch.setattr(module, "open_run", lambda *given: broken(opened(*given)))


def test_a_number_that_is_not_finite_is_not_a_pixel_value():
    x = jnp.asarray([-1.0, *BAD, 1e30, 0.0])
    assert to_pixels(x, 17).tolist() == jax.jit(to_pixels, static_argnums=1)(x, 17).tolist() == [0, -1, -1, -1, 16, 8]
    assert NO_VALUE == -1
    finite = jnp.linspace(-1.5, 1.5, 301)
    np.testing.assert_array_equal(to_pixels(finite, 256), denormalize(finite, 256))


@pytest.mark.parametrize("bad", BAD)
def test_examples_that_are_not_finite_are_counted(bad):
    x = np.zeros((7, 2, 3), np.float32)
    check_finite(x, "points")
    x[[1, 1, 4], [0, 1, 1], [0, 0, 2]] = bad
    for examples in (x, np.asarray(to_pixels(jnp.asarray(x), 256))):
        with pytest.raises(NotFinite, match=r"^2 of 7 points are not finite\. Do it\.$"):
            check_finite(examples, "points", "Do it.")
    check_finite(np.zeros((3, 2), np.uint8), "images")


@pytest.mark.parametrize("bad", BAD)
def test_plots_refuse_values_that_are_not_finite(tmp_path, bad):
    x = np.zeros((4, 5, 2))  # four states of five chains
    x[2:, 1] = bad
    path, plane = tmp_path / "one.png", np.zeros((6, 6, 2)) + np.arange(6.0)[:, None]
    images = np.asarray(to_pixels(jnp.asarray(x, jnp.float32), 17)).reshape(4, 5, 1, 2, 1)
    height, arrows = np.zeros((6, 6)), np.zeros((6, 6, 2))
    height[3, 3] = arrows[1, 2, 0] = np.nan if bad == -np.inf else bad
    for message, call in {
        "2 of 20 images of one.png": lambda: save_grid(path, images, 17),
        "1 of 5 points of one.png": lambda: plot_points(path, x[-1], None, ""),
        "1 of 5 chains of one.png": lambda: plot_paths(path, x, ""),
        "1 of 6 values of 'hill' in one.png": lambda: plot_panels(path, {"hill": Panel(plane, height)}),
        "1 of 6 arrows 'exact' of 'hill' in one.png": lambda: plot_panels(
            path, {"hill": Panel(plane, 0 * plane[..., 0], plane, {"exact": arrows})}
        ),
        "1 of 5 chains of 'hill' in one.png": lambda: plot_panels(
            path, {"hill": Panel(plane, 0 * plane[..., 0], paths=x)}
        ),
    }.items():
        with pytest.raises(NotFinite, match=f"^{message} are not finite"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_log_density_of_minus_infinity_is_plotted(tmp_path):
    axis = np.linspace(-1.0, 1.0, 9)
    x = np.stack(np.meshgrid(axis, axis), axis=-1)
    height = np.where(x[..., 0] < 0.5, -np.inf, 0.0)
    assert plot_panels(tmp_path / "one.png", {"half": Panel(x, height)}).exists()


@pytest.mark.usefixtures("all_broken")
def test_training_continues_and_then_commands_fail_with_one_message_and_plot_nothing(command, tmp_path, monkeypatch):
    message = f"\n2 of 4 samples are not finite. {REMEDY} or a smaller step size; `vdm-jax sample tiny --help`"
    code, output = command(training.main, "tiny", "--steps", "6", "--picture-every", "2")
    assert code == 1
    for step in (2, 4, 6):  # a failed plot does not stop a run
        assert f"samples/step_{step:06}.png is not written: 2 of 4 samples are not finite. {REMEDY}" in output
    assert "tiny: 6 steps" in output  # the evaluation is printed nevertheless
    assert output.count(message) == 1
    report = tmp_path / "tiny" / "report.json"
    assert json.loads(report.read_text())["steps"] == 6
    code, output = command(sample.main, "tiny")
    assert code == 1
    assert message in output
    assert "Traceback" not in output
    monkeypatch.setattr(sample_quality, "extractor", lambda run, file: PIXELS)
    code, output = command(evaluate.main, "tiny", "--quality", "50")
    assert code == 1
    assert "25 of 50 samples are not finite" in output
    assert "quality" not in json.loads(report.read_text())
    assert not list(tmp_path.rglob("*.png"))


def test_a_chain_that_is_not_finite_is_not_plotted(tiny):
    def ends_well(params, key, n):
        return SampleBatch(jnp.full((n, 8, 8, 1), 8), jnp.full((3, 2, 8, 8, 1), NO_VALUE))

    run = broken(tiny(), ends_well)
    with pytest.raises(NotFinite, match=r"6 of 6 images of trajectory.png are not finite"):
        sampling.write_samples_and_plots(run, initial_state(run).ema)
    assert [path.name for path in run.folder.glob("*.png")] == ["samples.png"]


def test_points_that_are_not_finite_are_not_plotted(tiny):
    def points(params, key, n):
        return SampleBatch(jnp.zeros((n, 2)).at[:3, 1].set(jnp.inf))

    run = tiny(num_samples=50)
    run = broken(run._replace(data=run.data._replace(spec=SPECS["moons"])), points)
    with pytest.raises(NotFinite, match=f"3 of 50 samples are not finite. {REMEDY}"):
        sampling.write_samples_and_plots(run, initial_state(run).ema)
    assert not list(run.folder.glob("*.png"))


@pytest.mark.slow
@pytest.mark.usefixtures("all_broken")
def test_the_comparison_is_written_all_the_same(command, tmp_path):
    code, output = command(compare.main, "tiny:6", "--eval-examples", "16", "--workdir", str(tmp_path), workdir=False)
    assert code == 1
    assert f"Not in the figure:\n  tiny: 5 of 10 samples are not finite. {REMEDY}" in output
    (row,) = json.loads((tmp_path / "comparison.json").read_text())
    assert row["steps"] == 6
    assert (tmp_path / "comparison.png").exists()


def test_quality_is_never_measured_on_samples_that_are_not_finite(tiny):
    run = broken(tiny(1, eval_batch_size=40))
    by = PIXELS._replace(extract=lambda images: pytest.fail("their features were requested"))
    with pytest.raises(NotFinite, match=f"20 of 40 samples are not finite. {REMEDY}"):
        sample_quality.measure_quality(run, initial_state(run).ema, by, 100)


def test_features_that_are_not_finite_are_refused(tiny):
    def see(images):
        brightness = images[:, 0, 0].astype(jnp.float32)
        return jnp.where(brightness > 7, jnp.nan, brightness), None

    images = np.zeros((150, 8, 8, 1), np.uint8)
    images[[3, 140, 149], 0, 0] = 8
    with pytest.raises(
        NotFinite, match=r"3 of 150 features of samples are not finite. Check the weights for NaN: pixels"
    ):
        PIXELS._replace(extract=see)(images, "samples")


def test_too_few_are_refused_before_a_classifier_is_trained(tiny, monkeypatch):
    monkeypatch.setattr(sample_quality, "extractor", lambda run, file: pytest.fail("features were requested"))
    saved = Saved(initial_state(tiny(1)), {"seconds": 1.0, "training_images_per_second": None}, [])
    for options, samples in (({}, 1), ({}, 19), ({"eval_examples": 19}, 100)):
        with pytest.raises(UserError, match=f"--quality {samples} with .* at least 20 of each"):
            sample_quality.add_quality(tiny(1, **options), saved, {}, samples)


# Recipes

RECIPES = {
    "ddpm_digits": {"network": SMALL, "sampling": Sampling(steps=2)},
    "ddpm_digits_cond": {"network": dataclasses.replace(SMALL, num_classes=10), "sampling": Sampling("heun", 3)},
    "iddpm_cifar": {"network": dataclasses.replace(SMALL, embedding="sinusoidal"), "sampling": Sampling(steps=2)},
    "vdm_digits": {"network": SMALL, "sampling": Sampling(steps=2)},
    "ncsn_digits": {"network": RefineNetConfig(channels=8, num_levels=3), "sampling": AnnealedLangevin(steps=1)},
    "sure_denoise_digits": {"network": SMALL, "chain_steps": 2},
    "ae_digits": {"network": AutoencoderConfig(architecture="mlp", latent=2, width=8, blocks=1)},
    "vae_digits": {"network": AutoencoderConfig(architecture="mlp", latent=2, width=8, blocks=1)},
    "hvae_digits": {},
    "score_2d": {"num_levels": 2, "sampling": AnnealedLangevin(steps=2)},
}
QUICK = {"vae_digits"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RECIPES])
def test_every_kind_of_recipe_reports_samples_that_are_not_finite(name):
    config = dataclasses.replace(registry.find(name), **RECIPES[name])
    experiment = config.build(SPECS["digits" if "cifar" in name else config.data])
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
    call = unoptimized(experiment.sample, static_argnums=2)
    with pytest.raises(NotFinite, match="3 of 3 samples are not finite"):
        check_finite(np.asarray(call(params, jax.random.key(1), 3).images), "samples")


@pytest.mark.slow
def test_an_energy_that_is_not_finite_is_reported_although_chains_reject_such_steps(tmp_path):
    experiment = registry.find("ebm_2d").build(SPECS["moons"])
    params = jax.tree.map(lambda x: x * jnp.nan, experiment.init(jax.random.key(0)))
    with pytest.raises(NotFinite, match=r"160 of 160 values of 'learned' in energy.png are not finite"):
        plot_panels(
            tmp_path / "energy.png", jax.device_get(experiment.plane_plots["energy"](params, jax.random.key(1)))
        )


def test_models_turn_numbers_into_pixels_in_one_place():
    root = Path(__file__).parents[2]
    callers = {
        path.name
        for folder in (root / "experiments", root / "vdm_jax" / "models")
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if "denormalize" in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
    }
    assert callers == {"images.py"}


@pytest.mark.slow
def test_a_sampler_that_exceeds_its_steps_is_reported():
    config = registry.find("ddpm_digits")
    config = dataclasses.replace(config, network=SMALL, sampling=Sampling("adaptive", tolerance=1e-12))
    experiment = config.build(DataSpec("digits", (4, 4, 1), 17, 10, 1, 1))
    params = experiment.init(jax.random.key(0))
    images = np.asarray(jax.jit(experiment.sample, static_argnums=2)(params, jax.random.key(1), 1).images)
    with pytest.raises(NotFinite, match="1 of 1 samples"):
        check_finite(images, "samples")
