"""Errors that the user can fix are shown as one message without a traceback."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

EVENT_LOOP_CLOSED = "Event loop is closed"  # raised by every pending write after the first one failed


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do."""


class Stopped(Exception):
    """A signal stopped the run after its state was saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error or one of its causes reports a full file system."""
    return _message_with_errno(error, (errno.ENOSPC, errno.EDQUOT)) is not None


def not_writable(error: BaseException | None) -> str | None:
    """The message of an error or one of its causes about missing write permission; None if there is no such error."""
    return _message_with_errno(error, (errno.EROFS, errno.EACCES, errno.EPERM))


def _message_with_errno(error: BaseException | None, codes: tuple[int, ...]) -> str | None:
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in codes:
            return text
        if any(os.strerror(code) in text for code in codes):  # tensorstore reports them as text
            return text
        error = error.__cause__ or error.__context__
    return None


class _TolerantStream:
    """A stream that discards its output once writing fails, as on a closed terminal or pipe or a full disk."""

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
        except OSError:  # also discards what is still in the buffer
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """Keep running when stdout or stderr can no longer be written to: output is discarded, training is not lost."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for characters that the encoding lacks
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = (_TolerantStream(stream or null) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def suppress_repeats() -> Iterator[None]:
    """Silence background threads and exit handlers that would repeat an error that is already reported."""
    before = sys.unraisablehook, threading.excepthook, (show_last := sys.excepthook)

    def known(error: BaseException) -> bool:
        return bool(remedy(error)) or EVENT_LOOP_CLOSED in str(error)

    def quiet(show: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda seen: None if known(seen.exc_value) else show(seen)

    sys.unraisablehook, threading.excepthook = map(quiet, before[:2])
    # called for errors in the threads of tensorstore
    sys.excepthook = lambda kind, error, trace: None if known(error) else show_last(kind, error, trace)
    try:
        yield
    except SystemExit as end:
        # Writes to a full disk or to a removed folder fail again at exit: keep them silent.
        if remedy(end) or _message_with_errno(end, (errno.ENOENT,)):
            before = sys.unraisablehook, threading.excepthook, sys.excepthook
        raise
    finally:
        sys.unraisablehook, threading.excepthook, sys.excepthook = before


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn user errors into one message on stderr and an exit code: 1, or 128 + signal after a stop.

    With VDM_JAX_TRACEBACK=1 in the environment, every error shows its traceback instead.
    """
    if os.environ.get("VDM_JAX_TRACEBACK") == "1":
        yield
        return
    with tolerate_closed_output(), suppress_repeats():
        try:
            yield
        except UserError as error:
            _exit(str(error), 1)
        except Stopped as stop:
            _exit(str(stop), 128 + stop.signum)
        except KeyboardInterrupt:
            _exit(
                "Interrupted. Saved checkpoints are kept; the same command resumes from the newest one.",
                128 + signal.SIGINT,
            )
        except Exception as error:
            if not (message := remedy(error)):
                raise
            _exit(message, 1)


def remedy(error: BaseException) -> str | None:
    """The message for an error of the file system or for insufficient memory; None for other errors."""
    then = "The same command then resumes from the newest checkpoint"
    if disk_is_full(error):
        return f"The disk is full. Free some space or use another --workdir. {then}."
    if what := not_writable(error):
        return f"The file system is not writable ({what}). Make it writable, or use another --workdir. {then}."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "Out of memory. Use a smaller --eval-batch-size, --num-samples or --batch-size (with --changed to resume a "
            "run). --accumulate, --shard and --network.remat also reduce memory. Saved checkpoints are kept."
        )
    return None


def _exit(message: str, code: int) -> None:
    print(f"\n{message}", file=sys.stderr)
    sys.exit(code)
