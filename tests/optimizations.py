"""Programs compiled with or without the optimizations of XLA, whatever the setting of the other tests."""

import contextlib
from collections.abc import Callable

import jax


@contextlib.contextmanager
def optimizations(wanted: bool):
    """Compile with all optimizations of XLA, or with few; programs compiled before are compiled again."""
    before = jax.config.read("jax_disable_most_optimizations")
    if before == (not wanted):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", not wanted)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()


def unoptimized(function: Callable, **options) -> Callable:
    """`jax.jit` without optimizations, for a program that takes longer to optimize than it saves."""
    return jax.jit(function, **options, compiler_options={"xla_backend_optimization_level": 0})
