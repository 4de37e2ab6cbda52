"""SIGINT, SIGTERM and SIGHUP as a wish that the loop grants between two steps."""

import contextlib
import signal
import time
from collections.abc import Iterator

ECHO = 1.0  # seconds in which a signal is the same one again: `make` passes on what its whole process group got


class StopRequest:
    """The signal that asked the run to stop, or 0, and when it came."""

    signum: int = 0
    when: float = 0.0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first SIGINT, SIGTERM or SIGHUP instead of dying of it; one more, later, acts as it always does.

    One that is ignored, as under `nohup`, stays so.
    """
    request = StopRequest()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {signum: handler for signum, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def note(signum, _frame) -> None:
        now = time.monotonic()
        if not request.signum:
            request.signum, request.when = signum, now
        elif now - request.when > ECHO:
            restore()
            signal.raise_signal(signum)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
