"""The tensors of a diffusers `UNet2DModel`, by name <-> our parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vdm_jax.interop.config_checks import raise_if_any, summarize
from vdm_jax.interop.tensor_layouts import from_torch, to_torch
from vdm_jax.interop.tensor_names import Path, TensorEntry, current_name, flatten, tensor_table
from vdm_jax.networks.unet import UNetConfig

__all__ = ["Params", "check_params", "from_tensors", "to_tensors"]

Params = Any  # nested dictionaries of arrays


def from_tensors(config: UNetConfig, shape: tuple[int, int, int], tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameters, as NumPy arrays, from diffusers' tensors.

    Args:
        config: of the network, as `from_unet_config` returns it.
        shape: of an image, (H, W, C).
        tensors: float32 arrays by name; attention layers may have the legacy names query, key, value and proj_attn.

    Raises:
        ValueError: tensors are missing, extra, of another shape or type, or not finite; lists them.
    """
    table, named = tensor_table(config, shape), {current_name(name): value for name, value in tensors.items()}
    wanted = {entry.name: entry.shape for entry in table.values()}
    shared = {name: named[name] for name in wanted if name in named}
    twice = [name for name in tensors if current_name(name) != name and current_name(name) in tensors]
    wrong = [f"{name} {x.shape}, not {wanted[name]}" for name, x in shared.items() if x.shape != wanted[name]]
    not_float32 = [f"{name} {x.dtype}" for name, x in shared.items() if x.dtype != np.float32]
    faults = [
        *summarize("missing", [name for name in wanted if name not in named]),
        *summarize("not of this network", [name for name in named if name not in wanted]),
        *summarize("present under a legacy and a current name", twice),
        *summarize("of another shape", wrong),
        *summarize("not float32 (convert by model.float())", not_float32),
        *summarize("with non-finite values", [name for name, x in shared.items() if not np.isfinite(x).all()]),
    ]
    raise_if_any(faults, "The tensors do not match config.json", "Use the config.json and the weights of one model.")
    return _nested({path: from_torch(entry.name, named[entry.name]) for path, entry in table.items()})


def to_tensors(config: UNetConfig, shape: tuple[int, int, int], params: Params) -> dict[str, np.ndarray]:
    """Diffusers' tensors, by name, from our parameters.

    Args:
        config: of the network.
        shape: of an image, (H, W, C).
        params: of `UNet(config)`, float32.

    Raises:
        ValueError: the parameters are of another network; lists the differences.
    """
    table = tensor_table(config, shape)
    check_params(params, table)
    arrays = {path: np.asarray(array) for path, array in flatten(params).items()}
    return {entry.name: to_torch(entry.name, arrays[path]) for path, entry in table.items()}


def check_params(params: Params, table: Mapping[Path, TensorEntry]) -> None:
    """Refuse parameters of another network.

    Raises:
        ValueError: lists what is missing, extra, or of another shape or type.
    """
    arrays = {"/".join(path): np.asarray(array) for path, array in flatten(params).items()}
    wanted = {"/".join(path): entry.flax_shape for path, entry in table.items()}
    shared = {name: arrays[name] for name in wanted if name in arrays}
    wrong = [f"{name} {x.shape}, not {wanted[name]}" for name, x in shared.items() if x.shape != wanted[name]]
    faults = [
        *summarize("missing", [name for name in wanted if name not in arrays]),
        *summarize("not of this network", [name for name in arrays if name not in wanted]),
        *summarize("of another shape", wrong),
        *summarize("not float32", [f"{name} {x.dtype}" for name, x in shared.items() if x.dtype != np.float32]),
    ]
    raise_if_any(faults, "The parameters do not match the network's config", "Use the config they were trained with.")


def _nested(arrays: Mapping[Path, np.ndarray]) -> Params:
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        inner = params
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = array
    return params
