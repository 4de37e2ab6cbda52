"""The weights: diffusers' tensors of a `UNet2DModel` by name <-> our parameters, layer by layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vdm_jax.interop.faults import listed, refuse
from vdm_jax.interop.layouts import from_torch, to_torch
from vdm_jax.interop.names import Path, Place, flat, places, renamed
from vdm_jax.networks.unet import UNetConfig

Params = Any  # nested dictionaries of arrays


def from_tensors(config: UNetConfig, shape: tuple[int, int, int], tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameters, NumPy arrays, of diffusers' tensors.

    Args:
        config, shape: of the network and of an image (H, W, C), as `from_unet_config` has them.
        tensors: float32 arrays by name; attention's may be the older query, key, value and proj_attn.

    Raises:
        ValueError: tensors that are missing, extra, of another shape or type, or not finite; lists them.
    """
    where, named = places(config, shape), {renamed(name): value for name, value in tensors.items()}
    wanted = {place.name: place.shape for place in where.values()}
    shared = {name: named[name] for name in wanted if name in named}
    twice = [name for name in tensors if renamed(name) != name and renamed(name) in tensors]
    wrong = [f"{name} {x.shape}, not {wanted[name]}" for name, x in shared.items() if x.shape != wanted[name]]
    faults = [
        *listed("missing", [name for name in wanted if name not in named]),
        *listed("not of this network", [name for name in named if name not in wanted]),
        *listed("there by an old and a new name", twice),
        *listed("of another shape", wrong),
        *listed(
            "not float32, as model.float() is", [f"{n} {x.dtype}" for n, x in shared.items() if x.dtype != np.float32]
        ),
        *listed("with numbers that are not finite", [name for name, x in shared.items() if not np.isfinite(x).all()]),
    ]
    refuse("The tensors do not fit config.json", faults, "Take the config.json that belongs to them, and whole files.")
    return _nested({path: from_torch(place.name, named[place.name]) for path, place in where.items()})


def to_tensors(config: UNetConfig, shape: tuple[int, int, int], params: Params) -> dict[str, np.ndarray]:
    """Diffusers' tensors of our parameters, by name.

    Args:
        config, shape: of the network and of an image (H, W, C).
        params: of `UNet(config)`, float32.

    Raises:
        ValueError: parameters of another network; lists them.
    """
    where = places(config, shape)
    refuse_params(params, where)
    arrays = {path: np.asarray(array) for path, array in flat(params).items()}
    return {place.name: to_torch(place.name, arrays[path]) for path, place in where.items()}


def refuse_params(params: Params, where: Mapping[Path, Place]) -> None:
    """Raise ValueError where parameters are not those of a network; lists what is missing, extra or wrong."""
    arrays = {"/".join(path): np.asarray(array) for path, array in flat(params).items()}
    wanted = {"/".join(path): place.ours for path, place in where.items()}
    shared = {name: arrays[name] for name in wanted if name in arrays}
    wrong = [f"{name} {x.shape}, not {wanted[name]}" for name, x in shared.items() if x.shape != wanted[name]]
    faults = [
        *listed("missing", [name for name in wanted if name not in arrays]),
        *listed("not of this network", [name for name in arrays if name not in wanted]),
        *listed("of another shape", wrong),
        *listed("not float32", [f"{name} {x.dtype}" for name, x in shared.items() if x.dtype != np.float32]),
    ]
    refuse("The parameters do not fit the network's config", faults, "Take the config that they were trained with.")


def _nested(arrays: Mapping[Path, np.ndarray]) -> Params:
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        inner = params
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = array
    return params
