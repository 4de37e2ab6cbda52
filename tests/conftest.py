"""Strict settings for every test: 8 virtual CPU devices, no silent promotion, annotations checked at run time."""

import gc
import os
import platform
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
# Compiling takes most of the time of most tests, so programs are kept for the other processes of a run and for the next
# run. A program may not run on another machine. `pytest --cache-clear` deletes them.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parent.parent / ".pytest_cache" / "d" / f"jax-{platform.node()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

jaxtyping.install_import_hook("vdm_jax", "beartype.beartype")  # before vdm_jax is imported


@pytest.fixture
def without_checks_of_annotations(monkeypatch):
    """No type checker at run time, as for a user, so that traces take half the time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def without_old_garbage():
    """What earlier tests left is not searched for garbage, as it is after an unreadable checkpoint."""
    gc.freeze()
    yield
    gc.unfreeze()
