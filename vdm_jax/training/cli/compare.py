"""`vdm-jax compare RECIPE:STEPS ... [options]`: train several recipes and compare them.

Choose numbers of steps that take the same time. Finished runs are not repeated, stopped runs are resumed.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from tqdm import tqdm

from vdm_jax.training.evaluation import comparison
from vdm_jax.training.evaluation.plots import NotFinite
from vdm_jax.training.run import remove_run
from vdm_jax.training.runtime.files import atomic_write, write_json

FRESH = "Delete these runs and start over."


@dataclasses.dataclass(frozen=True)
class Options:
    """Train recipes in turn, each for its number of steps, and compare them. Finished runs are not repeated.

    Writes comparison.md, comparison.png and comparison.json to the folder of these runs, which is separate from other
    runs.
    """

    recipes: tuple[str, ...]
    """Recipes with their numbers of steps, RECIPE:STEPS, in the order of the table."""
    workdir: str = "runs/compare"
    """Folder of these runs."""
    eval_examples: int = 0
    """Evaluate only this many test images; 0 evaluates all."""
    fresh: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=FRESH)] = False


def main(arguments: Sequence[str], program: str = "vdm-jax compare") -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog=program, config=(tyro.conf.PositionalRequiredArgs,))
    items = options.recipes
    runs = [comparison.open_comparison_run(item, options.workdir, options.eval_examples) for item in items]
    comparison.check_comparable(runs)
    for run in runs if options.fresh else ():
        remove_run(run.folder)
    folder, results = Path(options.workdir), []
    for run in tqdm(runs, desc="compare", unit="run", disable=not sys.stderr.isatty()):
        results.append(comparison.train_and_evaluate(run))
        jax.clear_caches()  # the next run needs other programs
    data = runs[0].data
    rows = {"test images": data.test.take(np.arange(comparison.COLUMNS))["image"]}
    failed = []
    for run, result in zip(runs, results, strict=True):
        if isinstance(result.images, NotFinite):
            failed.append(f"{run.name}: {result.images}")
        else:
            rows[run.name] = result.images
    table = comparison.table(results)
    with atomic_write(folder / "comparison.md") as unfinished:
        unfinished.write_text(table)
    write_json(folder / "comparison.json", [result.result for result in results])
    comparison.plot_rows(folder / "comparison.png", rows, data.spec.levels)
    print(table)
    for name in ("comparison.md", "comparison.json", "comparison.png"):
        print(f"  {folder / name}")
    if failed:
        raise NotFinite("Not in the figure:\n  " + "\n  ".join(failed))
