"""Means and standard errors over the test set, with every example evaluated once; report.json."""

import functools
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.config import differences, from_json, read_json, to_json
from vdm_jax.training.evaluation.baseline import histogram_bits_per_dim
from vdm_jax.training.experiment import Batch, Params
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run, files_changed
from vdm_jax.training.runtime.devices import batch_sharding, local_rows, make_global, replicated
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json
from vdm_jax.training.runtime.metrics_writer import format_duration
from vdm_jax.training.state import count

Evaluation = Callable[[Params, Array, Batch], dict[str, Array]]
LIBRARIES = ("vdm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def evaluate_examples(
    run: Run, params: Params, key: Array, function: Evaluation | None = None, done: Callable[[int], Any] = int
) -> dict[str, np.ndarray]:
    """The values of a function, by default the experiment's `evaluate`, for every test example, in order.

    The examples are evaluated in blocks of `eval_batch_size`, each with the key folded with the block's number. The
    last block is padded with copies of its last example, so that one program serves all; the values of the copies are
    dropped. `done` is called with the number of examples in each block.
    """
    test = run.data.test
    everywhere, parts = replicated(run.mesh), batch_sharding(run.mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def evaluate(params, key, batch):
        return (function or run.experiment.evaluate)(jax.lax.with_sharding_constraint(params, everywhere), key, batch)

    size, block, blocks = num_examples(run), eval_block_size(run), []
    rows = local_rows(run.mesh, block)
    for number, first in enumerate(range(0, size, block)):
        indices = np.arange(first, first + block)
        batch = make_global(test.take(np.minimum(indices, size - 1)[rows]), parts)
        values = jax.device_get(evaluate(params, jax.random.fold_in(key, number), batch))
        blocks.append({name: value[indices < size] for name, value in values.items()})
        done(int(np.sum(indices < size)))
    return {name: np.concatenate([values[name] for values in blocks]) for name in blocks[0]}


def eval_block_size(run: Run) -> int:
    """The number of examples evaluated at once: a multiple of the number of devices, at most `eval_batch_size`."""
    devices = run.mesh.size
    return min(run.config.eval_batch_size, -(-num_examples(run) // devices) * devices)


def num_examples(run: Run) -> int:
    """The number of test examples that are evaluated."""
    return min(run.config.eval_examples or len(run.data.test), len(run.data.test))


def mean_and_error(values: np.ndarray) -> dict[str, float | None]:
    """Mean and standard error in float64; the error is None for a single value or a mean that is not finite."""
    values = values.astype(np.float64)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(mean):
        return {"mean": mean, "standard_error": None}
    return {"mean": mean, "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def format_mean_and_error(
    value: Mapping[str, float | None], digits: int = 4, width: int = 0, error_width: int = 0
) -> str:
    """A mean and its standard error as text, with "n/a" for None."""
    parts = ("n/a" if x is None else f"{x:.{digits}f}" for x in (value["mean"], value["standard_error"]))
    return " ± ".join(f"{part:>{size}}" for part, size in zip(parts, (width, error_width), strict=True))


def write_report(run: Run, saved: Saved) -> dict[str, Any]:
    """Evaluate the averaged parameters of a saved state and write report.json; returns its contents."""
    values = evaluate_examples(run, saved.state.ema, stream(run.config.seed, "evaluate"))
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
    """A report as text of a few lines."""
    device = result["device"]
    duration = format_duration(result["seconds"])
    lines = [
        f"{result['experiment']}: {result['steps']:,} steps in {duration} on {device['count']} x {device['kind']}; "
        f"{result['n_examples']:,} test {result['noun']} of {result['data']}:"
    ]
    width = max(len(name) for name in [*result["test"], "pixel histogram"])
    for name, value in result["test"].items():
        lines.append(f"  {name.replace('_', ' '):{width}}  {format_mean_and_error(value)}")
    if result["histogram_bits_per_dim"] is not None and "bits_per_dim" in result["test"]:
        lines.append(f"  {'pixel histogram':{width}}  {result['histogram_bits_per_dim']:.4f}  bits/dim (baseline)")
    if result["training_images_per_second"]:
        lines.append(
            f"  training {result['training_images_per_second']:,.0f} images/s; data pipeline alone "
            f"{result['pipeline_images_per_second']:,.0f} images/s"
        )
    return "\n".join(lines)


def is_finished(run: Run) -> bool:
    """Whether the run has a report of its last step, made with the same options and the same data files."""
    stored = stored_options(run)
    try:
        steps = read_json(run.folder / "report.json")["steps"]
        same_files = not files_changed(run, read_json(run.folder / "config.json"))
    except (UserError, KeyError):
        return False
    same_options = stored is not None and not differences(stored, to_json(run.config))
    return same_options and same_files and steps == run.config.steps


def is_started(run: Run) -> bool:
    """Whether the run was started with the same options, except for the number of steps."""
    stored, ignored = stored_options(run), {"steps": 0, "workdir": ""}
    return stored is not None and stored | ignored == to_json(run.config) | ignored


def stored_options(run: Run) -> dict[str, Any] | None:
    """The options in the run's config.json, as JSON; None if the file is missing or damaged.

    Training overwrites a damaged file, or reports what is wrong with it.
    """
    try:
        stored = read_json(run.folder / "config.json")["config"]
        from_json(run.config, stored)
    except (UserError, KeyError):
        return None
    return stored
