"""`python -m vdm_jax.training EXPERIMENT`: train, evaluate and sample."""

from vdm_jax.training.cli.train import start

if __name__ == "__main__":
    start()
