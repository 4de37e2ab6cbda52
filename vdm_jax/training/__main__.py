"""`python -m vdm_jax.training RECIPE` is `vdm-jax train RECIPE`."""

import sys

from vdm_jax.training.cli.main import start

if __name__ == "__main__":
    start("train", sys.argv[1:], "python -m vdm_jax.training")
