"""Peak memory of a training step by batch size, by the compiler's own analysis: nothing runs.

    python -m benchmarks.memory [RECIPE ...]        # ddpm_cifar and vdm_cifar

Bytes of one device: the state (parameters, average, optimiser), the batch, and what the step keeps for a while. The
figures are those of the backend at hand; a GPU's compiler orders and fuses differently, so run it there.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from vdm_jax.training import optimizer, registry
from vdm_jax.training.data.sources import Dataset
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.run import Run, abstract_state, state_sharding
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.step import make_step

BATCHES = (8, 32, 128)
CIFAR = DataSpec("cifar10", (32, 32, 3), 256, 10, 50_000, 10_000)
WAYS = {"as it is": {}, "--accumulate 4": {"accumulate": 4}, "--network.remat": {"remat": True}}
WAYS["both"] = WAYS["--accumulate 4"] | WAYS["--network.remat"]
GIB = 2**30


def peak(config: Any, batch_size: int, devices: int = 1, **changes: Any) -> tuple[float, float]:
    """GiB on one device: of the state and the batch, and of what the compiled step needs beside them."""
    network = dataclasses.replace(config.network, remat=changes.pop("remat", False))
    config = dataclasses.replace(config, network=network, batch_size=batch_size, **changes)
    run = Run("memory", config, Path(), Dataset(CIFAR, None, None), config.build(CIFAR), make_mesh(devices))  # pyright: ignore
    options = {"seed": 0, "ema_decay": config.ema_decay, "accumulate": config.accumulate, "place": state_sharding(run)}
    step = make_step(run.experiment, optimizer.optimizer(config), run.mesh, **options)
    image = jax.ShapeDtypeStruct((batch_size, *CIFAR.shape), "uint8")
    label = jax.ShapeDtypeStruct((batch_size,), "int32")
    used = step.lower(abstract_state(run), {"image": image, "label": label}).compile().memory_analysis()
    assert used is not None, "this backend's compiler gives no analysis"
    return used.argument_size_in_bytes / GIB, used.temp_size_in_bytes / GIB


def by_batch_size(names: list[str]) -> None:
    """What --accumulate and --network.remat save, on one device."""
    print(
        f"| GiB on {jax.devices()[0].device_kind} | batch | state | {' | '.join(WAYS)} |\n|{'---|' * (3 + len(WAYS))}"
    )
    for name in names:
        for batch_size in BATCHES:
            found = [peak(registry.find(name), batch_size, **way) for way in WAYS.values()]
            cells = [f"{found[0][0]:.2f}", *(f"{temporary:.2f}" for _, temporary in found)]
            print(f"| {name} | {batch_size} | {' | '.join(cells)} |", flush=True)


def by_devices(names: list[str]) -> None:
    """What --shard saves, with 8 images a device."""
    numbers = [number for number in (1, 2, 4, 8) if number <= jax.device_count()]
    print(f"\n| GiB a device | devices | state | the rest | state, --shard | the rest, --shard |\n|{'---|' * 6}")
    for name in names:
        for devices in numbers:
            found = [peak(registry.find(name), 8 * devices, devices, shard=shard) for shard in (False, True)]
            print(f"| {name} | {devices} | {' | '.join(f'{gib:.2f}' for pair in found for gib in pair)} |", flush=True)


def main(names: list[str]) -> None:
    """Print the tables."""
    names = names or ["ddpm_cifar", "vdm_cifar"]
    by_batch_size(names)
    by_devices(names[:1])


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # where there is nothing else
    main(sys.argv[1:])
