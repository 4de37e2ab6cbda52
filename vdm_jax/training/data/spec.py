"""The description of a data set from which a recipe builds its model."""

from typing import NamedTuple


class DataSpec(NamedTuple):
    """What a recipe knows about a data set before it builds its model."""

    name: str
    shape: tuple[int, ...]  # (height, width, channels), or (2,) for points in the plane
    levels: int  # pixel values are 0 .. levels - 1; 0 for real-valued data
    num_classes: int  # 0 for data without labels
    num_train: int
    num_test: int

    @property
    def noun(self) -> str:
        """The plural noun for its examples."""
        return "images" if self.levels else "points"
