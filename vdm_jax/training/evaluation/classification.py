"""Classification by Bayes' rule from the bounds of a class-conditional model.

    p(y | x) = p(y) P(x | y) / sum over y' of p(y') P(x | y')

with -log P(x | y) replaced by its bound, estimated with the same noise for every class.

Source: Li et al. 2023, arXiv:2303.16203; Clark & Jaini 2023, arXiv:2303.15233 (diffusion models as classifiers).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vdm_jax.training.evaluation.report import format_mean_and_error, mean_and_error
from vdm_jax.training.evaluation.scoring import with_bar, write_csv
from vdm_jax.training.experiment import LikelihoodRow, Params
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json

BINS = 10  # of the calibration


def class_nats(run: Run, params: Params, row: LikelihoodRow, *, samples: int = 1) -> Float[np.ndarray, "n c"]:
    """The bound on -log P(x | y) of each test example of the run's data for every class y, shape (N, C), in nats.

    The noise is the same for all classes of an example, so that much of its effect cancels in their differences.

    Args:
        run: a class-conditional model with the examples.
        params: its parameters.
        row: the bound, of an example with its label.
        samples: number of noise samples, over which the mean is taken.

    Raises:
        UserError: the model is not class-conditional.
    """
    classes = run.experiment.num_classes
    if not classes:
        raise UserError(f"{run.name} is not class-conditional: use a recipe such as ddpm_digits_cond.")

    def nats(params, key, batch):
        def mean(label):
            labeled = {**batch, "label": jnp.full_like(batch["label"], label)}
            return jax.lax.map(lambda k: row.nats(params, k, labeled), jax.random.split(key, samples)).mean(0)

        return {"nats": jax.lax.map(mean, jnp.arange(classes)).T}

    return with_bar(run, params, nats, row.cost * samples * classes)["nats"].astype(np.float64)


def posterior(nats: Float[np.ndarray, "n c"], prior: Float[np.ndarray, " c"] | None = None) -> Float[np.ndarray, "n c"]:
    """p(y | x) by Bayes' rule, shape (N, C).

    Args:
        nats: -log P(x | y), or a bound on it.
        prior: p(y), by default uniform.
    """
    log_prior = 0.0 if prior is None else np.log(prior)
    joint = log_prior - nats
    joint = joint - joint.max(1, keepdims=True)
    return np.exp(joint) / np.exp(joint).sum(1, keepdims=True)


def assess(probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """How well class probabilities predict the labels.

    Returns:
        "accuracy" and "nats" (-log of the probability of the label), with standard errors; "calibration_error", the
        mean over examples of |accuracy - confidence| in the example's bin of confidence (Guo et al. 2017,
        arXiv:1706.04599); "calibration", each bin's number of examples, confidence and accuracy; "by_label", the
        accuracy of each label; "confusion", counts by label (row) and prediction (column).
    """
    count = probabilities.shape[1]
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    right = predicted == labels
    with np.errstate(divide="ignore"):
        nats = -np.log(probabilities[np.arange(len(labels)), labels])
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    calibration = [
        {
            "n_examples": int(np.sum(bins == i)),
            "confidence": float(confidence[bins == i].mean()),
            "accuracy": float(right[bins == i].mean()),
        }
        for i in np.unique(bins)
    ]
    gaps = [abs(part["confidence"] - part["accuracy"]) * part["n_examples"] for part in calibration]
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (labels, predicted), 1)
    return {
        "n_examples": len(labels),
        "accuracy": mean_and_error(right.astype(np.float64)),
        "nats": mean_and_error(nats),
        "calibration_error": float(np.sum(gaps) / len(labels)),
        "calibration": calibration,
        "by_label": {str(label): mean_and_error(1.0 * right[labels == label]) for label in np.unique(labels)},
        "confusion": confusion.tolist(),
    }


def write_classes(
    folder: Path,
    names: Sequence[str],
    labels: Int[np.ndarray, " n"] | None,
    nats: Float[np.ndarray, "n c"],
    description: dict[str, Any],
) -> tuple[str, list[Path]]:
    """Write classes.csv, one line for each example, and classes.json; returns a summary and the paths.

    Args:
        folder: of the files.
        names, labels: of the examples; without labels nothing is assessed.
        nats: of each example and class, from `class_nats`.
        description: what classes.json says besides.
    """
    probabilities = posterior(nats)
    predicted = probabilities.argmax(1)
    columns = ["example", "label", "predicted", *(f"p({label})" for label in range(nats.shape[1]))]
    known = [""] * len(nats) if labels is None else labels.tolist()
    rows = [[*row, *p] for *row, p in zip(names, known, predicted.tolist(), probabilities.tolist(), strict=True)]
    paths = [folder / "classes.csv", folder / "classes.json"]
    write_csv(paths[0], columns, rows)
    found = {} if labels is None else assess(probabilities, labels)
    write_json(paths[1], {**description, **found})
    if labels is None:
        counts = np.bincount(predicted, minlength=nats.shape[1])
        shown = ", ".join(f"{count} x {label}" for label, count in enumerate(counts) if count)
        return f"  {len(nats):,} examples without labels, classified as {shown}", paths
    return (
        f"  accuracy {format_mean_and_error(found['accuracy'])}, -log p(label | x) "
        f"{format_mean_and_error(found['nats'])} nats, calibration error {found['calibration_error']:.4f} "
        f"({found['n_examples']:,} examples)"
    ), paths
