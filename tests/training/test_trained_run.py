"""load_run: a trained run by its name or folder, as the library takes it; which runs are refused, and how."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdm_jax.training
from experiments import ddpm_digits_cond, iddpm_cifar, vdm_digits
from tests.optimizations import unoptimized
from tests.test_experiments import SMALL, batch_of
from tests.training.bits import assert_same_bits
from tests.training.experiments import known
from vdm_jax import closed_form, elbo
from vdm_jax.likelihoods import normalize
from vdm_jax.training import load_run, run
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.loop import train
from vdm_jax.training.run import abstract_state
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.runtime.errors import UserError

KNOWN = str(Path(known.__file__))


@pytest.fixture
def made(command, tmp_path):
    """`made("known", KNOWN)`: a run of a test recipe by name or path, saved after two steps."""
    del command  # which makes the recipes of the tests those of the project

    def make(recipe, config=known.CONFIG, **options):
        opened = run.open_run(
            recipe, dataclasses.replace(config, workdir=str(tmp_path), **{"steps": 2, **options}), make_mesh(1)
        )
        train(opened)
        return opened

    return make


def test_a_run_by_name_and_by_a_folder_that_has_moved(made, tmp_path, monkeypatch):
    opened = made("known")
    with Checkpoints(opened.folder / "checkpoints") as checkpoints:
        saved = checkpoints.restore(abstract_state(opened))
    assert saved is not None
    assert saved.state.ema["trained"] != saved.state.params["trained"]
    moved = tmp_path / "elsewhere" / "mine"
    shutil.copytree(opened.folder, moved)
    monkeypatch.chdir(tmp_path)
    for loaded in (load_run("known", workdir="."), load_run(opened.folder), load_run(moved)):
        assert loaded.step == 2
        assert loaded.config.steps == 2
        assert loaded.data.spec.name == "digits"
        assert_same_bits(loaded.params, saved.state.ema)
        assert loaded.prediction_type == "eps"
    assert (loaded.name, loaded.run.folder) == ("mine", moved)
    assert "mine, step 2" in repr(loaded)
    # P(x) is the last table, P(x | label) that of the label: the denoiser of each is the optimal one
    x_t, level = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jax.vmap(loaded.schedule)(jnp.asarray([0.2, 0.7]))
    table = loaded.params["tables"]
    call = jax.jit(lambda denoiser, x_t, level: denoiser(x_t, level))
    ours = [call(model.denoiser, x_t, level) for model in (loaded.model, *map(loaded.conditional, (3, 4)))]
    for predicted, which in zip(ours, (10, 3, 4), strict=True):
        optimal = call(closed_form.OptimalDenoiser(known.distribution(table[which])), x_t, level)
        np.testing.assert_allclose(predicted, optimal, atol=1e-6)
    both = call(loaded.conditional([3, 4]).denoiser, x_t, level)
    np.testing.assert_allclose(both, [ours[1][0], ours[2][1]], atol=1e-6)
    assert loaded.sample(jax.random.key(0), 3).images.shape == (3, 8, 8, 1)
    batch = loaded.data.test.take(np.arange(2))
    assert loaded.evaluate(jax.random.key(0), batch)["bits_per_dim"].shape == (2,)


def test_the_recipe_is_stored_and_a_file_is_not_run_unasked(made, tmp_path):
    folder = made("known").folder
    stored = json.loads((folder / "config.json").read_text())
    assert stored["recipe"] == "known"
    older = {name: value for name, value in stored.items() if name != "recipe"}
    (folder / "config.json").write_text(json.dumps(older))
    assert load_run(folder).name == "known"
    own = tmp_path / "own.py"
    own.write_text(Path(KNOWN).read_text())
    folder = made(str(own)).folder
    assert json.loads((folder / "config.json").read_text())["recipe"] == str(own)
    with pytest.raises(UserError, match=r"names the recipe '.*own.py'.*code.*recipe=PATH"):
        load_run(folder)
    assert load_run(folder, recipe=str(own)).name == "own"
    (folder / "config.json").write_text(json.dumps({**stored, "recipe": 7}))
    with pytest.raises(UserError, match="names no recipe"):
        load_run(folder)


def test_what_a_run_lacks_is_said(made, tmp_path):
    with pytest.raises(UserError, match=r"There is no run in known or .*known \(no config.json\)"):
        load_run("known", workdir=tmp_path)
    loaded = load_run(made("known", label_dropout=0.0).folder)
    with pytest.raises(UserError, match=r"--label-dropout 0 .*conditional\(label\)"):
        _ = loaded.denoiser
    with pytest.raises(UserError, match=r"label 10: known has 10 classes \(0..9\)"):
        loaded.conditional(10)
    shutil.rmtree(loaded.run.folder / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_run(loaded.run.folder)


def test_another_kind_of_model_has_no_denoiser(tiny):
    opened = tiny(steps=2)
    other = vdm_jax.training.TrainedRun(opened, None, 2)
    with pytest.raises(UserError, match=r"tiny is not a diffusion model .*sample and evaluate"):
        _ = other.schedule
    with pytest.raises(UserError, match="tiny is not class-conditional"):
        other.conditional(0)
    with pytest.raises(AttributeError, match="no attribute 'elbow'"):
        _ = vdm_jax.training.elbow


SPEC = DataSpec("digits", (4, 4, 1), 5, 3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("label", [True, False])
def test_the_bound_of_a_ddpm_s_model_is_that_of_its_evaluation(label):
    network = dataclasses.replace(SMALL, num_classes=3)
    config = dataclasses.replace(ddpm_digits_cond.CONFIG, network=network, eval_terms=3)
    experiment, key, batch = config.build(SPEC), jax.random.key(1), batch_of(SPEC, 4)
    batch["label"] = jnp.asarray([2, 0, 1, 1]) if label else jnp.full(4, experiment.num_classes)
    params = jax.tree.map(lambda x: x + 0.1, unoptimized(experiment.init)(key))
    assert experiment.diffusion is not None
    model = experiment.diffusion(params, batch["label"] if label else None)
    bound = elbo.bound(
        model.denoiser, key, normalize(batch["image"], 5), model.discrete_schedule, model.decoder,
        prediction_type=model.prediction_type, terms=3,
    )  # fmt: skip
    expected = experiment.evaluate(params, key, batch)["bits_per_dim"]
    np.testing.assert_allclose(elbo.bits_per_dim(bound.total, 16), expected, rtol=1e-5)
    # in continuous time, t = 0 is timestep 1 and t = 1 timestep T
    ends = [model.schedule(jnp.float32(t)).log_snr for t in (0.0, 1.0)]
    levels = [model.discrete_schedule(t).log_snr for t in (1, config.num_steps)]
    np.testing.assert_allclose(ends, levels, rtol=1e-5)


@pytest.mark.slow
def test_the_bound_of_a_vdm_s_model_is_that_of_its_evaluation():
    config = dataclasses.replace(vdm_digits.CONFIG, network=SMALL, eval_terms=3, schedule_features=4)
    experiment, key, batch = config.build(SPEC), jax.random.key(1), batch_of(SPEC, 4)
    params = jax.tree.map(lambda x: x + 0.1, unoptimized(experiment.init)(key))
    assert experiment.diffusion is not None
    model = experiment.diffusion(params, None)
    bound = elbo.continuous_bound(
        model.denoiser, key, normalize(batch["image"], 5), model.schedule, model.decoder,
        prediction_type=model.prediction_type, terms=3,
    )  # fmt: skip
    expected = experiment.evaluate(params, key, batch)["bits_per_dim"]
    np.testing.assert_allclose(elbo.bits_per_dim(bound.total, 16), expected, rtol=1e-5)
    assert model.discrete_schedule.num_steps == config.sampling.steps


@pytest.mark.slow
def test_an_iddpm_s_model_has_a_learned_and_a_fixed_variance():
    network = dataclasses.replace(SMALL, embedding="sinusoidal")
    experiment = dataclasses.replace(iddpm_cifar.CONFIG, network=network).build(SPEC)
    assert experiment.diffusion is not None
    model = experiment.diffusion(experiment.init(jax.random.key(0)), None)
    x_t = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    level = jax.vmap(model.discrete_schedule)(jnp.asarray([1, 30]))
    assert model.variance_denoiser is not None
    prediction, fraction = model.variance_denoiser(x_t, level)
    np.testing.assert_array_equal(model.denoiser(x_t, level), prediction)
    assert fraction.shape == x_t.shape
    decoder = model.decoder(x_t[0], x_t[1], jax.tree.map(lambda leaf: leaf[0], level))
    np.testing.assert_array_equal(decoder.mean, x_t[0])
    assert decoder.scale == level.sigma[0]
