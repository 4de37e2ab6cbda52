"""Several experiments in turn, in one table and one picture: `python -m vdm_jax.training.cli.compare NAME:STEPS ...`.

The numbers of steps make the comparison: such as take the same time. A rung that is finished is not trained again, and
one that was stopped goes on.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from vdm_jax.training import dry_run, registry
from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.cli.command import newest, program
from vdm_jax.training.cli.train import finished
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.evaluation import likelihood_report
from vdm_jax.training.evaluation.plots import NotFinite, finish
from vdm_jax.training.evaluation.report import plus_minus, write_report
from vdm_jax.training.evaluation.sampling import Sampler
from vdm_jax.training.loop import train
from vdm_jax.training.run import Run, open_run, remove
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json, writing
from vdm_jax.training.runtime.metrics_writer import clock

FRESH = "Delete these runs first and start anew."
WIDE = 10  # images in a row of the picture
MOST = 1000  # network passes an image that an importance-weighted bound may take


@dataclasses.dataclass(frozen=True)
class Options:
    """Train experiments in turn, each for its number of steps, and compare them. What is done already is kept.

    Writes ladder.md, ladder.png and ladder.json into the folder of these runs, which is apart from other runs.
    """

    rungs: tuple[str, ...]
    """Experiments with their numbers of steps, NAME:STEPS, in the order of the table."""
    workdir: str = "runs/ladder"
    """Folder of these runs."""
    eval_examples: int = 0
    """Evaluate only the first so many test images; 0 is all."""
    fresh: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=FRESH)] = False


class Rung(NamedTuple):
    """An experiment of the ladder, done: its report, and images drawn from it or why there are none."""

    result: dict[str, Any]
    images: np.ndarray | NotFinite


def chosen(rung: str, options: Options) -> Run:
    """The run of NAME:STEPS.

    Raises:
        UserError: not of this form, or no such experiment.
    """
    name, _, steps = rung.partition(":")
    if not steps.isdecimal() or int(steps) < 1:
        raise UserError(f"{rung!r} is no rung: give an experiment and its number of steps, such as vae_digits:2000.")
    config = shortened(registry.find(name), int(steps))
    devices = jax.local_device_count()
    block = -(-options.eval_examples // devices) * devices or config.eval_batch_size  # a thousand draws of each copy
    few = {"picture_every": 0, "num_samples": WIDE, "eval_examples": options.eval_examples}
    few["eval_batch_size"] = min(config.eval_batch_size, block)
    return open_run(name, dataclasses.replace(config, workdir=options.workdir, **few))


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """A recipe in fewer steps than its own: it warms up, and averages its parameters, over the same part of the run."""
    part = min(steps / config.steps, 1.0)
    averaged = 1.0 - min((1.0 - config.ema_decay) / part, 0.1)
    warming = [field.name for field in dataclasses.fields(config) if field.name.endswith("warmup_steps")]
    scaled = {name: round(getattr(config, name) * part) for name in warming}
    return dataclasses.replace(config, steps=steps, ema_decay=min(averaged, config.ema_decay), **scaled)


def check(runs: list[Run]) -> None:
    """Refuse a ladder that compares nothing.

    Raises:
        UserError: no rungs, or rungs on different data or on points.
    """
    if not runs:
        raise UserError("A ladder needs rungs: experiments with their numbers of steps, such as vae_digits:2000.")
    if len(names := {run.data.spec.name for run in runs}) > 1:
        raise UserError(f"The rungs are on different data, {', '.join(sorted(names))}: nothing could be compared.")
    if not runs[0].data.spec.levels:
        raise UserError(f"The rungs are on points, {names.pop()}: a ladder compares models of images.")


def climb(run: Run) -> Rung:
    """Train unless that is done; evaluate unless that is done; draw."""
    done = finished(run)
    saved = newest(run) if done else trained(run)
    result = json.loads((run.folder / "report.json").read_text()) if done else write_report(run, saved)
    rows = {name: row for name, row in run.experiment.ledger.items() if _importance(name) and row.cost <= MOST}
    if not rows.keys() <= result.setdefault("ledger", {}).keys():  # a stop may have left some of them out
        likelihood_report.fill(run, saved, rows, result, curve=False)
    try:
        return Rung(result, np.asarray(Sampler(run)(on_one_device(saved.state.ema)).images))
    except NotFinite as error:  # the other rungs can still be compared
        return Rung(result, error)


def trained(run: Run) -> Saved:
    """The final state of a run that is seen to work as a whole before it begins."""
    return train(run, step=dry_run.check_training(run, ledger=False))


def _importance(name: str) -> bool:
    return name.startswith("bound, K")


def table(rungs: list[Rung]) -> str:
    """The comparison in Markdown: bits/dim with standard errors; an autoencoder has none, but an error of its own."""
    lines = [
        "| | bits/dim, the bound | bits/dim, importance-weighted | squared error a pixel | parameters | steps | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in (rung.result for rung in rungs):
        weighted = [f"{_number(e['bits_per_dim'])} ({name[7:]})" for name, e in result["ledger"].items()]
        cells = [
            result["experiment"],
            _number(result["test"].get("bits_per_dim")),
            ", ".join(weighted) or "-",
            _number(result["test"].get("reconstruction_error")),
            f"{result['parameters']:,}",
            f"{result['steps']:,}",
            clock(result["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: dict[str, float | None] | None) -> str:
    return "-" if value is None else plus_minus(value)


def draw(path: Path, rows: dict[str, np.ndarray], levels: int) -> Path:
    """A row of images for each name."""
    import matplotlib.pyplot as plt

    shape = (len(rows), WIDE)
    figure, axes = plt.subplots(
        *shape, figsize=(0.75 * WIDE + 1.4, 0.8 * len(rows)), layout="constrained", squeeze=False
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images[:WIDE], strict=True):
            place.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=levels - 1)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return finish(figure, path)


def main() -> None:
    """The command."""
    options = tyro.cli(Options, args=sys.argv[1:], prog=program("ladder"), config=(tyro.conf.PositionalRequiredArgs,))
    runs = [chosen(rung, options) for rung in options.rungs]
    check(runs)
    for run in runs if options.fresh else ():
        remove(run.folder)
    folder, rungs = Path(options.workdir), []
    for run in tqdm(runs, desc="ladder", unit="rung", disable=not sys.stderr.isatty()):
        rungs.append(climb(run))
        jax.clear_caches()  # a rung's programs are of no use to the next
    first = runs[0].data
    test = first.test.take(np.arange(WIDE))["image"]
    images = {run.name: rung.images for run, rung in zip(runs, rungs, strict=True)}
    rows = {"test images": test} | {name: row for name, row in images.items() if isinstance(row, np.ndarray)}
    with writing(folder / "ladder.md") as unfinished:
        unfinished.write_text(table(rungs))
    write_json(folder / "ladder.json", [rung.result for rung in rungs])
    print(table(rungs))
    for path in (folder / "ladder.md", folder / "ladder.json", draw(folder / "ladder.png", rows, first.spec.levels)):
        print(f"  {path}")
    if missing := [f"{name}: {error}" for name, error in images.items() if isinstance(error, NotFinite)]:
        raise NotFinite("Not in the picture:\n  " + "\n  ".join(missing))


if __name__ == "__main__":
    from vdm_jax.training.cli.command import execute

    execute(main)
