"""Conversion of one layer's array between Flax's and PyTorch's axis order."""

import numpy as np

__all__ = ["from_torch", "to_torch"]


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Flax to PyTorch: output channels first, kernel height and width last; a shortcut becomes a 1 x 1 convolution."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2 and not name.startswith("class_embedding"):
        array = array.T
    return array[:, :, None, None] if name.endswith("conv_shortcut.weight") else array


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """PyTorch to Flax, the inverse of `to_torch`."""
    if name.endswith("conv_shortcut.weight"):
        array = array[:, :, 0, 0]
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2 and not name.startswith("class_embedding"):
        array = array.T
    return np.ascontiguousarray(array)
