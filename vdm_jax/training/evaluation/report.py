"""Every number of the test set, each example once: `python -m vdm_jax.training.evaluation.report EXPERIMENT`."""

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.evaluation.baseline import histogram_bits_per_dim
from vdm_jax.training.experiment import Batch, Params
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run, open_run, stored_config
from vdm_jax.training.runtime.devices import own_rows, put, replicated, split
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json
from vdm_jax.training.runtime.metrics_writer import clock
from vdm_jax.training.state import count

Evaluation = Callable[[Params, Array, Batch], dict[str, Array]]
LIBRARIES = ("vdm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def per_example(
    run: Run, params: Params, key: Array, function: Evaluation | None = None, done: Callable[[int], Any] = int
) -> dict[str, np.ndarray]:
    """What a function (the experiment's `evaluate`, if none is given) says of each test example, in order, each once.

    Blocks of `eval_batch_size` examples, or fewer where there are not as many, draw from the key folded with the
    block's number. The last one is filled up with copies of its last example, so that one program serves all; what it
    says of the copies is thrown away. `done` hears how many examples each block had.
    """
    test = run.data.test
    whole, parts = replicated(run.mesh), split(run.mesh)

    @functools.partial(jax.jit, out_shardings=whole)
    def evaluate(params, key, batch):
        return (function or run.experiment.evaluate)(jax.lax.with_sharding_constraint(params, whole), key, batch)

    size, block, blocks = number_of_examples(run), block_size(run), []
    rows = own_rows(run.mesh, block)
    for number, first in enumerate(range(0, size, block)):
        indices = np.arange(first, first + block)
        batch = put(test.take(np.minimum(indices, size - 1)[rows]), parts)
        values = jax.device_get(evaluate(params, jax.random.fold_in(key, number), batch))
        blocks.append({name: value[indices < size] for name, value in values.items()})
        done(int(np.sum(indices < size)))
    return {name: np.concatenate([values[name] for values in blocks]) for name in blocks[0]}


def block_size(run: Run) -> int:
    """How many examples are evaluated at once: a multiple of the number of devices, and no more than there are."""
    devices = run.mesh.size
    return min(run.config.eval_batch_size, -(-number_of_examples(run) // devices) * devices)


def number_of_examples(run: Run) -> int:
    """How many test examples are evaluated."""
    return min(run.config.eval_examples or len(run.data.test), len(run.data.test))


def mean_and_error(values: np.ndarray) -> dict[str, float | None]:
    """Mean and its standard error, in float64; the error is None for one value, or where the mean is not finite."""
    values = values.astype(np.float64)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(mean):
        return {"mean": mean, "standard_error": None}
    return {"mean": mean, "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def plus_minus(value: Mapping[str, float | None], digits: int = 4, width: int = 0, error_width: int = 0) -> str:
    """A mean and its standard error to be printed, "n/a" where one of them is None."""
    parts = ("n/a" if x is None else f"{x:.{digits}f}" for x in (value["mean"], value["standard_error"]))
    return " ± ".join(f"{part:>{size}}" for part, size in zip(parts, (width, error_width), strict=True))


def write_report(run: Run, saved: Saved) -> dict[str, Any]:
    """Evaluate a saved state's averaged parameters and write report.json; returns its contents."""
    values = per_example(run, saved.state.ema, stream(run.config.seed, "evaluate"))
    device = jax.devices()[0]
    result = {
        "experiment": run.name,
        "data": run.data.spec.name,
        "noun": run.data.spec.noun,
        "test": {name: mean_and_error(value) for name, value in values.items()},
        "n_examples": len(next(iter(values.values()))),
        "histogram_bits_per_dim": histogram_bits_per_dim(run.data),
        "steps": int(saved.state.step),
        "seconds": saved.notes["seconds"],
        "parameters": count(saved.state.params),
        "device": {"kind": device.device_kind, "platform": device.platform, "count": run.mesh.size},
        "pipeline_images_per_second": saved.notes["pipeline_images_per_second"],
        "training_images_per_second": saved.notes["training_images_per_second"],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
    }
    write_json(run.folder / "report.json", result)
    return result


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def summary(result: dict[str, Any]) -> str:
    """A report in a few lines."""
    device = result["device"]
    lines = [
        f"{result['experiment']}: {result['steps']:,} steps in {clock(result['seconds'])} on {device['count']} x "
        f"{device['kind']}; {result['n_examples']:,} test {result['noun']} of {result['data']}:"
    ]
    width = max(len(name) for name in [*result["test"], "pixel histogram"])
    for name, value in result["test"].items():
        lines.append(f"  {name.replace('_', ' '):{width}}  {plus_minus(value)}")
    if result["histogram_bits_per_dim"] is not None and "bits_per_dim" in result["test"]:
        lines.append(f"  {'pixel histogram':{width}}  {result['histogram_bits_per_dim']:.4f}  bits/dim to beat")
    if result["training_images_per_second"]:
        lines.append(
            f"  trained {result['training_images_per_second']:,.0f} images/s; the data pipeline alone gives "
            f"{result['pipeline_images_per_second']:,.0f}"
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluate the averaged parameters of a run's newest checkpoint on the test set: its numbers, the ledger, and how
    near samples are to test images.

    Writes report.json after every row, and ledger.png. Options of the ledger's rows are the run's own.
    """

    eval_batch_size: int | None = None
    """Images evaluated at once; the run's own number by default."""
    eval_examples: int | None = None
    """Evaluate only the first so many test images; 0 is all; the run's own number by default."""
    rows: tuple[str, ...] | None = None
    """Rows of the ledger to evaluate, by the beginnings of their names ("bound" is every bound); all by default, none
    with "none"."""
    quality: int | None = None
    """Samples drawn to measure their quality; 0 draws none. By default as many as test images are evaluated, where that
    takes no longer than the training did, and none where --rows are named."""
    inception: str = ""
    """A safetensors file of Inception-v3's weights, to measure quality by its features; by default a classifier's,
    which is trained on the data set at hand, once."""
    workdir: str = "runs"
    """Folder of all runs."""


def check_quality(run: Run, samples: int | None, inception: str = "") -> None:
    """Refuse options by which the quality of samples cannot be measured, before anything is evaluated.

    Args:
        run: the run.
        samples: how many are asked for; 0 is none, and None leaves the number to `quality.fill`.
        inception: a file of Inception's weights.

    Raises:
        UserError: says what can be measured.
    """
    from vdm_jax.training.evaluation.sample_quality import FEWEST, inception_extractor

    spec, number = run.data.spec, number_of_examples(run)
    if samples != 0 and inception:
        inception_extractor(Path(inception), spec)
    if not samples:
        return
    if samples < FEWEST:
        raise UserError(f"--quality {samples}: quality is measured on {FEWEST} samples or more; 0 measures none.")
    if number < FEWEST:
        raise UserError(
            f"--quality {samples}: samples are compared with {FEWEST} test {spec.noun} or more, and {number} are "
            "evaluated. Take more --eval-examples, or --quality 0."
        )
    if spec.levels and spec.num_classes < 2 and not inception:
        raise UserError(f"--quality {samples}: {spec.name} has no labels to train a classifier on. Give --inception.")


def main() -> None:
    """The command."""
    from vdm_jax.training import dry_run
    from vdm_jax.training.cli import command
    from vdm_jax.training.evaluation import likelihood_report, sample_quality

    name, options = command.parse("evaluate", Options())
    own = {name: getattr(options, name) for name in ("eval_batch_size", "eval_examples", "workdir")}
    given = {key: value for key, value in own.items() if value is not None}
    run = open_run(name, dataclasses.replace(stored_config(name, options.workdir), **given))
    chosen = likelihood_report.choose(run.experiment, options.rows)
    samples = 0 if options.quality is None and options.rows is not None else options.quality
    check_quality(run, samples, options.inception)
    dry_run.check_evaluation(run, chosen)
    if samples != 0:
        dry_run.check_sampling(run, min(samples or number_of_examples(run), run.config.eval_batch_size))
    saved = command.newest(run)
    result = write_report(run, saved)
    print(summary(result))
    paths = likelihood_report.fill(run, saved, chosen, result)
    sample_quality.fill(run, saved, result, samples, options.inception)
    for path in [*paths, run.folder / "report.json"]:
        print(f"  {path}")


if __name__ == "__main__":
    from vdm_jax.training.cli.command import execute

    execute(main)
