"""The console command `vdm-jax`, also `python -m vdm_jax`."""

import sys


def main(program: str = "vdm-jax") -> None:
    """Run the command line; without the packages of the extra `train`, print one line that names it."""
    try:
        from vdm_jax.training.cli.main import main as run
    except ImportError as error:
        if "vdm_jax[train]" not in str(error):
            raise
        sys.exit(str(error))
    run(program=program)


if __name__ == "__main__":
    main("python -m vdm_jax")
