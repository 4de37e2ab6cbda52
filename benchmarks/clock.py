"""Times of several functions that take turns, so that whatever else the machine does falls on all of them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_turns(
    functions: dict[str, Callable[[], object]], rounds: int = 15, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds of each round, by name, after a first call that compiles; each round has its own order.

    With time.process_time they are seconds of work, of all threads together: other programs then disturb less.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for turn in range(rounds):
        for name in np.random.RandomState(turn).permutation(list(functions)):
            begin = clock()
            jax.block_until_ready(functions[name]())
            seconds[name].append(clock() - begin)
    return {name: np.asarray(taken) for name, taken in seconds.items()}


def ratio(taken: np.ndarray, unit: np.ndarray | float, digits: int = 2) -> str:
    """The median of taken / unit over the rounds, and its quartiles."""
    low, middle, high = np.quantile(taken / unit, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def milliseconds(taken: np.ndarray, calls: int = 1) -> str:
    """The median of a call, in a round of so many."""
    return f"{1e3 * np.median(taken) / calls:.3g} ms"


def repeat(step: Callable[..., tuple[Any, Any]], state: Any, *inputs: Any, times: int = 1) -> Callable[[], Any]:
    """A function without arguments that takes `times` steps of (state, *inputs) -> (state, out), from where it was."""

    def go():
        nonlocal state
        out = None
        for _ in range(times):
            state, out = step(state, *inputs)
        return state, out

    return go
