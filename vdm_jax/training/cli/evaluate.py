"""`vdm-jax evaluate RECIPE [options]`: evaluate a run's latest checkpoint on the test set."""

import dataclasses
from collections.abc import Sequence

import tyro

from vdm_jax.training import registry
from vdm_jax.training.cli.common import recipe_argument
from vdm_jax.training.evaluation import dry_run, likelihood_report, sample_quality
from vdm_jax.training.evaluation.report import num_examples, summary, write_report
from vdm_jax.training.run import newest_checkpoint, open_run, stored_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluate the EMA parameters of a run's latest checkpoint on the test set: loss terms, likelihood report and
    sample quality.

    Writes report.json after every row of the likelihood report, and likelihood.png. The options of the rows are those
    of the run.
    """

    eval_batch_size: int | None = None
    """Global evaluation batch size; defaults to the run's setting."""
    eval_examples: int | None = None
    """Evaluate only this many test images; 0 evaluates all; defaults to the run's setting."""
    rows: tuple[str, ...] | None = None
    """Rows of the likelihood report to evaluate, by prefixes of their names ("bound" selects every bound); all by
    default; "none" selects no rows."""
    quality: int | None = None
    """Number of samples whose quality is measured; 0 skips it. By default one for each evaluated test image, if that
    takes no longer than the training did; none if --rows is given."""
    inception: str = ""
    """A safetensors file with Inception-v3's weights, to measure quality in its features; by default the features of a
    classifier, which is trained once on the data set."""
    workdir: str = "runs"
    """Folder of all runs."""


def main(arguments: Sequence[str], program: str = "vdm-jax evaluate") -> None:
    """The command."""
    recipe = recipe_argument(arguments, program)
    registry.find(recipe)
    options = tyro.cli(Options, args=arguments[1:], prog=f"{program} {recipe}")
    own = {name: getattr(options, name) for name in ("eval_batch_size", "eval_examples", "workdir")}
    given = {key: value for key, value in own.items() if value is not None}
    run = open_run(recipe, dataclasses.replace(stored_config(recipe, options.workdir), **given))
    rows = likelihood_report.select_rows(run.experiment, options.rows)
    samples = 0 if options.quality is None and options.rows is not None else options.quality
    sample_quality.check_quality_options(run, samples, options.inception)
    dry_run.check_evaluation(run, rows)
    if samples != 0:
        dry_run.check_sampling(run, min(samples or num_examples(run), run.config.eval_batch_size))
    saved = newest_checkpoint(run)
    result = write_report(run, saved)
    print(summary(result))
    plots = likelihood_report.add_likelihood(run, saved, rows, result)
    sample_quality.add_quality(run, saved, result, samples, options.inception)
    for path in [*plots, run.folder / "report.json"]:
        print(f"  {path}")
