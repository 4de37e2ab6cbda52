"""Options, files and names that may hold anything: they work, or one message describes the error; nothing is written.

Nothing but UserError may come out of them, or tyro's own message and SystemExit.
"""

import copy
import dataclasses
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import get_type_hints

import hypothesis.strategies as st
import pytest
from hypothesis import assume

from tests.training.experiments.tiny import CONFIG as TINY
from tests.training.fuzzing import each_number, on_examples
from vdm_jax.training import registry
from vdm_jax.training import run as runs
from vdm_jax.training.cli import train as training
from vdm_jax.training.config import TrainConfig, from_json, read_json, to_json
from vdm_jax.training.data import sources as datasets
from vdm_jax.training.data import tfds_images
from vdm_jax.training.evaluation import features
from vdm_jax.training.evaluation.report import is_finished
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.validation import malformed

ROOT = Path(__file__).parents[2]
RECIPES = ["ddpm_digits", "ddpm_digits_cond", "vdm_digits", "vae_digits", "hvae_digits", "ncsn_digits", "ebm_2d"]
INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 1_001, 2**31 - 1, 2**31, 2**64, -(10**400), 10**400]) | st.integers()
FLOATS = st.sampled_from([0.0, -1.0, 1.0, 1e308, -1e308, 1e-308, float("nan"), float("inf")]) | st.floats()
OF_KIND = {int: INTEGERS, float: FLOATS, tuple[int, ...]: st.lists(INTEGERS, max_size=6).map(tuple)}
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS.filter(lambda i: abs(i) < 2**70) | FLOATS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Data sets are read once for all tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runs, "load", load)


load = functools.cache(datasets.load)


def config_of(recipe):
    return registry.find(recipe)


def leaves(config, prefix=()):
    """Path and declared type of every option, nested ones included."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*prefix, field.name))
        else:
            yield (*prefix, field.name), hints[field.name]


def changed(config, path, value):
    """A copy with another value; types are not checked, as where no import hook checks them."""
    first, *rest = path
    new = copy.copy(config)
    object.__setattr__(new, first, changed(getattr(config, first), rest, value) if rest else value)
    return new


def run_in(folder):
    """A run of the test experiment in this folder."""
    return runs.open_run("tiny", TINY)._replace(folder=folder)


def outcome(call):
    """What a call returns, or the text of its UserError; anything else passes through and fails the test."""
    try:
        return call()
    except UserError as error:
        return str(error)


NUMBERS = [(name, path, kind) for name in RECIPES for path, kind in leaves(config_of(name)) if kind in OF_KIND]


@each_number
def test_any_number_for_an_option(tmp_path, number):
    """The model builds or the option is refused; NaN, infinity and huge numbers are always refused."""

    @on_examples(number, st.sampled_from(NUMBERS), st.data())
    def _(option, data):
        name, path, kind = option
        value = data.draw(OF_KIND[kind])
        config = changed(config_of(name), path, value)
        config = config if path == ("workdir",) else dataclasses.replace(config, workdir=str(tmp_path))
        result = outcome(lambda: runs.open_run(name, config))
        extreme = any(not abs(number) < 2**32 for number in (value if isinstance(value, tuple) else [value]))
        assert isinstance(result, str if extreme else (str, runs.Run))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("ddpm_digits", "num_steps", 0, "--num-steps must be at least 2, got 0"),
        ("ddpm_digits", "num_steps", 10**9, "--num-steps must be below 1000001"),
        ("ddpm_digits", "network.channels", 0, "--network.channels must be at least 1"),
        ("ddpm_digits", "network.groups", 0, "--network.groups must be at least 1"),
        ("ddpm_digits", "network.blocks", 10**9, "--network.blocks must be below 1001"),
        ("vae_digits", "network.multipliers", (), r"multipliers is \(\): set one number"),
        ("ddpm_digits", "network.multipliers", (1, -2), "--network.multipliers must be at least 1"),
        ("ddpm_digits", "network.dropout", 1.0, r"--network.dropout must be in \[0, 1\)"),
        ("ddpm_digits", "label_dropout", float("nan"), r"--label-dropout must be in \[0, 1\)"),
        ("ddpm_digits", "learning_rate", float("nan"), "--learning-rate must be positive and finite"),
        ("ddpm_digits", "learning_rate", 1e308, "--learning-rate must be positive and finite"),
        ("ddpm_digits", "eval_terms", -1, "--eval-terms must be at least 0"),
        ("ddpm_digits", "snapshots", -1, "--snapshots must be at least 0"),
        ("ddpm_digits", "likelihood_report.steps", (10, 0), "--likelihood-report.steps must be at least 1"),
        ("ddpm_digits", "likelihood_report.tolerance", 0.0, "--likelihood-report.tolerance must be positive"),
        ("ddpm_digits", "sampling.tolerance", 0.0, "--sampling.tolerance must be positive"),
        ("ddpm_digits", "sampling.guidance_scale", float("inf"), "--sampling.guidance-scale must be below"),
        ("ddpm_digits", "log_snr_max", 1e9, "--log-snr-max must be below 81"),
        ("ddpm_digits", "weight_decay", float("inf"), "--weight-decay must be below"),
        ("ddpm_digits", "flip", 1, "--flip must be true or false"),
        ("ddpm_digits", "prediction_type", "score", "--prediction-type must be one of eps, x_0, v"),
        ("ddpm_digits", "steps", "many", "--steps must be a whole number"),
        ("ddpm_digits", "steps", True, "--steps must be a whole number"),
        ("ddpm_digits", "workdir", "a\0b", "--workdir must be a valid folder name"),
        ("ddpm_digits", "workdir", "y" * 256, "--workdir must be a valid folder name"),
        ("vdm_digits", "gamma_0", float("nan"), "--gamma-0 must be at least -80"),
        ("vdm_digits", "network.num_classes", 10, "class conditioning .* set --network.num-classes 0"),
        ("sure_denoise_digits", "network.num_classes", 10, "class conditioning .* set --network.num-classes 0"),
        ("ncsn_digits", "sampling.rate", 0.0, "--sampling.rate must be positive"),
        ("ncsn_digits", "noise_scales.sigma_min", 1e-308, r"both within 1e-6\.\.1e6"),
        ("ebm_2d", "network.width", 7, "--network.width 7 must be even"),
        ("score_2d", "network.num_classes", 2, "class conditioning .* set --network.num-classes 0"),
        ("score_2d", "num_levels", 0, "--num-levels must be at least 2"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_option(name, option, value, message):
    with pytest.raises(UserError, match=message):
        runs.open_run(name, changed(config_of(name), option.split("."), value))


@each_number
def test_any_values_for_stored_options(number):
    """Stored options have the declared types or are refused."""

    @on_examples(number, st.sampled_from(RECIPES), st.data())
    def _(recipe, data):
        config = config_of(recipe)
        path, _ = data.draw(st.sampled_from(list(leaves(config))))
        stored = to_json(config)
        place = stored
        for part in path[: data.draw(st.integers(0, len(path) - 1))]:
            place = place[part]
        place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=9))] = data.draw(JSON)
        restored = outcome(lambda: from_json(config, stored))
        assert isinstance(restored, str) or not malformed(restored)


def test_stored_options_of_another_kind_are_named():
    for values in (None, [], 7, "options"):
        with pytest.raises(UserError, match="it must be an object"):
            from_json(TINY, values)
    for values, message in [
        ({"steps": "7"}, "--steps must be a whole number"),
        ({"widths": [1]}, "--widths must be an object"),
        ({"widths": {"hidden": 1.5}}, "--widths.hidden must be a whole number"),
        ({"scales": [[1]]}, "--scales must be a list"),
        ({"scales": json.loads("[" * 990 + "]" * 990)}, "--scales must be a list"),
        ({"widths": {"depth": 3}}, "unknown options: widths.depth"),
    ]:
        with pytest.raises(UserError, match=message):
            from_json(TINY, values)


HARD = ["", "{", "[]", "null", "[" * 100_000, '{"config": ' + "[" * 900 + "]" * 900 + "}", '{"a": ' + "9" * 5_000 + "}"]


@pytest.mark.parametrize("text", [*HARD, "\ud800"])
def test_a_config_json_that_is_hard_to_read(tmp_path, text):
    (tmp_path / "ddpm_digits").mkdir()
    (tmp_path / "ddpm_digits" / "config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(UserError, match=r"config.json .*--fresh"):
        runs.stored_config("ddpm_digits", str(tmp_path))


@each_number
def test_any_bytes_for_the_files_of_a_run(tmp_path, number):
    """With a damaged report or config a run is not finished, and a classifier is trained again."""

    @on_examples(number, st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
    def _(content):
        run = run_in(tmp_path)
        whole = {"config.json": {"config": to_json(TINY)}, "report.json": {"steps": TINY.steps}}
        for name in whole:
            for other, value in whole.items():
                (tmp_path / other).write_text(json.dumps(value))
            assert is_finished(run)
            (tmp_path / name).write_bytes(content)
            assert not is_finished(run)
            outcome(lambda name=name: read_json(tmp_path / name))
        (tmp_path / "report.json").write_bytes(content)
        assert features._stored_accuracy(tmp_path) is None
        (tmp_path / "config.json").write_bytes(content)
        assert not features._has_options(tmp_path, features.classifier_options(runs.load("digits").spec))


@pytest.mark.parametrize("accuracy", [None, "0.9", float("nan"), -1.0, 1e9, {"mean": 0.9}])
def test_an_accuracy_that_is_not_a_fraction_is_ignored(tmp_path, accuracy):
    (tmp_path / "report.json").write_text(json.dumps({"test": {"accuracy": {"mean": accuracy}}}))
    assert features._stored_accuracy(tmp_path) is None


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="it is not a file"):
        read_json(tmp_path / "config.json")
    assert not is_finished(run_in(tmp_path))
    with pytest.raises(UserError, match=r"--inception .* it is not a file"):
        features.inception_extractor(tmp_path / "config.json", runs.load("digits").spec)


WORDS = st.sampled_from(
    ["0", "-1", "nan", "inf", "1e400", "9" * 5_000, "None", "True", "", "--", "-h=", "\0", "\udcff"]
)


@each_number
def test_any_words_on_the_command_line(number):
    """Options are parsed, or tyro reports the invalid one and exits with 2."""

    @on_examples(
        number,
        st.sampled_from([path for path, _ in leaves(config_of("ddpm_digits"))]),
        st.lists(WORDS | st.text(max_size=6), max_size=2),
    )
    def _(path, words):
        assume(not {"-h", "--help"} & set(words))
        arguments = ["ddpm_digits", "--" + ".".join(path).replace("_", "-"), *words]
        try:
            name, config, fresh, _ = training.parse(arguments, "vdm-jax train")
        except SystemExit as stop:
            result = stop.code
        else:
            result = name, isinstance(config, TrainConfig), fresh
        assert result in (2, ("ddpm_digits", True, False))


BAD_NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "x" * 5_000, "_ddpm", "__init__", "no.py",
             "a\0/b.py", "x" * 5_000 + ".py", "/", "~/x.py", "os", "ddpm_digits ", "ｄdpm",
             "\udcff"]  # fmt: skip


@each_number
def test_any_name_for_an_experiment(number):
    """Only recipes of the project and Python files are imported."""

    @on_examples(number, st.sampled_from(BAD_NAMES) | st.text())
    def _(name):
        assume((name not in registry.recipe_names() and Path(name).suffix != ".py") or name in BAD_NAMES)
        before = set(sys.modules)
        assert re.match("Unknown recipe|There is no recipe file|The recipe file", outcome(lambda: registry.find(name)))
        assert set(sys.modules) == before


@pytest.mark.parametrize(
    "name",
    [*BAD_NAMES[:5], *BAD_NAMES[6:8], "../mnist", "mnist/..", "mnist/../../x", "huggingface:x", "hf:x", "kaggle:a/b",
     "user:mnist", "mnist/data_dir=x", "mnist:1", "MNIST", "mnist\n"],
)  # fmt: skip
def test_a_name_that_is_no_data_sets_is_refused_unread(name, monkeypatch):
    """TFDS would download code for a name with a namespace, and follow paths in names."""
    monkeypatch.setattr(tfds_images, "_builder", None)  # not called
    with pytest.raises(UserError, match="Unknown data set"):
        tfds_images.open_set(name)


def test_only_a_runs_own_folder_is_removed(tmp_path):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    link.symlink_to(elsewhere)
    (tmp_path / "file").write_text("mine")
    for path in (link, tmp_path / "file"):
        with pytest.raises(UserError, match="is a link or a file, not the folder of a run"):
            runs.remove_run(path)
    assert (elsewhere / "config.json").exists()
    with pytest.raises(UserError, match=r"no config\.json"):
        runs.remove_run(tmp_path)
    inside = elsewhere / "checkpoints"
    inside.symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    runs.remove_run(elsewhere)
    assert not (elsewhere / "config.json").exists()
    assert not inside.is_symlink()
    assert (tmp_path / "kept").exists()  # a link is removed, not its target
    runs.remove_run(tmp_path / "nothing there")
