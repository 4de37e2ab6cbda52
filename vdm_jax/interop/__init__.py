"""Weights to and from diffusers: a `UNet2DModel` with its `DDPMScheduler` <-> our U-Net, schedule and prediction type.

Only safetensors and JSON are read: no pickle, no code. A round trip in either direction changes no bit.

    load, save         a diffusers folder or a safetensors file <-> `Pretrained`
    from_tensors       diffusers tensors by name -> our parameters; the inverse is `to_tensors`
    from_unet_config   config.json -> UNetConfig and image shape; the inverse is `to_unet_config`
    Scheduler          the contents of scheduler_config.json: `from_scheduler_config`, `to_scheduler_config`

`make import` turns such a folder into a training run, and a run into such a folder.
"""

from vdm_jax.interop.folder import Pretrained, load, save
from vdm_jax.interop.schedulers import Scheduler, from_scheduler_config, to_scheduler_config
from vdm_jax.interop.tensors import from_tensors, to_tensors
from vdm_jax.interop.unet_config import from_unet_config, to_unet_config

__all__ = [
    "Pretrained",
    "Scheduler",
    "from_scheduler_config",
    "from_tensors",
    "from_unet_config",
    "load",
    "save",
    "to_scheduler_config",
    "to_tensors",
    "to_unet_config",
]
