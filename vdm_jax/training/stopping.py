"""SIGINT and SIGTERM as a wish that the loop grants between two steps."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """The signal that asked the run to stop, or 0."""

    signum: int = 0


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one acts as it always does."""
    request = StopRequest()

    def note(signum, _frame) -> None:
        request.signum = signum
        restore()

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
