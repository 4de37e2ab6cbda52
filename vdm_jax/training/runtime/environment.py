"""Environment variables, logging and the compilation cache of the commands.

Importing this module sets environment variables, so the commands import it before JAX initializes its devices.
"""

import hashlib
import logging
import os
import platform
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):  # a resumed run must be bit-identical
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true").strip()


def prepare() -> None:
    """Silence the logging of other libraries and enable JAX's persistent compilation cache.

    The cache is in JAX_COMPILATION_CACHE_DIR, or in the user's cache folder.
    """
    import jax
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.set_stderrthreshold(absl_logging.FATAL)
    for name in ("absl", "asyncio", "jax", "orbax", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _cache_folder() -> Path:
    # Compiled CPU code depends on the processor's features, and machines may share a home folder.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vdm_jax" / kind
