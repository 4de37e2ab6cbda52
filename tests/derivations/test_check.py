"""The assertions of the derivations fail when they should, and record their errors."""

import numpy as np
import pytest
import sympy as sp

from tests.derivations import check
from tests.derivations.check import (
    assert_close,
    assert_disproved,
    assert_mean,
    assert_moments,
    assert_proved,
    refuted,
)
from tests.derivations.conftest import names

x, y = sp.symbols("x y", positive=True)


def test_proofs():
    assert_proved(sp.log(x) + sp.log(y), sp.log(x * y))
    assert_disproved((x + y) ** 2, x**2 + y**2)
    with pytest.raises(AssertionError, match="simplifies to"):
        assert_proved((x + y) ** 2, x**2 + y**2)
    with pytest.raises(AssertionError, match="the same"):
        assert_disproved((x + y) ** 2, x**2 + 2 * x * y + y**2)


@pytest.mark.parametrize("ours", [1.0 + 2e-12, np.nan, np.inf])
def test_close_is_close(ours):
    assert_close([1.0, 2.0], [1.0, sp.Integer(2)])
    with pytest.raises(AssertionError):
        assert_close([ours, 2.0], [1.0, 2.0], rtol=1e-12)
    with pytest.raises(ValueError, match="shapes"), refuted():
        assert_close([1.0], [1.0, 2.0])


def test_a_mean_is_within_four_standard_errors():
    samples = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
    assert_moments(samples, 3.0, 4.0)
    for wrong in (3.0 + 0.12, 3.0 - 0.12, np.nan):
        with pytest.raises(AssertionError):
            assert_mean(samples, wrong)
    with pytest.raises(AssertionError, match="resolves less"):
        assert_mean(samples, 3.0, resolution=0.01)


def test_notes_are_kept_but_for_what_is_refuted():
    assert_close(1.0 + 1e-6, 1.0, rtol=1e-5)
    with refuted():
        assert_close(2.0, 1.0)
    assert_proved(x, x)
    assert [kind for kind, _ in check.notes] == ["exact", "symbolic"]
    assert 0.9e-6 < check.notes[0][1] < 1.1e-6
    with pytest.raises(AssertionError, match="passes too"), refuted():
        assert_close(1.0, 1.0)


def test_names_of_entries():
    assert names("test_ELBO_1_and_3_have_one_expectation") == ["ELBO-1", "ELBO-3"]
    assert names("test_ELBO_13_bits") == ["ELBO-13"]
    assert names("test_erratum_product_to_i") == ["erratum product_to_i"]
    assert names("test_exact_step_is_exact") == []
