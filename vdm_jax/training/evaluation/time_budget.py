"""How long a report will take, before it is begun."""

from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.metrics_writer import clock

ALWAYS = 300.0  # seconds that a report may take, however short the training was
PASSES = 3.0  # a training step runs the network forward, and backward for twice that


def too_long(run: Run, saved: Saved) -> str | None:
    """Why the report of a trained run is put off: it would take longer than training did. None if it would not."""
    rate = saved.notes["training_images_per_second"]
    if not rate:
        return None
    config, cost = run.config, run.experiment.cost
    images = min(config.eval_examples or len(run.data.test), len(run.data.test))
    evaluate, draw = (n / (PASSES * rate) for n in (images * cost.evaluate, config.num_samples * cost.sample))
    if evaluate + draw <= max(ALWAYS, saved.notes["seconds"]):
        return None
    return (
        f"Trained and saved: step {int(saved.state.step)}, {run.folder}. On this machine evaluating {images:,} images "
        f"would take about {clock(evaluate)} and drawing {config.num_samples} about {clock(draw)}, longer than the "
        f"training did, so this is left to you:\n"
        f'  make eval EXP={run.name} ARGS="--eval-examples 8 --eval-batch-size 8"\n'
        f'  make sample EXP={run.name} ARGS="--num-samples 4"'
    )
