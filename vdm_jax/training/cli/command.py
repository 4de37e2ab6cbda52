"""What the three commands share: naming the experiment, reading options, finding the checkpoint."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from vdm_jax.training import registry
from vdm_jax.training.checkpoint import Checkpoints, Saved
from vdm_jax.training.run import Run, abstract_state
from vdm_jax.training.runtime import environment
from vdm_jax.training.runtime.errors import UserError, readable_errors
from vdm_jax.training.runtime.processes import together_or_not_at_all

Options = TypeVar("Options")


def execute(main: Callable[[], None]) -> None:
    """Run a command with a quiet environment and readable errors."""
    environment.prepare()
    with together_or_not_at_all(), readable_errors():
        main()


def experiment_name(command: str) -> str:
    """The first argument of the command line.

    Raises:
        UserError: there is none.
    """
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        return sys.argv[1]
    message = f"usage: {program(command)} EXPERIMENT [options]   (EXPERIMENT --help shows its options)\n"
    message += f"Experiments: {', '.join(registry.names())}."
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(message)
        sys.exit(0)
    raise UserError(message)


def program(command: str) -> str:
    """How a command is called."""
    return "python -m vdm_jax.training" + ("" if command == "train" else f".{command}")


def parse(command: str, default: Options) -> tuple[str, Options]:
    """The experiment's name and the options after it; a wrong option ends the program with tyro's message."""
    name = experiment_name(command)
    registry.find(name)
    return name, tyro.cli(type(default), default=default, args=sys.argv[2:], prog=f"{program(command)} {name}")


def newest(run: Run) -> Saved:
    """The newest readable checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    with Checkpoints(run.folder / "checkpoints", run.config.keep) as checkpoints:
        saved = checkpoints.restore(abstract_state(run))
    if saved is None:
        raise UserError(f"The run in {run.folder} has no checkpoint yet; train on: `make train EXP={run.name}`.")
    for step in saved.unreadable:
        print(f"The checkpoint of step {step} cannot be read; taking that of step {int(saved.state.step)}.")
    return saved
