"""The life cycle of a run: every recipe trains, saves, resumes, samples and evaluates, or is refused by the dry run.

A run that trains for days and then cannot save, sample or evaluate is lost, so `dry_run` traces all of that before the
first step. Here every recipe goes through its life cycle, with its own options at the smallest sizes.
"""

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import optimizations
from tests.test_experiments import RECIPES, SPECS, config_of
from tests.training.bits import assert_same_bits
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.autoencoder import AutoencoderConfig
from vdm_jax.networks.schedule import MonotoneNetwork
from vdm_jax.networks.unet import UNetConfig
from vdm_jax.networks.very_deep_vae import VeryDeepVAEConfig
from vdm_jax.training import registry
from vdm_jax.training import run as runs
from vdm_jax.training.cli import evaluate, sample
from vdm_jax.training.cli import train as training
from vdm_jax.training.config import to_json
from vdm_jax.training.data import batches
from vdm_jax.training.data.sources import DISTRIBUTIONS, Dataset, Images
from vdm_jax.training.evaluation import dry_run, likelihood_report
from vdm_jax.training.evaluation.report import write_report
from vdm_jax.training.evaluation.sampling import write_image_grids, write_samples_and_plots
from vdm_jax.training.experiment import LikelihoodRow, SampleBatch
from vdm_jax.training.loop import train
from vdm_jax.training.run import initial_state
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.runtime.errors import UserError, readable_errors

ROOT = Path(__file__).parents[1]
FAST = ["score_2d", "ae_digits"]  # points and images; they compile within seconds
PERCEPTRON = AutoencoderConfig(architecture="mlp", latent=2, width=8, blocks=1)
ONE_OF_EACH = [  # one of each other kind of model
    "ddpm_digits_cond", "ddpm_series", "ddpm_vectors", "ebm_2d", "hvae_digits", "iddpm_cifar", "ncsn_digits",
    "sure_denoise_digits", "vae_em_digits", "vdm_digits",
]  # fmt: skip
SMALLEST = {
    "steps": 2, "batch_size": 2, "eval_batch_size": 2, "eval_examples": 2, "num_samples": 2, "snapshots": 1,
    "log_every": 1, "checkpoint_every": 1, "picture_every": 1, "num_steps": 21, "eval_terms": 2,
    "importance_samples": 2, "chain_steps": 2, "sampling_steps": 2,
}  # fmt: skip


def stand_in(name, options=None):
    """A few random images or points as a data set."""
    spec = SPECS[name]._replace(num_train=16, num_test=12)

    def examples(number, seed):
        if not spec.levels:
            examples, labels = DISTRIBUTIONS[name]().sample(number, seed)
            records = [{"image": x, "label": label} for x, label in zip(examples, labels, strict=True)]
            return Images(records, spec.shape, np.float32)
        images = np.random.RandomState(seed).randint(spec.levels, size=(number, *spec.shape)).astype(np.uint8)
        records = [{"image": image, "label": i % spec.num_classes} for i, image in enumerate(images)]
        return Images(records, spec.shape)

    return Dataset(spec, examples(16, 0), examples(12, 1))


def smallest(config):
    """The recipe with the smallest possible sizes."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    new = {name: size for name, size in SMALLEST.items() if fields.get(name)}  # 0 often has a special meaning
    new["network"] = small_network(config.network)
    if "likelihood_report" in fields:
        sizes = {"steps": (2,), "terms": 2, "importance_steps": 2, "importance_samples": 2, "tolerance": 0.1}
        new["likelihood_report"] = dataclasses.replace(config.likelihood_report, **sizes)
    if "sampling" in fields:
        new["sampling"] = dataclasses.replace(config.sampling, steps=2)
    return dataclasses.replace(config, **new)


def small_network(network):
    """A narrow network with each part once."""
    if isinstance(network, VeryDeepVAEConfig):
        once = {part: tuple((size, 1) for size, _ in getattr(network, part)) for part in ("layers", "encoder")}
        return dataclasses.replace(network, width=16, z_channels=2, **once)
    narrow = getattr(network, "groups", 8)
    sizes = {"blocks": 1, "channels": narrow, "width": narrow, "multipliers": (1, 2)}
    return dataclasses.replace(network, **{name: size for name, size in sizes.items() if hasattr(network, name)})


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(runs, "load", stand_in)
    monkeypatch.setattr(batches, "images_per_second", lambda *_, **__: 1000.0)  # measured for 0.3 seconds


@pytest.fixture
def opened(tmp_path):
    """`opened("ddpm_digits", network=..., ...)`: a run of the smallest recipe with these options."""

    def make(name, own=None, **options):
        config = dataclasses.replace(own or smallest(config_of(name)), **{"workdir": str(tmp_path), **options})
        return runs.open_run(name, config, make_mesh(1))

    return make


def checked(run, likelihood=False):
    """The update of a run, after a dry run."""
    return dry_run.check_training(run, likelihood=likelihood)


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compile with few optimizations, as `make test` does."""
    with optimizations(False):
        yield


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in RECIPES])
def test_every_recipe_trains_saves_resumes_samples_and_evaluates(name, opened):
    run = opened(name, **({"network": PERCEPTRON} if name == "ae_digits" else {}))  # other recipes have convolutions
    step = checked(run, likelihood=True)
    whole = train(run, step=step)
    shutil.rmtree(run.folder / "checkpoints" / "2")
    assert_same_bits(train(run, step=step).state, whole.state)  # from the checkpoint of step 1
    saved = runs.newest_checkpoint(run)
    assert_same_bits(saved.state, whole.state)
    result = write_report(run, saved)
    likelihood_report.add_likelihood(run, saved, {} if name in FAST else dict(run.experiment.likelihood_rows), result)
    numbers = [value["mean"] for value in result["test"].values()]
    numbers += [entry["nats"]["mean"] for entry in result.get("likelihood", {}).values()]
    assert all(map(math.isfinite, numbers)), json.dumps(result, indent=1)
    written = write_samples_and_plots(run, saved.state.ema)
    assert len(written) >= 1
    assert all(path.stat().st_size > 100 for path in written)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_recipe_of_every_kind_passes_its_dry_run(name, opened):
    checked(opened(name), likelihood=name in ("vdm_digits", "hvae_digits"))


def options(config, path=()):
    """The path, the declared type and the value of every option, nested ones included."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, own = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, own)
        else:
            yield own, hints[field.name], value


def changed(config, path, value):
    first, *rest = path
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def at_the_boundaries(hint, value):
    """Boundary values of a type, except the given one."""
    literal = next((each for each in (hint, *get_args(hint)) if get_origin(each) is Literal), None)
    if literal is not None:  # or None
        found = get_args(literal)
    elif get_origin(hint) is tuple:
        whole = get_args(hint)[0] is int
        found = [(), (0,), (1,)] if whole else [(), ((0, 1), (8, 1)), ((1, 0), (8, 1)), ((3, 1), (8, 1)), ((8, 1),)]
    else:
        kinds = {bool: [False, True], float: [0.0, 1e-30, 0.5, 1.0, 1e9]}
        found = [] if hint is str else kinds.get(hint, [0, 1, 2, 3, 2**31 - 1])
    return [new for new in found if new != value]


def every_option_once():
    """A recipe and a path for every option of every class of options."""
    seen = set()
    for recipe in ["score_2d", "ebm_2d", "vae_digits", "ae_digits", "vdm_cifar", *ONE_OF_EACH]:
        for path, hint, value in options(smallest(config_of(recipe))):
            owner = config_of(recipe) if len(path) == 1 else getattr(config_of(recipe), path[0])
            kind = next(c for c in reversed(type(owner).__mro__) if path[-1] in getattr(c, "__annotations__", {}))
            if (kind, path[-1]) not in seen and at_the_boundaries(hint, value):
                seen.add((kind, path[-1]))
                yield pytest.param(recipe, path, hint, id=f"{recipe}-{'.'.join(path)}")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "path", "hint"), list(every_option_once()))
def test_an_option_at_its_boundaries_can_be_traced_or_is_refused_by_its_name(recipe, path, hint, opened, monkeypatch):
    config = smallest(config_of(recipe))
    monkeypatch.setattr(registry, "find", lambda _: config)
    for value in at_the_boundaries(hint, functools.reduce(getattr, path, config)):
        try:
            report = path[0] in ("likelihood_report", "importance_samples")
            checked(opened(recipe, changed(config, path, value)), likelihood=report)
        except UserError as error:
            text = str(error).replace("-", "_")
            assert path[-1] in text, (value, text)
            assert "VDM_JAX_TRACEBACK" not in text, (value, text)


def test_a_linear_learned_schedule_has_no_parameter_of_size_zero():
    zero = jnp.zeros(())
    params = MonotoneNetwork(0).init(jax.random.key(0), zero, zero)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [()]


def test_a_state_that_no_checkpoint_can_hold_is_refused(opened):
    run = opened("ae_digits", network=PERCEPTRON)
    for extra, message in [
        (jnp.zeros((3, 0)), r"parameter more/w has shape \(3, 0\); a checkpoint cannot hold empty arrays"),
        (jax.random.key(0), r"parameter more/w has type key<fry>; a checkpoint holds numbers only"),
    ]:
        init = lambda key, extra=extra: {**run.experiment.init(key), "more": {"w": extra}}  # noqa: E731
        with pytest.raises(UserError, match=message):
            dry_run.check_state(run._replace(experiment=run.experiment._replace(init=init)))


@pytest.mark.parametrize(
    ("part", "function", "message"),
    [
        ("init", lambda key: [] / key, r"The initial state fails .*TypeError: unsupported operand"),
        ("loss", lambda *_: (jnp.zeros(()), {"mean": jnp.zeros(3)}), r"metrics of the loss must have shape \(\), but"),
        (
            "sample",
            lambda _, key, n: SampleBatch(jnp.zeros((n, 4, 4, 1))),
            r"samples must have shape \(2, 8, 8, 1\), but",
        ),
        ("evaluate", lambda *_: {"error": jnp.zeros(())}, r"values of the evaluation must have shape \(2,\), but"),
        ("evaluate", lambda *_: {"error": [] / 1}, r"Evaluation fails .*TypeError: unsupported operand"),
        (
            "likelihood_rows",
            {"bound": LikelihoodRow("", lambda *_: jnp.zeros((2, 2)))},
            r"row 'bound' must have shape \(2,\), but",
        ),
        ("latent_codes", lambda *_: jnp.zeros((10, 3)), r"latent codes must have shape \(10, 2\), but have \(10, 3\)"),
        ("image_grids", {"map": lambda *_: jnp.zeros(3)[5:][0]}, r"The plot 'map' fails"),
    ],
)
def test_a_recipe_s_function_that_cannot_work_is_named(opened, part, function, message):
    run = opened("ae_digits", network=PERCEPTRON)
    with pytest.raises(UserError, match=message):
        checked(run._replace(experiment=run.experiment._replace(**{part: function})), likelihood=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ddpm_digits",
            {"sampling": Sampling("ddim", steps=2, eta=1.5)},
            r"(?s)eta must be in \[0, 1\], got 1.5.* --sampling.eta 1.5",
        ),
        ("ddpm_digits", {"noise_schedule": "linear", "num_steps": 1}, "--num-steps must be at least 2, got 1"),
        (
            "ddpm_digits",
            {"noise_schedule": "linear", "num_steps": 20},
            "--noise-schedule linear .* --num-steps of at least 21",
        ),
        ("iddpm_cifar", {"num_steps": 1}, "--num-steps must be at least 2, got 1"),
        ("ddpm_digits_cond", {"label_dropout": 0.0}, "guidance scale 2 .* --label-dropout"),
        (
            "ddpm_digits",
            {"network": UNetConfig(channels=32, multipliers=(1,), blocks=1, out_channels=3)},
            "--network.out-channels 3",
        ),
    ],
)
def test_options_that_fail_only_after_training_are_refused_before_it(opened, name, options, message):
    with pytest.raises(UserError, match=message):
        checked(opened(name, **options))


def test_without_label_dropout_there_is_no_likelihood_report(opened):
    sampling = dataclasses.replace(smallest(config_of("ddpm_digits_cond")).sampling, guidance_scale=1.0)
    assert opened("ddpm_digits_cond", sampling=sampling).experiment.likelihood_rows
    assert not opened("ddpm_digits_cond", sampling=sampling, label_dropout=0.0).experiment.likelihood_rows


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`command(main, "ddpm_digits", "--steps", "3")`: run a command on a recipe -> exit code, what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(main, *arguments):
        code = 0
        try:
            with readable_errors():
                main([*arguments, "--workdir", str(tmp_path)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


TOO_MUCH_NOISE = ("ddpm_digits", "--sampling.sampler", "ddim", "--sampling.eta", "1.5")


def test_an_option_that_cannot_work_is_one_message_and_neither_writes_nor_deletes(command, tmp_path):
    folder = tmp_path / "ddpm_digits"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    code, output = command(training.main, *TOO_MUCH_NOISE, "--fresh")
    assert code == 1
    assert "Sampling fails with these options: eta must be in [0, 1], got 1.5" in output
    assert "differ from the recipe: --sampling.sampler ddim --sampling.eta 1.5" in output
    assert "Traceback" not in output
    assert set(tmp_path.rglob("*")) == {folder, folder / "checkpoints", folder / "config.json"}
    assert (folder / "config.json").read_text() == "{}"


def test_sampling_and_evaluation_refuse_options_before_they_begin(command, opened, tmp_path):
    run = opened("ddpm_digits", eval_batch_size=8, batch_size=8)
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps({"config": to_json(run.config)}))
    code, output = command(sample.main, "ddpm_digits", "--sampler", "ddim", "--eta", "1.5")
    assert code == 1
    assert "Sampling fails with these options: eta must be in [0, 1], got 1.5" in output
    for options, message in [
        (("--quality", "1"), "--quality 1: at least 20 samples"),
        (("--quality", "-3"), "--quality -3: at least 20 samples"),
        (("--quality", "20"), "at least 20 test images are needed, and 12 are evaluated. Use more --eval-examples"),
        (("--inception", str(tmp_path / "none")), "--inception .*none cannot be used"),
    ]:
        code, output = command(evaluate.main, "ddpm_digits", *options)
        assert code == 1
        assert re.search(message, output), output
        assert "Traceback" not in output


RECIPE = """from dataclasses import dataclass, replace
from vdm_jax.training.config import TrainConfig
@dataclass(frozen=True)
class Mine(TrainConfig): width: int = 3
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CONFIG = Mine(stpes=3)", r"mine\.py, line 5, Mine has no option 'stpes'. Did you mean 'steps'"),
        ("CONFIG = replace(Mine(), batchsize=3)", r"line 5, Mine has no .* Did you mean 'batch_size'"),
        ("CONFIG = Mine(xyzzy=3)", r"Mine has no option 'xyzzy'. Its options: accumulate, .*, width, workdir"),
        ("CONFIG = Mine(", r"mine\.py, line 5, SyntaxError: '\(' was never closed"),
        ("\nCONFIG = Config()", r"mine\.py, line 6, NameError: name 'Config' is not defined"),
        ("import nothing_here", r"mine\.py, line 5, ModuleNotFoundError: No module named 'nothing_here'"),
        ("CONFIGURATION = Mine()", r"mine\.py must define CONFIG"),
    ],
)
def test_a_recipe_that_cannot_be_imported_is_one_message_with_its_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(RECIPE + text)
    with pytest.raises(UserError, match=message):
        registry.find(str(tmp_path / "mine.py"))


@pytest.mark.usefixtures("compiled_quickly")
def test_fewer_test_images_than_a_picture_shows_are_all_shown(opened, monkeypatch):
    few = stand_in("digits")
    few = few._replace(test=Images([{"image": np.zeros((8, 8, 1), np.uint8), "label": 0}] * 3, (8, 8, 1)))
    monkeypatch.setattr(runs, "load", lambda *_: few)
    run = opened("ae_digits", network=PERCEPTRON, picture_every=0)
    dry_run.check_plots(run)
    run.folder.mkdir()
    assert write_image_grids(run, initial_state(run).ema) == [run.folder / "reconstructions.png"]


def test_images_that_are_not_square_cannot_be_turned(opened, monkeypatch):
    data = stand_in("digits")
    monkeypatch.setattr(runs, "load", lambda *_: data._replace(spec=data.spec._replace(shape=(8, 4, 1))))
    with pytest.raises(UserError, match=r"--rotate .* square images, and those of digits are 8x4x1"):
        opened("ae_digits", rotate=True)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")])
def test_too_little_memory_is_one_message(command, monkeypatch, error):
    def train(*_):
        raise error

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(dry_run, "check_training", lambda *_, **__: None)
    code, output = command(training.main, "ae_digits", "--batch-size", "8")
    assert code == 1
    assert "Out of memory. Use a smaller" in output
    assert "Traceback" not in output
