"""Strict settings for every test: 8 virtual CPU devices, no silent promotion, annotations checked at run time."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

install_import_hook("vdm_jax", "beartype.beartype")  # before vdm_jax is imported
