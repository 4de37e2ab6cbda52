"""What the commands share: error handling, the recipe argument, the type of a flag."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from vdm_jax.training import registry
from vdm_jax.training.runtime import environment
from vdm_jax.training.runtime.errors import UserError, readable_errors
from vdm_jax.training.runtime.processes import exit_together


def execute(main: Callable[[], None]) -> None:
    """Run a program with quiet libraries and readable errors."""
    environment.prepare()
    with exit_together(), readable_errors():
        main()


def recipe_argument(arguments: Sequence[str], program: str) -> str:
    """The first argument: the name or the path of a recipe. With --help it prints the usage and exits.

    Raises:
        UserError: there is no such argument.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    message = (
        f"usage: {program} RECIPE [options]\n`{program} RECIPE --help` shows the options.\n"
        f"Recipes: {', '.join(registry.recipe_names())}, or the path of a recipe file, such as ./mine.py."
    )
    if list(arguments[:1]) in (["-h"], ["--help"]):
        print(message)
        sys.exit(0)
    raise UserError(message)


def flag(help_text: str) -> Any:
    """The type of an option that is false unless given, with its help text."""
    return Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=help_text)]
