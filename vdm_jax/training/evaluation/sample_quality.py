"""Sample quality: distances between the features of samples, of test images and of training images."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdm_jax import metrics
from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.data.sources import Dataset
from vdm_jax.training.evaluation.features import Extractor, extractor, inception_extractor, progress_bar
from vdm_jax.training.evaluation.report import format_mean_and_error, mean_and_error, num_examples
from vdm_jax.training.evaluation.sampling import check_samples
from vdm_jax.training.evaluation.time_budget import exceeds_budget, seconds_for
from vdm_jax.training.experiment import Params
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json
from vdm_jax.training.runtime.metrics_writer import format_duration

MIN_SAMPLES = 20  # for the ten blocks of the kernel distance
MAX_DEFAULT_SAMPLES = 10_000  # if --quality is not given
KEY_INDEX = 2**32 - 1  # folded into the sampling key, so that these samples differ from those of samples.png


def check_quality_options(run: Run, samples: int | None, inception_file: str = "") -> None:
    """Reject options with which sample quality cannot be measured, before anything is evaluated.

    Args:
        run: the run.
        samples: the requested number; 0 measures nothing, None leaves the number to `add_quality`.
        inception_file: a file of Inception's weights; "" for none.

    Raises:
        UserError: names the option and the remedy.
    """
    spec, number = run.data.spec, num_examples(run)
    if samples != 0 and inception_file:
        inception_extractor(Path(inception_file), spec)
    if not samples:
        return
    if samples < MIN_SAMPLES:
        raise UserError(f"--quality {samples}: at least {MIN_SAMPLES} samples are needed; 0 skips sample quality.")
    if number < MIN_SAMPLES:
        raise UserError(
            f"--quality {samples}: at least {MIN_SAMPLES} test {spec.noun} are needed, and {number} are evaluated. "
            "Use more --eval-examples, or --quality 0."
        )
    if spec.levels and spec.num_classes < 2 and not inception_file:
        raise UserError(f"--quality {samples}: {spec.name} has no labels to train a classifier on. Give --inception.")


def add_quality(
    run: Run, saved: Saved, result: dict[str, Any], samples: int | None = None, inception_file: str = ""
) -> None:
    """Measure the sample quality of a run, print it and add it to report.json as "quality".

    Args:
        run, saved: the model.
        result: the report so far.
        samples: number of samples; 0 measures nothing; None uses as many as test images are evaluated, at most 10,000,
            and skips the measurement if it is impossible or would take longer than the training did.
        inception_file: a file of Inception's weights; by default the features are a classifier's.

    Raises:
        UserError: too few samples or images, samples that are not finite, or no features available.
    """
    if samples == 0:
        return
    if samples is None and (reason := reason_to_skip(run, saved, inception_file)):
        print(f"  sample quality is not measured: {reason}", flush=True)
        return
    num_quality_samples(run, samples or 0)  # checks the number before a classifier is trained
    result["quality"] = measure_quality(run, saved.state.ema, extractor(run, inception_file), samples or 0)
    write_json(run.folder / "report.json", result)
    print(summary(result["quality"]), flush=True)


def reason_to_skip(run: Run, saved: Saved, inception_file: str = "") -> str | None:
    """Why sample quality is not measured unless requested; None if it is measured."""
    number = min(num_examples(run), MAX_DEFAULT_SAMPLES)
    for images, split in ((number, "test"), (len(run.data.train), "training")):
        if images < MIN_SAMPLES:
            return f"it needs {MIN_SAMPLES} {split} {run.data.spec.noun}, and there are {images}"
    if run.data.spec.levels and run.data.spec.num_classes < 2 and not inception_file:
        return f"{run.data.spec.name} has no labels to train a classifier on; give Inception's weights: --inception"
    seconds = seconds_for(saved, number * run.experiment.cost.sample)
    if exceeds_budget(saved, seconds):
        fewer = max(MIN_SAMPLES, number // 50)
        return f"{number:,} samples would take about {format_duration(seconds)}; use fewer: --quality {fewer}"
    return None


def measure_quality(run: Run, params: Params, by: Extractor, samples: int = 0) -> dict[str, Any]:
    """Compare samples with the test set in feature space, and as many training images for reference.

    Args:
        run: the run.
        params: replicated over the run's devices; the first device samples.
        by: the feature extractor.
        samples: number of samples; 0 uses as many as test images are evaluated, at most 10,000.

    Returns:
        "features": their description; "test_images": their number; "samples": their number, with "frechet", "kernel",
        "precision" and "recall" against the test images; "training_images": the same for training images, about what a
        perfect model would reach (a classifier's features are slightly biased on its own training images);
        "agreement", for conditional samples: the share whose predicted label is the requested one.

    Raises:
        UserError: fewer than 20 samples, test or training images; samples or features that are not finite.
    """
    number = num_quality_samples(run, samples)
    images, labels = sample_in_blocks(run, params, number)
    generated, predicted = by(images, "samples")
    test, _ = by(run.data.test.take(np.arange(num_examples(run)))["image"], "test images")
    train, _ = by(_training_images(run.data, number), "training images")
    result = {"features": by.name, "test_images": len(test), **distances(test, generated)}
    result["training_images"] = distances(test, train)
    if labels is not None and predicted is not None:
        result["agreement"] = mean_and_error((predicted == labels).astype(np.float64))
    return result


def num_quality_samples(run: Run, samples: int = 0) -> int:
    """The number of samples to measure if `samples` are requested; 0 is one for each test image, at most 10,000.

    Raises:
        UserError: fewer than 20 samples, test or training images.
    """
    test, train = num_examples(run), len(run.data.train)
    number = samples or min(test, MAX_DEFAULT_SAMPLES)
    if min(number, test, train) < MIN_SAMPLES:
        raise UserError(
            f"--quality {number} with {test} test and {train} training {run.data.spec.noun}: at least {MIN_SAMPLES} of "
            "each are needed. Use a larger --quality or --eval-examples, or skip sample quality with --quality 0."
        )
    return number


def sample_in_blocks(run: Run, params: Params, number: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples of a run in blocks of `eval_batch_size`, with their labels if they are conditional.

    They start from other noise than those of `samples.png`, and are the same at every call.

    Raises:
        NotFinite: some samples of a block are not finite.
    """
    one, key = on_one_device(params), jax.random.fold_in(stream(run.config.seed, "sample"), KEY_INDEX)
    sample, size = jax.jit(run.experiment.sample, static_argnums=2), min(run.config.eval_batch_size, number)
    images, labels = [], []
    with progress_bar(number, "samples") as bar:
        for block, first in enumerate(range(0, number, size)):
            batch = jax.device_get(sample(one, jax.random.fold_in(key, block), size))
            check_samples(run, np.asarray(batch.images))
            images.append(np.asarray(batch.images)[: number - first])
            labels.append(batch.labels)
            bar.update(len(images[-1]))
    conditional = labels[0] is not None
    return np.concatenate(images), np.concatenate(labels)[:number] if conditional else None


def distances(real: np.ndarray, generated: np.ndarray) -> dict[str, Any]:
    """All metrics of generated features (N, F) against real ones (M, F), with their number N."""
    blocks = max(10, min(len(real), len(generated)) // 1000)
    kernel = metrics.kernel_distance(real, generated, jax.random.key(0), blocks)
    return {
        "samples": len(generated),
        "frechet": metrics.frechet_distance(metrics.moments(real), metrics.moments(generated)),
        "kernel": kernel._asdict(),
        **metrics.precision_recall(real, generated)._asdict(),
    }


def summary(result: dict[str, Any]) -> str:
    """The result as a table: samples beside training images."""
    floor = result["training_images"]
    kernel, reference = (format_mean_and_error(part["kernel"]) for part in (result, floor))
    rows = [
        (f"against {result['test_images']:,} test images", f"{result['samples']:,} samples",
         f"{floor['samples']:,} training images"),
        ("Fréchet distance", f"{result['frechet']:.4f}", f"{floor['frechet']:.4f}"),
        ("kernel distance", kernel, reference),
        *((name, f"{result[name]:.3f}", f"{floor[name]:.3f}") for name in ("precision", "recall")),
    ]  # fmt: skip
    if "agreement" in result:
        rows.append(("label agreement", f"{result['agreement']['mean']:.1%}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(f"  {line}" for line in [f"sample quality by {result['features']}", *lines])


def _training_images(data: Dataset, number: int) -> np.ndarray:
    """A fixed random subset of this many training images, or all of them if there are fewer."""
    chosen = np.random.RandomState(0).permutation(len(data.train))[:number]
    return data.train.take(chosen)["image"]
