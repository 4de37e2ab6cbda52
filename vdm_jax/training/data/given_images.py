"""Examples that a user gives to a trained model: an image file, a folder of images or an array file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vdm_jax.training.data import arrays
from vdm_jax.training.data.sources import Images, NumpyBatch
from vdm_jax.training.data.spec import DataSpec
from vdm_jax.training.data.user_files import ARRAYS, shown
from vdm_jax.training.runtime.errors import UserError


class Given(NamedTuple):
    """Examples with a name for each.

    names: a file's path, or the index in an array.
    examples: as a data set's test examples.
    labeled: whether they have labels.
    """

    names: list[str]
    examples: Any
    labeled: bool


class Relabeled:
    """Examples with other labels.

    Args:
        examples: by index.
        labels: one for all, or one for each.
    """

    def __init__(self, examples: Any, labels: int | Int[np.ndarray, " n"]):
        self._examples, self.shape = examples, examples.shape
        self._labels = np.broadcast_to(np.asarray(labels, np.int32), len(examples))

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, indices: np.ndarray) -> NumpyBatch:
        """The examples at these indices."""
        return {**self._examples.take(indices), "label": self._labels[indices]}


def read(path: str, spec: DataSpec, image_size: int = 0) -> Given:
    """Examples of a file or a folder, for a model of data with this description.

    Args:
        path: an array file (.npy, .npz, .safetensors) with one array of examples, or examples `x` and labels `y`; an
            image file; or a folder of images, whose subfolders are labels if all their names are numbers.
        spec: the shape, the number of levels and of classes that the examples must have.
        image_size: side to which image files are cropped and resized, as for training; 0 leaves them as they are.

    Raises:
        UserError: the file does not exist or cannot be read, or an example has another shape, type, pixel value or
            label; names the first.
    """
    place = Path(os.path.expanduser(path))
    if not os.path.exists(place):  # accepts any characters
        raise UserError(f"{shown(path)}: there is no such file or folder.")
    if place.suffix in ARRAYS:
        names, values, labels = _array(place)
    else:
        files = [place] if place.is_file() else _image_files(place)
        names, values, labels = _decoded(place, files, spec, image_size)
    _check(place, names, values, labels, spec)
    values = values.reshape(-1, *spec.shape).astype(spec.dtype)
    known = np.zeros(len(values), np.int32) if labels is None else labels
    records = [{"image": value, "label": int(label)} for value, label in zip(values, known, strict=True)]
    return Given(names, Images(records, spec.shape, spec.dtype), labels is not None)


def _array(path: Path) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Names, values and labels of an array file."""
    try:
        found = arrays.open_file(path)
        labels = next((name for name in ("y", "labels") if name in found and len(found) > 1), None)
        others = sorted(set(found) - {labels})
        if len(others) != 1 and "x" not in others:
            raise UserError(
                f"{shown(path)} has the arrays {', '.join(sorted(found)) or 'none'}: name the examples x and the "
                "labels, if any, y."
            )
        x = np.asarray(found["x" if "x" in others else others[0]][:])
        y = None if labels is None else np.asarray(found[labels][:])
    except UserError:
        raise
    except Exception as error:  # NumPy, zipfile and safetensors raise errors of their own
        raise UserError(f"{shown(path)} cannot be read: {error}. Save an array of numbers again.") from error
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise UserError(
            f"{shown(path)}: the labels {labels} must be integers of shape {x.shape[:1]}, one for each example, not "
            f"{y.dtype} of shape {y.shape}."
        )
    return [str(index) for index in range(len(x) if x.ndim else 0)], x, y


def _image_files(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, in the order of their paths."""
    from vdm_jax.training.data import image_folder  # it imports Pillow, which arrays do not need

    files = [path for path in folder.rglob("*") if path.suffix.lower() in image_folder.SUFFIXES and path.is_file()]
    if not files:
        raise UserError(f"{shown(folder)} contains no images ({', '.join(image_folder.SUFFIXES)}).")
    return sorted(files, key=os.fsencode)


def _decoded(
    place: Path, files: Sequence[Path], spec: DataSpec, image_size: int
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Names, pixels and labels of image files."""
    from vdm_jax.training.data import image_folder

    if not spec.levels:
        raise UserError(f"{shown(place)}: the model is of {spec.noun} {spec.shape}, not of images: give an array file.")
    pixels = []
    for path in files:
        try:
            pixels.append(image_folder.decode(path, spec.shape[-1], image_size))
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"{shown(path)} cannot be read: {error}. Replace it or leave it out.") from error
        if pixels[-1].shape != spec.shape:
            raise _wrong_shape(path, pixels[-1].shape, spec)
    names = [str(path) if path == place else path.relative_to(place).as_posix() for path in files]
    folders = [
        name.split("/")[0] if "/" in name and path != place else "" for name, path in zip(names, files, strict=True)
    ]
    numbers = all(folder.isascii() and folder.isdecimal() for folder in folders)
    labels = np.array([int(folder) for folder in folders]) if numbers else None
    return names, np.stack(pixels), labels


def _check(path: Path, names: Sequence[str], values: np.ndarray, labels: np.ndarray | None, spec: DataSpec) -> None:
    """Check types, shapes, pixel values and labels.

    Raises:
        UserError: names what differs, and the first example in which it does.
    """
    wanted = "iub" if spec.levels else "f"
    if values.dtype.kind not in wanted:
        kind = f"integers 0 .. {spec.levels - 1}" if spec.levels else "floating-point numbers"
        raise UserError(f"{shown(path)} has numbers of type {values.dtype}: {spec.noun} of {spec.name} are {kind}.")
    shape = values.shape[1:] if values.shape[1:] != spec.shape[:-1] or spec.shape[-1] != 1 else spec.shape
    if shape != spec.shape:
        raise _wrong_shape(path, shape, spec)
    if not len(values):
        raise UserError(f"{shown(path)} has no examples.")
    flat = values.reshape(len(values), -1)
    good = (flat >= 0) & (flat < spec.levels) if spec.levels else np.isfinite(flat)
    if not good.all():
        row, place = np.argwhere(~good)[0]
        what = f"a pixel value in 0 .. {spec.levels - 1}" if spec.levels else "a finite number"
        remedy = f" Pixel values of {spec.name} have {spec.levels} levels; rescale them." if spec.levels else ""
        raise UserError(f"{shown(path)}: example {names[row]} contains {flat[row, place]}, not {what}.{remedy}")
    if labels is not None and spec.num_classes:
        unknown = np.flatnonzero((labels < 0) | (labels >= spec.num_classes))
        if len(unknown):
            raise UserError(
                f"{shown(path)}: example {names[unknown[0]]} has label {labels[unknown[0]]}; {spec.name} has "
                f"{spec.num_classes} classes (0..{spec.num_classes - 1})."
            )


def _wrong_shape(path: Path, shape: tuple[int, ...], spec: DataSpec) -> UserError:
    found, wanted = ("x".join(map(str, size)) or "a single number" for size in (shape, spec.shape))
    return UserError(f"{shown(path)}: an example is {found}, and {spec.noun} of {spec.name} are {wanted}. Convert it.")
