"""Errors that are the user's to mend: one clear message, no traceback."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

CLOSED = "Event loop is closed"  # said of each of many writes, once the first has failed


class UserError(Exception):
    """Something the user can put right; its message says what happened and what to do."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is the file system having no room left."""
    return _because(error, (errno.ENOSPC, errno.EDQUOT)) is not None


def not_writable(error: BaseException | None) -> str | None:
    """What an error, or one that caused it, says of a read-only or forbidden file or folder; None if nothing."""
    return _because(error, (errno.EROFS, errno.EACCES, errno.EPERM))


def _because(error: BaseException | None, codes: tuple[int, ...]) -> str | None:
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in codes:
            return text
        if any(os.strerror(code) in text for code in codes):  # tensorstore reports them as text
            return text
        error = error.__cause__ or error.__context__
    return None


class _Lasting:
    """A stream that may go away, its terminal or pipe closed, its disk full: what is said then is lost, and no more."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError:  # what is still in its buffer has to go somewhere, too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Go on where nobody can be told anything any more: hours of training are worth more than a line about them."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what its encoding lacks
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (_Lasting(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Keep threads in the background, and what is cleared away at the end, from saying again what one message says."""
    before = sys.unraisablehook, threading.excepthook, (show_last := sys.excepthook)

    def known(error: BaseException) -> bool:
        return bool(remedy(error)) or CLOSED in str(error)

    def quiet(show: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda seen: None if known(seen.exc_value) else show(seen)

    sys.unraisablehook, threading.excepthook = map(quiet, before[:2])
    # tensorstore's threads come here
    sys.excepthook = lambda kind, error, trace: None if known(error) else show_last(kind, error, trace)
    try:
        yield
    except SystemExit as end:
        # Of the error it came from there is more to clear away at exit: writes to a full disk, or to a removed folder.
        if remedy(end) or _because(end, (errno.ENOENT,)):
            before = sys.unraisablehook, threading.excepthook, sys.excepthook
        raise
    finally:
        sys.unraisablehook, threading.excepthook, sys.excepthook = before


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the user's errors into one message on stderr and an exit code: 1, or 128 + signal after a stop.

    With VDM_JAX_TRACEBACK=1 in the environment every error shows its traceback instead.
    """
    if os.environ.get("VDM_JAX_TRACEBACK") == "1":
        yield
        return
    with lasting_output(), said_once():
        try:
            yield
        except UserError as error:
            _exit(str(error), 1)
        except Stopped as stop:
            _exit(str(stop), 128 + stop.signum)
        except KeyboardInterrupt:
            _exit("Interrupted. What was saved is kept; the same command goes on from there.", 128 + signal.SIGINT)
        except Exception as error:
            if not (message := remedy(error)):
                raise
            _exit(message, 1)


def remedy(error: BaseException) -> str | None:
    """What to do about an error of the file system, or about too little memory; None where it is of another kind."""
    then = "then the same command goes on from the last checkpoint"
    if disk_is_full(error):
        return f"The disk is full: nothing more can be saved. Free some space or choose another --workdir; {then}."
    if what := not_writable(error):
        return f"The file system does not allow it ({what}). Make it writable, or choose another --workdir; {then}."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "There is too little memory. Take a smaller --eval-batch-size or --num-samples, or a smaller --batch-size "
            "(by --changed, where a run goes on); --accumulate, --shard and --network.remat need less, too. What was "
            "saved is kept."
        )
    return None


def _exit(message: str, code: int) -> None:
    print(f"\n{message}", file=sys.stderr)
    sys.exit(code)
