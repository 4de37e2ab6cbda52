"""`docs/derivations.md` and the code say the same: every row's function and test exist, every entry appears once."""

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "derivations.md").read_text()
CHAPTERS = re.findall(r"^## ([A-Z]+) ", DOC, re.M)
LATER = set(re.findall(r"[A-Z]+-\d+", " ".join(re.findall(r"^Not here yet:.*$", DOC, re.M))))


def _rows():
    """The table rows as lists of cells; a `\\|` inside a formula is no border."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in DOC.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not re.fullmatch(r"[-: ]+|ID|misprint", row[0].strip())]


def _tests(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


ROWS = _rows()


def test_every_row_is_complete():
    assert ROWS
    for row in ROWS:
        assert [bool(cell) for cell in row] == [True] * 6, row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:30])
def test_functions_exist(row):
    for name in re.findall(r"`([\w.]+)`", row[2]):
        module, *attributes = name.split(".")
        value = importlib.import_module(f"vdm_jax.{module}")
        for attribute in attributes:
            value = getattr(value, attribute)
        assert callable(value), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:30])
def test_tests_exist(row):
    names = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])
    assert names
    for path, test in names:
        assert test in _tests(ROOT / "tests" / path), f"{path} has no {test}"


def test_every_entry_appears_once():
    ids = Counter(row[0] for row in ROWS if re.fullmatch(r"[A-Z]+-\d+", row[0]))
    assert set(ids.values()) == {1}
    for chapter in CHAPTERS:
        numbers = sorted(int(i.split("-")[1]) for i in [*ids, *LATER] if i.startswith(f"{chapter}-"))
        assert numbers == list(range(1, len(numbers) + 1)), f"{chapter} has {numbers}"


def test_every_entry_named_in_code_or_tests_has_a_row():
    entries = {row[0] for row in ROWS}
    chapters = "|".join(CHAPTERS)
    for path in sorted((ROOT / "vdm_jax").glob("*.py")):
        named = set(re.findall(rf"\b(?:{chapters})-\d+", path.read_text()))
        assert named - LATER <= entries, f"{path.name} names {sorted(named - LATER - entries)}"
    for path in sorted((ROOT / "tests" / "derivations").glob("test_*.py")):
        for test in _tests(path):
            if match := re.match(r"test_([A-Z]+)_(\d+)", test):
                assert "-".join(match.groups()) in entries, f"{path.name}::{test}"


def test_every_misprint_with_a_test_has_a_row():
    for path in sorted((ROOT / "tests" / "derivations").glob("test_*.py")):
        for test in _tests(path):
            assert not test.startswith("test_erratum") or test in DOC, f"{path.name}::{test}"
