"""The run that nothing happened to."""

import pytest

from tests.faults.harness import OPTIONS, train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run of OPTIONS that went through at once."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    train(folder, *OPTIONS)
    return folder
