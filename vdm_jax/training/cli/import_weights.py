"""`vdm-jax import WEIGHTS --recipe NAME`: the weights of a diffusers folder as a run, and back with --export."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro

from vdm_jax.interop.config_checks import printable
from vdm_jax.interop.experiment_options import apply_pretrained, network_and_scheduler
from vdm_jax.interop.folder import Pretrained, load, save
from vdm_jax.training import imported_weights, registry
from vdm_jax.training.run import newest_checkpoint, open_run, stored_config
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.invocation import command_line

FRESH = "Delete an existing run."


@dataclasses.dataclass(frozen=True)
class Options:
    """Create a run whose checkpoint holds the weights of a diffusers model, to sample from it and to evaluate it; or,
    with --export, write the EMA parameters of a run's latest checkpoint as a folder that diffusers loads.

    Only .safetensors and JSON files are read.
    """

    weights: tyro.conf.Positional[str] = ""
    """Folder of a UNet2DModel or a DDPMPipeline, or a .safetensors file."""
    recipe: str = "ddpm_cifar"
    """Recipe for the data and for all options that the weights do not determine."""
    config: str | None = None
    """The network's config.json, if it is not beside the weights."""
    export: str | None = None
    """Folder to write, instead of importing WEIGHTS."""
    workdir: str = "runs"
    """Folder of all runs."""
    fresh: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=FRESH)] = False


def main(arguments: Sequence[str], program: str = "vdm-jax import") -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog=program)
    if bool(options.weights) == bool(options.export):
        raise UserError("Give either WEIGHTS to import or --export FOLDER to write.")
    try:
        export_weights(options) if options.export else import_weights(options)
    except ValueError as error:
        raise UserError(printable(str(error))) from error


def import_weights(options: Options) -> None:
    """Create a run from a diffusers folder."""
    name = options.recipe
    recipe, pretrained = registry.find(name), load(options.weights, options.config)
    run = open_run(name, dataclasses.replace(apply_pretrained(recipe, pretrained), workdir=options.workdir))
    if run.data.spec.shape != pretrained.shape:
        wanted, there = ("x".join(map(str, shape)) for shape in (pretrained.shape, run.data.spec.shape))
        raise UserError(
            f"The weights are for images of {wanted}, but {run.data.spec.name} has {there}: use another --recipe."
        )
    folder = imported_weights.start(run, pretrained.params, options.weights, fresh=options.fresh)
    if pretrained.scheduler is None:
        print(f"Without scheduler_config.json, the noise schedule is that of {name}.")
    elif pretrained.scheduler.clip != 1.0:
        print("The scheduler does not clip x_0 to [-1, 1]; sampling here does.")
    sample, evaluate = (command_line(command, name) for command in ("sample", "evaluate"))
    print(f"The weights are in {folder}. Next: `{sample}` and `{evaluate}`.")


def export_weights(options: Options) -> None:
    """Write a run's EMA parameters as a diffusers folder."""
    name = options.recipe
    run = open_run(name, dataclasses.replace(stored_config(name, options.workdir), workdir=options.workdir))
    network, scheduler = network_and_scheduler(run.config)
    params = jax.device_get(on_one_device(newest_checkpoint(run).state.ema))
    height, width, channels = run.data.spec.shape
    save(options.export or "", Pretrained(network, (height, width, channels), params, scheduler))
    print(f'{Path(options.export or "")}: diffusers.DDPMPipeline.from_pretrained("{options.export}") loads it.')
