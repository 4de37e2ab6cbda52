"""Feature extractors for sample quality: a classifier trained on the data set, Inception-v3, or points themselves."""

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

from vdm_jax.likelihoods import normalize
from vdm_jax.networks import inception
from vdm_jax.networks.classifier import Classifier, ClassifierConfig
from vdm_jax.training import loop
from vdm_jax.training import run as runs
from vdm_jax.training.config import TrainConfig, read_json, to_json
from vdm_jax.training.data.sources import Dataset
from vdm_jax.training.evaluation.plots import check_finite
from vdm_jax.training.evaluation.report import write_report
from vdm_jax.training.experiment import DataSpec, Experiment
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.devices import make_mesh, on_one_device
from vdm_jax.training.runtime.errors import UserError

BLOCK = 120  # images in a batch of an extractor


class Extractor(NamedTuple):
    """A function from images to features.

    name: description of the features, in a few words.
    extract: a block of images or points -> (features (B, F), predicted labels (B,) or None).
    """

    name: str
    extract: Callable[[Array], tuple[Array, Array | None]]

    def __call__(self, images: np.ndarray, what: str = "") -> tuple[np.ndarray, np.ndarray | None]:
        """The features (N, F) of images (N, H, W, C), and their predicted labels (N,) if there are any.

        All blocks have the same size, so that one program serves all; the last is padded with copies.

        Raises:
            NotFinite: some features are not finite.
        """
        blocks = []
        with progress_bar(len(images), f"features of {what}") as bar:
            for first in range(0, len(images), BLOCK):
                indices = np.arange(first, first + BLOCK)
                kept = indices < len(images)
                block = jax.device_get(self.extract(jnp.asarray(images[np.minimum(indices, len(images) - 1)])))
                blocks.append([part if part is None else part[kept] for part in block])
                bar.update(int(kept.sum()))
        features, labels = zip(*blocks, strict=True)
        found = np.concatenate(features)
        check_finite(found, f"features of {what}", f"Check the weights for NaN: {self.name}.")
        return found, None if labels[0] is None else np.concatenate(labels)


def extractor(run: Run, inception_file: str = "") -> Extractor:
    """The extractor for the samples of a run.

    Inception-v3 if a file with its weights is given; else, for real-valued data, the numbers themselves; else a
    classifier trained on the run's data set.

    Raises:
        UserError: the images have no labels and no file is given, or the file does not fit.
    """
    data = run.data
    if inception_file:
        return inception_extractor(Path(inception_file), data.spec)
    if not data.spec.levels:
        return Extractor(f"the {data.spec.noun} themselves", lambda x: (x.reshape(len(x), -1), None))
    if data.spec.num_classes < 2:
        raise UserError(
            f"{data.spec.name} has no labels to train a classifier on. Give Inception's weights with --inception FILE, "
            "or skip sample quality with --quality 0."
        )
    own = data.spec.fingerprint and f"-{data.spec.fingerprint[:12]}"  # other files need another classifier
    return train_classifier(data, Path(run.config.workdir) / ".features" / f"{data.spec.name}{own}")


@dataclass(frozen=True)
class ClassifierTraining(TrainConfig):
    """Options for the training of a data set's classifier."""

    network: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The classifier."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions with which the loop trains and evaluates; a classifier has no samples."""
        self.network.check(data.shape)
        network = Classifier(self.network)

        def init(key):
            return network.init(key, jnp.zeros((1, *data.shape)))["params"]

        def loss(params, key, batch, step):
            del step
            x = normalize(batch["image"], data.levels)
            output = network.apply({"params": params}, x, train=True, rngs={"dropout": key})
            return _cross_entropy(output, batch["label"]).mean(), {}

        def evaluate(params, key, batch):
            del key
            output: Any = network.apply({"params": params}, normalize(batch["image"], data.levels))
            correct = (jnp.argmax(output.logits, axis=-1) == batch["label"]).astype(jnp.float32)
            return {"accuracy": correct, "cross_entropy": _cross_entropy(output, batch["label"])}

        def sample(params, key, n):
            raise NotImplementedError("a classifier has no samples: set num_samples to 0")

        return Experiment(init, loss, sample, evaluate)


def _cross_entropy(output: Any, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(output.logits, label)


def classifier_options(data: DataSpec) -> ClassifierTraining:
    """The options for a data set; images larger than the digits get one more resolution and twice the steps.

    Images whose sides cannot be halved without a remainder get fewer resolutions.
    """
    small = min(data.shape[:2]) < 16
    multipliers = (1, 2) if small else (1, 2, 2)
    while any(side % 2 ** (len(multipliers) - 1) for side in data.shape[:2]):
        multipliers = multipliers[:-1]
    network = ClassifierConfig(num_classes=data.num_classes, multipliers=multipliers, dropout=0.2)
    return ClassifierTraining(
        data=data.name,
        network=network,
        steps=1000 if small else 2000,
        learning_rate=2e-3,
        warmup_steps=50,
        lr_schedule="cosine",
        weight_decay=1e-2,
        ema_decay=0.99,
        log_every=500,
        num_samples=0,
        picture_every=0,
    )


def train_classifier(data: Dataset, folder: Path, options: ClassifierTraining | None = None) -> Extractor:
    """The features of a data set's classifier, read from a folder, or trained first if the folder has none.

    Args:
        data: the images and their labels.
        folder: the classifier's run, with its test accuracy in report.json.
        options: options for its training; `classifier_options` by default. A classifier in the folder that was trained
            with other options is replaced.
    """
    options = dataclasses.replace(options or classifier_options(data.spec), workdir=str(folder.parent))
    mesh = make_mesh(1)
    runs.validate(options, mesh.size)
    run = Run("classifier", options, folder, data, options.build(data.spec), mesh)
    if not _has_options(folder, options):
        runs.remove_run(folder)
    if (accuracy := _stored_accuracy(folder)) is None:
        print(f"Training a classifier on {data.spec.name}, once, for its features.", flush=True)
        accuracy = write_report(run, loop.train(run))["test"]["accuracy"]["mean"]
    params, network = on_one_device(runs.newest_checkpoint(run).state.ema), Classifier(options.network)

    @jax.jit
    def extract(images):
        output: Any = network.apply({"params": params}, normalize(images, data.spec.levels))
        return output.features, jnp.argmax(output.logits, axis=-1)

    what = f"{options.network.features} features of a classifier trained on {data.spec.name}"
    return Extractor(f"{what} (test accuracy {accuracy:.1%})", extract)


def _has_options(folder: Path, options: ClassifierTraining) -> bool:
    """Whether the classifier in a folder was trained with these options, or the folder has none."""
    path, ignored = folder / "config.json", {"workdir": ""}
    if not path.exists():
        return True
    try:
        return {**read_json(path)["config"], **ignored} == to_json(options) | ignored
    except (UserError, KeyError, TypeError):  # damaged
        return False


def _stored_accuracy(folder: Path) -> float | None:
    """The test accuracy in a classifier's report.json; None if it is missing or damaged."""
    try:
        value = read_json(folder / "report.json")["test"]["accuracy"]["mean"]
    except (UserError, KeyError, TypeError):
        return None
    return value if isinstance(value, float) and 0.0 <= value <= 1.0 else None


def inception_extractor(path: Path, data: DataSpec) -> Extractor:
    """The 2,048 features of Inception-v3, with weights from a safetensors file.

    Raises:
        UserError: the file is missing, is not a safetensors file or lacks tensors, or the images have neither 1 nor 3
            channels.
    """
    if not data.levels or data.shape[-1] not in (1, 3):
        raise UserError(f"--inception needs images of 1 or 3 channels, which {data.name} does not have: remove it.")
    try:
        from safetensors.numpy import load

        if not path.is_file():  # reading a pipe could block for ever
            raise ValueError("it is not a file")
        weights = inception.check_weights(load(path.read_bytes()))
    except ImportError as error:
        raise UserError("--inception needs safetensors: run `pip install safetensors`.") from error
    except Exception as error:  # safetensors raises an error of its own for other files
        raise UserError(f"--inception {path} cannot be used: {error}") from error

    @jax.jit
    def extract(images):
        x = inception.resize(normalize(images, data.levels))
        return inception.inception_features(weights, jnp.broadcast_to(x, (*x.shape[:3], 3))), None

    return Extractor(f"2,048 features of Inception-v3 ({path.name})", extract)


def progress_bar(total: int, what: str) -> tqdm:
    """A progress bar over images on stderr, if that is a terminal."""
    return tqdm(total=total, desc=what, unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
