"""The checks of `make accuracy`, and tests that they detect errors."""

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from tests import accuracy
from tests.optimizations import optimizations

# Schedules of 4000 steps and 256 bins represent these in fast runs.
LONG = (
    "discrete schedules of 1000 steps",
    "discrete schedules of 100000 steps",
    *(f"edges of {n} bins" for n in (2, 3, 17, 65536)),
)


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_for_users():
    """With all optimizations, also in `make test`, which leaves them out for speed."""
    with optimizations(True):
        yield


@pytest.mark.parametrize("source", [pytest.param(s, marks=[pytest.mark.slow] * (s in LONG)) for s in accuracy.SOURCES])
def test_float32_is_right_to_1e_6(source):
    for check in accuracy.SOURCES[source]():
        size, place = accuracy.worst(check)
        assert size <= accuracy.LIMIT, f"{check.quantity}: relative error {size:.1e} at {place}"


@pytest.mark.parametrize(
    ("value", "reference", "floor", "expected"),
    [
        (1.0 + 3e-6, mpf(1), 0.0, 3e-6),
        (3e-6, mpf(0), 1.0, 3e-6),  # relative to the floor if the reference is below it
        (1e-30, mpf(0), 0.0, np.inf),  # zero must be exact
        (np.nan, mpf(1), 0.0, np.inf),
        (3e38, mpmath.inf, 0.0, np.inf),
        (np.inf, mpmath.inf, 0.0, 0.0),
    ],
)
def test_errors_are_measured(value, reference, floor, expected):
    np.testing.assert_allclose(accuracy.error(value, reference, floor), expected, rtol=1e-9)


def test_a_float32_cumulative_product_would_fail():
    # A cumulative product in float32, as in many libraries: 1 - abar_t is off by up to 2e-4.
    abar = np.cumprod(np.float32(1) - np.linspace(1e-4, 0.02, 1000).astype(np.float32))
    reference = accuracy.linear_reference(1000)
    errors = [accuracy.error(np.sqrt(1 - abar[t - 1]), reference(t).sigma, 0.0) for t in (1, 2, 5)]
    assert max(errors) > 20 * accuracy.LIMIT
