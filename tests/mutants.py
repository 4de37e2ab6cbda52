"""Mutation tests of the equation files: `make mutants`.

Every equation file is changed in one place at a time: a sign, an operator, a number, a comparison. The tests that
`make test` runs must notice each change that matters. The mutants are cosmic-ray's; the few that change nothing are in
`mutants.toml`, with the reason. All happens in copies of the tree: the tree itself is only read.

    python -m tests.mutants [file ...] [--sample 60] [--processes 2]
"""

import argparse
import ast
import concurrent.futures
import gc
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILES = [
    "gaussian", "noise_levels", "schedules", "discrete_schedules", "time_sampling", "forward", "parameterization",
    "likelihoods", "divergence", "score_matching", "tweedie", "sure", "langevin", "energy", "autoencoder", "vae",
    "hvae", "elbo", "path_bounds", "losses", "vdm", "weightings", "reverse_variance", "probability_flow",
    "samplers/chain", "samplers/ancestral", "samplers/ddim", "samplers/churn", "samplers/euler", "samplers/heun",
    "samplers/dpmpp", "samplers/predictor_corrector", "samplers/repaint", "samplers/twisted", "samplers/adaptive",
    "guidance", "dequantization", "closed_form", "information", "linear_gaussian", "metrics",
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
# for each file, the tests of other files that killed its last mutants, in this process
KILLERS: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=6))


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

    tree, silent, seen = get_ast(source), silent_spans(source), {_program(source)}
    for name in OPERATORS:
        operator = plugins.get_operator(f"core/{name}")()
        positions = [(node, start) for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(positions):
            if node.parent.type == "parameters" or any(low <= start < high for low, high in silent):
                continue
            text = mutate_code(source, operator, occurrence)
            before, after = (t.splitlines()[start[0] - 1] for t in (source, text))
            program = _program(text)
            if program is None or program in seen or is_less(name, occurrence, before[start[1] :]):
                continue
            seen.add(program)
            yield Mutant(text, start[0], before.strip(), after.strip())


def silent_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The positions without equations: annotations, decorators, default arguments and the text of messages."""
    silent = []
    for node in ast.walk(ast.parse(source)):
        silent += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        silent += getattr(node, "decorator_list", [])
        silent += [*node.defaults, *node.kw_defaults] if isinstance(node, ast.arguments) else []
        silent += [node] if isinstance(node, ast.JoinedStr) else []
    spans = [node for node in silent if node is not None]
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in spans]


def is_less(name: str, occurrence: int, number: str) -> bool:
    """Whether a mutant is a float minus 1: redundant beside the float plus 1. Integers get both."""
    return name == "NumberReplacer" and occurrence % 2 == 1 and not re.match(r"\d+(?![\d.e])", number)


def _program(text: str) -> str | None:
    """The syntax tree, which is the same for 1e24 and 1e24 + 1; None where a text is not Python.

    Not every star that looks like a product to the operators is one.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(text, "mutant", "exec")
        return ast.dump(ast.parse(text))
    except SyntaxError:
        return None


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
    os.environ.update(JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # as in `make test`
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
    """The tests that may kill a mutant of a file: its own, then all that import it."""
    own = _test_of(tree, name)
    paths = sorted(path for path in (tree / "tests").rglob("test_*.py") if _imports(path, name.replace("/", ".")))
    return [(own,), tuple(other for path in paths if (other := str(path.relative_to(tree))) != own)]


def _test_of(tree: Path, name: str) -> str:
    """A file's own tests, or its folder's."""
    own = f"tests/test_{Path(name).name}.py"
    return own if (tree / own).exists() else f"tests/test_{Path(name).parts[0]}.py"


def _imports(path: Path, module: str) -> bool:
    """Whether a test imports a module of vdm_jax, or the package that the module is in."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return not imported.isdisjoint({f"vdm_jax.{module}", f"vdm_jax.{module.split('.')[0]}"})


def time_limit(tree: Path, names: Sequence[str], processes: int) -> float:
    """The seconds after which a mutant hangs: those of all tests without a mutant, and more; exits if they fail.

    This also compiles the programs that mutants do not change.
    """
    tests = sorted({test for name in names for stage in stages(tree, name) for test in stage})
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", *PYTEST, "-n", str(processes), *tests]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{run.stdout}\nThe tests fail without a mutant.")
    return 120.0 + time.monotonic() - begin


def judge(tree: Path, name: str, mutant: Mutant, limit: float) -> str:
    """Put a mutant in the place of its file and run the tests, stage by stage, until one fails.

    The tests of other files that killed the last mutants come before all the other ones, which take much longer.
    """
    path = tree / "vdm_jax" / f"{name}.py"
    original = path.read_text()
    path.write_text(mutant.source)
    own, others = stages(tree, name)
    killers = KILLERS[name]
    try:
        for tests in (own, tuple(killers), others):
            result = run_tests(tree, tests, limit) if tests else "passed"
            if result == "failed" and tests is not own:
                killers.extendleft(
                    set(re.findall(r"^FAILED (\S+::\w+)", (tree / "log").read_text(), re.M)) - {*killers}
                )
            if result != "passed":
                return "killed" if result == "failed" else "hung"
        return "survived"
    finally:
        path.write_text(original)


# -- many mutants in several processes --------------------------------------------------------------------------------


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of what the tests of equations read."""
    for part in ("vdm_jax", "tests", "experiments", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / part, folder)
    return folder


def _judge_in_own_tree(root: Path, name: str, mutant: Mutant, limit: float) -> tuple[Outcome, float]:
    """The outcome of a mutant in this process's copy of the tree, and the seconds that it took."""
    tree = root / f"tree-{os.getpid()}"
    if not tree.exists():
        copy_of_the_tree(tree)
    begin = time.monotonic()
    return Outcome(mutant, judge(tree, name, mutant, limit)), time.monotonic() - begin


def sampled(name: str, sample: int | None) -> tuple[int, list[Mutant]]:
    """The number of mutants of a file, and `sample` of them in even distances."""
    found = list(mutants((ROOT / "vdm_jax" / f"{name}.py").read_text()))
    if stale := equivalents(name) - {(mutant.before, mutant.after) for mutant in found}:
        sys.exit(f"mutants.toml lists entries that are not mutants of {name}: {stale}")
    number = len(found) if sample is None else min(sample, len(found))
    return len(found), [found[i * len(found) // number] for i in range(number)]


def judge_files(
    names: Sequence[str], sample: int | None, processes: int, root: Path
) -> Iterator[tuple[str, int, list[Outcome], float]]:
    """Judge the mutants of files; each file's name, number of mutants, outcomes and seconds, when it is complete.

    Survivors are printed as they are found.
    """
    totals, outcomes, seconds, waiting = {}, defaultdict(list), defaultdict(float), {}
    limit = time_limit(copy_of_the_tree(root / "tree"), names, processes)
    fork = multiprocessing.get_context("fork")  # with the imports of `preload`
    with concurrent.futures.ProcessPoolExecutor(processes, fork) as pool:
        for name in names:
            totals[name], chosen = sampled(name, sample)
            listed = equivalents(name)
            for mutant in chosen:
                if (mutant.before, mutant.after) in listed:
                    outcomes[name].append(Outcome(mutant, "equivalent"))
                else:
                    waiting[pool.submit(_judge_in_own_tree, root, name, mutant, limit)] = name
        left = Counter(waiting.values())
        for future in concurrent.futures.as_completed(waiting):
            name, (outcome, spent) = waiting[future], future.result()
            outcomes[name].append(outcome)
            seconds[name] += spent
            left[name] -= 1
            if outcome.fate in ("survived", "hung"):
                print(f"{outcome.fate}: vdm_jax/{name}.py:{outcome.mutant.number}", flush=True)
                print(f"  - {outcome.mutant.before}\n  + {outcome.mutant.after}", flush=True)
            if not left[name]:
                yield name, totals[name], outcomes[name], seconds[name]
    yield from ((name, totals[name], outcomes[name], 0.0) for name in names if name not in seconds)


# -- the table --------------------------------------------------------------------------------------------------------


def row(name: str, total: int, outcomes: list[Outcome], seconds: float) -> tuple[str, float]:
    """A line of the table, and the share of the mutants that were killed."""
    fates = [outcome.fate for outcome in outcomes]
    hung, survived, same = (fates.count(fate) for fate in ("hung", "survived", "equivalent"))
    share = 1.0 - survived / max(1, len(fates) - same)
    counts = f"{total:8} {len(fates):7} {fates.count('killed') + hung:8} {survived:9} {same:11} {hung:6}"
    return f"{name:27} {counts} {100 * share:7.1f} % {seconds / max(1, len(fates) - same):7.1f} s", share


def main() -> None:
    """Print the table; exit with 1 if a file is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", choices=[*FILES, []], metavar="file", help="such as elbo, samplers/heun")
    parser.add_argument("--sample", type=int, help="only this many mutants per file, in even distances")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    preload()
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")  # only changed programs compile
        print(f"{'file':27}  mutants  judged   killed  survived  equivalent (hung)   score     each", flush=True)
        for judged in judge_files(options.files or FILES, options.sample, options.processes, Path(folder)):
            line, share = row(*judged)
            print(line, flush=True)
            shares.append(share)
    sys.exit(min(shares) < GOAL)


if __name__ == "__main__":
    main()
