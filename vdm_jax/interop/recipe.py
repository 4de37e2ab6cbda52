"""What a pretrained network means to an experiment's options, and back. They are any dataclass with these fields:

network: UNetConfig;  prediction_type, noise_schedule, num_steps: as `vdm_jax/models/ddpm.py` has them;  sampling: has a variance and steps
"""

from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np

from vdm_jax.interop.folder import Pretrained
from vdm_jax.interop.schedulers import Scheduler
from vdm_jax.networks.unet import UNetConfig

NOISES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
FIELDS = ("network", "prediction_type", "noise_schedule", "num_steps", "sampling")


def fit(config: Any, pretrained: Pretrained) -> Any:
    """An experiment's options with a pretrained network, and its noise where that is known.

    Raises:
        ValueError: the experiment is no DDPM of this U-Net, or has no such schedule.
    """
    _check(config)
    network = replace(pretrained.network, dtype=config.network.dtype)  # how to compute is the experiment's affair
    scheduler = pretrained.scheduler
    if scheduler is None:
        return replace(config, network=network)
    fitted = replace(
        config,
        network=network,
        prediction_type=scheduler.prediction_type,
        noise_schedule=NOISES.get(scheduler.beta_schedule, config.noise_schedule),
        num_steps=scheduler.num_steps,
        sampling=replace(
            config.sampling, variance=scheduler.variance, steps=min(config.sampling.steps, scheduler.num_steps)
        ),
    )
    wanted, got = scheduler.discrete_schedule().log_snr, fitted.discrete_schedule().log_snr
    if not np.allclose(wanted[1:], got[1:], rtol=0.0, atol=1e-5):
        raise ValueError(
            f"The scheduler's betas ({scheduler.beta_schedule}, {scheduler.beta_start} to {scheduler.beta_end}, T = "
            f"{scheduler.num_steps}) are none that this experiment can have: supported is linear from 0.1 / T to "
            "20 / T, and squaredcos_cap_v2. From Python every schedule is: vdm_jax.interop.load(...).scheduler.discrete_schedule()."
        )
    return fitted


def describe(config: Any) -> tuple[UNetConfig, Scheduler]:
    """The network of an experiment's options, and its noise in diffusers' words: its name there, or its betas.

    Raises:
        ValueError: the experiment is no DDPM of this U-Net.
    """
    _check(config)
    options = {"prediction_type": config.prediction_type, "variance": config.sampling.variance}
    steps = config.num_steps
    match config.noise_schedule:
        case "linear":
            return config.network, Scheduler(steps, "linear", 0.1 / steps, 20.0 / steps, **options)
        case "cosine":
            return config.network, Scheduler(steps, "squaredcos_cap_v2", **options)
        case _:
            return config.network, Scheduler.of(config.discrete_schedule(), **options)


def _check(config: Any) -> None:
    missing = [name for name in FIELDS if not hasattr(config, name)]
    if missing or not isinstance(config.network, UNetConfig) or not is_dataclass(config.sampling):
        raise ValueError("This experiment is no DDPM of vdm_jax's U-Net: take ddpm_cifar, ddpm_mnist or one like them.")
