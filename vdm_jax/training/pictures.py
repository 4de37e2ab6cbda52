"""Integer images to PNG: grids of samples, and the chain that led to them. Points to PNG: a map of codes."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

SMALLEST_SIDE = 48  # pixels an image is shown with at least
GAP = 2


def grid(images: Integer[np.ndarray, "rows columns h w c"], levels: int) -> Integer[np.ndarray, "height width c"]:
    """Lay images out in rows and columns, enlarged without blurring, scaled from 0 .. levels - 1 to 0 .. 255."""
    rows, columns, height, width, channels = images.shape
    scale = -(-SMALLEST_SIDE // min(height, width))
    pixels = np.round(images.astype(np.float64) * (255 / (levels - 1))).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=128)
    sheet = pixels.swapaxes(1, 2).reshape(rows * pixels.shape[2], columns * pixels.shape[3], channels)
    return np.pad(sheet, ((0, GAP), (0, GAP), (0, 0)), constant_values=128)


def square(images: Integer[np.ndarray, "n h w c"]) -> Integer[np.ndarray, "rows columns h w c"]:
    """Arrange n images in a nearly square block; what the last row lacks stays black."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    filled = np.zeros((rows * columns, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    return filled.reshape(rows, columns, *images.shape[1:])


def save(path: Path, images: Integer[np.ndarray, "rows columns h w c"], levels: int) -> None:
    """Write a grid as PNG, whole or not at all. Images of neither 1 nor 3 channels show their first."""
    from PIL import Image

    sheet = grid(images, levels)
    sheet = sheet if sheet.shape[-1] == 3 else sheet[..., 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(sheet).save(unfinished, format="PNG")
    unfinished.replace(path)


def scatter(path: Path, points: Float[np.ndarray, "n 2"], labels: Integer[np.ndarray, " n"], title: str) -> Path:
    """Write points in the plane as PNG, coloured by their label."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 5.0), layout="constrained")
    for label in np.unique(labels):
        axes.scatter(*points[labels == label].T, s=9, label=str(label), color=f"C{label % 10}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(title=title, aspect="equal")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
