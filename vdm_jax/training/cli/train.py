"""`vdm-jax train RECIPE [options]`: train, then evaluate and sample."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from vdm_jax.training import registry
from vdm_jax.training.cli.common import flag, recipe_argument
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.evaluation import dry_run
from vdm_jax.training.evaluation.report import is_finished, is_started, summary, write_report
from vdm_jax.training.evaluation.sampling import Sampler, write_samples_and_plots
from vdm_jax.training.evaluation.time_budget import reason_to_defer
from vdm_jax.training.loop import train
from vdm_jax.training.run import Run, open_run, remove_run
from vdm_jax.training.runtime.accelerator import idle_accelerator
from vdm_jax.training.runtime.invocation import command_line
from vdm_jax.training.runtime.metrics_writer import print_line
from vdm_jax.training.runtime.processes import initialize_processes
from vdm_jax.training.step import Step

FRESH = "Delete the run's folder and start over."
CHANGED = "Resume a run although its options have changed."


def main(arguments: Sequence[str], program: str = "vdm-jax train") -> None:
    """The command; several processes with the same arguments train together."""
    initialize_processes()
    recipe, config, fresh, changed = parse(arguments, program)
    if warning := idle_accelerator():
        print_line(warning)
    run = open_run(recipe, config)
    if not fresh and is_finished(run):
        cosine = " (with --changed: the learning rate has decayed to zero, and jumps)"
        print(
            f"The run in {run.folder} is finished: {config.steps} steps, {run.folder / 'report.json'}. Increase "
            f"--steps to continue{cosine if config.lr_schedule == 'cosine' else ''}, or start over with --fresh, which "
            "deletes it."
        )
        return
    step = dry_run.check_training(run, likelihood=fresh or not is_started(run))
    if fresh:
        remove_run(run.folder)
    train_and_report(run, changed, step)


def parse(arguments: Sequence[str], program: str) -> tuple[str, TrainConfig, bool, bool]:
    """The recipe, its config with the options of the command line, --fresh and --changed."""
    recipe = recipe_argument(arguments, program)
    config = registry.find(recipe)
    fields = [
        ("config", Annotated[type(config), tyro.conf.arg(name="")], config),
        ("fresh", flag(FRESH), False),
        ("changed", flag(CHANGED), False),
    ]
    options = dataclasses.make_dataclass("Options", fields, frozen=True)
    options.__doc__ = type(config).__doc__
    given = tyro.cli(options, args=arguments[1:], prog=f"{program} {recipe}")
    return recipe, given.config, given.fresh, given.changed


def train_and_report(run: Run, changed: bool = False, step: Step | None = None) -> None:
    """Train, evaluate, sample and print the results; a report that takes longer than training is left to the user."""
    saved = train(run, changed, step, Sampler(run).write_or_warn)
    if reason := reason_to_defer(run, saved):
        print(reason)
        return
    print_line("Evaluating on the test set and sampling.")
    result = write_report(run, saved)
    print(summary(result))
    plots = write_samples_and_plots(run, saved.state.ema)
    for path in [*plots, run.folder / "report.json"]:
        print(f"  {path}")
    if run.experiment.likelihood_rows:
        print(f"  likelihood report and sample quality: {command_line('evaluate', run.recipe)}")
