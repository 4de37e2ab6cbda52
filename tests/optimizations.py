"""Programs compiled with or without the optimizations of XLA, whatever the setting of the other tests."""

import contextlib

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
