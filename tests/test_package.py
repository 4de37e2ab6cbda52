"""The library as somebody installs it: every module by name, the core without the packages of training."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vdm_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Import names of what only training needs. Flax itself brings optax and orbax.
TRAINING_ONLY = ["grain", "matplotlib", "tensorboardX", "tensorflow_datasets", "tqdm", "tyro", "sklearn", "PIL"]
FIRST_USE = """
import jax, jax.numpy as jnp
import vdm_jax
from jax.tree_util import Partial

schedule = vdm_jax.discrete_schedules.linear_betas(20)
network = Partial(lambda scale, x_t, level: scale * x_t, jnp.float32(0.5))
x_0, key = vdm_jax.likelihoods.normalize(jnp.arange(12).reshape(3, 4) % 5, 5), jax.random.key(0)
decoder = lambda x_hat, x_1, level: vdm_jax.likelihoods.DiscretizedGaussian(x_hat, scale=level.sigma, levels=5)
assert vdm_jax.losses.simple_loss(network, key, x_0, schedule).shape == (3,)
assert jnp.isfinite(vdm_jax.elbo.bound(network, key, x_0, schedule, decoder).total).all()
assert vdm_jax.samplers.ancestral(network, key, x_0, schedule).x_0.shape == (3, 4)
import importlib
for name in [name for name in vdm_jax.__all__ if name not in ("models", "training")]:
    importlib.import_module("vdm_jax." + name)
import vdm_jax.networks.unet, vdm_jax.networks.very_deep_vae, vdm_jax.networks.refinenet
import sys
print(sorted(name for name in FORBIDDEN if sys.modules.get(name) is not None))
"""


def run(code, *options, python=sys.executable, cwd=ROOT):
    return subprocess.run([python, *options, "-c", code], capture_output=True, text=True, cwd=cwd, check=True).stdout


def without(names):
    """Python that makes imports of these fail, as where they are not installed."""
    return f"import sys; FORBIDDEN = {names}; sys.modules.update(dict.fromkeys(FORBIDDEN))\n"


def test_every_module_is_an_attribute():
    files = {path.stem for path in (ROOT / "vdm_jax").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / "vdm_jax").glob("*/__init__.py")}
    assert set(vdm_jax.__all__) == files | folders
    assert set(vdm_jax.__all__) <= set(dir(vdm_jax))
    for name in vdm_jax.__all__:
        assert getattr(vdm_jax, name) is importlib.import_module(f"vdm_jax.{name}")
    with pytest.raises(AttributeError, match="elbow"):
        _ = vdm_jax.elbow


def test_type_checkers_see_every_module():
    listed = (ROOT / "vdm_jax" / "__init__.py").read_text().split("TYPE_CHECKING:")[1].split(")")[0]
    assert all(f"        {name}," in listed for name in vdm_jax.__all__)
    assert (ROOT / "vdm_jax" / "py.typed").exists()


def test_importing_the_package_imports_nothing_else():
    assert run("import sys, vdm_jax; print(vdm_jax.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)") == (
        f"{vdm_jax.__version__} False False\n"
    )


def test_equations_networks_and_weights_need_no_package_of_training():
    assert run(without(TRAINING_ONLY) + FIRST_USE) == "[]\n"


def test_training_without_its_packages_is_one_line():
    code = without(["grain", "tyro"]) + "import importlib.util; importlib.util.find_spec = lambda name: "
    code += "None if name in FORBIDDEN else True\nimport vdm_jax.training"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = failed.stderr.strip().splitlines()[-1]
    assert "grain, tyro" in last
    assert "vdm_jax[train]" in last


@pytest.mark.slow
def test_the_wheel_alone_in_a_fresh_environment(tmp_path):
    """Needs a package index, as installing does."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("vdm_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, *pip[1:], "install", wheel, "--constraint", constraints], check=True)
    assert run(f"FORBIDDEN = {TRAINING_ONLY}\n" + FIRST_USE, "-P", python=python, cwd=tmp_path) == "[]\n"
    command = subprocess.run([python, "-m", "vdm_jax.training"], capture_output=True, text=True, cwd=tmp_path)
    assert command.returncode == 1
    assert len(command.stderr.strip().splitlines()) == 1
    assert "vdm_jax[train]" in command.stderr


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("says", "chosen"),
    [("echo 580.65.06", "cuda13"), ("echo 535.1", "cuda12"), ("echo 470.82", "cpu"), ("echo no driver; exit 9", "cpu")],
)
def test_jax_is_chosen_by_the_driver_of_the_gpu(tmp_path, says, chosen):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(["sh", ROOT / ".ci" / "accelerator"], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == chosen
    assert ("ACCEL=cpu" in found.stderr) == (chosen != "cpu")
