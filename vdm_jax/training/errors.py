"""Errors that are the user's to mend: one clear message, no traceback."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can put right; its message says what happened and what to do."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is the file system having no room left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # tensorstore reports it as text
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the user's errors into one message on stderr and an exit code: 1, or 128 + signal after a stop.

    With VDM_JAX_TRACEBACK=1 in the environment every error shows its traceback instead.
    """
    if os.environ.get("VDM_JAX_TRACEBACK") == "1":
        yield
        return
    try:
        yield
    except UserError as error:
        _exit(str(error), 1)
    except Stopped as stop:
        _exit(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _exit("Interrupted. What was saved is kept; the same command goes on from there.", 128 + signal.SIGINT)
    except Exception as error:
        if not disk_is_full(error):
            raise
        _exit(
            "The disk is full: nothing more can be saved. Free some space or choose another --workdir; then the same "
            "command goes on from the last checkpoint.",
            1,
        )


def _exit(message: str, code: int) -> None:
    print(f"\n{message}", file=sys.stderr)
    sys.exit(code)
