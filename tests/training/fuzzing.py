"""Random examples of a test's arguments: one in `make test`, many in `make test-all`."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

each_number = pytest.mark.parametrize("number", [1, pytest.param(60, marks=pytest.mark.slow)])


def on_examples(number: int, *strategies: SearchStrategy) -> Callable[[Callable], None]:
    """A decorator that calls a function with this many examples of its arguments, always the same ones."""
    options = settings(deadline=None, max_examples=number, derandomize=True, suppress_health_check=list(HealthCheck))

    def call(function: Callable) -> None:
        given(*strategies)(options(function))()

    return call
