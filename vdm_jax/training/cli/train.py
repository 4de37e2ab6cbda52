"""Train an experiment, then evaluate it and draw: `python -m vdm_jax.training EXPERIMENT [options]`."""

import dataclasses
import signal
import sys
from typing import Annotated

from vdm_jax.training.runtime import environment  # noqa: F401  imported first: it changes the environment

FRESH = "Delete the run's folder first and start anew."
CHANGED = "Go on with a run although its options have changed since it began."


def main() -> None:
    """The command; where several processes are started alike, they train together."""
    from vdm_jax.training import dry_run
    from vdm_jax.training.run import open_run, remove
    from vdm_jax.training.runtime import processes

    processes.join()
    name, config, fresh, changed = parse()
    run = open_run(name, config)
    if not fresh and finished(run):
        cosine = " (and --changed: the learning rate has fallen to zero, and jumps)"
        print(
            f"The run in {run.folder} is finished: {config.steps} steps, {run.folder / 'report.json'}. Ask for more "
            f"--steps to go on{cosine if config.lr_schedule == 'cosine' else ''}, or start anew with --fresh, which "
            "deletes it."
        )
        return
    step = dry_run.check_training(run, ledger=fresh or not begun(run))
    if fresh:
        remove(run.folder)
    train_and_report(run, changed, step)


def parse():
    """The experiment's name, its config with the command line's options, and whether to start anew or with others."""
    import tyro

    from vdm_jax.training import registry
    from vdm_jax.training.cli import command

    name = command.experiment_name("train")
    config = registry.find(name)
    fields = [
        ("config", Annotated[type(config), tyro.conf.arg(name="")], config),
        ("fresh", Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=FRESH)], False),
        ("changed", Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=CHANGED)], False),
    ]
    options = dataclasses.make_dataclass("Options", fields, frozen=True)
    options.__doc__ = type(config).__doc__
    given = tyro.cli(options, args=sys.argv[2:], prog=f"{command.program('train')} {name}")
    return name, given.config, given.fresh, given.changed


def finished(run) -> bool:
    """Whether the run has a report of as many steps as asked for, made with the same options."""
    from vdm_jax.training.config import differences, read_json, to_json
    from vdm_jax.training.runtime.errors import UserError

    stored = stored_options(run)
    try:
        steps = read_json(run.folder / "report.json")["steps"]
    except (UserError, KeyError):
        return False
    return stored is not None and not differences(stored, to_json(run.config)) and steps == run.config.steps


def begun(run) -> bool:
    """Whether the run was begun with the same options, but for the number of steps."""
    from vdm_jax.training.config import to_json

    stored, free = stored_options(run), {"steps": 0, "workdir": ""}
    return stored is not None and stored | free == to_json(run.config) | free


def stored_options(run):
    """The options in the run's folder, as JSON has them; None where there are none, or damaged ones.

    The training writes damaged ones anew, or says what is wrong with them.
    """
    from vdm_jax.training.config import from_json, read_json
    from vdm_jax.training.runtime.errors import UserError

    try:
        stored = read_json(run.folder / "config.json")["config"]
        from_json(run.config, stored)
    except (UserError, KeyError):
        return None
    return stored


def train_and_report(run, changed: bool = False, step=None) -> None:
    """Train, evaluate, draw, and say what came out; what would take longer than the training is left to the user."""
    from vdm_jax.training.evaluation.report import summary, write_report
    from vdm_jax.training.evaluation.sampling import draw_final
    from vdm_jax.training.evaluation.time_budget import too_long
    from vdm_jax.training.loop import train
    from vdm_jax.training.runtime.metrics_writer import say

    saved = train(run, changed, step)
    if reason := too_long(run, saved):
        print(reason)
        return
    say("Evaluating on the test set and drawing.")
    result = write_report(run, saved)
    print(summary(result))
    pictures = draw_final(run, saved.state.ema)
    for path in [*pictures, run.folder / "report.json"]:
        print(f"  {path}")
    if run.experiment.ledger:
        print(f"  every other number there is, likelihoods among them: make eval EXP={run.name}")


def start() -> None:
    """The command, as a process of its own."""
    # Before and after training there is nothing to lose: Ctrl-C ends it at once, not with the traceback of an import.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vdm_jax.training.cli.command import execute

    execute(main)
