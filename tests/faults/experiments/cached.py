"""The test experiment with every compiled program in the cache, however short its compilation."""

import jax

from tests.training.experiments.tiny import CONFIG

__all__ = ["CONFIG"]
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
