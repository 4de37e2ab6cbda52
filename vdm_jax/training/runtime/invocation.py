"""How the user calls the commands: by `make` in a checkout, or by `vdm-jax`; for messages that name a command."""

import os

MADE = "VDM_JAX_MAKE"  # set by the Makefile
TARGETS = {"evaluate": "eval"}  # make targets that are not named as the command


def command_line(command: str, recipe: str, options: str = "") -> str:
    """The command line that runs a command on a recipe, as the user would type it.

    Args:
        command: such as "sample".
        recipe: name or path of the recipe.
        options: of the command.
    """
    if os.environ.get(MADE):
        return f"make {TARGETS.get(command, command)} EXP={recipe}" + (f' ARGS="{options}"' if options else "")
    return " ".join(["vdm-jax", command, recipe, *options.split()])
