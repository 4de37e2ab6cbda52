"""An estimate of how long a report takes, made before it starts."""

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.evaluation.report import num_examples
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.invocation import command_line
from vdm_jax.training.runtime.metrics_writer import format_duration

MIN_BUDGET = 300.0  # seconds that a report may always take
PASSES_PER_STEP = 3.0  # forward passes that cost as much as a training step: one forward, backward as two


def seconds_for(saved: Saved, passes: int) -> float:
    """An estimate from the speed of training of how long this many forward passes, each of one image, take."""
    rate = saved.notes["training_images_per_second"]
    return passes / (PASSES_PER_STEP * rate) if rate else 0.0


def exceeds_budget(saved: Saved, seconds: float) -> bool:
    """Whether this is longer than the run was trained, and than five minutes."""
    return seconds > max(MIN_BUDGET, saved.notes["seconds"])


def reason_to_defer(run: Run, saved: Saved) -> str | None:
    """Why the report of a trained run is left to the user: it would take longer than training. None if it would not."""
    config, cost, images = run.config, run.experiment.cost, num_examples(run)
    evaluate = seconds_for(saved, images * cost.evaluate)
    sample = seconds_for(saved, config.num_samples * cost.sample)
    if not exceeds_budget(saved, evaluate + sample):
        return None
    return (
        f"Trained and saved: step {int(saved.state.step)}, {run.folder}. On this machine, evaluating {images:,} images "
        f"would take about {format_duration(evaluate)} and sampling {config.num_samples} about "
        f"{format_duration(sample)}, longer than training. To evaluate and sample fewer:\n"
        f"  {command_line('evaluate', run.recipe, '--eval-examples 8 --eval-batch-size 8')}\n"
        f"  {command_line('sample', run.recipe, '--num-samples 4')}"
    )
