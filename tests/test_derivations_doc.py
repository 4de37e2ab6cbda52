"""`docs/derivations.md` matches the code: its functions and tests exist and belong together, and it is complete."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.derivations.check import CATALOGUE, ERRATA

TESTS = Path(__file__).parent
DOC = (TESTS.parent / "docs" / "derivations.md").read_text()
CHAPTERS = re.findall(r"^## ([A-Z]+) ", DOC, re.M)


class Entry(NamedTuple):
    """One section: an equation, three lines about it, a remark, perhaps a figure."""

    name: str
    equation: str
    functions: list[str]
    tests: list[tuple[str, str]]
    source: str
    remark: str


def _entry(section):
    head, figure = r"(.+)\n\n```math\n((?:.+\n)+)```\n\n", r"(?:\n!\[.+\]\((.+)\)\n)?"
    form = head + r"- function: (.+)\n- test: (.+)\n- source: (.+)\n\n(.+)\n" + figure + r"\n*"
    match = re.fullmatch(form, re.split(r"^## ", section, flags=re.M)[0])
    assert match, f"not a heading, an equation, function, test, source and a remark:\n{section}"
    name, equation, functions, tests, source, remark, figure = match.groups()
    assert figure is None or (TESTS.parent / "docs" / figure).is_file(), f"{figure} is not there: `make figures`"
    pairs = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
    return Entry(name, equation, re.findall(r"`([\w.]+)`", functions), pairs, source, remark)


ENTRIES = [_entry(section) for section in re.split(r"^### ", DOC + "\n", flags=re.M)[1:]]


@cache
def _module(path):
    return ast.parse((TESTS / path).read_text())


@cache
def _functions(path):
    return {node.name for node in ast.walk(_module(path)) if isinstance(node, ast.FunctionDef)}


def _imports(tree):
    """Local names of the package's names: {"kl": "gaussian.kl", "forward": "forward"}."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}".removeprefix("vdm_jax.")
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vdm_jax"
        for alias in node.names
    }


def _uses(path, test):
    """The names of the package that a test mentions, itself or by what its module defines: {"forward.marginal"}."""
    tree = _module(path)
    imports, defined = _imports(tree), {}
    for node in tree.body:
        for name in [getattr(node, "name", None), *(getattr(t, "id", None) for t in getattr(node, "targets", []))]:
            defined[name] = node
    found, seen, waiting = set(), set(), [test]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        for node in ast.walk(defined[name]):
            if isinstance(node, ast.Name):
                waiting.append(node.id)
                found |= {imports[node.id]} if node.id in imports else set()
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
                found.add(f"{imports[node.value.id]}.{node.attr}")
    return found


def test_functions_exist():
    for entry in ENTRIES:
        assert entry.functions, entry.name
        for name in entry.functions:
            module, *attributes = name.split(".")
            value = importlib.import_module(f"vdm_jax.{module}")
            for attribute in attributes:
                value = getattr(value, attribute)
            assert callable(value), name


def test_tests_exist():
    for entry in ENTRIES:
        assert entry.tests, entry.name
        for path, test in entry.tests:
            assert test in _functions(path), f"{path} has no {test}"


def test_tests_are_about_the_functions():
    for entry in ENTRIES:
        uses = {test: _uses(path, test) for path, test in entry.tests}
        for function in entry.functions:
            assert any(function in used for used in uses.values()), f"none of {list(uses)} mentions {function}"
        for test, used in uses.items():  # a proof may be in symbols alone
            assert not used or used & set(entry.functions), f"{test} mentions {used}, not one of {entry.functions}"


def test_every_entry_appears_once():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    for chapter in CHAPTERS:
        here = {name for name in names if name.startswith(f"{chapter}-")}
        assert here == {f"{chapter}-{i}" for i in range(1, CATALOGUE[chapter] + 1)}
    assert {name for name in names if name.startswith("erratum ")} == {f"erratum {name}" for name in ERRATA}


def test_coverage_is_what_the_sections_give():
    here = {chapter: sum(entry.name.startswith(f"{chapter}-") for entry in ENTRIES) for chapter in CATALOGUE}
    here["errata"] = sum(entry.name.startswith("erratum ") for entry in ENTRIES)
    total = {**CATALOGUE, "errata": len(ERRATA)}
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| (\d+) \| (\d+) \|$", DOC, re.M)
    assert {chapter: (int(n), int(of)) for chapter, n, of in rows} == {c: (here[c], total[c]) for c in total}
    coverage = f"**{sum(here.values())} of {sum(total.values())} entries**"
    assert coverage in DOC, f"at the top it should contain {coverage}"


def test_every_entry_named_in_code_or_tests_has_a_section():
    names = {entry.name for entry in ENTRIES}
    chapters = "|".join(CHAPTERS)
    for path in sorted((TESTS.parent / "vdm_jax").glob("*.py")):
        named = set(re.findall(rf"\b(?:{chapters})-\d+", path.read_text()))
        assert named <= names, f"{path.name} names {sorted(named - names)}"
    for path in sorted((TESTS / "derivations").glob("test_*.py")):
        for test in _functions(path):
            if match := re.match(r"test_([A-Z]+)_(\d+)", test):
                assert "-".join(match.groups()) in names, f"{path.name}::{test}"


def test_every_misprint_with_a_test_has_a_section():
    for path in sorted((TESTS / "derivations").glob("test_*.py")):
        for test in _functions(path):
            assert not test.startswith("test_erratum") or test in DOC, f"{path.name}::{test}"
