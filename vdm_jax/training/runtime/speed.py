"""Training time and speed of a run, without pauses for saving and sampling."""

import contextlib
import time
from collections.abc import Iterator


class Speed:
    """A timer of training steps.

    Args:
        step: the step from which the run starts or resumes.
        seconds: training time before that step.
    """

    def __init__(self, step: int, seconds: float):
        self._begin = time.perf_counter() - seconds
        self._first = self._last = (step, time.perf_counter())

    @property
    def seconds(self) -> float:
        """Training time of the whole run in seconds, with compilation, without pauses."""
        return time.perf_counter() - self._begin

    def compiled(self, step: int) -> None:
        """Start measuring the speed, after the first step, which compiles."""
        self._first = self._last = (step, time.perf_counter())

    def lap(self, step: int) -> float | None:
        """Steps per second since the last call; None right after `compiled`. The devices must have finished."""
        (before, then), now = self._last, time.perf_counter()
        self._last = (step, now)
        return (step - before) / (now - then) if step > before else None

    @property
    def overall(self) -> float | None:
        """Steps per second from `compiled` to the last `lap`; None without a lap."""
        (first, begin), (last, end) = self._first, self._last
        return (last - first) / (end - begin) if last > first else None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent in the block."""
        begin = time.perf_counter()
        yield
        length = time.perf_counter() - begin
        self._begin += length
        self._first = (self._first[0], self._first[1] + length)
        self._last = (self._last[0], self._last[1] + length)
