"""A baseline for every model: independent pixels with the histograms of the training set."""

import numpy as np

from vdm_jax.training.data.sources import RAM_LIMIT, Dataset, Images


def histogram_bits_per_dim(data: Dataset) -> float | None:
    """Bits per dimension of the test set under the training histograms of each pixel, with add-one smoothing.

        p_j(v) = (1 + #{x in train: x_j = v}) / (levels + #train)

    Returns:
        the mean over test images and pixels; None for real-valued data, or if the training images or their histograms
        do not fit in RAM.
    """
    dims = int(np.prod(data.spec.shape))
    if not data.spec.levels or not data.train.fits_in_memory or 8 * data.spec.levels * dims > RAM_LIMIT:
        return None
    counts = np.ones((data.spec.levels, dims))
    for images in _flat_chunks(data.train):
        for pixel in range(dims):
            counts[:, pixel] += np.bincount(images[:, pixel], minlength=data.spec.levels)
    bits = -np.log2(counts / counts.sum(axis=0))
    total = sum(bits[images, np.arange(dims)].sum() for images in _flat_chunks(data.test))
    return float(total / (len(data.test) * dims))


def _flat_chunks(images: Images):
    return (chunk.reshape(len(chunk), -1) for chunk in images.chunks())
