"""The options of a recipe from a pretrained network, and the reverse.

The options are any dataclass with the fields network (a UNetConfig), prediction_type, noise_schedule, num_steps and
sampling (with a variance and steps), as `vdm_jax.models.ddpm.DDPM` has them.
"""

from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np

from vdm_jax.interop.folder import Pretrained
from vdm_jax.interop.schedulers import Scheduler
from vdm_jax.networks.unet import UNetConfig

__all__ = ["apply_pretrained", "network_and_scheduler"]

NOISE_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
FIELDS = ("network", "prediction_type", "noise_schedule", "num_steps", "sampling")


def apply_pretrained(config: Any, pretrained: Pretrained) -> Any:
    """A recipe's options with the network of `pretrained`, and with its scheduler if it has one.

    Raises:
        ValueError: the recipe is not a DDPM with this U-Net, or its options cannot express the noise schedule.
    """
    _check(config)
    network = replace(pretrained.network, dtype=config.network.dtype)  # the arithmetic is the recipe's choice
    scheduler = pretrained.scheduler
    if scheduler is None:
        return replace(config, network=network)
    steps = min(config.sampling.steps, scheduler.num_steps)
    changed = replace(
        config,
        network=network,
        prediction_type=scheduler.prediction_type,
        noise_schedule=NOISE_SCHEDULES.get(scheduler.beta_schedule, config.noise_schedule),
        num_steps=scheduler.num_steps,
        sampling=replace(config.sampling, variance=scheduler.variance, steps=steps),
    )
    wanted, got = scheduler.discrete_schedule().log_snr, changed.discrete_schedule().log_snr
    if not np.allclose(wanted[1:], got[1:], rtol=0.0, atol=1e-5):
        raise ValueError(
            f"The options of a recipe cannot express this scheduler's betas ({scheduler.beta_schedule}, "
            f"{scheduler.beta_start} to {scheduler.beta_end}, T = {scheduler.num_steps}): supported are linear from "
            "0.1 / T to 20 / T, and squaredcos_cap_v2. From Python, use "
            "vdm_jax.interop.load(...).scheduler.discrete_schedule(), which supports every schedule."
        )
    return changed


def network_and_scheduler(config: Any) -> tuple[UNetConfig, Scheduler]:
    """The network and the scheduler of a recipe's options: a named beta schedule, or the betas themselves.

    Raises:
        ValueError: the recipe is not a DDPM with this U-Net.
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
        raise ValueError("This recipe is not a DDPM with vdm_jax's U-Net: use one such as ddpm_cifar or ddpm_mnist.")
