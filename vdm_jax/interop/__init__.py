"""Weights to and from diffusers: a `UNet2DModel` with its `DDPMScheduler` <-> our U-Net, schedule and kind.

Only safetensors and JSON are read: no pickle, no code. A round trip changes no bit, either way round.

    load, save         a diffusers folder, or a bare safetensors file <-> `Pretrained`
    from_tensors       their tensors by name -> our parameters;  `to_tensors` back
    from_unet_config   config.json -> UNetConfig and the shape of an image;  `to_unet_config` back
    Scheduler          scheduler_config.json, read by `from_scheduler_config`, written by `to_scheduler_config`

`python -m vdm_jax.interop` makes a run of such a folder, and such a folder of a run. Files are read and written in
`files`, `folder` and that command alone; what is between is pure.
"""

from vdm_jax.interop.architecture import from_unet_config, to_unet_config
from vdm_jax.interop.folder import Pretrained, load, save
from vdm_jax.interop.schedulers import Scheduler, from_scheduler_config, to_scheduler_config
from vdm_jax.interop.tensors import from_tensors, to_tensors

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
