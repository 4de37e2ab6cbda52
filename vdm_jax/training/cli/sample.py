"""`vdm-jax sample RECIPE [options]`: sample from the EMA parameters of a run's latest checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from vdm_jax.training import registry
from vdm_jax.training.cli.common import recipe_argument
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.evaluation import dry_run
from vdm_jax.training.evaluation.sampling import write_samples_and_plots
from vdm_jax.training.run import newest_checkpoint, open_run, stored_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Sample from the EMA parameters of a run's latest checkpoint; writes samples.png and trajectory.png.

    The sampling options default to those of the run, and depend on the kind of model.
    """

    num_samples: int | None = None
    """Images in the grid; defaults to the run's setting."""
    seed: int | None = None
    """Random seed; defaults to the run's setting."""
    workdir: str = "runs"
    """Folder of all runs."""


def main(arguments: Sequence[str], program: str = "vdm-jax sample") -> None:
    """The command."""
    recipe = recipe_argument(arguments, program)
    first, _ = parse(arguments, program, registry.find(recipe))  # finds the run, whose options are the defaults
    config = stored_config(recipe, first.workdir)
    options, sampling = parse(arguments, program, config)
    number = config.num_samples or 64 if options.num_samples is None else options.num_samples
    given = {"workdir": options.workdir, "num_samples": number} | ({} if sampling is None else {"sampling": sampling})
    run = open_run(recipe, dataclasses.replace(config, **given))
    if number:
        dry_run.check_sampling(run, number)
        dry_run.check_plots(run)
    saved = newest_checkpoint(run)
    for path in write_samples_and_plots(run, saved.state.ema, options.seed):
        print(path)


def parse(arguments: Sequence[str], program: str, config: TrainConfig) -> tuple[Options, Any]:
    """The options of the command line, and the sampling options of the model, if it has any."""
    sampling = getattr(config, "sampling", None)
    fields: list[Any] = [("options", Annotated[Options, tyro.conf.arg(name="")], Options())]
    if sampling is not None:
        fields.append(("sampling", Annotated[type(sampling), tyro.conf.arg(name="")], sampling))
    both = dataclasses.make_dataclass("Options", fields, frozen=True)
    both.__doc__ = Options.__doc__
    given = tyro.cli(both, args=arguments[1:], prog=f"{program} {arguments[0]}")
    return given.options, getattr(given, "sampling", None)
