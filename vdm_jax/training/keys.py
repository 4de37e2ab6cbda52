"""One seed, four streams of random keys that never meet."""

from typing import Literal

import jax
from jax import Array

PURPOSES = ("init", "train", "sample", "evaluate")


def stream(seed: int, purpose: Literal["init", "train", "sample", "evaluate"]) -> Array:
    """The key that everything random of one purpose descends from.

    Split first and folded after: fold_in(key, i) may equal split(key)[i], so one key must not serve two purposes.
    """
    return jax.random.split(jax.random.key(seed), len(PURPOSES))[PURPOSES.index(purpose)]
