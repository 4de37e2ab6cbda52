"""`python -m vdm_jax.training EXPERIMENT` is `vdm-jax train EXPERIMENT`."""

import sys

from vdm_jax.training.cli.main import start

if __name__ == "__main__":
    start("train", sys.argv[1:], "python -m vdm_jax.training")
