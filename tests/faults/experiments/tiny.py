"""The test experiment of tests/training."""

from tests.training.experiments.tiny import CONFIG

__all__ = ["CONFIG"]
