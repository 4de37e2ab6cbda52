"""Nothing that reads a user's files can run code out of them: no pickle, no eval, no shell, no import by name."""

import ast
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.training import shards
from tests.training.test_checkpoint import fill, numbered
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.data import batches, sources

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("vdm_jax", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
MODULES = {  # that read objects, or run what they are given
    "pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "torch", "jsonpickle", "h5py",
    "tensorflow", "code", "codeop", "runpy", "ctypes", "pty", "xml", "diffusers", "huggingface_hub",
}  # fmt: skip
CALLS = {"eval", "exec", "__import__", "system", "popen", "import_module", "load_module", "exec_module"}
OPTIONS = {"allow_pickle", "shell", "trust_remote_code"}
ALLOWED = {
    # the package's own modules, by a list of their names
    ("vdm_jax/__init__.py", "import_module"),
    ("vdm_jax/models/__init__.py", "import_module"),
    ("vdm_jax/networks/__init__.py", "import_module"),
    ("vdm_jax/training/__init__.py", "import_module"),
    # a recipe, by the name of a file in the folder of recipes or by the path that the user gives
    ("vdm_jax/training/registry.py", "import_module"),
    ("vdm_jax/training/registry.py", "exec_module"),
    # torch and diffusers, which are compared with, by their own names
    ("benchmarks/convolutions.py", "import_module"),
    ("benchmarks/eager.py", "import_module"),
}


def risks(source, file="somewhere.py"):
    """Lines with what can run code out of a file, as "file:line name"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                names = [part for name in names for part in name.name.split(".") if part in MODULES]
            case ast.ImportFrom(module=module, names=names):
                given = [*(module or "").split("."), *(name.name for name in names)]
                names = [part for part in given if part in MODULES | CALLS]
            case ast.Attribute(value=ast.Name(id="np" | "numpy" | "jnp"), attr="load"):
                names = ["load"]
            case ast.Attribute(attr=name) if name in MODULES - {"code"} | {"Unpickler"}:
                names = [name]
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), keywords=keywords):
                names = [word.arg for word in keywords if word.arg in OPTIONS]
                names += [name] if name in CALLS and (file, name) not in ALLOWED else []
            case ast.Call(keywords=keywords):
                names = [word.arg for word in keywords if word.arg in OPTIONS]
            case _:
                continue
        found += [f"{file}:{node.lineno} {name}" for name in names]
    return found


def test_no_source_runs_what_it_reads():
    assert len(SOURCES) > 100
    assert [risk for path in SOURCES for risk in risks(path.read_text(), str(path.relative_to(ROOT)))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "import numpy.lib.pickle",
        "import torch", "from yaml import load", "x = eval('1')", "exec(text)", "__import__(name)",
        "importlib.import_module(name)", "from importlib import import_module", "np.load(f)",
        "load(f, allow_pickle=True)", "run(c, shell=flag)",
        "os.system(c)", "os.popen(c)", "pandas.io.pickle.read(f)", "from os import system", "f()(shell=True)",
    ],
)  # fmt: skip
def test_each_way_to_run_code_is_detected(source):
    assert risks(source)


@pytest.mark.parametrize("source", ["lowered.compile()", "re.compile('x')", "subprocess.run([a, b])", "a.load(f)"])
def test_harmless_code_passes(source):
    assert not risks(source)


WATCH = []


def watch(event, arguments):
    """An audit hook, which cannot be removed: it records what is unpickled while WATCH contains a list."""
    if WATCH and event == "pickle.find_class":
        WATCH[-1].append(arguments)


@pytest.fixture
def unpickled():
    """The classes and functions that any library has unpickled during the test."""
    if not hasattr(sys, "_watched_by_tests"):
        sys.addaudithook(watch)
        sys._watched_by_tests = True
    WATCH.append([])
    yield WATCH[-1]
    WATCH.pop()


def test_the_watch_sees_a_pickle(unpickled):
    pickle.loads(pickle.dumps(Path("x")))
    assert unpickled


def test_checkpoints_are_restored_without_a_pickle(tmp_path, unpickled):
    fill(tmp_path, {1: 1.0})
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(numbered(0)).state.step) == 1
    assert unpickled == []


def test_a_users_own_files_are_read_without_a_pickle(tmp_path, unpickled):
    x = np.arange(48, dtype=np.uint8).reshape(4, 3, 4)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(4))
    save_file({"x": x}, tmp_path / "x.safetensors")
    for number, pixels in enumerate(x):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    for path in (tmp_path, *(tmp_path / f"x.{suffix}" for suffix in ("npy", "npz", "safetensors"))):
        assert sources.load(str(path)).train.take(np.arange(3))["image"].shape == (3, 3, 4, 1)
    assert unpickled == []


def test_data_and_its_position_are_read_without_a_pickle(tmp_path, monkeypatch, unpickled):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    shards.write(tmp_path)
    train = sources.load("tiny_set").train
    iterator = batches.train_iterator(train, 8, 0)
    state = iterator.get_state()
    first = next(iterator)
    iterator.set_state(state)
    assert np.array_equal(next(iterator)["image"], first["image"])
    assert unpickled == []
