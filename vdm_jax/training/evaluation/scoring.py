"""Scores of single examples: a bound on -log P(x) of each, with the error of its Monte Carlo estimate."""

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from vdm_jax.training.evaluation.likelihood_report import evaluate_with_progress
from vdm_jax.training.evaluation.report import format_mean_and_error, mean_and_error, num_examples
from vdm_jax.training.experiment import Experiment, LikelihoodRow, Params
from vdm_jax.training.run import Run, abstract_state
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import atomic_write, write_json

SHOWN = 20  # examples in a printed table


class Scores(NamedTuple):
    """Scores of examples, in nats.

    names: of the examples.
    labels: of the examples, or None.
    nats: one estimate for each example and noise sample, shape (N, K).
    num_dims: numbers in an example, for bits per dimension; None for a density, whose bits depend on the units.
    """

    names: Sequence[str]
    labels: Int[np.ndarray, " n"] | None
    nats: Float[np.ndarray, "n k"]
    num_dims: int | None

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """The mean over noise samples, nats of each example."""
        return self.nats.mean(1)

    @property
    def error(self) -> Float[np.ndarray, " n"]:
        """The standard error of the mean over noise samples; NaN for a single one."""
        count = self.nats.shape[1]
        return self.nats.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(self.nats), np.nan)

    def units(self, nats: Any) -> dict[str, Any]:
        """Numbers in nats, and in bits per dimension if these are defined, by name."""
        if self.num_dims is None:
            return {"nats": nats}
        return {"nats": nats, "bits_per_dim": nats / (self.num_dims * math.log(2.0))}


def model_bound(run: Run) -> LikelihoodRow:
    """The bound of `Experiment.evaluate`, which the report after training has too, as a row.

    Raises:
        UserError: the model has no likelihood.
    """
    evaluate, dims = run.experiment.evaluate, int(np.prod(run.data.spec.shape))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, run.data.test.take(np.arange(1))))
    found = jax.eval_shape(evaluate, abstract_state(run).ema, jax.random.key(0), batch)
    if "bits_per_dim" in found:
        name, scale = "bits_per_dim", dims * math.log(2.0)
    elif "nats" in found:
        name, scale = "nats", 1.0
    else:
        raise UserError(f"{run.name} has no likelihood: `evaluate` computes {', '.join(found)}. Use another recipe.")

    def nats(params, key, batch):
        return scale * evaluate(params, key, batch)[name]

    return LikelihoodRow("-log P(x) <= the model's bound", nats, run.experiment.cost.evaluate)


def select_score(run: Run, prefix: str | None) -> tuple[str, LikelihoodRow]:
    """The name of a row and the row: the only one whose name begins with a prefix, the model's own bound for None.

    Raises:
        UserError: no row or several rows start with it.
    """
    if prefix is None:
        return "bound of report.json", model_bound(run)
    rows = run.experiment.likelihood_rows
    found = [prefix] if prefix in rows else [name for name in rows if name.startswith(prefix)]
    if len(found) != 1:
        listed = "".join(f"\n  {name}" for name in found or rows) or " (this recipe has no rows)"
        what = f"begins {len(found)} rows" if found else "begins no row"
        raise UserError(f"--row {prefix!r} {what} of the likelihood report. Give one of these:{listed}")
    return found[0], rows[found[0]]


def score(
    run: Run, params: Params, row: LikelihoodRow, names: Sequence[str], labels: Any = None, *, samples: int = 8
) -> Scores:
    """Evaluate a row on each test example of the run's data, with independent noise samples.

    Args:
        run: its data's test examples are scored, the first `eval_examples` of them.
        params: the model's parameters.
        row: what is evaluated.
        names: of the examples.
        labels: of the examples, or None.
        samples: K, number of noise samples for each example.
    """

    def nats(params, key, batch):
        return {"nats": jax.lax.map(lambda k: row.nats(params, k, batch), jax.random.split(key, samples)).T}

    found = with_bar(run, params, nats, row.cost * samples)["nats"].astype(np.float64)
    count = len(found)
    dims = int(np.prod(run.data.spec.shape)) if run.data.spec.levels else None
    return Scores(list(names)[:count], None if labels is None else np.asarray(labels)[:count], found, dims)


def with_bar(run: Run, params: Params, function: Callable, cost: int) -> dict[str, np.ndarray]:
    """`evaluate_with_progress` with a progress bar of its own."""
    total = num_examples(run) * cost
    with tqdm(total=total, unit="pass", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        return evaluate_with_progress(run, params, function, cost, bar)


def write_scores(folder: Path, scores: Scores, description: dict[str, Any]) -> list[Path]:
    """Write scores.csv, one line for each example, and scores.json, with means over examples and over each label."""
    means, errors = scores.units(scores.mean), scores.units(scores.error)
    columns = ["example", "label", *(each for name in means for each in (name, f"{name}_error"))]
    labels = [""] * len(scores.names) if scores.labels is None else scores.labels.tolist()
    numbers = np.stack([each for name in means for each in (means[name], errors[name])], 1).tolist()
    rows = [[*row, *values] for *row, values in zip(scores.names, labels, numbers, strict=True)]
    table, report = folder / "scores.csv", folder / "scores.json"
    write_csv(table, columns, rows)
    examples = [
        {key: value for key, value in zip(columns, row, strict=True) if key != "label" or value != ""} for row in rows
    ]
    write_json(report, {**description, **totals(scores), "by_label": by_label(scores), "examples": examples})
    return [table, report]


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table atomically."""
    with atomic_write(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([[_cell(value) for value in row] for row in rows])


def _cell(value: Any) -> Any:
    """A number with six significant digits; nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def totals(scores: Scores) -> dict[str, Any]:
    """Mean and standard error over the examples."""
    means = {name: mean_and_error(values) for name, values in scores.units(scores.mean).items()}
    return {"n_examples": len(scores.nats), **means}


def by_label(scores: Scores) -> dict[str, Any]:
    """`totals` of the examples with each label; empty without labels."""
    if scores.labels is None:
        return {}
    parts = {int(label): scores.labels == label for label in np.unique(scores.labels)}
    return {
        str(label): totals(scores._replace(names=[], labels=None, nats=scores.nats[which]))
        for label, which in parts.items()
    }


def table(scores: Scores) -> str:
    """The scores as text: some examples, the mean of each label, and the mean of all."""
    count = min(len(scores.nats), SHOWN)
    width = max([len("all 10,000 examples"), *(len(name) for name in scores.names[:count])])
    header = f"  {'nats':>19}" + ("" if scores.num_dims is None else f"  {'bits/dim':>17}")
    lines = [f"  {'':{width}}{header}"]
    for name, nats, error in zip(scores.names[:count], scores.mean, scores.error, strict=False):
        means, errors = scores.units(float(nats)), scores.units(float(error))
        entry = {
            unit: {"mean": means[unit], "standard_error": None if math.isnan(error) else errors[unit]} for unit in means
        }
        lines.append(_line(name, entry, width))
    if len(scores.nats) > count:
        lines.append(f"  ... {len(scores.nats) - count:,} more in scores.csv")
    for label, part in by_label(scores).items():
        lines.append(_line(f"label {label} ({part['n_examples']:,})", part, width))
    whole = totals(scores)
    lines.append(_line(f"all {whole['n_examples']:,} examples", whole, width))
    return "\n".join(lines)


def _line(name: str, entry: dict[str, Any], width: int) -> str:
    text = f"  {name:{width}}  {format_mean_and_error(entry['nats'], 3, 9, 7)}"
    if "bits_per_dim" in entry:
        text += f"  {format_mean_and_error(entry['bits_per_dim'], 4, 8, 6)}"
    return text


def conditional_labels(run: Run, labeled: bool, label: int | None) -> tuple[int | None, str]:
    """The label that replaces those of the examples in a conditional model, and the probability that is scored.

    Args:
        run: the model.
        labeled: whether the examples have labels of their own, which are kept.
        label: one for all examples; by default "no label" for examples that have none.

    Raises:
        UserError: the model is not conditional or lacks the class, or there is no label and the model needs one.
    """
    classes = run.experiment.num_classes
    if label is not None:
        if not classes:
            raise UserError(f"--label {label}: {run.name} is unconditional; omit it.")
        if not 0 <= label < classes:
            raise UserError(f"--label {label}: {run.name} has {classes} classes (0..{classes - 1}).")
        return label, f"P(x | label {label})"
    if not classes:
        return None, "P(x)"
    if labeled:
        return None, "P(x | label)"
    if not has_unconditional(run.experiment, run.config):
        raise UserError(
            f"{run.name} has no model of P(x), only of P(x | label), and the images have no labels: --label."
        )
    return classes, "P(x)"


def has_unconditional(experiment: Experiment, config: Any) -> bool:
    """Whether the model has an unconditional prediction."""
    return not experiment.num_classes or bool(getattr(config, "label_dropout", 0.0))
