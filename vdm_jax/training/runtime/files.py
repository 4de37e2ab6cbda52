"""Atomic writes, and locks that give a run exclusive use of its folder."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.processes import is_first_process, on_first_process

LOCK = "lock"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` once the block ends without an error.

    Processes other than the first write to os.devnull.
    """
    if not is_first_process():
        yield Path(os.devnull)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")  # a fixed name: overwrites what a killed process left
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON text; NaN and infinity, which JSON lacks, become null."""
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
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this job, creating it if necessary; the lock ends with the first process, however it exits.

    Raises:
        UserError: another job holds the lock, or the folder was removed meanwhile.
    """
    with contextlib.ExitStack() as held:
        on_first_process(lambda: held.enter_context(process_lock(folder)))
        yield


@contextlib.contextmanager
def process_lock(folder: Path) -> Iterator[None]:
    """`run_lock` for a single process.

    Raises:
        UserError: as in `run_lock`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"Another run is using {folder} ({file.read().strip() or 'unknown process'}). Wait for it, stop it, or "
                "use another --workdir."
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        try:
            yield
        except Exception as error:
            if not still_exists(file):
                raise UserError(
                    f"The folder {folder} was removed during the run, which has stopped. The same command starts a new "
                    "run."
                ) from error
            raise


def still_exists(file: IO[str]) -> bool:
    """Whether an open file has not been deleted."""
    return os.fstat(file.fileno()).st_nlink > 0
