"""Recipes by name or by path: Python files with a CONFIG.

The recipes of the project are in the folder `experiments`: inside the installed package, or beside it in a checkout.
They are imported as the package `vdm_jax.experiments`, wherever the command runs.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from vdm_jax.training.config import TrainConfig, changed_options
from vdm_jax.training.runtime.errors import UserError

PACKAGE = "vdm_jax.experiments"
ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "experiments", ROOT.parent / "experiments")  # of an installed wheel, of a checkout
NAME = re.compile(r"\w[\w.-]{0,99}")
UNEXPECTED_KEYWORD = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def recipe_folder() -> Path:
    """The folder with the recipes of the project.

    Raises:
        UserError: the folder is missing.
    """
    for folder in FOLDERS:
        if (folder / "__init__.py").is_file():
            return folder
    raise UserError(f"The recipes are missing: {FOLDERS[0]} does not exist. Reinstall vdm_jax.")


def recipe_names() -> list[str]:
    """The names of the project's recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.py") if not path.stem.startswith("_"))


def is_path(recipe: str) -> bool:
    """Whether a recipe is given by the path of its file and not by its name."""
    return recipe.endswith(".py") or "/" in recipe or os.sep in recipe


def run_name(recipe: str) -> str:
    """The name of the run folder of a recipe: its name, or the file name without `.py`."""
    return Path(recipe).stem if is_path(recipe) else recipe


def from_any_folder(recipe: str) -> str:
    """A recipe as a command in any folder finds it: the name of one of the project's, or an absolute path."""
    if not is_path(recipe):
        return recipe
    path = Path(recipe).resolve()
    return path.stem if path.parent == recipe_folder().resolve() else str(path)


def find(recipe: str) -> TrainConfig:
    """The CONFIG of a recipe.

    Args:
        recipe: the name of one of the project's recipes, or the path of a Python file.

    Raises:
        UserError: the recipe does not exist (lists the known names and the closest), cannot be imported, or has no
            CONFIG.
    """
    if is_path(recipe):
        path = _checked_path(recipe)
        if path.parent == recipe_folder().resolve():
            return find(path.stem)
        load = _import_file
    else:
        path, load = Path(recipe), _import_recipe
        if recipe not in (known := recipe_names()):
            near = difflib.get_close_matches(recipe[:100], known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"Unknown recipe {recipe[:100]!r}.{hint}\nRecipes: {', '.join(known)}, or the path of a recipe file, "
                "such as ./mine.py."
            )
    try:
        module = load(path)
    except Exception as error:  # importing a recipe may raise any error
        raise UserError(f"{_shown(recipe)} cannot be imported: {describe_error(error, recipe)}") from error
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{_shown(recipe)} must define CONFIG, an instance of a subclass of vdm_jax.training.config.TrainConfig."
        )
    return config


def _checked_path(recipe: str) -> Path:
    """The resolved path of a recipe file.

    Raises:
        UserError: it is not a Python file, or its name cannot name a run folder.
    """
    shown = recipe[:200]
    if not os.path.isfile(recipe):
        names = ", ".join(recipe_names())
        raise UserError(f"There is no recipe file {shown!r}. Give the path of a Python file, or one of {names}.")
    if not recipe.endswith(".py") or not NAME.fullmatch(Path(recipe).stem):
        raise UserError(f"The recipe file {shown!r} must be named NAME.py: its run goes to the folder WORKDIR/NAME.")
    return Path(recipe).resolve()


def _import_recipe(name: Path) -> ModuleType:
    _import_package()
    return importlib.import_module(f"{PACKAGE}.{name}")


def _import_package() -> None:
    """Make `vdm_jax.experiments` importable, also in a checkout, where the folder is beside the package."""
    if PACKAGE not in sys.modules:
        folder = recipe_folder()
        places = [str(folder)]
        _execute(
            importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py", submodule_search_locations=places)
        )


def _import_file(path: Path) -> ModuleType:
    """Import a user's own recipe, which may import `vdm_jax.experiments` and modules in its own folder."""
    name = f"vdm_jax_recipe_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
    if name not in sys.modules:
        _import_package()
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # last: its modules shadow no installed ones
        _execute(importlib.util.spec_from_file_location(name, path))
    return sys.modules[name]


def _execute(spec: ModuleSpec | None) -> None:
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise


def changed_options_hint(recipe: str, config: TrainConfig) -> str:
    """A line with the options that differ from the recipe's, to be appended to a message; "" if there are none."""
    own = find(recipe) if is_path(recipe) or recipe in recipe_names() else None
    changes = changed_options(own, config) if own is not None and isinstance(config, type(own)) else []
    return f"\nOptions that differ from the recipe: {' '.join(changes)}" if changes else ""


def describe_error(error: Exception, recipe: str = "") -> str:
    """An error raised by a recipe, in one or two lines: a ValueError's message, else type, message and line."""
    if isinstance(error, ValueError):
        return str(error)
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    places = [f"{_shown(file)}, line {line}, " for file, line in frames if _is_recipe_file(file, recipe)]
    place = places[-1] if places else ""
    if match := UNEXPECTED_KEYWORD.match(text):
        return f"{place}{match[1]} has no option {match[2]!r}.{_closest_option(match[1], match[2], error)}"
    return f"{place}{type(error).__name__}: {text}\nSet VDM_JAX_TRACEBACK=1 in the environment to see the traceback."


def _is_recipe_file(file: str, recipe: str) -> bool:
    path = Path(file).resolve()
    return path.parent == recipe_folder().resolve() or (is_path(recipe) and path == Path(recipe).resolve())


def _shown(recipe: str) -> str:
    """A recipe, or its file, as messages name it."""
    if not is_path(recipe):
        return f"experiments/{recipe}.py"
    path = Path(recipe)
    return f"experiments/{path.name}" if path.resolve().parent == recipe_folder().resolve() else str(path)


def _closest_option(owner: str, keyword: str, error: Exception) -> str:
    """A hint at the option of the dataclass `owner` that is closest to a misspelled one."""
    scopes = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]  # with those of the recipe
    kinds = [scope.get(owner) for scope in [*scopes, *map(vars, list(sys.modules.values()))]]
    options = {field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)}
    near = difflib.get_close_matches(keyword, sorted(options), n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Its options: {', '.join(sorted(options))}."
