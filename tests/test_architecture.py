"""Imports are acyclic and follow the layers, equations are pure, and docstrings name catalogue entries that exist."""

import ast
import importlib
import re
import sys
from functools import cache
from pathlib import Path

from tests.derivations.check import CATALOGUE as CHAPTERS

PACKAGE = Path(__file__).parents[1] / "vdm_jax"
# Layers of equations: each imports only earlier ones, and nothing else of the package.
LAYERS = [
    "closures", "compilation", "types", "gaussian", "noise_levels", "schedules", "discrete_schedules", "time_sampling",
    "forward", "parameterization", "likelihoods",
    "divergence", "score_matching", "tweedie", "sure", "langevin", "energy", "autoencoder", "vae", "hvae",
    "elbo", "path_bounds", "losses", "vdm", "weightings", "reverse_variance", "probability_flow", "samplers",
    "guidance", "dequantization", "closed_form", "information", "linear_gaussian", "metrics",
]  # fmt: skip
# Layers of the training package; "" are the files of the package itself.
ROOMS = ["runtime", "data", "", "evaluation", "cli"]
MAY_IMPORT = {"jax", "numpy", "jaxtyping", "diffrax", "vdm_jax"} | set(sys.stdlib_module_names)
CATALOGUE = {f"{chapter}-{i}" for chapter, last in CHAPTERS.items() for i in range(1, last + 1)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
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
        "__main__",
        "networks",
        "training",
        "interop",
        "models",
        *LAYERS,
    }


def test_equations_import_only_jax_numpy_and_earlier_layers():
    for name in LAYERS:
        own = {name} if len(files(name)) > 1 else set()
        for path in files(name):
            assert {module.split(".")[0] for module in imports(path)} <= MAY_IMPORT, path.name
            assert rooms(path) <= {*LAYERS[: LAYERS.index(name)], *own}, path.name


def test_networks_and_training_import_no_equation():
    # sample quality needs metrics and a classifier, importing weights interop, restoring images models; the others not
    also = {
        "sample_quality.py": {"metrics"},
        "features.py": {"networks", "likelihoods"},
        "import_weights.py": {"interop"},
        "interpolate.py": {"models", "likelihoods"},
        "restore.py": {"models", "likelihoods"},
    }
    for folder in ("networks", "training"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert rooms(path) <= {folder, *also.get(path.name, ())}, path.name


def test_interop_imports_networks_and_schedules_only():
    for path in (PACKAGE / "interop").glob("*.py"):
        assert rooms(path) <= {"interop", "networks", "schedules", "discrete_schedules"}, path.name


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Each module of the package -> those it imports, at module level and in functions; not for type checking only."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        source = tree(path)
        checked = [
            node for node in ast.walk(source) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        skipped = {inner for node in checked for part in node.body for inner in ast.walk(part)}
        found = set()
        for node in (node for node in ast.walk(source) if node not in skipped):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {each if each in paths else node.module for each in submodules}
        graph[name] = found & paths.keys()
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that a module imports, directly or not."""
    found, todo = set(), [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_there_is_no_import_cycle():
    graph = import_graph()
    assert len(graph) > 100
    assert "vdm_jax.training.loop" in reachable(graph, "vdm_jax.__main__")  # imports in functions count
    assert [name for name in graph if name in reachable(graph, name)] == []


def test_a_cycle_is_detected():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert [name for name in graph if name in reachable(graph, name)] == ["b", "c"]


def test_training_imports_point_one_way():
    def room(name: str) -> str:
        rest = name.removeprefix("vdm_jax.training").removeprefix(".").split(".")
        return rest[0] if rest[0] in ROOMS else ""

    folders = {path.parent.name for path in (PACKAGE / "training").glob("*/__init__.py")}
    assert folders == set(ROOMS) - {""}
    for name, imported in import_graph().items():
        if name.startswith("vdm_jax.training.") and name != "vdm_jax.training.__main__":
            later = {each for each in imported if each.startswith("vdm_jax.training.")}
            assert {each for each in later if ROOMS.index(room(each)) > ROOMS.index(room(name))} == set(), name


def test_public_names_are_documented_with_entries_that_exist():
    for path in (path for name in LAYERS for path in files(name)):
        for node in public(path):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
        mentioned = set(re.findall(rf"\b(?:{'|'.join(CHAPTERS)})-\d+", path.read_text()))
        assert mentioned <= CATALOGUE, path.name


def test_public_functions_are_in_the_index():
    index = ast.get_docstring(tree(PACKAGE / "__init__.py"))
    assert index is not None
    for name in (layer for layer in LAYERS if layer not in ("closures", "compilation", "types")):
        for node in (node for path in files(name) for node in public(path)):
            if isinstance(node, ast.FunctionDef) and not (len(files(name)) > 1 and node.name not in exported(name)):
                assert re.search(rf"\b{node.name}\b", index), f"{name}.{node.name} is not in vdm_jax's docstring"


def definitions(path: Path) -> set[str]:
    """The names that a file defines at its top level."""
    found = set()
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found - {"__all__"}


def test_all_lists_the_public_names():
    for name in LAYERS:
        exports = importlib.import_module(f"vdm_jax.{name}").__all__
        assert len(exports) == len(set(exports)), name
        defined = exported(name) if len(files(name)) > 1 else definitions(files(name)[0])
        assert set(exports) == {each for each in defined if not each.startswith("_")}, name


def test_nothing_is_called_utils():
    assert not [path for path in PACKAGE.rglob("*.py") if "util" in path.stem]
