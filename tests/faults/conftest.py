"""The undisturbed run."""

import pytest

from tests.faults.harness import STEPS, train_here


@pytest.fixture(autouse=True)
def quick(without_old_garbage):
    """Reading damaged checkpoints takes less time."""


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run of OPTIONS without interruptions."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    train_here(folder, steps=STEPS, checkpoint_every=10, log_every=5, keep=3)
    return folder
