"""The models and their options, on the recipes."""

import dataclasses
import importlib
import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ddpm_digits, ddpm_digits_cond, ebm_2d, score_2d, sure_denoise_digits
from tests.derivations.check import assert_mean
from vdm_jax import closed_form
from vdm_jax.models import denoiser, planes
from vdm_jax.models.annealing import NoiseScales, decreasing_levels
from vdm_jax.models.images import to_pixels
from vdm_jax.models.ncsn import NCSN
from vdm_jax.models.pixel_likelihood import PixelLikelihood
from vdm_jax.models.sampling import Sampling
from vdm_jax.models.vae import VAE
from vdm_jax.models.vdm import VDM
from vdm_jax.networks.autoencoder import AutoencoderConfig
from vdm_jax.networks.mlp import MLPConfig
from vdm_jax.networks.refinenet import RefineNetConfig
from vdm_jax.networks.unet import UNetConfig
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.data.sources import DISTRIBUTIONS
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.optimizer import optimizer
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.state import create
from vdm_jax.training.step import make_step

FOLDER = Path(__file__).parents[1] / "experiments"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
SPECS = {
    "digits": DataSpec("digits", (8, 8, 1), 17, 10, 1437, 360),
    "mnist": DataSpec("mnist", (28, 28, 1), 256, 10, 60_000, 10_000),
    "fashion_mnist": DataSpec("fashion_mnist", (28, 28, 1), 256, 10, 60_000, 10_000),
    "cifar10": DataSpec("cifar10", (32, 32, 3), 256, 10, 50_000, 10_000),
    **{name: DataSpec(name, (2,), 0, 0, 50_000, 10_000, (0.1, -0.2), (0.9, 1.1)) for name in PLANES},
    "oscillations": DataSpec("oscillations", (32, 1), 0, 0, 50_000, 10_000, (0.0,), (1.0,)),
}
SMALL = UNetConfig(
    channels=8, multipliers=(1,), blocks=1, groups=4, attention_resolutions=(), middle_attention=False,
    dropout=0.0, embedding="log_snr",
)  # fmt: skip


def config_of(name):
    return importlib.import_module(f"experiments.{name}").CONFIG


def batch_of(spec, size, seed=0):
    if not spec.levels:
        examples, labels = DISTRIBUTIONS[spec.name]().sample(size, seed)
        return {"image": jnp.asarray(examples), "label": jnp.asarray(labels)}
    images = np.random.RandomState(seed).randint(spec.levels, size=(size, *spec.shape))
    return {"image": jnp.asarray(images, jnp.uint8), "label": jnp.zeros(size, jnp.int32)}


def trained(config, spec, steps):
    """The state after so many updates on random images, and the experiment."""
    experiment = config.build(spec)
    state = create(experiment, optimizer(config), config.seed)
    step = make_step(experiment, optimizer(config), make_mesh(1), seed=config.seed, ema_decay=config.ema_decay)
    losses = []
    for i in range(steps):
        state, metrics = step(state, batch_of(spec, 8, i % 4))
        losses.append(float(metrics["loss"]))
    return experiment, state, losses


@pytest.mark.slow
@pytest.mark.parametrize("head", ["eps", "v", "categorical"])
def test_end_points_stay_pinned_through_training(head):
    config = VDM(
        network=SMALL, head=head, gamma_0=-6.0, gamma_1=4.0, schedule_features=8, learning_rate=0.01, weight_decay=0.01,
        steps=30, eval_terms=4,
    )  # fmt: skip
    experiment, state, _ = trained(config, DataSpec("digits", (4, 4, 1), 5, 0, 1, 1), 30)
    start = experiment.init(jax.random.key(0))["schedule"]
    for params in (state.params, state.ema):
        moved = params["schedule"]
        schedule = config.continuous_schedule(moved)
        ends = jax.vmap(schedule.log_snr)(jnp.asarray([0.0, 1.0]))
        np.testing.assert_allclose(ends, [-moved["gamma_0"], -moved["gamma_1"]], rtol=1e-6)
        assert moved["gamma_0"] != start["gamma_0"]
        assert moved["gamma_1"] != start["gamma_1"]
        middle = schedule.log_snr(jnp.linspace(0.0, 1.0, 9))
        assert np.all(np.diff(middle) < 0)
    shape = state.params["schedule"]["shape"]["params"]
    assert np.abs(shape["log_height"]).max() > 0.01


@pytest.mark.slow
def test_a_fixed_schedule_has_no_parameters_and_t_steps_are_trained():
    spec = DataSpec("digits", (4, 4, 1), 5, 0, 1, 1)
    config = VDM(
        network=SMALL, noise_schedule="fixed", gamma_0=-6.0, gamma_1=4.0, num_steps=10, learning_rate=0.01, eval_terms=4
    )
    experiment, state, losses = trained(config, spec, 40)
    assert state.params["schedule"] == {}
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    values = experiment.evaluate(state.ema, jax.random.key(0), batch_of(spec, 4))
    total = values["prior"] + values["reconstruction"] + values["diffusion"]
    np.testing.assert_allclose(values["bits_per_dim"], total, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_0": 5.0}, r"--gamma-0 5.0 .* --gamma-1"),
        ({"sampling": Sampling(steps=1)}, "sampling steps must be at least 2 .* got 1"),
        ({"eval_terms": 0}, "--eval-terms 0 must be at least 1"),
        ({"schedule_features": -1}, "--schedule-features -1 must be at least 0"),
    ],
)
def test_invalid_options_of_a_diffusion_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VDM(network=SMALL, **options).build(SPECS["digits"])


def test_channels_that_do_not_split_into_groups_are_refused():
    with pytest.raises(ValueError, match="8 channels do not split into 3 groups"):
        VDM(network=dataclasses.replace(SMALL, groups=3)).build(SPECS["digits"])


SMALL_VAE = VAE(network=AutoencoderConfig(architecture="mlp", latent=2, width=8, blocks=1), importance_samples=3)


@pytest.mark.slow
def test_rows_of_a_vae_s_likelihood_report_agree():
    spec, key = SPECS["digits"], jax.random.key(0)
    experiment, batch = SMALL_VAE.build(spec), batch_of(spec, 4)
    params = experiment.init(key)
    nats = {name: row.nats(params, key, batch) for name, row in experiment.likelihood_rows.items()}
    np.testing.assert_allclose(nats["bound"], nats["reconstruction"] + nats["kl"], rtol=1e-5)
    bits = experiment.evaluate(params, key, batch)["bits_per_dim"]
    np.testing.assert_allclose(bits, nats["bound"] / (64 * np.log(2.0)), rtol=1e-5)


@pytest.mark.slow
def test_in_variational_em_one_network_is_fixed_while_the_other_is_trained():
    config = dataclasses.replace(SMALL_VAE, alternate_every=3, b1=0.0, learning_rate=0.01)
    spec, seen = SPECS["digits"], []
    experiment = config.build(spec)
    state = create(experiment, optimizer(config), 0)
    step = make_step(experiment, optimizer(config), make_mesh(1), seed=0, ema_decay=0.0)
    for _ in range(7):
        seen.append(jax.device_get(state.params))
        state, _ = step(state, batch_of(spec, 8))
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    for i, (old, new) in enumerate(itertools.pairwise(seen)):
        assert same(old["decoder"], new["decoder"]) == (i < 3), i
        assert same(old["encoder"], new["encoder"]) == (i >= 3), i


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alternate_every": 5}, "--alternate-every 5 .* --b1 0 and --weight-decay 0"),
        (
            {"likelihood": PixelLikelihood("bernoulli")},
            "--likelihood.distribution .* 17: add --likelihood.binarize",
        ),
        ({"likelihood": PixelLikelihood("mixture", components=0)}, "--likelihood.components 0 must be at least 1"),
    ],
)
def test_invalid_options_of_a_vae_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL_VAE, **options).build(SPECS["digits"])


@pytest.mark.parametrize("distribution", ["bernoulli", "gaussian", "discretized", "mixture"])
@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_pixel_likelihood_sums_to_one(distribution, channels):
    likelihood = PixelLikelihood(distribution, components=2)
    levels = 2 if distribution == "bernoulli" else 5
    output = jnp.asarray(np.random.RandomState(0).normal(size=(1, 1, likelihood.num_features(channels))), jnp.float32)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, levels)] * channels, indexing="ij"), -1).reshape(
        -1, 1, 1, channels
    )

    @jax.jit
    def masses(output, grid):
        return jax.vmap(lambda x: likelihood.distribution_of(output, levels).log_prob(x))(grid)

    total = np.exp(masses(output, jnp.asarray(grid, jnp.float32))).sum()
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)  # of all images of one pixel
    mean_image = jax.eval_shape(lambda output: likelihood.mean_image(output, levels), output)
    assert mean_image.shape == (1, 1, channels)


def test_a_gaussian_is_a_density_in_training_and_a_mass_in_evaluation():
    likelihood, zero = PixelLikelihood("gaussian", scale=0.01), jnp.zeros((1, 1, 1))

    def of_training_and_evaluation(output, x):
        return [likelihood.distribution_of(output, 5, density=density).log_prob(x) for density in (True, False)]

    density, mass = jax.jit(of_training_and_evaluation)(zero, zero)
    assert density > 3.0
    np.testing.assert_allclose(mass, 0.0, atol=1e-6)


def test_binarized_images_are_black_and_white():
    likelihood = PixelLikelihood("bernoulli", binarize=True)
    np.testing.assert_array_equal(likelihood.normalize(jnp.asarray([0, 8, 9, 16]), 17), [-1.0, -1.0, 1.0, 1.0])
    np.testing.assert_array_equal(to_pixels(jnp.asarray([-1.0, 1.0]), 17), [0, 16])


def test_forms_of_score_matching_differ_by_a_constant():
    """A good score and a bad one: every form has the same difference of losses, and the exact score the lowest loss."""
    distribution = planes.data_distribution(SPECS["two_modes"])
    config = dataclasses.replace(score_2d.CONFIG, num_levels=5)
    schedule, x = config.noise_scales.discrete_schedule(5), batch_of(SPECS["two_modes"], 20_000)["image"]
    level, best = schedule(1 + jnp.arange(len(x)) % 5), closed_form.OptimalDenoiser(distribution)
    bent = lambda x_t, level: best(x_t, level) + 0.3 * jnp.tanh(x_t)  # noqa: E731
    gaps = {}
    for objective in ("denoising", "implicit", "sliced"):
        way = dataclasses.replace(config, objective=objective)

        @jax.jit
        def gap(key, x, level, way=way):
            return [way.score_matching_loss(denoiser, key, x, level) for denoiser in (bent, best)]

        gaps[objective] = np.subtract(*gap(jax.random.key(0), x, level))
    expected = 0.5 * np.square(0.3 * np.tanh(np.asarray(x))).sum(1).mean()  # of clean data; noise changes it little
    assert np.mean(gaps["denoising"]) > 0.5 * expected
    assert_mean(gaps["implicit"] - gaps["denoising"].mean(), 0.0, resolution=0.1 * expected)
    assert_mean(gaps["sliced"] - gaps["denoising"].mean(), 0.0, resolution=0.1 * expected)


def test_the_levels_of_a_score_model_decrease():
    levels = decreasing_levels(NoiseScales(sigma_max=2.0, sigma_min=0.02).discrete_schedule(3))
    np.testing.assert_allclose(levels.sigma, [2.0, 0.2, 0.02], rtol=1e-6)
    np.testing.assert_allclose(levels.alpha, 1.0)


@pytest.mark.slow
def test_an_energy_s_log_density_integrates_to_one():
    experiment = dataclasses.replace(ebm_2d.CONFIG, network=MLPConfig(width=8, blocks=1, out_features=1)).build(
        SPECS["moons"]
    )
    params = experiment.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    nodes, cell = planes.grid(150, 4.0).reshape(-1, 2), (8.0 / 150) ** 2
    batch = {"image": nodes, "label": jnp.zeros(len(nodes), jnp.int32)}
    nats = experiment.evaluate(params, jax.random.key(0), batch)["nats"]
    np.testing.assert_allclose(np.sum(np.exp(-np.asarray(nats, np.float64))) * cell, 1.0, rtol=1e-3)


def test_an_image_has_one_fixed_noise():
    images = batch_of(SPECS["digits"], 6)["image"]
    keys = jax.random.key_data(denoiser._image_keys(images))
    np.testing.assert_array_equal(jax.random.key_data(denoiser._image_keys(images[::-1])), keys[::-1])
    assert len(np.unique(np.asarray(keys), axis=0)) == 6
    nearly = images.at[0, 0, 0, 0].add(1)
    assert not np.array_equal(jax.random.key_data(denoiser._image_keys(nearly))[0], keys[0])


@pytest.mark.slow
def test_sure_and_the_clean_loss_agree_on_average():
    """The risk of an untrained denoiser and of a perturbed one, by SURE and by the clean digits."""
    spec, key = SPECS["digits"], jax.random.key(0)
    config = dataclasses.replace(sure_denoise_digits.CONFIG, network=SMALL, sigma=0.7)
    experiment = config.build(spec)
    params = experiment.init(key)
    for size in (0.0, 0.2):
        params = jax.tree.map(lambda leaf, size=size: leaf + size * jax.random.normal(key, leaf.shape), params)
        values = experiment.evaluate(params, key, batch_of(spec, 300))
        assert_mean(values["sure"] - values["squared_error"], 0.0, resolution=0.05)
    untrained = experiment.evaluate(experiment.init(key), key, batch_of(spec, 300))
    np.testing.assert_allclose(untrained["psnr"], untrained["psnr_noisy"], rtol=1e-5)
    assert_mean(untrained["squared_error"], 0.7**2, resolution=0.01)


SIGMA = "--noise-scales.sigma-max .* --noise-scales.sigma-min"


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (
            dataclasses.replace(sure_denoise_digits.CONFIG, fresh_noise=True),
            "digits",
            "--fresh-noise .* --objective clean",
        ),
        (dataclasses.replace(sure_denoise_digits.CONFIG, sigma=0.0), "digits", "--sigma 0 must be above 0"),
        (dataclasses.replace(score_2d.CONFIG, noise_scales=NoiseScales(0.1, 0.2)), "moons", SIGMA),
        (NCSN(network=RefineNetConfig(channels=8), noise_scales=NoiseScales(1.0, 0.0)), "digits", SIGMA),
    ],
)
def test_invalid_options_of_a_score_model_are_refused(config, data, message):
    with pytest.raises(ValueError, match=message):
        config.build(SPECS[data])


LABELLED = dataclasses.replace(
    ddpm_digits_cond.CONFIG, network=dataclasses.replace(SMALL, num_classes=10), num_steps=4, sampling=Sampling()
)


def perturbed(experiment):
    params = experiment.init(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), params)


def sampled(label, guidance_scale):
    config = dataclasses.replace(
        LABELLED, sampling=Sampling(label=label, guidance_scale=guidance_scale, sampler="ddim")
    )
    experiment = config.build(SPECS["digits"])
    return experiment.sample(perturbed(experiment), jax.random.key(2), 3)


@pytest.mark.slow
def test_guidance_scales_the_effect_of_the_label():
    np.testing.assert_array_equal(sampled(3, 0.0).images, sampled(5, 0.0).images)  # 0: unconditional
    assert not np.array_equal(sampled(3, 1.0).images, sampled(5, 1.0).images)
    assert sampled(3, 1.0).labels.tolist() == [3, 3, 3]
    assert sampled(None, 1.0).labels.tolist() == [0, 1, 2]
    one_by_one = [sampled(label, 1.0).images[label] for label in range(3)]
    np.testing.assert_array_equal(sampled(None, 1.0).images, one_by_one)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_dropped_labels():
    spec, batch = SPECS["digits"], batch_of(SPECS["digits"], 8)
    relabelled = batch | {"label": batch["label"] + 3}
    for share, same in ((0.0, False), (0.999_999, True)):
        experiment = dataclasses.replace(LABELLED, label_dropout=share).build(spec)
        losses = [experiment.loss(perturbed(experiment), jax.random.key(0), b, 0)[0] for b in (batch, relabelled)]
        assert (losses[0] == losses[1]) == same


SAMPLERS = get_args(get_type_hints(Sampling)["sampler"])


@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [*((sampler, "uniform") for sampler in SAMPLERS), ("ddim", "log_snr"), ("ancestral", "karras")],
)
def test_every_sampler_and_every_spacing(sampler, spacing):
    config = dataclasses.replace(LABELLED, num_steps=8, sampling=Sampling(sampler, steps=5, spacing=spacing))
    experiment = config.build(SPECS["digits"])
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    images = jax.eval_shape(lambda p, k: experiment.sample(p, k, 3), params, jax.random.key(0)).images
    assert images.shape == (3, 8, 8, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(LABELLED, sampling=Sampling(label=10)), r"label 10 .* 10 classes \(0\.\.9\)"),
        (dataclasses.replace(LABELLED, sampling=Sampling(steps=5)), r"sampling steps must be in 1\.\.4.* got 5"),
        (dataclasses.replace(ddpm_digits.CONFIG, sampling=Sampling(label=1)), "label 1 .* unconditional: omit it"),
        (
            dataclasses.replace(ddpm_digits.CONFIG, sampling=Sampling(guidance_scale=2.0)),
            "guidance scale 2 .* use 1",
        ),
        (
            dataclasses.replace(LABELLED, network=dataclasses.replace(SMALL, num_classes=4)),
            "--network.num-classes 4 .* 10 classes: set it to 10, or to 0",
        ),
        (dataclasses.replace(LABELLED, label_dropout=1.0), "--label-dropout 1 must be in"),
    ],
)
def test_invalid_sampling_options_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(SPECS["digits"])
