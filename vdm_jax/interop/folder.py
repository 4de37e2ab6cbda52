"""Diffusers' folders: read whole, written whole."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from vdm_jax.interop.architecture import from_unet_config, to_unet_config
from vdm_jax.interop.faults import printable
from vdm_jax.interop.files import read, read_json
from vdm_jax.interop.schedulers import Scheduler, from_scheduler_config, to_scheduler_config
from vdm_jax.interop.tensors import Params, from_tensors, to_tensors
from vdm_jax.networks.unet import UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIGEST = ".sha256"  # beside the weights, in the form of the command sha256sum; diffusers passes it over


class Pretrained(NamedTuple):
    """A network with its weights.

    network: its config.
    shape: of an image, (H, W, C), values on [-1, 1].
    params: for `UNet(network).apply({"params": params}, x_t, timestep)`, timestep 0..T-1.
    scheduler: its noise, or None where there is none to read.
    """

    network: UNetConfig
    shape: tuple[int, int, int]
    params: Params
    scheduler: Scheduler | None = None


def load(path: str | Path, config: str | Path | None = None) -> Pretrained:
    """Read a diffusers folder, or a bare safetensors file.

    Args:
        path: the folder of a `UNet2DModel`, or of a pipeline with unet/ and scheduler/ in it, or a .safetensors file.
        config: the network's config.json, where it is not beside the weights.

    Raises:
        ValueError: a pickle; files that are missing, damaged, or of a network or scheduler that ours cannot be.
    """
    weights = _weights(Path(path))
    beside = Path(config) if config else weights.parent / CONFIG
    network, shape = from_unet_config(read_json(beside))
    params = from_tensors(network, shape, _tensors(weights))
    place = next((found for found in _scheduler_places(weights) if os.path.exists(found)), None)
    return Pretrained(network, shape, params, from_scheduler_config(read_json(place)) if place else None)


def save(path: str | Path, pretrained: Pretrained) -> None:
    """Write a folder that diffusers' `DDPMPipeline.from_pretrained` loads: unet/, and scheduler/ where it is known.

    Without a scheduler it is the folder of a `UNet2DModel` by itself. The weights' SHA-256 lies beside them, by which
    `load` sees damage that leaves the file readable.

    Args:
        path: the folder; made if absent.
        pretrained: what is in it.

    Raises:
        ValueError: a network that diffusers has not, parameters of another one, or a folder with something in it.
    """
    folder = Path(path)
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: name a new folder, or empty it.")
    network, shape, params, scheduler = pretrained
    config = to_unet_config(network, shape)
    tensors = {name: np.ascontiguousarray(array) for name, array in to_tensors(network, shape, params).items()}
    data = serialise(tensors, metadata={"format": "pt"})
    unet = folder if scheduler is None else folder / "unet"
    _make(unet)
    (unet / WEIGHTS).write_bytes(data)
    (unet / (WEIGHTS + DIGEST)).write_text(f"{hashlib.sha256(data).hexdigest()}  {WEIGHTS}\n")
    _write(unet / CONFIG, config)
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        _write(folder / "scheduler" / SCHEDULER, to_scheduler_config(scheduler))
        modules = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        _write(folder / "model_index.json", {"_class_name": "DDPMPipeline", **modules})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error}): name another folder.") from error


def _weights(path: Path) -> Path:
    """The file with the weights, at or under a path."""
    if os.path.isdir(path):  # no error, whatever the letters in it
        unet = path / "unet" if (path / "unet").is_dir() else path
        if (unet / WEIGHTS).exists():
            return unet / WEIGHTS
        pickles = sorted(file for file in unet.iterdir() if file.suffix in PICKLES)
        if not pickles:
            raise ValueError(
                f"There is no {WEIGHTS} in {unet}: name the folder that UNet2DModel.save_pretrained wrote."
            )
        path = pickles[0]
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which may run any code when it is read: only .safetensors are read here. Where you "
            "trust it, write it anew: UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
        )
    if not os.path.exists(path):
        raise ValueError(f"There is nothing at {path}: name a folder or a .safetensors file.")
    return path


def _scheduler_places(weights: Path) -> list[Path]:
    """Where the scheduler of these weights may be described: beside them, or in the pipeline they are part of."""
    folder = weights.parent
    pipeline = [folder.parent / "scheduler" / SCHEDULER] if folder.name == "unet" else []
    return [folder / SCHEDULER, folder / "scheduler" / SCHEDULER, *pipeline]


def _tensors(path: Path) -> dict[str, np.ndarray]:
    data, beside = read(path), path.with_name(path.name + DIGEST)
    if os.path.exists(beside) and read(beside).split()[:1] != [hashlib.sha256(data).hexdigest().encode()]:
        raise ValueError(f"{path} has another SHA-256 than {beside.name} says: copy it again, or delete {beside}.")
    try:
        return parse(data)
    except Exception as error:  # SafetensorError, KeyError, OverflowError and more: of nothing but these bytes
        raise ValueError(
            f"{path} is no safetensors file of NumPy's types, or cut short or damaged: {printable(repr(error)[:300])}. "
            "Copy it again, or write it as float32."
        ) from error


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
