"""Reading and writing of diffusers folders."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize

from vdm_jax.interop.config_checks import printable
from vdm_jax.interop.safe_reading import read, read_json
from vdm_jax.interop.schedulers import Scheduler, from_scheduler_config, to_scheduler_config
from vdm_jax.interop.tensors import Params, from_tensors, to_tensors
from vdm_jax.interop.unet_config import from_unet_config, to_unet_config
from vdm_jax.networks.unet import UNetConfig

__all__ = ["Pretrained", "load", "save"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIGEST = ".sha256"  # beside the weights, in the format of sha256sum; diffusers ignores it


class Pretrained(NamedTuple):
    """A network with its weights.

    network: its config.
    shape: of an image, (H, W, C), values on [-1, 1].
    params: for `UNet(network).apply({"params": params}, x_t, timestep)`, timestep 0..T-1.
    scheduler: its noise schedule and prediction type, or None if unknown.
    """

    network: UNetConfig
    shape: tuple[int, int, int]
    params: Params
    scheduler: Scheduler | None = None


def load(path: str | Path, config: str | Path | None = None) -> Pretrained:
    """Read a diffusers folder, or a bare safetensors file.

    Args:
        path: the folder of a `UNet2DModel`, or of a pipeline with unet/ and scheduler/ in it, or a .safetensors file.
        config: the network's config.json, if it is not beside the weights.

    Raises:
        ValueError: a pickle; missing or damaged files; a network or scheduler that ours cannot represent.
    """
    weights = _weights(Path(path))
    beside = Path(config) if config else weights.parent / CONFIG
    network, shape = from_unet_config(read_json(beside))
    params = from_tensors(network, shape, _tensors(weights))
    scheduler = next((path for path in _scheduler_paths(weights) if os.path.exists(path)), None)
    return Pretrained(network, shape, params, from_scheduler_config(read_json(scheduler)) if scheduler else None)


def save(path: str | Path, pretrained: Pretrained) -> None:
    """Write a folder that diffusers' `DDPMPipeline.from_pretrained` loads, with unet/ and scheduler/.

    Without a scheduler, the folder is that of a `UNet2DModel`. The SHA-256 of the weights is written beside them, so
    that `load` detects damaged files that are still readable.

    Args:
        path: the folder; created if absent.
        pretrained: its contents.

    Raises:
        ValueError: diffusers cannot represent the network; the parameters are of another network; the folder is not
            empty.
    """
    folder = Path(path)
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not empty: name a new folder, or empty it.")
    network, shape, params, scheduler = pretrained
    config = to_unet_config(network, shape)
    tensors = {name: np.ascontiguousarray(array) for name, array in to_tensors(network, shape, params).items()}
    data = serialize(tensors, metadata={"format": "pt"})
    unet = folder if scheduler is None else folder / "unet"
    _create(unet)
    (unet / WEIGHTS).write_bytes(data)
    (unet / (WEIGHTS + DIGEST)).write_text(f"{hashlib.sha256(data).hexdigest()}  {WEIGHTS}\n")
    _write(unet / CONFIG, config)
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        _write(folder / "scheduler" / SCHEDULER, to_scheduler_config(scheduler))
        modules = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        _write(folder / "model_index.json", {"_class_name": "DDPMPipeline", **modules})


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be created ({error}): name another folder.") from error


def _weights(path: Path) -> Path:
    """The file with the weights, for the path of a file or a folder."""
    if os.path.isdir(path):  # Path.is_dir raises for some names
        unet = path / "unet" if (path / "unet").is_dir() else path
        if (unet / WEIGHTS).exists():
            return unet / WEIGHTS
        pickles = sorted(file for file in unet.iterdir() if file.suffix in PICKLES)
        if not pickles:
            raise ValueError(
                f"{unet} does not contain {WEIGHTS}: name a folder written by UNet2DModel.save_pretrained."
            )
        path = pickles[0]
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is read; only .safetensors is supported. If you "
            "trust it, convert it by UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
        )
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist: name a folder or a .safetensors file.")
    return path


def _scheduler_paths(weights: Path) -> list[Path]:
    """Possible paths of scheduler_config.json: beside the weights, or in the pipeline that they are part of."""
    folder = weights.parent
    pipeline = [folder.parent / "scheduler" / SCHEDULER] if folder.name == "unet" else []
    return [folder / SCHEDULER, folder / "scheduler" / SCHEDULER, *pipeline]


def _tensors(path: Path) -> dict[str, np.ndarray]:
    data, beside = read(path), path.with_name(path.name + DIGEST)
    if os.path.exists(beside) and read(beside).split()[:1] != [hashlib.sha256(data).hexdigest().encode()]:
        raise ValueError(f"{path} does not match the SHA-256 in {beside.name}: copy it again, or delete {beside}.")
    try:
        return parse(data)
    except Exception as error:  # SafetensorError, KeyError, OverflowError and more, all from the contents of the file
        raise ValueError(
            f"{path} is not a complete safetensors file of NumPy types: {printable(repr(error)[:300])}. "
            "Copy it again, or save it as float32."
        ) from error


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
