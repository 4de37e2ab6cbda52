"""Data sets by name or path: training and test examples held in RAM where they fit."""

import gzip
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vdm_jax.training.data import user_files
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.data.series import SERIES
from vdm_jax.training.data.spec import DEFAULTS, DataOptions, DataSpec
from vdm_jax.training.runtime.errors import UserError

RAM_LIMIT = 2**30  # bytes; larger sets are decoded again at every use
CHUNK = 1024  # examples read at once to go through all of them
DIGITS_TEST = 360  # of the 1,797 digits
DISTRIBUTIONS = PLANES | SERIES
SAMPLES = (50_000, 10_000)  # training and test examples of a distribution with known density
NumpyBatch = dict[str, np.ndarray]
Record = dict[str, Any]


class Images:
    """Labeled examples by index; each is decoded at most once if the whole set fits in RAM.

    Args:
        records: sequence of {"image": array of this shape and type, "label": int}; indexing may be slow, since it
            decodes.
        shape: of an example, such as (H, W, C).
        dtype: of an example.
    """

    def __init__(self, records: Any, shape: tuple[int, ...], dtype: type = np.uint8):
        self._records = records
        self.shape = shape
        self.fits_in_memory = len(records) * int(np.prod(shape)) * np.dtype(dtype).itemsize <= RAM_LIMIT
        held = len(records) if self.fits_in_memory else 0
        self._image = np.empty((held, *shape), dtype)
        self._label = np.empty(held, np.int32)
        self._known = np.zeros(held, bool)

    def __len__(self) -> int:
        return len(self._records)

    def take(self, indices: np.ndarray) -> NumpyBatch:
        """The examples at these indices: {"image": array (B, *shape), "label": int32 (B,)}."""
        if not self.fits_in_memory:
            examples = self._read(indices)
            labels = np.array([example.get("label", 0) for example in examples], np.int32)
            return {"image": np.stack([example["image"] for example in examples]), "label": labels}
        missing = indices[~self._known[indices]]
        # Two threads may decode the same image: they write the same bytes, and set `known` only afterwards.
        for i, record in zip(missing, self._read(missing), strict=True):
            self._image[i], self._label[i] = record["image"], record.get("label", 0)
        self._known[missing] = True
        return {"image": self._image[indices], "label": self._label[indices]}

    def chunks(self) -> Iterator[np.ndarray]:
        """The images of all examples in order, a thousand at a time."""
        for first in range(0, len(self), CHUNK):
            yield self.take(np.arange(first, min(first + CHUNK, len(self))))["image"]

    def _read(self, indices: np.ndarray) -> Sequence[Record]:
        if hasattr(self._records, "__getitems__"):  # TFDS reads a batch at once in half the time
            return self._records.__getitems__(indices.tolist()) if len(indices) else []
        return [self._records[i] for i in indices.tolist()]


class Dataset(NamedTuple):
    """Training and test examples with their description."""

    spec: DataSpec
    train: Images
    test: Images


def load(name: str, options: DataOptions = DEFAULTS) -> Dataset:
    """A data set: "digits", a distribution in the plane, any image set of TFDS, or a user's own images or arrays.

    Args:
        name: the name of the set, or the path of a folder or a file; see `user_files.is_path`.
        options: how it is read.

    Raises:
        UserError: the set is unknown, or is neither on this machine nor available for download; says how to get it.
            A user's own files cannot be used, or an option does not apply to these data; says why.
    """
    if user_files.is_path(name):
        return _user_data(name, options)
    if name == "digits" or name in DISTRIBUTIONS:
        user_files.refuse_unused(name, options)
        return _digits() if name == "digits" else _distribution(name)
    from vdm_jax.training.data import tfds_images  # slow to import, and the digits do not need it

    user_files.refuse_unused(name, options, ["trust_data_code"])
    shape, num_classes, train, test = tfds_images.open_set(name, trust_code=options.trust_data_code)
    spec = DataSpec(name, shape, 256, num_classes, len(train), len(test))
    return Dataset(spec, Images(train, shape), Images(test, shape))


def _user_data(name: str, options: DataOptions) -> Dataset:
    from vdm_jax.training.data import arrays, image_folder  # Pillow is slow to import

    path = user_files.existing(name)
    if not path.is_dir() and (path.suffix not in user_files.ARRAYS or not path.is_file()):
        kinds = ", ".join(user_files.ARRAYS)
        raise UserError(f"--data {user_files.shown(path)} is neither a folder of images nor an array file ({kinds}).")
    try:
        spec, *parts = (image_folder.open_folder if path.is_dir() else arrays.open_array)(path, options)
    except OSError as error:
        raise UserError(f"--data {user_files.shown(path)} cannot be read: {error}.") from error
    return _with_moments(Dataset(spec, *(Images(part, spec.shape, spec.dtype) for part in parts)))


def _digits() -> Dataset:
    """scikit-learn's 1,797 digits, 8 x 8 pixels, 17 gray levels; the test set is the last 360 of a fixed order."""
    rows = _digit_rows()
    order = np.random.RandomState(0).permutation(len(rows))  # RandomState's stream never changes
    records = [{"image": row[:64].reshape(8, 8, 1), "label": int(row[64])} for row in rows[order]]
    train, test, shape = records[:-DIGITS_TEST], records[-DIGITS_TEST:], (8, 8, 1)
    return Dataset(DataSpec("digits", shape, 17, 10, len(train), len(test)), Images(train, shape), Images(test, shape))


def _digit_rows() -> UInt8[np.ndarray, "n 65"]:
    found = importlib.util.find_spec("sklearn")
    for folder in found.submodule_search_locations or () if found else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():  # reading the file takes 5 ms, importing sklearn.datasets a second
            with gzip.open(path, "rt") as file:
                return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


def _distribution(name: str) -> Dataset:
    """Samples of a distribution with known density: 50,000 for training, 10,000 for testing."""
    parts = []
    for seed, count in enumerate(SAMPLES):
        examples, labels = DISTRIBUTIONS[name]().sample(count, seed)
        records = [{"image": x, "label": label} for x, label in zip(examples, labels, strict=True)]
        parts.append(Images(records, examples.shape[1:], np.float32))
    return _with_moments(Dataset(DataSpec(name, parts[0].shape, 0, 0, *SAMPLES), *parts))


def _with_moments(data: Dataset) -> Dataset:
    """Real-valued data with the mean and standard deviation of each entry or channel over the training set.

    Raises:
        UserError: an entry or channel is constant.
    """
    if data.spec.levels:
        return data

    axes, count = tuple(range(len(data.spec.shape))), len(data.train) * int(np.prod(data.spec.shape[:-1]))

    def average(function):
        sums = [function(chunk.astype(np.float64)).sum(axes) for chunk in data.train.chunks()]
        return np.sum(sums, axis=0) / count

    mean = average(lambda x: x)
    std = np.sqrt(average(lambda x: (x - mean) ** 2))
    if np.any(constant := std <= 1e-6 * np.abs(mean)):
        what, which = "entry" if len(data.spec.shape) == 1 else "channel", int(np.argmax(constant))
        raise UserError(f"{data.spec.name}: {what} {which} is always {mean[which]:g} and has no density: remove it.")
    return data._replace(spec=data.spec._replace(mean=tuple(mean.tolist()), std=tuple(std.tolist())))
