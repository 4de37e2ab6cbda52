"""Mutation tests of the equation files: `make mutants`.

Every equation file is changed in one place at a time: a sign, an operator, a number, a comparison. The tests must
notice each change that matters. The mutants are cosmic-ray's; the few that change nothing are in `mutants.toml`, with
the reason. All happens in a copy of the tree: the tree itself is only read.

    python -m tests.mutants [file ...]
"""

import ast
import gc
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILES = [
    "gaussian", "noise_levels", "schedules", "discrete_schedules", "time_sampling", "forward", "parameterization",
    "likelihoods", "divergence", "score_matching", "tweedie", "sure", "langevin", "energy", "autoencoder", "vae",
    "hvae", "elbo", "path_bounds", "losses", "vdm", "weightings", "reverse_variance", "probability_flow",
    "samplers/chain", "samplers/ancestral", "samplers/ddim", "samplers/churn", "samplers/euler", "samplers/heun",
    "samplers/dpmpp", "samplers/predictor_corrector", "samplers/repaint", "samplers/adaptive", "guidance",
    "dequantization", "closed_form", "information", "linear_gaussian", "metrics",
]  # fmt: skip
GOAL = 0.95
# Equations do not use //, shifts or bit operations except on masks, so one replacement is enough.
OPERATORS = [
    *("ReplaceBinaryOperator_" + pair for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul")),
    *("ReplaceBinaryOperator_" + pair for pair in ("BitAnd_BitOr", "BitOr_BitAnd")),
    *("ReplaceComparisonOperator_" + pair for pair in ("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt")),
    *("ReplaceComparisonOperator_" + pair for pair in ("Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt")),
    *("ReplaceComparisonOperator_" + pair for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *("ReplaceUnaryOperator_" + pair for pair in ("Delete_USub", "Delete_Invert", "Delete_Not")),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer"),
]
# Plain asserts, since rewriting them takes longer than most mutants live.
PYTEST = ["-x", "-q", "--tb=short", "--assert=plain", "-p", "no:cacheprovider", "-m", "not slow"]


class Mutant(NamedTuple):
    """One change: the file's new text, and the changed line before and after."""

    source: str
    number: int
    before: str
    after: str


class Outcome(NamedTuple):
    """The outcome of a mutant: killed, hung (which counts as killed), survived or equivalent."""

    mutant: Mutant
    fate: str


# -- the mutants ------------------------------------------------------------------------------------------------------


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a text that are Python, each once."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    tree, silent, seen = get_ast(source), silent_spans(source), {source}
    for name in OPERATORS:
        operator = plugins.get_operator(f"core/{name}")()
        positions = [(node, start) for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(positions):
            if node.parent.type == "parameters" or any(low <= start < high for low, high in silent):
                continue
            text = mutate_code(source, operator, occurrence)
            before, after = (t.splitlines()[start[0] - 1] for t in (source, text))
            if text in seen or not is_python(text) or is_less(name, occurrence, before[start[1] :]):
                continue
            seen.add(text)
            yield Mutant(text, start[0], before.strip(), after.strip())


def silent_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The positions without equations: annotations, decorators and the text of messages."""
    silent = []
    for node in ast.walk(ast.parse(source)):
        silent += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        silent += getattr(node, "decorator_list", [])
        silent += [node] if isinstance(node, ast.JoinedStr) else []
    spans = [node for node in silent if node is not None]
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in spans]


def is_less(name: str, occurrence: int, number: str) -> bool:
    """Whether a mutant is a float minus 1: redundant beside the float plus 1. Integers get both."""
    return name == "NumberReplacer" and occurrence % 2 == 1 and not re.match(r"\d+(?![\d.e])", number)


def is_python(text: str) -> bool:
    """Whether a text compiles: not every star that looks like a product to the operators is one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def equivalents(name: str) -> set[tuple[str, str]]:
    """The line and the changed line of the mutants of a file that change nothing."""
    with (ROOT / "tests" / "mutants.toml").open("rb") as file:
        entries = tomllib.load(file).get(name, [])
    return {(entry["line"], mutant) for entry in entries for mutant in entry["mutants"]}


# -- running the tests ------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what every test needs, once, so that each mutant's process forks with it.

    Import nothing that starts threads, which a fork would lose. JAX starts none before its first array, OpenBLAS one.
    """
    os.environ.update(JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    import beartype  # noqa: F401
    import hypothesis  # noqa: F401
    import jax  # noqa: F401
    import mpmath  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import sympy  # noqa: F401

    warnings.filterwarnings("ignore", message="os.fork")
    gc.freeze()  # garbage collection in each process skips all this


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> str:
    """Run tests of a tree in a process of their own: passed, failed or hung."""
    child = os.fork()
    if child == 0:
        _run_child(tree, tests)
    try:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                child = 0
                return "passed" if status == 0 else "failed"
            time.sleep(0.02)
        return "hung"
    finally:
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)


def _run_child(tree: Path, tests: Sequence[str]) -> None:
    code = 3
    try:
        log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        sys.path[0] = str(tree)  # its tests and its vdm_jax, not the ones this file belongs to
        sys.modules.pop("tests", None)
        import pytest

        code = int(pytest.main([*PYTEST, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stages(tree: Path, name: str) -> list[tuple[str, ...]]:
    """The tests that may kill a mutant of a file, in the order to run them: its own first, then more general ones."""
    derivations = sorted(str(path.relative_to(tree)) for path in (tree / "tests" / "derivations").glob("test_*.py"))
    others = [_test_of(tree, other) for other in ("accuracy", "transforms", *FILES)]
    return [(_test_of(tree, name),), ("tests/test_properties.py",), tuple(derivations), tuple(dict.fromkeys(others))]


def _test_of(tree: Path, name: str) -> str:
    """A file's own tests, or its folder's."""
    own = f"tests/test_{Path(name).name}.py"
    return own if (tree / own).exists() else f"tests/test_{Path(name).parts[0]}.py"


@cache
def baseline(tree: Path, tests: tuple[str, ...]) -> float:
    """The time limit of a mutant in seconds; exits if the tests fail without a mutant."""
    begin = time.monotonic()
    if run_tests(tree, tests, 3600.0) != "passed":
        sys.exit((tree / "log").read_text() + "\nThe tests fail without a mutant.")
    return 60.0 + 10.0 * (time.monotonic() - begin)  # a slow start is not a hang


def judge(tree: Path, name: str, mutant: Mutant) -> str:
    """Put a mutant in the place of its file and run the tests, stage by stage, until one fails."""
    path = tree / "vdm_jax" / f"{name}.py"
    original = path.read_text()
    for tests in stages(tree, name):
        limit = baseline(tree, tests)
        path.write_text(mutant.source)
        try:
            result = run_tests(tree, tests, limit)
        finally:
            path.write_text(original)
        if result != "passed":
            return "killed" if result == "failed" else "hung"
    return "survived"


def judge_file(tree: Path, name: str) -> list[Outcome]:
    """The outcomes of all mutants of a file; survivors are printed as they are found."""
    found = list(mutants((tree / "vdm_jax" / f"{name}.py").read_text()))
    listed = equivalents(name)
    for stale in listed - {(mutant.before, mutant.after) for mutant in found}:
        sys.exit(f"mutants.toml lists entries that are not mutants of {name}: {stale}")
    outcomes = []
    for mutant in found:
        same = (mutant.before, mutant.after) in listed
        outcomes.append(Outcome(mutant, "equivalent" if same else judge(tree, name, mutant)))
        if outcomes[-1].fate in ("survived", "hung"):
            print(f"{outcomes[-1].fate}: vdm_jax/{name}.py:{mutant.number}", flush=True)
            print(f"  - {mutant.before}\n  + {mutant.after}", flush=True)
    return outcomes


# -- the table --------------------------------------------------------------------------------------------------------


def row(name: str, outcomes: list[Outcome], seconds: float) -> tuple[str, float]:
    """A line of the table, and the share of the mutants that were killed."""
    fates = [outcome.fate for outcome in outcomes]
    hung, survived, same = (fates.count(fate) for fate in ("hung", "survived", "equivalent"))
    share = 1.0 - survived / max(1, len(fates) - same)
    counts = f"{len(fates):8} {fates.count('killed') + hung:8} {survived:9} {same:11} {hung:6}"
    return f"{name:18} {counts} {100 * share:7.1f} % {seconds / max(1, len(fates) - same):7.1f} s", share


def main(names: list[str]) -> None:
    """Print the table; exit with 1 if a file is below the goal."""
    preload()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")  # only changed programs compile
        tree = Path(folder) / "tree"
        for part in ("vdm_jax", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for name in names:
            begin = time.monotonic()
            rows.append(row(name, judge_file(tree, name), time.monotonic() - begin))
    print(f"{'file':18}  mutants   killed  survived  equivalent (hung)   score     each")
    print("\n".join(line for line, _ in rows))
    sys.exit(min(share for _, share in rows) < GOAL)


if __name__ == "__main__":
    main(sys.argv[1:] or FILES)
