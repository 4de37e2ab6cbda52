"""Default signal handling, however the tests were started."""

import contextlib
import signal


@contextlib.contextmanager
def default_signals():
    """SIGINT, SIGTERM and SIGHUP have their default effects, here and in child processes.

    `nohup` ignores SIGHUP, a shell may ignore SIGINT for a job in the background, and children inherit that.
    """
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
