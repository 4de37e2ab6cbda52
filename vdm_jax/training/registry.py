"""The experiments there are: modules of the folder `experiments` where the command is run."""

import dataclasses
import difflib
import importlib
import re
import sys
import traceback
from pathlib import Path

from vdm_jax.training.config import TrainConfig, changed_options
from vdm_jax.training.runtime.errors import UserError

FOLDER = "experiments"
KEYWORD = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def names() -> list[str]:
    """All experiments, sorted."""
    return sorted(path.stem for path in Path(FOLDER).glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> TrainConfig:
    """The CONFIG of an experiment.

    Raises:
        UserError: there is none of this name (lists those there are and the nearest), or its file cannot be imported.
    """
    known = names()
    if not known:
        raise UserError(f"There is no folder {FOLDER!r} with experiments here; run from the root of the repository.")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"There is no experiment {name!r}.{hint}\nThere are: {', '.join(known)}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(f"{FOLDER}.{name}")
    except Exception as error:  # a recipe is a program: anything
        raise UserError(f"{FOLDER}/{name}.py cannot be imported: {explained(error)}") from error
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{FOLDER}/{name}.py has no CONFIG that is a vdm_jax.training.config.TrainConfig.")
    return config


def suspects(name: str, config: TrainConfig) -> str:
    """A line with the options that are not the recipe's own, and may be to blame; nothing where there are none."""
    own = find(name) if name in names() else None
    changes = changed_options(own, config) if own is not None and isinstance(config, type(own)) else []
    return f"\nOptions that are not the recipe's own: {' '.join(changes)}" if changes else ""


def explained(error: Exception) -> str:
    """An error of a recipe in a line or two: what a ValueError says, and of any other where in the recipes it arose."""
    if isinstance(error, ValueError):
        return str(error)
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    own = [f"{FOLDER}/{Path(file).name}, line {line}, " for file, line in frames if Path(file).parent.name == FOLDER]
    place = own[-1] if own else ""
    if match := KEYWORD.match(text):
        return f"{place}{match[1]} has no option {match[2]!r}.{_nearest(match[1], match[2], error)}"
    return f"{place}{type(error).__name__}: {text}\nVDM_JAX_TRACEBACK=1 in the environment shows where it comes from."


def _nearest(owner: str, keyword: str, error: Exception) -> str:
    """A hint at the option of a dataclass of this name that is most like a misspelt one."""
    scopes = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]  # of the recipe's own, too
    kinds = [scope.get(owner) for scope in [*scopes, *map(vars, list(sys.modules.values()))]]
    options = {field.name for kind in kinds if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)}
    near = difflib.get_close_matches(keyword, sorted(options), n=1)
    return f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(sorted(options))}."
