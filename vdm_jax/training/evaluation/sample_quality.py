"""How good the samples of a run are: their features beside those of real images, and the distances between."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

from vdm_jax import metrics
from vdm_jax.networks import inception
from vdm_jax.networks.classifier import Classifier, ClassifierConfig
from vdm_jax.training import loop
from vdm_jax.training import run as runs
from vdm_jax.training.checkpoint import Saved
from vdm_jax.training.cli import command
from vdm_jax.training.config import TrainConfig, read_json, to_json
from vdm_jax.training.data.sources import Dataset
from vdm_jax.training.evaluation.plots import check_finite
from vdm_jax.training.evaluation.report import mean_and_error, number_of_examples, plus_minus, write_report
from vdm_jax.training.evaluation.sampling import check_samples
from vdm_jax.training.evaluation.time_budget import ALWAYS, PASSES
from vdm_jax.training.experiment import DataSpec, Experiment, Params
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.devices import make_mesh, on_one_device
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json
from vdm_jax.training.runtime.metrics_writer import clock

FEWEST = 20  # samples that the kernel distance's ten blocks can be made of
MOST = 10_000  # samples drawn where no number is asked for
BLOCK = 120  # images that an extractor sees at once
OWN = 2**32 - 1  # what the key of samples is folded with, so that these are none of a picture's


@dataclass(frozen=True)
class ClassifierTraining(TrainConfig):
    """How the classifier of a data set is trained."""

    network: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The classifier."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that the loop trains and evaluates with; a classifier draws nothing."""
        self.network.check(data.shape)
        network = Classifier(self.network)

        def init(key):
            return network.init(key, jnp.zeros((1, *data.shape)))["params"]

        def loss(params, key, batch, step):
            del step
            x = _to_unit(batch["image"], data.levels)
            said = network.apply({"params": params}, x, train=True, rngs={"dropout": key})
            return _cross_entropy(said, batch["label"]).mean(), {}

        def evaluate(params, key, batch):
            del key
            said: Any = network.apply({"params": params}, _to_unit(batch["image"], data.levels))
            right = (jnp.argmax(said.logits, axis=-1) == batch["label"]).astype(jnp.float32)
            return {"accuracy": right, "cross_entropy": _cross_entropy(said, batch["label"])}

        def sample(params, key, n):
            raise NotImplementedError("a classifier draws nothing: set num_samples to 0")

        return Experiment(init, loss, sample, evaluate)


def _to_unit(images, levels: int) -> Array:
    return 2.0 / (levels - 1) * jnp.asarray(images, jnp.float32) - 1.0


def _cross_entropy(said: Any, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(said.logits, label)


def classifier_options(data: DataSpec) -> ClassifierTraining:
    """The options for a data set: images larger than the digits are halved twice, and seen for longer."""
    digits = min(data.shape[:2]) < 16
    network = ClassifierConfig(num_classes=data.num_classes, multipliers=(1, 2) if digits else (1, 2, 2), dropout=0.2)
    return ClassifierTraining(
        data=data.name,
        network=network,
        steps=1000 if digits else 2000,
        learning_rate=2e-3,
        warmup_steps=50,
        lr_schedule="cosine",
        weight_decay=1e-2,
        ema_decay=0.99,
        log_every=500,
        num_samples=0,
        picture_every=0,
    )


class Extractor(NamedTuple):
    """What turns images into features.

    Fields:
        name: what the features are, in a few words.
        see: a block of images, or points -> (features (B, F), labels (B,) or None).
    """

    name: str
    see: Callable[[Array], tuple[Array, Array | None]]

    def __call__(self, images: np.ndarray, what: str = "") -> tuple[np.ndarray, np.ndarray | None]:
        """The features (N, F) of images (N, H, W, C), and the labels it gives them where it gives any.

        Blocks are of one size, so that one program serves all; the last is filled up with copies, then thrown away.

        Raises:
            NotFinite: features that are not finite.
        """
        seen = []
        with _bar(len(images), f"features of {what}") as bar:
            for first in range(0, len(images), BLOCK):
                indices = np.arange(first, first + BLOCK)
                kept = indices < len(images)
                block = jax.device_get(self.see(jnp.asarray(images[np.minimum(indices, len(images) - 1)])))
                seen.append([part if part is None else part[kept] for part in block])
                bar.update(int(kept.sum()))
        features, labels = zip(*seen, strict=True)
        found = np.concatenate(features)
        check_finite(found, f"features of {what}", f"Look for NaN in the weights of: {self.name}.")
        return found, None if labels[0] is None else np.concatenate(labels)


def extractor(run: Run, inception_file: str = "") -> Extractor:
    """What features a run's samples are judged by: Inception's where a file of its weights is given, else those of a
    classifier trained on the run's data, else (points of a plane) the points themselves.

    Raises:
        UserError: images without labels, and no file; or a file that does not fit.
    """
    data = run.data
    if inception_file:
        return inception_extractor(Path(inception_file), data.spec)
    if not data.spec.levels:
        return Extractor("the points themselves", lambda points: (points, None))
    if data.spec.num_classes < 2:
        raise UserError(
            f"{data.spec.name} has no labels to train a classifier on: give Inception's weights with --inception FILE, "
            "or leave the quality of samples out with --quality 0."
        )
    return train_classifier(data, Path(run.config.workdir) / ".features" / data.spec.name)


def train_classifier(data: Dataset, folder: Path, options: ClassifierTraining | None = None) -> Extractor:
    """The features of a classifier of a data set: of the one in the folder, or, where it is none, of one trained now.

    Args:
        data: the images and their labels.
        folder: where it is kept, as a run, with its accuracy on the test set in report.json.
        options: of its training; by default `classifier_options`. Where the one in the folder was made with others, it
            is trained anew.
    """
    options = dataclasses.replace(options or classifier_options(data.spec), workdir=str(folder.parent))
    mesh = make_mesh(1)
    runs.validate(options, mesh.size)
    own = Run("classifier", options, folder, data, options.build(data.spec), mesh)
    if not _is_made_with(folder, options):
        runs.remove(folder)
    if (accuracy := _accuracy(folder)) is None:
        print(f"Training a classifier on {data.spec.name}, once, for its features.", flush=True)
        accuracy = write_report(own, loop.train(own))["test"]["accuracy"]["mean"]
    params, network = on_one_device(command.newest(own).state.ema), Classifier(options.network)

    @jax.jit
    def see(images):
        said: Any = network.apply({"params": params}, _to_unit(images, data.spec.levels))
        return said.features, jnp.argmax(said.logits, axis=-1)

    what = f"{options.network.features} features of a classifier trained on {data.spec.name}"
    return Extractor(f"{what} ({accuracy:.1%} of test right)", see)


def _is_made_with(folder: Path, options: ClassifierTraining) -> bool:
    path, free = folder / "config.json", {"workdir": ""}
    if not path.exists():
        return True
    try:
        return {**read_json(path)["config"], **free} == to_json(options) | free
    except (UserError, KeyError, TypeError):  # damaged
        return False


def _accuracy(folder: Path) -> float | None:
    """Of the classifier in the folder, as its report has it; None where it has none, or is damaged."""
    try:
        value = read_json(folder / "report.json")["test"]["accuracy"]["mean"]
    except (UserError, KeyError, TypeError):
        return None
    return value if isinstance(value, float) and 0.0 <= value <= 1.0 else None


def inception_extractor(path: Path, data: DataSpec) -> Extractor:
    """The 2,048 features of Inception-v3, its weights from a safetensors file of the user's.

    Raises:
        UserError: the file is not there, is no safetensors file, or has not these tensors; images of neither 1 nor 3
            channels.
    """
    if not data.levels or data.shape[-1] not in (1, 3):
        raise UserError(f"Inception sees images of 1 or 3 channels, and {data.name} are none: leave --inception away.")
    try:
        from safetensors.numpy import load

        if not path.is_file():  # a pipe would never end
            raise ValueError("it is no file; name one")
        weights = inception.check_weights(load(path.read_bytes()))
    except ImportError as error:
        raise UserError("Reading --inception's file needs safetensors: .venv/bin/pip install safetensors") from error
    except Exception as error:  # safetensors has its own error for what is not one of its files
        raise UserError(f"--inception {path} cannot be used: {error}") from error

    @jax.jit
    def see(images):
        x = inception.resize(_to_unit(images, data.levels))
        return inception.inception_features(weights, jnp.broadcast_to(x, (*x.shape[:3], 3))), None

    return Extractor(f"2,048 features of Inception-v3 ({path.name})", see)


def fill(run: Run, saved: Saved, result: dict[str, Any], samples: int | None = None, inception_file: str = "") -> None:
    """Measure the quality of a run's samples, print it and add it to report.json.

    Args:
        run, saved: the model.
        result: the report so far; gets the entry "quality".
        samples: how many; 0 measures nothing; None is as many as test images are evaluated, and 10,000 at most, and
            nothing where that would take longer than the training did, or cannot be.
        inception_file: of Inception's weights; a classifier's features without.

    Raises:
        UserError: too few samples or images, samples that are not finite, or features that cannot be had.
    """
    if samples == 0:
        return
    if samples is None and (reason := put_off(run, saved, inception_file)):
        print(f"  the quality of samples is not measured: {reason}", flush=True)
        return
    number_of_samples(run, samples or 0)  # before a classifier is trained
    result["quality"] = quality(run, saved.state.ema, extractor(run, inception_file), samples or 0)
    write_json(run.folder / "report.json", result)
    print(summary(result["quality"]), flush=True)


def put_off(run: Run, saved: Saved, inception_file: str = "") -> str | None:
    """Why the quality of samples is not measured unless it is asked for; None if it is."""
    number, rate = min(number_of_examples(run), MOST), saved.notes["training_images_per_second"]
    for images, which in ((number, "test"), (len(run.data.train), "training")):
        if images < FEWEST:
            return f"{images} {which} {run.data.spec.noun} are too few, it takes {FEWEST}"
    if run.data.spec.levels and run.data.spec.num_classes < 2 and not inception_file:
        return f"{run.data.spec.name} has no labels to train a classifier on; Inception's weights would do: --inception"
    seconds = number * run.experiment.cost.sample / (PASSES * rate) if rate else 0.0
    if seconds > max(ALWAYS, saved.notes["seconds"]):
        return f"drawing {number:,} would take about {clock(seconds)}; fewer: --quality {max(FEWEST, number // 50)}"
    return None


def quality(run: Run, params: Params, by: Extractor, samples: int = 0) -> dict[str, Any]:
    """Draw samples and say how near they are to the test set, and how near as many training images are.

    Args:
        run: whose sampler draws.
        params: replicated over the run's devices; the first draws.
        by: the features.
        samples: how many; 0 is as many as test images are evaluated, and 10,000 at most.

    Returns:
        "features", what they are; "test_images", how many; "samples", how many, and "frechet", "kernel", "precision"
        and "recall" of them against the test images; "training_images", the same of training images: about what a
        perfect model would have (a classifier's features are a little kinder, or harsher, to what it learned from);
        "agreement" where samples have a label: the share to which the classifier gives the same.

    Raises:
        UserError: fewer than 20 samples, test or training images; or samples or features that are not finite.
    """
    number = number_of_samples(run, samples)
    images, labels = draw(run, params, number)
    drawn, predicted = by(images, "samples")
    test, _ = by(run.data.test.take(np.arange(number_of_examples(run)))["image"], "test images")
    train, _ = by(_some(run.data, number), "training images")
    result = {"features": by.name, "test_images": len(test), **distances(test, drawn)}
    result["training_images"] = distances(test, train)
    if labels is not None and predicted is not None:
        result["agreement"] = mean_and_error((predicted == labels).astype(np.float64))
    return result


def number_of_samples(run: Run, samples: int = 0) -> int:
    """How many samples are drawn where so many are asked for; 0 is one for each test image, at most 10,000.

    Raises:
        UserError: fewer than 20 samples, test or training images.
    """
    number, test, train = samples or min(number_of_examples(run), MOST), number_of_examples(run), len(run.data.train)
    if min(number, test, train) < FEWEST:
        raise UserError(
            f"--quality {number}, with {test} test and {train} training {run.data.spec.noun}: quality is measured on "
            f"{FEWEST} or more of each. Take a larger --quality or --eval-examples, or leave it out with --quality 0."
        )
    return number


def draw(run: Run, params: Params, number: int) -> tuple[np.ndarray, np.ndarray | None]:
    """So many samples of a run, and their labels where it gives them any, in blocks of `eval_batch_size`.

    They start from other noise than those of `samples.png`, and are the same every time.

    Raises:
        NotFinite: of the first block with samples that are not finite: says how many.
    """
    one, key = on_one_device(params), jax.random.fold_in(stream(run.config.seed, "sample"), OWN)
    sample, size = jax.jit(run.experiment.sample, static_argnums=2), min(run.config.eval_batch_size, number)
    images, labels = [], []
    with _bar(number, "samples") as bar:
        for block, first in enumerate(range(0, number, size)):
            drawn = jax.device_get(sample(one, jax.random.fold_in(key, block), size))
            check_samples(run, np.asarray(drawn.images))
            images.append(np.asarray(drawn.images)[: number - first])
            labels.append(drawn.labels)
            bar.update(len(images[-1]))
    given = labels[0] is not None
    return np.concatenate(images), np.concatenate(labels)[:number] if given else None


def distances(real: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """Every metric of features (N, F) against those of real images, and N."""
    blocks = max(10, min(len(real), len(drawn)) // 1000)
    kernel = metrics.kernel_distance(real, drawn, jax.random.key(0), blocks)
    return {
        "samples": len(drawn),
        "frechet": metrics.frechet_distance(metrics.moments(real), metrics.moments(drawn)),
        "kernel": kernel._asdict(),
        **metrics.precision_recall(real, drawn)._asdict(),
    }


def summary(result: dict[str, Any]) -> str:
    """Quality in a few lines: the samples beside the training images."""
    floor = result["training_images"]
    kernel, least = (plus_minus(part["kernel"]) for part in (result, floor))
    rows = [
        (f"against {result['test_images']:,} test images", f"{result['samples']:,} samples",
         f"{floor['samples']:,} training images"),
        ("Fréchet distance", f"{result['frechet']:.4f}", f"{floor['frechet']:.4f}"),
        ("kernel distance", kernel, least),
        *((name, f"{result[name]:.3f}", f"{floor[name]:.3f}") for name in ("precision", "recall")),
    ]  # fmt: skip
    if "agreement" in result:
        rows.append(("as labelled", f"{result['agreement']['mean']:.1%}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(f"  {line}" for line in [f"quality by {result['features']}", *lines])


def _some(data: Dataset, number: int) -> np.ndarray:
    """So many training images, or all where there are fewer, each once."""
    chosen = np.random.RandomState(0).permutation(len(data.train))[:number]
    return data.train.take(chosen)["image"]


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
