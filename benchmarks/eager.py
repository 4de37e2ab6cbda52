"""Diffusers' U-Net on PyTorch: the training step and samplers of its users, as fast as they come on a CPU.

Tensors in channels_last, which oneDNN's convolutions take faster, Adam fused, the moving average in one call.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

torch: Any = importlib.import_module("torch")  # of the extra `parity`, which may not be here
diffusers: Any = importlib.import_module("diffusers")

RATE, DECAY, CALLS = 2e-4, 0.999, 50


def ways(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    x: np.ndarray,
    steps: int,
    same: Callable[[np.ndarray], None],
) -> dict[str, Callable[[], Any]]:
    """So many training steps, and both samplers, as functions without arguments.

    Args:
        config, tensors: of the `UNet2DModel`.
        x: a batch (B, H, W, C), the data of every step and the samplers' noise.
        steps: training steps a call.
        same: is shown the network's output on the batch at timestep 500.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    batch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=torch.channels_last)
    model, trained = (_model(config, tensors) for _ in range(2))
    with torch.inference_mode():
        same(model(batch, torch.full((len(x),), 500)).sample.numpy().transpose(0, 2, 3, 1))
    return {
        "step": _training(trained, batch, steps),
        "ancestral": lambda: _chain(model, diffusers.DDPMScheduler(), batch, 1000),
        "ddim": lambda: _chain(model, diffusers.DDIMScheduler(timestep_spacing="trailing"), batch, CALLS),
    }


def _model(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    model = diffusers.UNet2DModel.from_config(config)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()})
    return model.to(memory_format=torch.channels_last).train(False)


def _training(model: Any, x_0: Any, steps: int) -> Callable[[], Any]:
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    adam, scheduler = torch.optim.Adam(parameters, lr=RATE, fused=True), diffusers.DDPMScheduler()
    model.train()

    def step():
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),))
        predicted = model(scheduler.add_noise(x_0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1.0 - DECAY)
        return loss

    return lambda: [step() for _ in range(steps)] and None


def _chain(model: Any, scheduler: Any, x: Any, count: int) -> np.ndarray:
    """What DDPMPipeline and DDIMPipeline do."""
    scheduler.set_timesteps(count)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x.numpy()
