"""The experiments there are: modules of the folder `experiments` where the command is run."""

import difflib
import importlib
import sys
from pathlib import Path

from vdm_jax.training.config import TrainConfig
from vdm_jax.training.errors import UserError

FOLDER = "experiments"


def names() -> list[str]:
    """All experiments, sorted."""
    return sorted(path.stem for path in Path(FOLDER).glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> TrainConfig:
    """The CONFIG of an experiment.

    Raises:
        UserError: there is none of this name; lists those there are and the nearest.
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
    config = getattr(importlib.import_module(f"{FOLDER}.{name}"), "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise UserError(f"{FOLDER}/{name}.py has no CONFIG that is a vdm_jax.training.config.TrainConfig.")
    return config
