"""`vdm-jax score RECIPE INPUT [options]`: the likelihood of each given image, or its class by Bayes' rule."""

import dataclasses
from collections.abc import Sequence

import tyro

from vdm_jax.training.cli.common import recipe_argument
from vdm_jax.training.cli.given import check_at_least, parse, with_images
from vdm_jax.training.evaluation import classification, scoring
from vdm_jax.training.run import newest_checkpoint, open_run, stored_config
from vdm_jax.training.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Score images with the EMA parameters of a run's latest checkpoint: a bound on -log P(x) of each image, in nats
    and bits per dimension, with the standard error over noise samples, and its mean for every label.

    INPUT is an image file, a folder of images, an array file (.npy, .npz, .safetensors), or "test", the test set. A
    class-conditional model gives P(x | label), and P(x) for images without labels. Writes scores.csv and scores.json
    into the run's folder; with --classify classes.csv and classes.json.
    """

    row: str | None = None
    """Row of the likelihood report to evaluate, by the beginning of its name; by default the model's bound of
    report.json. Rows are about P(x), also in class-conditional models."""
    noise_samples: int = 4
    """Independent noise samples for each image, from which the error is computed."""
    label: int | None = None
    """Score all images given this label (class-conditional models)."""
    classify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Classify each image by Bayes' rule: p(y|x) from the bounds on -log P(x|y), all classes equally likely
    (class-conditional models)."""
    examples: int = 0
    """Score only this many images; 0 scores all."""
    batch_size: int | None = None
    """Images evaluated at once, summed over all devices; defaults to the run's evaluation batch size."""
    seed: int | None = None
    """Random seed of the noise; defaults to the run's."""
    workdir: str = "runs"
    """Folder of all runs."""


def main(arguments: Sequence[str], program: str = "vdm-jax score") -> None:
    """The command."""
    recipe = recipe_argument(arguments, program)
    given, options = parse(arguments, program, Options)
    check_at_least(options, noise_samples=1, examples=0, batch_size=1, seed=0)
    if options.classify and (options.row is not None or options.label is not None):
        raise UserError(
            "--classify compares the model's bounds on -log P(x | y) of all labels y: omit --row and --label."
        )
    own = {"eval_batch_size": options.batch_size, "seed": options.seed, "workdir": options.workdir}
    config = dataclasses.replace(
        stored_config(recipe, options.workdir), **{name: value for name, value in own.items() if value is not None}
    )
    run, names, labels, quantity = with_images(open_run(recipe, config), given, options.label)
    run = run._replace(config=dataclasses.replace(config, eval_examples=options.examples))
    name, row = scoring.select_score(run, options.row)
    saved = newest_checkpoint(run)
    count = min(options.examples or len(names), len(names))
    names, labels = names[:count], None if labels is None else labels[:count]
    description = {
        "experiment": run.name, "step": int(saved.state.step), "input": given, "row": name,
        "description": row.description, "noise_samples": options.noise_samples,
    }  # fmt: skip
    if options.classify:
        nats = classification.class_nats(run, saved.state.ema, row, samples=options.noise_samples)
        summary, paths = classification.write_classes(run.folder, names, labels, nats, description)
        print(f"{run.name}, classes of {given} by Bayes' rule:\n{summary}")
    else:
        scores = scoring.score(run, saved.state.ema, row, names, labels, samples=options.noise_samples)
        about = quantity if options.row is None else f"{quantity[0]}(x)"
        print(f"{run.name}, step {int(saved.state.step):,}, -log {about}: {name}\n{scoring.table(scores)}")
        paths = scoring.write_scores(run.folder, scores, {**description, "probability": about})
    for path in paths:
        print(f"  {path}")
