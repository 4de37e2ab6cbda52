"""The ledger of a trained model: every row of `Experiment.ledger` over the test set, with error bars, and its curve."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.evaluation.plots import finish
from vdm_jax.training.evaluation.report import Evaluation, mean_and_error, number_of_examples, per_example, plus_minus
from vdm_jax.training.experiment import Experiment, LikelihoodCurve, LikelihoodRow, Params
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json


def choose(experiment: Experiment, beginnings: tuple[str, ...] | None) -> dict[str, LikelihoodRow]:
    """The rows whose names begin so; all where nothing is said, none for "none".

    Raises:
        UserError: no row begins with one of them; lists those there are.
    """
    rows = dict(experiment.ledger)
    if beginnings is None:
        return rows
    if beginnings == ("none",):
        return {}
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in rows):
            known = "".join(f"\n  {name}" for name in rows) or " none at all"
            raise UserError(f"No row of this experiment's ledger begins with {beginning!r}. There are:{known}")
    return {name: row for name, row in rows.items() if name.startswith(beginnings)}


def fill(
    run: Run, saved: Saved, rows: dict[str, LikelihoodRow], result: dict[str, Any], *, curve: bool = True
) -> list[Path]:
    """Evaluate the rows one after the other, print each, and add it to report.json at once.

    Args:
        run, saved: the model.
        rows: which.
        result: the report so far; gets the entry "ledger".
        curve: whether the experiment's curve is drawn too.

    Returns:
        the paths of pictures drawn.
    """
    if not rows:
        return []
    params, examples, drawn = saved.state.ema, number_of_examples(run), run.experiment.curve if curve else None
    passes = examples * (sum(row.cost for row in rows.values()) + (drawn.cost if drawn else 0))
    result["ledger"] = {}
    print(header(rows, examples, run.data.spec.noun), flush=True)
    with tqdm(total=passes, unit="pass", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for name, row in rows.items():
            result["ledger"][name] = entry = evaluated(run, params, row, bar)
            write_json(run.folder / "report.json", result)
            tqdm.write(line(name, entry, rows), file=sys.stdout)
        if drawn is None:
            return []
        points = ask(run, params, drawn.points, drawn.cost, bar)
    result["curve"] = averaged(drawn, points)
    write_json(run.folder / "report.json", result)
    return [draw(run.folder / "ledger.png", run.name, result["curve"])]


def evaluated(run: Run, params: Params, row: LikelihoodRow, bar: tqdm) -> dict[str, Any]:
    """The entry of a row: its mean and standard error, in both units, and what it is."""
    nats = ask(run, params, lambda *given: {"nats": row.nats(*given)}, row.cost, bar)["nats"].astype(np.float64)
    bits = nats / (np.prod(run.data.spec.shape) * np.log(2.0))
    return {"nats": mean_and_error(nats), "bits_per_dim": mean_and_error(bits), "what": row.what}


def ask(run: Run, params: Params, function: Evaluation, cost: int, bar: tqdm) -> dict[str, np.ndarray]:
    """`per_example`, with the noise that every row sees and the bar that shows how far it is."""
    key = stream(run.config.seed, "evaluate")
    return per_example(run, params, key, function, lambda examples: bar.update(examples * cost))


def averaged(curve: LikelihoodCurve, points: dict[str, np.ndarray]) -> dict[str, Any]:
    """A curve as means over the test examples with their standard errors."""
    x, y = points["x"].astype(np.float64).mean(0), [mean_and_error(part) for part in points["y"].T]
    numbers = {"x": x.tolist(), "mean": [p["mean"] for p in y], "standard_error": [p["standard_error"] for p in y]}
    return {"x_label": curve.x_label, "y_label": curve.y_label, **numbers}


def draw(path: Path, name: str, curve: dict[str, Any]) -> Path:
    """A picture of a curve, its standard error as a band."""
    import matplotlib.pyplot as plt

    x, y, error = (np.asarray(curve[part], np.float64) for part in ("x", "mean", "standard_error"))
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.fill_between(x, y - error, y + error, alpha=0.3, linewidth=0)
    axes.plot(x, y, linewidth=1.2)
    axes.set(xlabel=curve["x_label"], ylabel=curve["y_label"], title=f"{name}: {y.sum():.4g} in all")
    return finish(figure, path)


def header(rows: dict[str, LikelihoodRow], examples: int, noun: str) -> str:
    """The first line of the table."""
    width = _width(rows)
    title = f"ledger of {examples:,} {noun}"
    return f"  {title:{width}}  {'nats':>20}  {'bits/dim':>17}"


def line(name: str, entry: dict[str, Any], rows: dict[str, LikelihoodRow]) -> str:
    """A row of the table."""
    width = _width(rows)
    numbers = f"{plus_minus(entry['nats'], 3, 10, 7)}  {plus_minus(entry['bits_per_dim'], 4, 8, 6)}"
    return f"  {name:{width}}  {numbers}  {entry['what']}"


def _width(rows: dict[str, LikelihoodRow]) -> int:
    return max(len(name) for name in [*rows, "ledger of 10,000 images"])
