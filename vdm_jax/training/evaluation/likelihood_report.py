"""The likelihood report: `Experiment.likelihood_rows` over the test set with standard errors, and their plot."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.evaluation.plots import save_figure
from vdm_jax.training.evaluation.report import (
    Evaluation,
    evaluate_examples,
    format_mean_and_error,
    mean_and_error,
    num_examples,
)
from vdm_jax.training.experiment import DataSpec, Experiment, LikelihoodCurve, LikelihoodRow, Params
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json


def select_rows(experiment: Experiment, prefixes: tuple[str, ...] | None) -> dict[str, LikelihoodRow]:
    """The rows whose names start with one of the prefixes; all rows for None, no rows for ("none",).

    Raises:
        UserError: no row starts with one of the prefixes; lists the rows.
    """
    rows = dict(experiment.likelihood_rows)
    if prefixes is None:
        return rows
    if prefixes == ("none",):
        return {}
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in rows):
            known = "".join(f"\n  {name}" for name in rows) or " (this recipe has no rows)"
            raise UserError(f"--rows {prefix!r}: no row of the likelihood report starts with this. Rows:{known}")
    return {name: row for name, row in rows.items() if name.startswith(prefixes)}


def add_likelihood(
    run: Run, saved: Saved, rows: dict[str, LikelihoodRow], result: dict[str, Any], *, curve: bool = True
) -> list[Path]:
    """Evaluate the rows one after the other, print each, and add it to report.json at once.

    Args:
        run, saved: the model.
        rows: the rows to evaluate.
        result: the report so far; gets the entry "likelihood", and "likelihood_curve".
        curve: whether to plot the experiment's `likelihood_curve` too.

    Returns:
        the paths of the plots.
    """
    if not rows:
        return []
    params, examples = saved.state.ema, num_examples(run)
    plotted = run.experiment.likelihood_curve if curve else None
    passes = examples * (sum(row.cost for row in rows.values()) + (plotted.cost if plotted else 0))
    result["likelihood"] = {}
    print(table_header(rows, examples, run.data.spec), flush=True)
    if not run.data.spec.levels:
        result["log_volume"] = run.data.spec.log_volume
        print(f"  (standardized; -log p(x) in the units of the data is larger by {result['log_volume']:.4g} nats)")
    with tqdm(total=passes, unit="pass", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for name, row in rows.items():
            result["likelihood"][name] = entry = evaluate_row(run, params, row, bar)
            write_json(run.folder / "report.json", result)
            tqdm.write(table_line(name, entry, rows), file=sys.stdout)
        if plotted is None:
            return []
        points = evaluate_with_progress(run, params, plotted.points, plotted.cost, bar)
    result["likelihood_curve"] = average_curve(plotted, points)
    write_json(run.folder / "report.json", result)
    return [plot_curve(run.folder / "likelihood.png", run.name, result["likelihood_curve"])]


def evaluate_row(run: Run, params: Params, row: LikelihoodRow, bar: tqdm) -> dict[str, Any]:
    """The entry of a row: means and standard errors in nats and per dimension, and its description."""
    nats = evaluate_with_progress(run, params, lambda *given: {"nats": row.nats(*given)}, row.cost, bar)["nats"].astype(
        np.float64
    )
    unit, scale = ("bits_per_dim", np.log(2.0)) if run.data.spec.levels else ("nats_per_dim", 1.0)
    per_dim = mean_and_error(nats / (np.prod(run.data.spec.shape) * scale))
    return {"nats": mean_and_error(nats), unit: per_dim, "description": row.description}


def evaluate_with_progress(
    run: Run, params: Params, function: Evaluation, cost: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """`evaluate_examples` with the same noise for every row, and a progress bar."""
    key = stream(run.config.seed, "evaluate")
    return evaluate_examples(run, params, key, function, lambda examples: bar.update(examples * cost))


def average_curve(curve: LikelihoodCurve, points: dict[str, np.ndarray]) -> dict[str, Any]:
    """The means of a curve over the test examples, with standard errors."""
    x, y = points["x"].astype(np.float64).mean(0), [mean_and_error(part) for part in points["y"].T]
    numbers = {"x": x.tolist(), "mean": [p["mean"] for p in y], "standard_error": [p["standard_error"] for p in y]}
    return {"x_label": curve.x_label, "y_label": curve.y_label, **numbers}


def plot_curve(path: Path, name: str, curve: dict[str, Any]) -> Path:
    """Plot a curve with its standard error as a band."""
    import matplotlib.pyplot as plt

    x, y, error = (np.asarray(curve[part], np.float64) for part in ("x", "mean", "standard_error"))
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.fill_between(x, y - error, y + error, alpha=0.3, linewidth=0)
    axes.plot(x, y, linewidth=1.2)
    axes.set(xlabel=curve["x_label"], ylabel=curve["y_label"], title=f"{name}: total {y.sum():.4g}")
    return save_figure(figure, path)


def table_header(rows: dict[str, LikelihoodRow], examples: int, data: DataSpec) -> str:
    """The header of the table."""
    width = _width(rows)
    title = f"likelihood of {examples:,} {data.noun}"
    return f"  {title:{width}}  {'nats':>20}  {'bits/dim' if data.levels else 'nats/dim':>17}"


def table_line(name: str, entry: dict[str, Any], rows: dict[str, LikelihoodRow]) -> str:
    """A row of the table."""
    width = _width(rows)
    per_dim = entry["bits_per_dim" if "bits_per_dim" in entry else "nats_per_dim"]
    numbers = f"{format_mean_and_error(entry['nats'], 3, 10, 7)}  {format_mean_and_error(per_dim, 4, 8, 6)}"
    return f"  {name:{width}}  {numbers}  {entry['description']}"


def _width(rows: dict[str, LikelihoodRow]) -> int:
    return max(len(name) for name in [*rows, "likelihood of 10,000 images"])
