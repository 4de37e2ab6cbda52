"""A run of a diffusers folder, or such a folder of a run: `python -m vdm_jax.interop WEIGHTS --experiment NAME`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from vdm_jax.interop.faults import printable
from vdm_jax.interop.folder import Pretrained, load, save
from vdm_jax.interop.recipe import describe, fit
from vdm_jax.training import imported_weights, registry
from vdm_jax.training.cli import command
from vdm_jax.training.run import open_run, stored_config
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError

FRESH = "Delete the run that is there."


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a run whose newest checkpoint holds a diffusers model's weights, for `make sample` and `make eval`; or, with
    --export, write the averaged parameters of a run's newest checkpoint as a folder that diffusers loads.

    Only .safetensors and JSON are read.
    """

    weights: tyro.conf.Positional[str] = ""
    """The folder of a UNet2DModel or of a DDPMPipeline, or a .safetensors file."""
    experiment: str = "ddpm_cifar"
    """The experiment whose run it is: its data, and all options that the weights do not fix."""
    config: str | None = None
    """The network's config.json, where it is not beside the weights."""
    export: str | None = None
    """Folder to write, in the place of reading one."""
    workdir: str = "runs"
    """Folder of all runs."""
    fresh: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=FRESH)] = False


def main() -> None:
    """The command."""
    options = tyro.cli(Options, args=sys.argv[1:], prog="python -m vdm_jax.interop")
    if bool(options.weights) == bool(options.export):
        raise UserError("Name either WEIGHTS to read or --export FOLDER to write: make import WEIGHTS=... EXP=...")
    try:
        write_out(options) if options.export else bring_in(options)
    except ValueError as error:
        raise UserError(printable(str(error))) from error


def bring_in(options: Options) -> None:
    """Weights into a run."""
    name = options.experiment
    recipe, pretrained = registry.find(name), load(options.weights, options.config)
    run = open_run(name, dataclasses.replace(fit(recipe, pretrained), workdir=options.workdir))
    if run.data.spec.shape != pretrained.shape:
        wanted, there = ("x".join(map(str, shape)) for shape in (pretrained.shape, run.data.spec.shape))
        raise UserError(f"The weights are for images of {wanted}; {run.data.spec.name}, {name}'s data, has {there}.")
    folder = imported_weights.start(run, pretrained.params, options.weights, fresh=options.fresh)
    if pretrained.scheduler is None:
        print(f"There is no scheduler_config.json: the noise schedule is {name}'s own.")
    elif pretrained.scheduler.clip != 1.0:
        print("Its scheduler does not clip x_0 to [-1, 1]; `make sample` does.")
    print(f"The weights are in {folder}. Go on with `make sample EXP={name}` and `make eval EXP={name}`.")


def write_out(options: Options) -> None:
    """A run's averaged parameters into a diffusers folder."""
    name = options.experiment
    run = open_run(name, dataclasses.replace(stored_config(name, options.workdir), workdir=options.workdir))
    network, scheduler = describe(run.config)
    params = jax.device_get(on_one_device(command.newest(run).state.ema))
    height, width, channels = run.data.spec.shape
    save(options.export or "", Pretrained(network, (height, width, channels), params, scheduler))
    print(f'{Path(options.export or "")}: diffusers.DDPMPipeline.from_pretrained("{options.export}") loads it.')


if __name__ == "__main__":
    command.execute(main)
