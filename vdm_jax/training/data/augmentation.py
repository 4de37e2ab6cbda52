"""What may be done to training images, each drawn by uniform numbers of its own."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Shaped

from vdm_jax.training.config import TrainConfig

Images = Shaped[np.ndarray, "b h w c"]
Uniform = Float[np.ndarray, "b c"]  # numbers in [0, 1), as many for each image as it has channels
Augmentation = Callable[[Images, Uniform], Images]


def flip_half(images: Images, uniform: Uniform) -> Images:
    """Mirror each image left to right with probability 1/2."""
    return np.where(uniform[:, 0, None, None, None] < 0.5, images[:, :, ::-1], images)


def rotate(images: Images, uniform: Uniform) -> Images:
    """Turn each (square) image by 0, 90, 180 or 270 degrees, all alike probable."""
    quarters = (4 * uniform[:, 0]).astype(int)
    return np.stack([np.rot90(image, k) for image, k in zip(images, quarters, strict=True)])


def swap_channels(images: Images, uniform: Uniform) -> Images:
    """Put each image's channels in one of all orders, all alike probable."""
    orders = np.argsort(uniform, axis=1)
    return np.take_along_axis(images, orders[:, None, None, :], axis=-1)


def augmentations(config: TrainConfig) -> list[Augmentation]:
    """What a run does to its training images, in this order."""
    chosen = {flip_half: config.flip, rotate: config.rotate, swap_channels: config.swap_channels}
    return [function for function, wanted in chosen.items() if wanted]
