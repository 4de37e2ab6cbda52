"""Times of several functions that take turns, so that whatever else the machine does falls on all of them."""

import time
from collections.abc import Callable

import jax
import numpy as np


def in_turns(functions: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, np.ndarray]:
    """Seconds of each round, by name, after a first call that compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.asarray(taken) for name, taken in seconds.items()}


def ratio(taken: np.ndarray, unit: np.ndarray) -> str:
    """The median of taken / unit over the rounds, and its quartiles."""
    low, middle, high = np.quantile(taken / unit, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
