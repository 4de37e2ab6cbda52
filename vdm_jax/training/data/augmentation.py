"""Augmentations of training images, each a function of the images and of uniform random numbers."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Shaped

Images = Shaped[np.ndarray, "b h w c"]
Uniform = Float[np.ndarray, "b c"]  # numbers in [0, 1), one for each channel of each image
Augmentation = Callable[[Images, Uniform], Images]


def flip_half(images: Images, uniform: Uniform) -> Images:
    """Mirror each image left to right with probability 1/2."""
    return np.where(uniform[:, 0, None, None, None] < 0.5, images[:, :, ::-1], images)


def rotate(images: Images, uniform: Uniform) -> Images:
    """Rotate each square image by 0, 90, 180 or 270 degrees with equal probability."""
    quarters = (4 * uniform[:, 0]).astype(int)
    return np.stack([np.rot90(image, k) for image, k in zip(images, quarters, strict=True)])


def swap_channels(images: Images, uniform: Uniform) -> Images:
    """Apply a uniformly random permutation to the channels of each image."""
    orders = np.argsort(uniform, axis=1)
    return np.take_along_axis(images, orders[:, None, None, :], axis=-1)


def augmentations(*, flip: bool, rotation: bool, channels: bool) -> list[Augmentation]:
    """The selected augmentations, in the order in which they are applied.

    Args:
        flip: include `flip_half`.
        rotation: include `rotate`.
        channels: include `swap_channels`.
    """
    selected = {flip_half: flip, rotate: rotation, swap_channels: channels}
    return [function for function, wanted in selected.items() if wanted]
