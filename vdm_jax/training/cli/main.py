"""The console command `vdm-jax`, also `python -m vdm_jax`; `python -m vdm_jax.training` is its command `train`."""

import signal
import sys
from collections.abc import Sequence

from vdm_jax.training.runtime import environment  # noqa: F401  imported first: it changes the environment

COMMANDS = {
    "train": "train a recipe, or resume its run; then evaluate and sample",
    "sample": "sample from the latest checkpoint of a run",
    "evaluate": "evaluate the latest checkpoint of a run on the test set",
    "score": "the likelihood of each given image: RECIPE INPUT",
    "interpolate": "images between pairs of given images, through the latents of the ODE: RECIPE INPUT",
    "restore": "inpainting and super-resolution of given images: RECIPE INPUT",
    "compare": "train several recipes and compare them: RECIPE:STEPS ...",
    "import": "import the weights of a diffusers folder as a run, or export a run",
}


def main(arguments: Sequence[str] | None = None, program: str = "vdm-jax") -> None:
    """Run the command named by the first argument.

    Args:
        arguments: of the command line; by default those of this process.
        program: the program as called, for usage messages.
    """
    first, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if first in COMMANDS:
        start(first, rest, f"{program} {first}")
        return
    width = max(map(len, COMMANDS))
    usage = f"usage: {program} COMMAND RECIPE [options]\n\n"
    usage += "".join(f"  {name:{width}}  {what}\n" for name, what in COMMANDS.items())
    usage += f"\n`{program} COMMAND --help` shows more, `{program} COMMAND RECIPE --help` all options."
    if first in ("-h", "--help"):
        print(usage)
        return
    unknown = f"{program}: unknown command {first[:100]!r}\n\n" if first else ""
    sys.exit(f"{unknown}{usage}")


def start(command: str, arguments: Sequence[str], program: str) -> None:
    """Run a command in this process, with quiet libraries and readable errors.

    Args:
        command: one of COMMANDS.
        arguments: the arguments after the command.
        program: the program and the command as called, for usage messages.
    """
    # Before and after training there is nothing to save: Ctrl-C ends the process without the traceback of an import.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vdm_jax.training.cli import (
        common,
        compare,
        evaluate,
        import_weights,
        interpolate,
        restore,
        sample,
        score,
        train,
    )

    mains = {
        "train": train.main,
        "sample": sample.main,
        "evaluate": evaluate.main,
        "score": score.main,
        "interpolate": interpolate.main,
        "restore": restore.main,
        "compare": compare.main,
        "import": import_weights.main,
    }
    common.execute(lambda: mains[command](arguments, program))
