"""Independent streams of random keys from one seed."""

from typing import Literal

import jax
from jax import Array

PURPOSES = ("init", "train", "sample", "evaluate")


def stream(seed: int, purpose: Literal["init", "train", "sample", "evaluate"]) -> Array:
    """The root key of all randomness for one purpose.

    Each purpose has its own key, split before any folding: fold_in(key, i) may equal split(key)[i].
    """
    return jax.random.split(jax.random.key(seed), len(PURPOSES))[PURPOSES.index(purpose)]
