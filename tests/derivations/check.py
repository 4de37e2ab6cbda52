"""Assertions for the derivations: a symbolic identity, an exact value, a mean of samples.

Each assertion records its error; `make derivations` prints the largest of each entry (see conftest.py).
"""

from contextlib import contextmanager

import numpy as np
import sympy as sp

# The catalog of equations: the number of entries per chapter, and the names of the tests of misprints.
CATALOGUE = {
    "AE": 3, "VAE": 12, "HVAE": 5, "FWD": 7, "POST": 8, "ELBO": 13, "PAR": 3, "SAM": 4, "TIME": 3, "WEIGHT": 2,
    "VDM": 2, "VAR": 4, "LIK": 5, "EBM": 4, "SM": 5, "LAN": 3, "TW": 3, "SURE": 3,
}  # fmt: skip
ERRATA = (
    "alpha_of_a_standard_deviation",
    "product_to_i",
    "noise_scale_of_one_step",
    "scale_of_the_posterior_mean",
    "marginal_score_is_not_minus_eps_over_sigma",
    "the_half_belongs_to_the_whole_kl",
    "algorithms_need_the_cumulative_product",
    "reverse_step_goes_to_the_next_state",
    "the_decoder_is_a_distribution_of_x",
    "a_hierarchy_counts_each_latent_once",
    "generation_samples_the_prior",
    "consistency_term_averages_over_the_bridge",
    "hierarchy_kl_needs_the_sample",
)

KINDS = ("symbolic", "exact", "statistical")  # the strongest first
notes: list[tuple[str, float]] = []  # kind and error of each claim of the running test


def assert_proved(left, right=0):
    """sympy simplifies left - right to zero."""
    notes.append(("symbolic", 0.0))
    rest = _simplest(left, right)
    assert rest == 0, f"{left} - ({right}) simplifies to {rest}"


def assert_disproved(left, right=0):
    """left and right differ at one point: every symbol has its own value in (0, 1/2]."""
    notes.append(("symbolic", 0.0))
    rest = sp.sympify(left) - right
    symbols = sorted(rest.free_symbols, key=str)
    value = sp.N(rest.subs({symbol: sp.Rational(1, 2 + i) for i, symbol in enumerate(symbols)}), 30)
    assert abs(value) > 1e-9, f"{left} and {right} are the same, or nearly: they differ by {value}"


def assert_close(ours, truth, *, rtol=1e-12, atol=0.0):
    """Every number is within atol + rtol |truth|. Records the largest error over the largest |truth|."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    if truth.ndim and ours.shape != truth.shape:
        raise ValueError(f"shapes {ours.shape} and {truth.shape}: not a failure that `refuted` may catch")
    error = np.abs(ours - truth)
    notes.append(("exact", float(error.max() / (np.abs(truth).max() or 1.0))))
    assert np.all(error <= atol + rtol * np.abs(truth)), f"{ours} is not {truth}: off by {error}"


def assert_mean(samples, truth, *, resolution=None):
    """The mean of independent samples is within four standard errors of the exact value `truth`.

    `resolution` bounds the standard error: a test with a wider error bar would not detect a wrong formula.
    """
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(samples.shape[0])
    z = (samples.mean(axis=0) - np.asarray(truth, np.float64)) / error
    notes.append(("statistical", float(np.abs(z).max())))
    assert np.all(np.abs(z) < 4), f"mean {samples.mean(axis=0)} is {z} standard errors from {truth}"
    assert resolution is None or np.all(error < resolution), f"standard error {error} resolves less than {resolution}"


def assert_moments(samples, mean, var):
    """Independent normal samples have this mean and variance."""
    assert_mean(samples, mean)
    assert_mean((np.asarray(samples, np.float64) - np.asarray(mean, np.float64)) ** 2, var)


@contextmanager
def refuted():
    """The numerical assertion inside, which states a misprint, must fail."""
    before = len(notes)
    try:
        yield
    except AssertionError:
        return
    finally:
        del notes[before:]
    raise AssertionError("the printed form passes too: this check does not distinguish it from the correct one")


def _simplest(left, right):
    """left - right, simplified until it is zero: logarithms are combined first, since simplify does not."""
    rest = sp.simplify(sp.expand(sp.simplify(left) - sp.simplify(right)))
    return rest if rest == 0 else sp.simplify(sp.logcombine(sp.expand(rest), force=True))
