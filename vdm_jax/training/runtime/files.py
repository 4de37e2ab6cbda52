"""Files that are whole or not there, and a folder that one run has to itself."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.processes import by_first, is_first

LOCK = "lock"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to, beside the real one, which it becomes once it is written: whole or not at all.

    What processes other than the first write goes nowhere.
    """
    if not is_first():
        yield Path(os.devnull)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")  # always the same: what a killed process left is written over
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with writing(path) as unfinished:
        unfinished.write_text(json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN and no infinity: such numbers are null."""
    return json.dumps(_finite_or_null(value), indent=indent, allow_nan=False)


def _finite_or_null(value: Any) -> Any:
    match value:
        case dict():
            return {name: _finite_or_null(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite_or_null(part) for part in value]
        case float() if not math.isfinite(value):
            return None
    return value


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Have a folder, made if absent, for this job alone; it loses it with its first process, however that ends.

    Raises:
        UserError: another job has it, or what was to be done in it failed because it was removed.
    """
    with contextlib.ExitStack() as held:
        by_first(lambda: held.enter_context(locked(folder)))
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """What `alone_in` does, for one process.

    Raises:
        UserError: as there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"Another run is going in {folder} ({file.read().strip() or 'it does not say which'}). Wait for it, "
                "stop it, or take another --workdir."
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        try:
            yield
        except Exception as error:
            if not is_there(file):
                raise UserError(
                    f"The folder {folder} was removed while a run was going in it; the run has stopped. The same "
                    "command starts anew."
                ) from error
            raise


def is_there(file: IO[str]) -> bool:
    """Whether an open file still has a name."""
    return os.fstat(file.fileno()).st_nlink > 0
