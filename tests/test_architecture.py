"""Imports point one way, equations stay pure, and docstrings say where each comes from."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.derivations.check import CATALOGUE as CHAPTERS

PACKAGE = Path(__file__).parents[1] / "vdm_jax"
# Each may import those before it, and nothing else of the package.
LAYERS = [
    "closures", "compilation", "types", "gaussian", "noise_levels", "schedules", "discrete_schedules", "time_sampling", "forward",
    "parameterization", "likelihoods",
    "divergence", "score_matching", "tweedie", "sure", "langevin", "energy", "autoencoder", "vae", "hvae",
    "elbo", "path_bounds", "losses", "vdm", "weightings", "reverse_variance", "probability_flow", "samplers",
    "guidance", "dequantization", "closed_form", "information", "linear_gaussian", "metrics",
]  # fmt: skip
MAY_IMPORT = {"jax", "numpy", "jaxtyping", "diffrax", "vdm_jax"} | set(sys.stdlib_module_names)
CATALOGUE = {f"{chapter}-{i}" for chapter, last in CHAPTERS.items() for i in range(1, last + 1)}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, `from package import module` included."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    """The files or folders of the package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("vdm_jax.")}


def public(path: Path):
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


def exported(layer: str) -> set[str]:
    """What a folder's __init__ imports."""
    return {name.split(".")[-1] for name in imports(PACKAGE / layer / "__init__.py")}


def files(layer: str) -> list[Path]:
    """A layer is a file, or a folder of them."""
    folder = PACKAGE / layer
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_equation_file_has_its_layer():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert {path.stem for path in PACKAGE.glob("*.py")} | folders == {
        "__init__",
        "networks",
        "training",
        "interop",
        "models",
        *LAYERS,
    }


@pytest.mark.parametrize("name", LAYERS)
def test_equations_import_only_jax_numpy_and_earlier_layers(name):
    own = {name} if len(files(name)) > 1 else set()
    for path in files(name):
        assert {module.split(".")[0] for module in imports(path)} <= MAY_IMPORT
        assert rooms(path) <= {*LAYERS[: LAYERS.index(name)], *own}, path.name


@pytest.mark.parametrize("room", ["networks", "training"])
def test_networks_and_training_import_no_equation(room):
    for path in (PACKAGE / room).rglob("*.py"):
        # the quality of samples is measured with both, and knows nothing of diffusion either
        also = {"metrics", "networks"} if path.name == "sample_quality.py" else set()
        assert rooms(path) <= {room, *also}, path.name


def test_interop_joins_networks_and_tables():
    for path in (PACKAGE / "interop").glob("*.py"):
        allowed = {"interop", "networks", "schedules", "discrete_schedules"}
        assert rooms(path) <= allowed, path.name
        assert len(path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", LAYERS)
def test_public_names_are_documented_with_entries_that_exist(name):
    for path in files(name):
        for node in public(path):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
        mentioned = set(re.findall(rf"\b(?:{'|'.join(CHAPTERS)})-\d+", path.read_text()))
        assert mentioned <= CATALOGUE


@pytest.mark.parametrize("name", [layer for layer in LAYERS if layer not in ("closures", "compilation", "types")])
def test_public_functions_are_in_the_index(name):
    index = ast.get_docstring(tree(PACKAGE / "__init__.py"))
    assert index is not None
    for node in (node for path in files(name) for node in public(path)):
        if isinstance(node, ast.FunctionDef) and not (len(files(name)) > 1 and node.name not in exported(name)):
            assert re.search(rf"\b{node.name}\b", index), f"{name}.{node.name} is not in vdm_jax's docstring"


def test_nothing_is_called_utils():
    assert not [path for path in PACKAGE.rglob("*.py") if "util" in path.stem]


def test_importing_the_package_is_light():
    heavy = ["tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "flax", "grain"]
    code = f"import sys, vdm_jax.losses, vdm_jax.samplers; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert out.stdout.strip() == "[]"
