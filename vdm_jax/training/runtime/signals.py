"""SIGINT, SIGTERM and SIGHUP as requests that the training loop handles between two steps."""

import contextlib
import signal
import time
from collections.abc import Iterator

DUPLICATE = 1.0  # seconds; `make` forwards a signal that its process group has received already


class StopRequest:
    """The signal that requested a stop, or 0, and the time of its arrival."""

    signum: int = 0
    when: float = 0.0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the first SIGINT, SIGTERM or SIGHUP; a second, later one has its default effect.

    Signals that are ignored, as under `nohup`, stay ignored.
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
        elif now - request.when > DUPLICATE:
            restore()
            signal.raise_signal(signum)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
