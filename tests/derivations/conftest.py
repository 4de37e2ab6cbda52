"""`make derivations`: one line for each entry of the catalog.

The recorded assertions of a test (check.notes) are sent with its report, so that this works with xdist too. An entry
fails if a test of it fails, if it has no test, or if only slow tests, which `make test` skips, make a claim of its
strongest kind.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import pytest

from tests.derivations import check

reports: list[pytest.TestReport] = []


class Claim(NamedTuple):
    """One assertion of a test, as recorded in check.notes."""

    kind: str
    error: float
    slow: bool


class Entry(NamedTuple):
    """One line: all tests of an entry together."""

    name: str
    claims: list[Claim] | None  # None without a test
    failed: bool

    @property
    def kind(self):
        """The strongest kind of any claim."""
        return min((claim.kind for claim in self.claims or []), key=check.KINDS.index, default=None)

    @property
    def verdict(self):
        if self.failed or not self.claims:
            return "FAIL"
        fast = any(claim.kind == self.kind and not claim.slow for claim in self.claims)
        return "pass" if fast else f"FAIL: {self.kind} in slow tests only"

    @property
    def good(self):
        return self.verdict == "pass"

    def worst(self, kind):
        return max((claim.error for claim in self.claims or [] if claim.kind == kind), default=None)

    def __str__(self):
        kind = self.kind or ("no test" if self.claims is None else "no claim")
        error, z = (
            "" if worst is None else f"{worst:{form}}"
            for worst, form in ((self.worst("exact"), ".1e"), (self.worst("statistical"), ".1f"))
        )
        return f"{self.name:<52} {kind:<11} {error:>8} {z:>5}  {self.verdict}"


def names(test: str) -> list[str]:
    """test_ELBO_1_and_3_have_one_expectation: ELBO-1, ELBO-3. test_erratum_product_to_i: erratum product_to_i."""
    if match := re.match(r"test_([A-Z]+)_(\d+(?:_and_\d+)*)_", test):
        return [f"{match[1]}-{number}" for number in match[2].split("_and_")]
    return [test.removeprefix("test_").replace("_", " ", 1)] if test.startswith("test_erratum_") else []


def entries(reports) -> list[Entry]:
    """All entries, in the order of the catalog."""
    claims, failed = defaultdict(list), set()
    for report in reports:
        made = dict(report.user_properties).get("claims", []) if report.when == "call" else []
        for name in names(report.location[2].split("[")[0]):
            claims[name] += [Claim(*claim) for claim in made]
            failed |= {name} if report.failed else set()
    order = [f"{chapter}-{i}" for chapter, last in check.CATALOGUE.items() for i in range(1, last + 1)]
    order += [f"erratum {name}" for name in check.ERRATA]
    strange = sorted(claims.keys() - set(order))  # a name that is not in the catalog: fails, on a separate line
    lines = [Entry(name, claims.get(name), name in failed) for name in order]
    return lines + [Entry(f"{name} (not in the catalog)", [], True) for name in strange]


def pytest_addoption(parser):
    parser.addoption("--derivations", action="store_true", help="one line for each entry of the catalog of equations")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    check.notes.clear()
    try:
        return (yield)
    finally:
        slow = item.get_closest_marker("slow") is not None
        item.user_properties.append(("claims", [(kind, error, slow) for kind, error in check.notes]))


def pytest_runtest_logreport(report):
    reports.append(report)


def _requested(config):
    return config.getoption("derivations", default=False) and not hasattr(config, "workerinput")


def pytest_sessionfinish(session):
    if _requested(session.config) and not all(entry.good for entry in entries(reports)):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if not _requested(config):
        return
    write, lines = terminalreporter.write_line, entries(reports)
    write(f"\n{'entry':<52} {'kind':<11} {'error':>8} {'|z|':>5}")
    for entry in lines:
        write(str(entry))
    total = sum(check.CATALOGUE.values()) + len(check.ERRATA)
    write(f"{sum(entry.good for entry in lines)} of {total} entries of the catalog")
