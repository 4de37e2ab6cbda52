"""The undisturbed run."""

import pytest

from tests.faults.harness import OPTIONS, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run of OPTIONS without interruptions."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    train(folder, *OPTIONS)
    return folder
