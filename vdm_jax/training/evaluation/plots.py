"""PNG files: grids of images, scatter plots, chains of points, and functions on the plane."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

from vdm_jax.training.experiment import NO_VALUE, Panel
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import atomic_write

MIN_SIDE = 48  # pixels of an enlarged image
GAP = 2
MAX_PAIRED = 5  # entries or channels in a plot
MAX_CURVES = 12
DEPTH = 12.0  # nats between the maximum and the lowest color


class NotFinite(UserError):
    """Numbers to be plotted or measured are not finite."""


def check_finite(examples: np.ndarray, what: str, remedy: str = "") -> None:
    """Check that examples (N, ...) are finite, and that no pixel has NO_VALUE.

    Args:
        examples: pixel values, or real numbers such as points.
        what: their name in the message.
        remedy: appended to the message.

    Raises:
        NotFinite: says how many of the examples are not finite.
    """
    good = examples > NO_VALUE if np.issubdtype(examples.dtype, np.integer) else np.isfinite(examples)
    bad = np.count_nonzero(~good.reshape(len(good), -1).all(axis=1))
    if bad:
        raise NotFinite(f"{bad} of {len(examples)} {what} are not finite. {remedy}".rstrip())


def grid(images: Integer[np.ndarray, "rows columns h w c"], levels: int) -> Integer[np.ndarray, "height width c"]:
    """One image of a grid of images, enlarged without blurring and scaled from 0 .. levels - 1 to 0 .. 255."""
    rows, columns, height, width, channels = images.shape
    scale = -(-MIN_SIDE // min(height, width))
    pixels = np.round(images.astype(np.float64) * (255 / (levels - 1))).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=128)
    sheet = pixels.swapaxes(1, 2).reshape(rows * pixels.shape[2], columns * pixels.shape[3], channels)
    return np.pad(sheet, ((0, GAP), (0, GAP), (0, 0)), constant_values=128)


def arrange_in_square(images: Integer[np.ndarray, "n h w c"]) -> Integer[np.ndarray, "rows columns h w c"]:
    """Arrange n images in a nearly square grid; missing images in the last row are black."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    filled = np.zeros((rows * columns, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    return filled.reshape(rows, columns, *images.shape[1:])


def save_grid(path: Path, images: Integer[np.ndarray, "rows columns h w c"], levels: int) -> None:
    """Write a grid of images as PNG, atomically; with neither 1 nor 3 channels, only the first is shown.

    Raises:
        NotFinite: an image has pixels with NO_VALUE.
    """
    from PIL import Image

    check_finite(images.reshape(-1, *images.shape[2:]), f"images of {path.name}")
    sheet = grid(images, levels)
    sheet = sheet if sheet.shape[-1] == 3 else sheet[..., 0]
    with atomic_write(path) as unfinished:
        Image.fromarray(sheet).save(unfinished, format="PNG")


def plot_points(
    path: Path, points: Float[np.ndarray, "n 2"], labels: Integer[np.ndarray, " n"] | None, title: str
) -> Path:
    """Write a scatter plot of points as PNG, colored by label if there are labels.

    Raises:
        NotFinite: a point is not finite.
    """
    import matplotlib.pyplot as plt

    check_finite(points, f"points of {path.name}")
    figure, axes = plt.subplots(figsize=(5.6, 5.0), layout="constrained")
    if labels is None:
        axes.scatter(*points.T, s=4, linewidths=0)
    else:
        for label in np.unique(labels):
            axes.scatter(*points[labels == label].T, s=9, label=str(label), color=f"C{label % 10}")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(title=title, aspect="equal")
    return save_figure(figure, path)


def plot_pairs(path: Path, samples: Float[np.ndarray, "n d"], data: Float[np.ndarray, "m d"], title: str) -> None:
    """Write the pairs of the first entries of vectors as scatter plots, samples over data, as PNG.

    Raises:
        NotFinite: a sample is not finite.
    """
    import matplotlib.pyplot as plt

    check_finite(samples, f"samples of {path.name}")
    count = min(samples.shape[1], MAX_PAIRED)
    figure, rows = plt.subplots(count, count, figsize=(1.2 + 1.8 * count,) * 2, layout="constrained", squeeze=False)
    for row, line in enumerate(rows):
        for column, axes in enumerate(line):
            for examples, name, color in ((data, "test data", "0.6"), (samples, "samples", "C0")):
                if row == column:
                    axes.hist(examples[:, row], bins=40, density=True, histtype="step", color=color, label=name)
                else:
                    axes.scatter(examples[:, column], examples[:, row], s=3, linewidths=0, color=color)
            axes.tick_params(labelsize="x-small")
            axes.set(xlabel=f"entry {column}" if row == count - 1 else "", ylabel="" if column else f"entry {row}")
    rows[0, 0].legend(fontsize="x-small")
    figure.suptitle(title)
    save_figure(figure, path)


def plot_series(path: Path, samples: Float[np.ndarray, "n l c"], data: Float[np.ndarray, "m l c"], title: str) -> None:
    """Write series as curves, data on the left and samples on the right, a row for each channel, as PNG.

    Raises:
        NotFinite: a sample is not finite.
    """
    import matplotlib.pyplot as plt

    check_finite(samples, f"samples of {path.name}")
    count = min(samples.shape[2], MAX_PAIRED)
    size = (9.0, 0.8 + 2.2 * count)
    figure, rows = plt.subplots(count, 2, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey="row")
    for channel, row in enumerate(rows):
        for axes, examples, name in zip(row, (data, samples), ("test data", "samples"), strict=True):
            axes.plot(examples[:MAX_CURVES, :, channel].T, linewidth=0.8)
            axes.set(title=f"{name}, channel {channel}" if count > 1 else name)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_paths(path: Path, chains: Float[np.ndarray, "k m 2"], title: str) -> Path:
    """Write chains of points as PNG, each a line with a dot at its end.

    Raises:
        NotFinite: a chain has points that are not finite.
    """
    import matplotlib.pyplot as plt

    check_finite(chains.swapaxes(0, 1), f"chains of {path.name}")
    figure, axes = plt.subplots(figsize=(5.0, 5.0), layout="constrained")
    _lines(axes, chains)
    axes.set(title=title, aspect="equal")
    return save_figure(figure, path)


def plot_panels(path: Path, shown: Mapping[str, Panel]) -> Path:
    """Write functions on the plane as PNG, side by side.

    Raises:
        NotFinite: values, arrows or chains of a panel are not finite.
    """
    import matplotlib.pyplot as plt

    for title, panel in shown.items():
        _check_panel(panel, f"of {title!r} in {path.name}")
    figure, row = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown), 5.0), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    low = min(float(panel.height.max()) for panel in shown.values()) - DEPTH
    for axes, (title, panel) in zip(row[0], shown.items(), strict=True):
        axes.pcolormesh(*np.moveaxis(panel.x, -1, 0), np.maximum(panel.height, low), cmap="Blues", shading="gouraud")
        for place, (name, arrows) in enumerate(sorted((panel.arrows or {}).items(), reverse=True)):
            # arrow lengths are square roots: the score grows without bound away from the data
            size = np.sqrt(np.linalg.norm(arrows, axis=-1, keepdims=True)) + 1e-9
            axes.quiver(*np.moveaxis(panel.places, -1, 0), *np.moveaxis(arrows / size, -1, 0), label=name,
                        color=("black", "C3")[place % 2], width=(0.007, 0.003)[place % 2], scale=60)  # fmt: skip
        if panel.arrows:
            axes.legend(fontsize="small", loc="upper right")
        if panel.paths is not None:
            _lines(axes, panel.paths)
        side = np.abs(panel.x).max()
        axes.set(title=title, aspect="equal", xlim=(-side, side), ylim=(-side, side))
    return save_figure(figure, path)


def _check_panel(panel: Panel, where: str) -> None:
    parts = {f"arrows {name!r}": arrows for name, arrows in (panel.arrows or {}).items()}
    if panel.paths is not None:
        parts["chains"] = panel.paths.swapaxes(0, 1)
    parts["values"] = np.where(panel.height == -np.inf, 0.0, panel.height)  # -inf is the logarithm of a zero density
    for what, part in parts.items():
        check_finite(part, f"{what} {where}")


def _lines(axes, chains) -> None:
    for chain in chains.swapaxes(0, 1):
        axes.plot(*chain.T, linewidth=0.6, alpha=0.7)
        axes.plot(*chain[-1], marker=".", color="black", markersize=5)


def save_figure(figure, path: Path) -> Path:
    """Write a matplotlib figure as PNG, atomically, and close it."""
    import matplotlib.pyplot as plt

    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    return path
