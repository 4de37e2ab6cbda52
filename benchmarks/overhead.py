"""The training step against the bare network's, part by part; the loop against steps back to back; compilations.

    python -m benchmarks.overhead

The bare step is forward, backward and optimiser of the same network on the same x_t, eps and noise levels every time,
dropout included. The whole step is `training.step.make_step`'s: it draws keys, steps and noise, makes x_t, averages the
parameters and returns metrics. The loop is the trainer's own, data pipeline included, without logs and checkpoints.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.clock import in_turns, milliseconds, ratio, repeat
from vdm_jax.networks.unet import UNet
from vdm_jax.training import optimizer, registry, state
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.loop import Loop, start_or_resume
from vdm_jax.training.run import open_run
from vdm_jax.training.runtime.devices import batch_sharding, make_mesh, replicated
from vdm_jax.training.runtime.metrics_writer import MetricsWriter
from vdm_jax.training.step import make_step

CIFAR = DataSpec("cifar10", (32, 32, 3), 256, 10, 50_000, 10_000)
DIGITS = DataSpec("digits", (8, 8, 1), 17, 10, 1_437, 360)
COMPILED = "/jax/core/compile/backend_compile_duration"


def narrow_cifar() -> Any:
    """The recipe ddpm_cifar at a quarter of its width, in batches that two cores can take."""
    config: Any = registry.find("ddpm_cifar")
    return dataclasses.replace(config, network=dataclasses.replace(config.network, channels=32), batch_size=8)


def bare_step(config: Any, average: bool) -> Callable[..., Any]:
    """(state, inputs) -> (state, loss): forward, backward, optimiser; with the moving average, if asked for."""
    network, adam = UNet(config.network), optimizer.optimizer(config)

    def loss(params, key, x_t, condition, eps):
        rngs = {"dropout": key}
        return jnp.square(network.apply({"params": params}, x_t, condition, train=True, rngs=rngs) - eps).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(held, inputs):
        params, ema, moments = held
        value, grads = jax.value_and_grad(loss)(params, *inputs)
        updates, moments = adam.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        ema = state.moving_average(ema, params, config.ema_decay, 0) if average else ema
        return (params, ema, moments), value

    return step


def steps(config: Any, spec: DataSpec, times: int) -> dict[str, Callable[[], Any]]:
    """So many steps of each kind, by name."""
    experiment, adam = config.build(spec), optimizer.optimizer(config)
    create = jax.jit(lambda: state.create(experiment, adam, 0))
    shape, key = (config.batch_size, *spec.shape), jax.random.key(1)
    x_t, eps = jax.random.normal(key, (2, *shape))
    inputs = key, x_t, jnp.linspace(-4.0, 8.0, config.batch_size), eps
    made = {"whole": whole_steps(config, spec, times)}
    for name, average in (("bare", False), ("bare, averaged", True)):
        first = create()
        held = first.params, first.ema, first.opt_state
        made[name] = repeat(bare_step(config, average), held, inputs, times=times)
    return made


def whole_steps(config: Any, spec: DataSpec, times: int) -> Callable[[], Any]:
    """So many of the trainer's steps, on one batch of random images."""
    experiment, adam, mesh = config.build(spec), optimizer.optimizer(config), make_mesh(1)
    shape = (config.batch_size, *spec.shape)
    image = jax.random.randint(jax.random.key(1), shape, 0, spec.levels).astype(jnp.uint8)
    batch = jax.device_put({"image": image, "label": jnp.zeros(shape[0], jnp.int32)}, batch_sharding(mesh))
    step = make_step(experiment, adam, mesh, seed=0, ema_decay=config.ema_decay)
    create = jax.jit(
        lambda: state.create(experiment, adam, 0), out_shardings=replicated(mesh)
    )  # else it compiles twice
    return repeat(step, create(), batch, times=times)


def parts(name: str, config: Any, spec: DataSpec, times: int, rounds: int) -> None:
    """Two lines of the table of steps: by the clock, and by the work of all cores."""
    made = steps(config, spec, times)
    for what, clock in (("by the clock", time.perf_counter), ("by the cores' work", time.process_time)):
        taken = in_turns(made, rounds, clock)
        cells = [ratio(taken[way], taken["bare"], 3) for way in ("bare, averaged", "whole")]
        print(f"| {name}, {what} | {milliseconds(taken['bare'], times)} | {' | '.join(cells)} |", flush=True)


def loop(times: int = 20, rounds: int = 15) -> None:
    """The loop's steps on the digits against compiled steps on one batch, and how often it compiles."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    with tempfile.TemporaryDirectory() as folder:
        never = {"log_every": 10**9, "checkpoint_every": 10**9, "picture_every": 0, "steps": 10**6, "workdir": folder}
        config: Any = dataclasses.replace(registry.find("ddpm_digits"), **never)
        run = open_run("ddpm_digits", config, make_mesh(1))
        with Checkpoints(run.folder / "checkpoints") as checkpoints:
            start = start_or_resume(run, checkpoints)  # makes the folder
            with MetricsWriter(run.folder, 0, 1) as writer:
                going = Loop(run, start, checkpoints, writer)

                def advance(count: int = times):
                    for step in range(count):
                        going.advance(step)
                    return going.state

                jax.block_until_ready(advance(1))
                before = compiled.count(COMPILED)
                jax.block_until_ready(advance(50))
                print(f"\ncompilations in the loop's steps 2 to 51: {compiled.count(COMPILED) - before}", flush=True)
                taken = in_turns({"loop": advance, "fixed": whole_steps(config, DIGITS, times)}, rounds)
                going.batches.close()
    print(f"the loop's time over that of steps back to back on one batch: {ratio(taken['loop'], taken['fixed'], 3)}")


def main() -> None:
    """Print the tables."""
    print("| | bare step | bare step with the average | whole step |\n|---|---|---|---|")
    parts("ddpm_digits", registry.find("ddpm_digits"), DIGITS, times=5, rounds=41)
    parts("ddpm_cifar, 32 channels, batch 8", narrow_cifar(), CIFAR, times=1, rounds=15)
    loop()


if __name__ == "__main__":
    from vdm_jax.training.cli.common import execute

    execute(main)
