"""Signals as in a terminal, whatever the tests were started by."""

import contextlib
import signal


@contextlib.contextmanager
def heard():
    """SIGINT, SIGTERM and SIGHUP act as they do in a terminal, here and in processes that are started inside.

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
