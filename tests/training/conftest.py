"""Runs of the small test experiment."""

import dataclasses
import sys
from pathlib import Path

import pytest

from tests import signals
from tests.training.experiments.tiny import CONFIG
from vdm_jax.training import registry
from vdm_jax.training import run as runs
from vdm_jax.training.data import batches
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.runtime.errors import readable_errors

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def quick(monkeypatch, without_old_garbage):
    """A run does not measure its data pipeline first."""
    monkeypatch.setattr(batches, "images_per_second", lambda *_, **__: 1000.0)


@pytest.fixture
def tiny(tmp_path):
    """`tiny(steps=20, devices=1, ...)`: a run of the test experiment with these options, in a folder of this test."""

    def make(devices=1, **options):
        config = dataclasses.replace(CONFIG, **{"workdir": str(tmp_path), **options})
        return runs.open_run("tiny", config, make_mesh(devices))

    return make


@pytest.fixture
def default_signals():
    """Signals act as in a terminal, also under `nohup` and in the background."""
    with signals.default_signals():
        yield


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`command(main, "tiny", "--steps", "3")`: run a command in this process -> exit code, what it printed.

    The project's recipes are those of tests/training/experiments.
    """
    monkeypatch.setattr(registry, "FOLDERS", (HERE / "experiments",))
    for name in recipe_modules():
        monkeypatch.delitem(sys.modules, name)

    def call(main, *arguments, workdir=True):
        own = ["--workdir", str(tmp_path)] if workdir else []
        code = 0
        try:
            with readable_errors():
                main([*arguments, *own])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    yield call
    for name in recipe_modules():
        del sys.modules[name]


def recipe_modules():
    return [name for name in sys.modules if name.startswith(registry.PACKAGE)]
