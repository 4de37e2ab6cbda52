"""A comparison of recipes on one data set: each is trained and evaluated, for a common table and figure."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vdm_jax.training import registry
from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.evaluation import dry_run, likelihood_report
from vdm_jax.training.evaluation.plots import NotFinite, save_figure
from vdm_jax.training.evaluation.report import format_mean_and_error, is_finished, write_report
from vdm_jax.training.evaluation.sampling import Sampler
from vdm_jax.training.loop import train
from vdm_jax.training.run import Run, newest_checkpoint, open_run
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.metrics_writer import format_duration

COLUMNS = 10  # images in a row of the figure
MAX_COST = 1000  # network evaluations for each image in an importance-weighted bound


class Comparison(NamedTuple):
    """One recipe of a comparison: its report, and its samples or the error that they are not finite."""

    result: dict[str, Any]
    images: np.ndarray | NotFinite


def open_comparison_run(item: str, workdir: str, eval_examples: int = 0) -> Run:
    """The run for RECIPE:STEPS.

    Args:
        item: name or path of a recipe, and its number of steps.
        workdir: folder of the comparison's runs.
        eval_examples: number of test images to evaluate; 0 is all.

    Raises:
        UserError: the item does not have this form, or the recipe does not exist.
    """
    recipe, _, steps = item.rpartition(":")
    if not recipe or not steps.isdecimal() or int(steps) < 1:
        raise UserError(f"Expected RECIPE:STEPS, such as vae_digits:2000, got {item!r}.")
    config = shortened(registry.find(recipe), int(steps))
    devices = jax.local_device_count()
    block = -(-eval_examples // devices) * devices or config.eval_batch_size  # padding costs 1,000 passes an image
    fixed = {"picture_every": 0, "num_samples": COLUMNS, "eval_examples": eval_examples}
    fixed["eval_batch_size"] = min(config.eval_batch_size, block)
    return open_run(recipe, dataclasses.replace(config, workdir=workdir, **fixed))


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """A recipe with fewer steps; its warm-ups and its EMA cover the same fraction of the run."""
    fraction = min(steps / config.steps, 1.0)
    ema_decay = 1.0 - min((1.0 - config.ema_decay) / fraction, 0.1)
    warming = [field.name for field in dataclasses.fields(config) if field.name.endswith("warmup_steps")]
    scaled = {name: round(getattr(config, name) * fraction) for name in warming}
    return dataclasses.replace(config, steps=steps, ema_decay=min(ema_decay, config.ema_decay), **scaled)


def check_comparable(runs: list[Run]) -> None:
    """Reject a comparison of nothing, of different data sets, or of points in the plane.

    Raises:
        UserError: names the data sets and the remedy.
    """
    if not runs:
        raise UserError("Give at least one RECIPE:STEPS, such as vae_digits:2000.")
    if len(names := {run.data.spec.name for run in runs}) > 1:
        raise UserError(
            f"The recipes use different data sets ({', '.join(sorted(names))}): compare recipes with the same data set."
        )
    if not runs[0].data.spec.levels:
        raise UserError(f"compare supports image recipes only; {names.pop()} is a 2-D point data set.")


def train_and_evaluate(run: Run) -> Comparison:
    """Train, evaluate and sample; a finished run is not trained again, a stopped one is resumed."""
    done = is_finished(run)
    saved = newest_checkpoint(run) if done else _train(run)
    result = json.loads((run.folder / "report.json").read_text()) if done else write_report(run, saved)
    rows = {
        name: row
        for name, row in run.experiment.likelihood_rows.items()
        if _is_importance_weighted(name) and row.cost <= MAX_COST
    }
    if not rows.keys() <= result.setdefault("likelihood", {}).keys():  # an earlier run may have stopped before them
        likelihood_report.add_likelihood(run, saved, rows, result, curve=False)
    try:
        return Comparison(result, np.asarray(Sampler(run)(on_one_device(saved.state.ema)).images))
    except NotFinite as error:  # the other recipes can still be compared
        return Comparison(result, error)


def _train(run: Run) -> Saved:
    """Train a run after a dry run."""
    return train(run, step=dry_run.check_training(run, likelihood=False))


def _is_importance_weighted(name: str) -> bool:
    return name.startswith("bound, K")


def table(comparisons: list[Comparison]) -> str:
    """The comparison in Markdown: bits/dim with standard errors; for autoencoders, which have none, their error."""
    lines = [
        "| | bits/dim, the bound | bits/dim, importance-weighted | squared error a pixel | parameters | steps | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in (comparison.result for comparison in comparisons):
        weighted = [f"{_number(e['bits_per_dim'])} ({name[7:]})" for name, e in result["likelihood"].items()]
        cells = [
            result["experiment"],
            _number(result["test"].get("bits_per_dim")),
            ", ".join(weighted) or "-",
            _number(result["test"].get("reconstruction_error")),
            f"{result['parameters']:,}",
            f"{result['steps']:,}",
            format_duration(result["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: dict[str, float | None] | None) -> str:
    return "-" if value is None else format_mean_and_error(value)


def plot_rows(path: Path, rows: dict[str, np.ndarray], levels: int) -> Path:
    """Write a figure with a row of images for each name."""
    import matplotlib.pyplot as plt

    shape = (len(rows), COLUMNS)
    figure, axes = plt.subplots(
        *shape, figsize=(0.75 * COLUMNS + 1.4, 0.8 * len(rows)), layout="constrained", squeeze=False
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images[:COLUMNS], strict=True):
            place.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=levels - 1)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return save_figure(figure, path)
