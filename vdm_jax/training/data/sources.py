"""Images or points in RAM, and batches of them in a reproducible order that a checkpoint can hold."""

import functools
import gzip
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int, UInt8

from vdm_jax.training.data.augmentation import Augmentation
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.experiment import DataSpec

RAM_LIMIT = 2**30  # bytes of decoded images that are worth remembering
DIGITS_TEST = 360  # of the 1,797 digits
POINTS = (50_000, 10_000)  # of a plane, to train on and to test
NumpyBatch = dict[str, np.ndarray]
Record = dict[str, Any]
ALL = slice(None)


class Images:
    """Labelled images by index, each decoded at most once where the whole set fits in RAM.

    Args:
        records: a sequence of {"image": uint8 (H, W, C), "label": int}; indexing it may be slow (it decodes).
        shape: (H, W, C), or any other.
        dtype: of an image.
    """

    def __init__(self, records: Any, shape: tuple[int, ...], dtype: type = np.uint8):
        self._records = records
        self.shape = shape
        self.fits = len(records) * int(np.prod(shape)) <= RAM_LIMIT
        held = len(records) if self.fits else 0
        self._image = np.empty((held, *shape), dtype)
        self._label = np.empty(held, np.int32)
        self._known = np.zeros(held, bool)

    def __len__(self) -> int:
        return len(self._records)

    def take(self, indices: np.ndarray) -> NumpyBatch:
        """The examples at these indices: {"image": uint8 (B, H, W, C), "label": int32 (B,)}."""
        if not self.fits:
            examples = self._read(indices)
            labels = np.array([example.get("label", 0) for example in examples], np.int32)
            return {"image": np.stack([example["image"] for example in examples]), "label": labels}
        missing = indices[~self._known[indices]]
        # Two threads may both decode an image; they write the same bytes, and `known` only once those are there.
        for i, record in zip(missing, self._read(missing), strict=True):
            self._image[i], self._label[i] = record["image"], record.get("label", 0)
        self._known[missing] = True
        return {"image": self._image[indices], "label": self._label[indices]}

    def _read(self, indices: np.ndarray) -> Sequence[Record]:
        if hasattr(self._records, "__getitems__"):  # TFDS reads many at once in half the time
            return self._records.__getitems__(indices.tolist()) if len(indices) else []
        return [self._records[i] for i in indices.tolist()]


class Dataset(NamedTuple):
    """Training and test images and what an experiment may know of them."""

    spec: DataSpec
    train: Images
    test: Images


def load(name: str) -> Dataset:
    """A data set by name: "digits", a law of points in a plane, or any image set of TFDS.

    Raises:
        UserError: there is no such set, or it is not here and cannot be fetched; says how to get it.
    """
    if name == "digits":
        return _digits()
    if name in PLANES:
        return _points(name)
    from vdm_jax.training.data import tfds_images  # a slow import, which the digits do not need

    shape, num_classes, train, test = tfds_images.open_set(name)
    spec = DataSpec(name, shape, 256, num_classes, len(train), len(test))
    return Dataset(spec, Images(train, shape), Images(test, shape))


def _digits() -> Dataset:
    """scikit-learn's 1,797 digits, 8x8 pixels of 17 grey levels; the last 360 of a fixed permutation are the test."""
    rows = _digit_rows()
    order = np.random.RandomState(0).permutation(len(rows))  # RandomState's stream is frozen for good
    records = [{"image": row[:64].reshape(8, 8, 1), "label": int(row[64])} for row in rows[order]]
    train, test, shape = records[:-DIGITS_TEST], records[-DIGITS_TEST:], (8, 8, 1)
    return Dataset(DataSpec("digits", shape, 17, 10, len(train), len(test)), Images(train, shape), Images(test, shape))


def _digit_rows() -> UInt8[np.ndarray, "n 65"]:
    found = importlib.util.find_spec("sklearn")
    for folder in found.submodule_search_locations or () if found else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():  # scikit-learn's own file: importing its data sets takes a second, reading this 5 ms
            with gzip.open(path, "rt") as file:
                return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)


def _points(name: str) -> Dataset:
    """Points of a law in the plane: 50,000 to train on, 10,000 to test."""
    train, test = (_drawn(name, count, seed) for seed, count in enumerate(POINTS))
    return Dataset(DataSpec(name, (2,), 0, 0, len(train), len(test)), train, test)


def _drawn(name: str, count: int, seed: int) -> Images:
    points, components = PLANES[name]().draw(count, seed)
    records = [{"image": point, "label": label} for point, label in zip(points, components, strict=True)]
    return Images(records, (2,), np.float32)


class ShuffledBatches:
    """The batches of an endless stream of epochs, each a fresh permutation, as arrays of indices.

    Whole batches are indexed, not examples: drawing 64 small images one by one in Python costs 1.3 ms, this 0.05 ms.

    Args:
        size: number of examples.
        batch_size: indices a batch; a batch may straddle two epochs, so no example is ever left out.
        seed: of the permutations.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self._size, self._batch_size = size, batch_size
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.RandomState([seed, epoch]).permutation(size)
        )

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        epochs, places = np.divmod(np.arange(index * self._batch_size, (index + 1) * self._batch_size), self._size)
        return np.concatenate([self._epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)])


def train_iterator(
    images: Images,
    batch_size: int,
    seed: int,
    augment: Sequence[Augmentation] = (),
    rows: Int[np.ndarray, " rows"] | slice = ALL,
) -> grain.DatasetIterator:
    """An endless iterator over shuffled batches that prefetches; `get_state` and `set_state` resume it exactly.

    Of each batch it gives only some rows, those of one process. Neither which examples are in a batch, nor what is done
    to them, nor the iterator's state depends on that: a run may go on with another number of processes.
    """
    batches = grain.MapDataset.source(ShuffledBatches(len(images), batch_size, seed))
    batches = batches.map(lambda indices: images.take(indices[rows]))
    for place, function in enumerate(augment):

        def augmented(batch: NumpyBatch, rng: np.random.Generator, function=function) -> NumpyBatch:
            uniform = rng.random((batch_size, images.shape[-1]))[rows]
            return {**batch, "image": function(batch["image"], uniform)}

        batches = batches.random_map(augmented, seed=(seed + place) % 2**32)  # one seed would tie their draws together
    threads = min(8, os.cpu_count() or 1)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def images_per_second(make_iterator: Callable[[], grain.DatasetIterator], batch_size: int, seconds: float) -> float:
    """Speed of a pipeline on its own, measured for so many seconds on an iterator of its own."""
    iterator = make_iterator()
    next(iterator)  # starts the threads
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(iterator)
        count += 1
    rate = count * batch_size / (time.perf_counter() - begin)
    iterator.close()
    return rate
