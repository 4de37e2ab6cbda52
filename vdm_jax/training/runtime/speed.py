"""How fast and how long a run trains, leaving out what is not training."""

import contextlib
import time
from collections.abc import Iterator


class Speed:
    """A clock for training steps.

    Args:
        step: the step the run goes on from.
        seconds: of training before that.
    """

    def __init__(self, step: int, seconds: float):
        self._begin = time.perf_counter() - seconds
        self._first = self._last = (step, time.perf_counter())

    @property
    def seconds(self) -> float:
        """Training time of the whole run, with compilation, without pauses."""
        return time.perf_counter() - self._begin

    def compiled(self, step: int) -> None:
        """The first step, which compiles, is over: from here on speed is counted."""
        self._first = self._last = (step, time.perf_counter())

    def lap(self, step: int) -> float | None:
        """Steps per second since the last lap, all steps being over on the devices; None right after `compiled`."""
        (before, then), now = self._last, time.perf_counter()
        self._last = (step, now)
        return (step - before) / (now - then) if step > before else None

    @property
    def overall(self) -> float | None:
        """Steps per second from `compiled` to the last lap."""
        (first, begin), (last, end) = self._first, self._last
        return (last - first) / (end - begin) if last > first else None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not training time."""
        begin = time.perf_counter()
        yield
        length = time.perf_counter() - begin
        self._begin += length
        self._first = (self._first[0], self._first[1] + length)
        self._last = (self._last[0], self._last[1] + length)
