"""Bitwise comparison."""

import jax
import numpy as np


def assert_same_bits(one, other):
    """Two pytrees have the same structure, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
