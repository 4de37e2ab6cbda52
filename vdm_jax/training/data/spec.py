"""The description of a data set from which a recipe builds its model, and the options for reading a user's own data."""

import math
from typing import NamedTuple

import numpy as np


class DataSpec(NamedTuple):
    """What a recipe knows about a data set before it builds its model."""

    name: str
    shape: tuple[int, ...]  # images (height, width, channels), points (dimensions,), series (length, channels)
    levels: int  # pixel values are 0 .. levels - 1; 0 for real-valued data
    num_classes: int  # 0 for data without labels
    num_train: int
    num_test: int
    mean: tuple[float, ...] = ()  # real-valued data: of each entry of a vector, or channel of a series
    std: tuple[float, ...] = ()  # standard deviation, likewise
    fingerprint: str = ""  # of a user's own files, to notice that they have changed; "" for other data

    @property
    def noun(self) -> str:
        """The plural noun for its examples."""
        return "images" if self.levels else "points" if len(self.shape) == 1 else "series"

    @property
    def log_volume(self) -> float:
        """The sum of log std over the entries of an example: -log p in the units of the data minus that of
        standardized data, in nats.
        """
        return math.prod(self.shape[:-1]) * sum(map(math.log, self.std))

    @property
    def dtype(self) -> type:
        """The NumPy type of its examples: uint8 or uint16 for images, float32 for real-valued data."""
        return np.float32 if not self.levels else np.uint8 if self.levels <= 256 else np.uint16


class DataOptions(NamedTuple):
    """How a data set is read: the options of these names of `TrainConfig`."""

    test_share: float = 0.1
    image_size: int = 0
    channels: int | None = None
    levels: int = 0
    skip_unreadable: bool = False
    trust_data_code: bool = False


DEFAULTS = DataOptions()
