"""The assertions of the derivations fail when they should, and record their errors."""

from types import SimpleNamespace

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
from tests.derivations.conftest import entries, names

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


def _report(test, *claims, failed=False):
    properties = [("claims", [(kind, 1e-9, slow) for kind, slow in claims])]
    return SimpleNamespace(location=("", 0, test), when="call", failed=failed, user_properties=properties)


def test_an_entry_needs_a_claim_of_its_strongest_kind_outside_the_slow_tests():
    fast, slow = False, True
    reports = [
        _report("test_AE_1_in_symbols", ("symbolic", fast)),
        _report("test_AE_1_numbers", ("exact", slow)),
        _report("test_AE_2_in_symbols[1.0]", ("symbolic", slow), ("exact", slow)),
        _report("test_AE_2_numbers", ("exact", fast)),
        _report("test_AE_3_numbers", ("exact", fast), failed=True),
        _report("test_VAE_1_without_a_claim"),
        _report("test_VAE_13_is_not_in_the_catalog", ("exact", fast)),
    ]
    found = {entry.name: entry for entry in entries(reports)}
    lines = {name: " ".join(str(entry).split()) for name, entry in found.items()}
    assert lines["AE-1"] == "AE-1 symbolic 1.0e-09 pass"
    assert lines["AE-2"] == "AE-2 symbolic 1.0e-09 FAIL: symbolic in slow tests only"
    assert lines["AE-3"] == "AE-3 exact 1.0e-09 FAIL"
    assert lines["VAE-1"] == "VAE-1 no claim FAIL"
    assert lines["VAE-2"] == "VAE-2 no test FAIL"
    assert lines["VAE-13 (not in the catalog)"].endswith("FAIL")
    assert [name for name, entry in found.items() if entry.good] == ["AE-1"]
