"""`make import`: a run from a diffusers folder, and a diffusers folder from a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.reference import TINY, random_tensors
from tests.training.bits import assert_same_bits
from vdm_jax import elbo, interop
from vdm_jax.interop import Scheduler
from vdm_jax.interop.experiment_options import apply_pretrained, network_and_scheduler
from vdm_jax.likelihoods import DiscretizedGaussian, normalize
from vdm_jax.networks.unet import UNet
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.cli import evaluate, import_weights, sample
from vdm_jax.training.data.sources import load as load_data
from vdm_jax.training.keys import stream
from vdm_jax.training.registry import find
from vdm_jax.training.run import abstract_state, open_run, stored_config
from vdm_jax.training.runtime.errors import readable_errors

DIGITS = TINY | {"sample_size": 8, "in_channels": 1, "out_channels": 1}
NOISE = Scheduler(20, "squaredcos_cap_v2", prediction_type="v", variance="fixed_large")


@pytest.fixture(scope="module")
def pretrained():
    network, shape = interop.from_unet_config(DIGITS)
    tensors = {name: np.float32(0.5) * value for name, value in random_tensors(DIGITS).items()}
    return interop.Pretrained(network, shape, interop.from_tensors(network, shape, tensors), NOISE)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command with arguments -> exit code, its output."""
    monkeypatch.chdir(tmp_path)

    def run(main, *arguments):
        code = 0
        try:
            with readable_errors():
                main([*map(str, arguments), "--workdir", str(tmp_path / "runs")])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def imported(call, tmp_path, pretrained):
    """A run of ddpm_digits with the weights in it."""
    interop.save(tmp_path / "theirs", pretrained)
    code, output = call(import_weights.main, tmp_path / "theirs", "--recipe", "ddpm_digits")
    assert code == 0, output
    assert "Next: `vdm-jax sample ddpm_digits` and `vdm-jax evaluate ddpm_digits`" in output
    return tmp_path / "runs" / "ddpm_digits"


@pytest.mark.slow
def test_an_imported_run_has_the_weights_and_exports_them_again(call, tmp_path, imported, pretrained):
    config = stored_config("ddpm_digits", str(tmp_path / "runs"))
    assert (config.network, config.prediction_type, config.noise_schedule, config.num_steps) == (
        pretrained.network,
        "v",
        "cosine",
        20,
    )
    assert config.sampling.variance == "fixed_large"
    run = open_run("ddpm_digits", config)
    with Checkpoints(imported / "checkpoints") as checkpoints:
        saved = checkpoints.restore(abstract_state(run))
    assert int(saved.state.step) == 0
    assert saved.notes["source"] == str(tmp_path / "theirs")
    assert_same_bits(jax.device_get((saved.state.params, saved.state.ema)), (pretrained.params, pretrained.params))
    code, output = call(import_weights.main, tmp_path / "theirs", "--recipe", "ddpm_digits")
    assert code == 1
    assert "There is a run in" in output
    code, output = call(import_weights.main, "--export", tmp_path / "ours", "--recipe", "ddpm_digits")
    assert code == 0, output
    files = [path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.*")]
    assert len(files) == 5
    for path in files:
        assert (tmp_path / "ours" / path).read_bytes() == (tmp_path / "theirs" / path).read_bytes(), path


@pytest.mark.slow
def test_eval_and_sample_of_an_imported_run(call, imported, pretrained):
    """The report's bits/dim equal the bound computed here from the equations."""
    options = ("ddpm_digits", "--eval-examples", "8", "--eval-batch-size", "8", "--rows", "none")
    code, output = call(evaluate.main, *options)
    assert code == 0, output
    got = json.loads((imported / "report.json").read_text())["test"]["bits_per_dim"]["mean"]

    def denoiser(x_t, level):
        return UNet(pretrained.network).apply({"params": pretrained.params}, x_t, level.t - 1.0)

    def decoder(x_hat, x_1, level):
        return DiscretizedGaussian(x_hat, scale=level.sigma, levels=17)

    x_0 = normalize(jnp.asarray(load_data("digits").test.take(np.arange(8))["image"]), 17)
    key = jax.random.fold_in(stream(0, "evaluate"), 0)
    terms = elbo.bound(denoiser, key, x_0, NOISE.discrete_schedule(), decoder, prediction_type="v", terms=50)
    np.testing.assert_allclose(got, elbo.bits_per_dim(terms.total, 64).mean(), rtol=1e-5)
    code, output = call(sample.main, "ddpm_digits", "--num-samples", "4", "--steps", "0")
    assert code == 0, output
    assert (imported / "samples.png").stat().st_size > 100


@pytest.mark.slow
def test_a_run_is_only_overwritten_with_the_option(call, imported, tmp_path):
    arguments = (import_weights.main, tmp_path / "theirs", "--recipe", "ddpm_digits")
    before = (imported / "config.json").stat().st_mtime_ns
    code, output = call(*arguments)
    assert code == 1
    assert "There is a run in" in output
    assert "--fresh, which deletes that run" in output
    assert (imported / "config.json").stat().st_mtime_ns == before
    code, output = call(*arguments, "--fresh")
    assert code == 0, output
    assert (imported / "config.json").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give either WEIGHTS to import or --export FOLDER to write"),
        (("nowhere",), "nowhere does not exist"),
        (("nowhere", "--recipe", "ddpm_digit"), "Did you mean ddpm_digits?"),
        (("theirs", "--recipe", "ae_digits"), "not a DDPM with vdm_jax's U-Net"),
        (("rgb", "--recipe", "ddpm_digits"), "The weights are for images of 4x4x3, but digits has"),
        (("betas", "--recipe", "ddpm_digits"), "betas (scaled_linear, 0.0001 to 0.02, T = 1000)"),
        (("--export", "new", "--recipe", "ddpm_digits"), "There is no run in"),
    ],
)
def test_invalid_imports_are_refused(call, tmp_path, pretrained, arguments, message):
    interop.save(tmp_path / "theirs", pretrained)
    interop.save(tmp_path / "betas", pretrained._replace(scheduler=Scheduler(beta_schedule="scaled_linear")))
    network, shape = interop.from_unet_config(TINY)
    rgb = interop.Pretrained(network, shape, interop.from_tensors(network, shape, random_tensors(TINY)))
    interop.save(tmp_path / "rgb", rgb)
    places = {name: str(tmp_path / name) for name in ("theirs", "rgb", "betas", "new")}
    code, output = call(import_weights.main, *(places.get(argument, argument) for argument in arguments))
    assert code == 1, output
    assert message in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("noise", ["linear", "cosine", "sigmoid"])
def test_a_recipe_round_trips_through_diffusers_fields(pretrained, noise):
    recipe = find("ddpm_cifar")
    config = dataclasses.replace(recipe, noise_schedule=noise, num_steps=500)
    network, scheduler = network_and_scheduler(config)
    assert network == config.network
    assert scheduler.variance == "fixed_large"
    np.testing.assert_allclose(
        scheduler.discrete_schedule().log_snr[1:-1], config.discrete_schedule().log_snr[1:-1], rtol=0.0, atol=1e-5
    )
    if noise == "sigmoid":  # by its betas, rounded; the recipe has them already
        return
    given = interop.Pretrained(network, (32, 32, 3), {}, scheduler)
    assert apply_pretrained(recipe, given) == config
