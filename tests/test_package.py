"""The installed library: every module by name, the core without the packages of training, the recipes."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vdm_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Import names of packages that only training needs; Flax itself installs optax and orbax.
TRAINING_ONLY = ["grain", "matplotlib", "tensorboardX", "tensorflow_datasets", "tqdm", "tyro", "sklearn", "PIL"]
FIRST_USE = """
import jax, jax.numpy as jnp
import vdm_jax
from jax.tree_util import Partial

schedule = vdm_jax.discrete_schedules.linear_betas(20)
network = Partial(lambda scale, x_t, level: scale * x_t, jnp.float32(0.5))
x_0, key = vdm_jax.likelihoods.normalize(jnp.arange(12).reshape(3, 4) % 5, 5), jax.random.key(0)
decoder = lambda x_hat, x_1, level: vdm_jax.likelihoods.DiscretizedGaussian(x_hat, scale=level.sigma, levels=5)

@jax.jit
def use(key, x_0):
    loss = vdm_jax.losses.simple_loss(network, key, x_0, schedule)
    bound = vdm_jax.elbo.bound(network, key, x_0, schedule, decoder).total
    return loss, bound, vdm_jax.samplers.ancestral(network, key, x_0, schedule).x_0

loss, bound, samples = use(key, x_0)
assert loss.shape == bound.shape == (3,)
assert samples.shape == x_0.shape
assert all(jnp.isfinite(x).all() for x in (loss, bound, samples))
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
    """Python code that makes imports of these modules fail, as if they were not installed."""
    return f"import sys; FORBIDDEN = {names}; sys.modules.update(dict.fromkeys(FORBIDDEN))\n"


def test_every_module_is_an_attribute():
    files = {path.stem for path in (ROOT / "vdm_jax").glob("*.py")} - {"__init__", "__main__"}
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


@pytest.mark.parametrize("use", ["import vdm_jax.training", "from vdm_jax.__main__ import main; main()"])
def test_training_without_its_packages_names_the_extra(use):
    code = without(["grain", "tyro"]) + "import importlib.util; importlib.util.find_spec = lambda name: "
    code += f"None if name in FORBIDDEN else True\n{use}"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "grain, tyro" in last
    assert "vdm_jax[train]" in last
    assert ("Traceback" in failed.stderr) == use.startswith("import")


def build_wheel(folder):
    """The wheel of the package, built in a folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("vdm_jax-*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_alone_in_a_fresh_environment(tmp_path):
    """Needs a package index, as every installation does."""
    wheel = build_wheel(tmp_path)
    recipes = {path.name for path in (ROOT / "experiments").glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        shipped = {Path(name).name for name in archive.namelist() if name.startswith("vdm_jax/experiments/")}
    assert shipped == recipes
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    constraints = ROOT / "constraints.txt"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", wheel, "--constraint", constraints], check=True)
    assert run(f"FORBIDDEN = {TRAINING_ONLY}\n" + FIRST_USE, "-P", python=python, cwd=tmp_path) == "[]\n"
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    assert run(example[1], "-P", python=python, cwd=tmp_path)
    for command in ([python, "-m", "vdm_jax.training"], [python, "-m", "vdm_jax"], [python.with_name("vdm-jax")]):
        done = subprocess.run([*command, "train", "ddpm_digits"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1
        assert "vdm_jax[train]" in done.stderr


@pytest.mark.slow
def test_the_wheel_trains_a_recipe_from_any_folder(tmp_path):
    """The packages are those of this environment; the wheel comes before them on the path."""
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}
    options = ["--steps", "1", "--batch-size", "2", "--num-samples", "0", "--eval-examples", "2", "--workdir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "vdm_jax", "train", "dae_digits", *options],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dae_digits" / "report.json").exists()
    program = "import vdm_jax.training.registry as r; print(r.recipe_folder())"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.stdout.strip() == str(tmp_path / "installed" / "vdm_jax" / "experiments")


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("nvidia_smi", "chosen"),
    [("echo 580.65.06", "cuda13"), ("echo 535.1", "cuda12"), ("echo 470.82", "cpu"), ("echo no driver; exit 9", "cpu")],
)
def test_jax_is_chosen_by_the_driver_of_the_gpu(tmp_path, nvidia_smi, chosen):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(["sh", ROOT / ".ci" / "accelerator"], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == chosen
    assert ("ACCEL=cpu" in found.stderr) == (chosen != "cpu")
