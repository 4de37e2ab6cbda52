"""The recipe ddpm_cifar on an accelerator: step time, images/s and model FLOP utilisation, in float32 and in bfloat16.

    python -m benchmarks.accelerator                              # --help lists the options
    python -m benchmarks.accelerator --batch-size 2 --channels 32 --steps 1 --rounds 3      # a try on a CPU

The model's FLOPs are XLA's count of the step before it optimises: afterwards a GPU's convolutions are calls that it
cannot look into. Utilisation is of the peak that the maker states for dense products of that type; float32 is done in
TF32 on NVIDIA's, as JAX does by default, and in bfloat16 passes on TPUs. As the trainer's, a GPU's operations are
deterministic; XLA_FLAGS=--xla_gpu_deterministic_ops=false shows what that costs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.clock import in_turns, milliseconds, ratio, repeat
from benchmarks.overhead import CIFAR
from vdm_jax.training import optimizer, registry, state
from vdm_jax.training.runtime.devices import batch_sharding, make_mesh, replicated
from vdm_jax.training.step import make_step

DTYPES = ("float32", "bfloat16")
PEAKS = {  # by device kind: TFLOP/s for float32 and bfloat16
    "H200": (494, 989),
    "H100 PCIe": (378, 756),
    "H100": (494, 989),
    "A100": (156, 312),
    "L40S": (183, 366),
    "L4": (60, 121),
    "RTX 4090": (83, 165),
    "TPU v6 lite": (918, 918),
    "TPU v5 lite": (197, 197),
    "TPU v5": (459, 459),
    "TPU v4": (275, 275),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    batch_size: int = 128
    """Images a step."""
    channels: int = 128
    """Width of the network; Ho et al.'s is 128."""
    steps: int = 20
    """Steps a round."""
    rounds: int = 9
    """Rounds of each type."""
    peak: tuple[float, float] | None = None
    """Peak TFLOP/s of the device in float32 and bfloat16, where the table has none."""


def peak(options: Options) -> tuple[float, float] | None:
    """The device's TFLOP/s in float32 and bfloat16, where they are known."""
    prediction_type = jax.devices()[0].device_kind
    return options.peak or next((peaks for name, peaks in PEAKS.items() if name in prediction_type), None)


def prepared(options: Options, dtype: Any) -> tuple[Any, float]:
    """So many steps as a function without arguments, and the FLOPs of one."""
    recipe: Any = registry.find("ddpm_cifar")
    network = dataclasses.replace(recipe.network, channels=options.channels, dtype=dtype)
    config = dataclasses.replace(recipe, network=network, batch_size=options.batch_size)
    experiment, adam, mesh = config.build(CIFAR), optimizer.optimizer(config), make_mesh(1)
    step = make_step(experiment, adam, mesh, seed=0, ema_decay=config.ema_decay)
    first = jax.jit(lambda: state.create(experiment, adam, 0), out_shardings=replicated(mesh))()
    image = jax.random.randint(jax.random.key(1), (options.batch_size, *CIFAR.shape), 0, 256).astype(jnp.uint8)
    batch = jax.device_put({"image": image, "label": jnp.zeros(options.batch_size, jnp.int32)}, batch_sharding(mesh))
    cost: Any = step.lower(first, batch).cost_analysis()  # pyright: ignore
    return repeat(step, first, batch, times=options.steps), cost["flops"]


def main(options: Options) -> None:
    """Print the table."""
    made = {dtype: prepared(options, dtype) for dtype in DTYPES}
    taken = in_turns({dtype: go for dtype, (go, _) in made.items()}, options.rounds)
    peaks, device = peak(options), jax.devices()[0].device_kind
    print(f"ddpm_cifar, {options.channels} channels, batches of {options.batch_size}, on {device}\n")
    print("| | step | images/s | TFLOP a step | TFLOP/s | of the peak | float32's time over its |\n|" + "---|" * 7)
    for place, dtype in enumerate(DTYPES):
        seconds, flops = np.median(taken[dtype]) / options.steps, made[dtype][1]
        share = f"{flops / seconds / peaks[place] / 1e12:.1%}" if peaks else "unknown: --peak"
        print(
            f"| {dtype} | {milliseconds(taken[dtype], options.steps)} | {options.batch_size / seconds:,.0f} | "
            f"{flops / 1e12:.3g} | {flops / seconds / 1e12:.3g} | {share} | {ratio(taken['float32'], taken[dtype])} |"
        )


if __name__ == "__main__":
    from vdm_jax.training.cli.common import execute

    execute(lambda: main(tyro.cli(Options)))
