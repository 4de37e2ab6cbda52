"""A folder of images: PNG, JPEG, WebP and TIFF, with subfolders as labels.

    PATH/a.png                        images without labels, of which a share is held out for testing
    PATH/cat/a.png                    with labels, held out likewise
    PATH/train/a.png, PATH/test/b.png     with test images
    PATH/train/cat/a.png, ...         with labels and test images

The order of the images is that of the bytes of their paths, whatever the order in the file system. Files are decoded
when they are used.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vdm_jax.training.data.spec import DataOptions, DataSpec
from vdm_jax.training.data.user_files import fingerprint, hold_out, in_threads, refuse_unused, shown
from vdm_jax.training.runtime.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
GRAY = {"1", "L", "LA", "La"}
COLOR = {"RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "P", "PA"}  # a palette may also be gray
SHOWN = 3  # files named in a message


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    width: int
    height: int
    gray: bool


class ImageRecords:
    """Images of a folder by index, decoded when they are read.

    Args:
        folder: of the images.
        names: their paths relative to the folder.
        labels: of each.
        spec: the description of the data.
        size: side of the square images, or 0 to leave them as they are.
    """

    def __init__(self, folder: Path, names: Sequence[str], labels: Sequence[int], spec: DataSpec, size: int):
        self._folder, self._names, self._labels, self._spec, self._size = folder, names, labels, spec, size

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example at this index.

        Raises:
            UserError: the file cannot be read, or has another size or larger pixel values than expected.
        """
        path, spec = self._folder / self._names[index], self._spec
        try:
            pixels = decode(path, spec.shape[-1], self._size)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(
                f"{shown(path)} cannot be read: {error}. Restore it, or leave out such files with --skip-unreadable.\n"
                "  Saved checkpoints are kept; --changed resumes a run with other files than at its start."
            ) from error
        if pixels.shape != spec.shape:
            raise UserError(f"{shown(path)} has shape {pixels.shape}, not {spec.shape}: it has changed. Restore it.")
        if int(pixels.max()) >= spec.levels:
            raise UserError(f"{shown(path)} contains {pixels.max()}, which is not below --levels {spec.levels}.")
        return {"image": pixels, "label": self._labels[index]}


def open_folder(folder: Path, options: DataOptions) -> tuple[DataSpec, ImageRecords, ImageRecords]:
    """Open a folder of images. Reads the header of every file, and decodes every file with `skip_unreadable`.

    Args:
        folder: as above. Files and folders whose names begin with a dot are ignored, and so are files of other types.
        options: `image_size`, `channels`, `levels` (256 by default), `skip_unreadable`; `test_share`, unless the folder
            has test images.

    Returns:
        the description, the training images, the test images.

    Raises:
        UserError: there are no images, or they differ in size, cannot be read, or have labels that do not fit.
    """
    names = _image_names(folder)
    own_test = _has_own_test(folder, names)
    names = [*_below(names, "test/"), *_below(names, "train/")] if own_test else names  # no other folders, such as val/
    applies = ["image_size", "channels", "levels", "skip_unreadable", *([] if own_test else ["test_share"])]
    refuse_unused(str(folder), options, applies)
    names, headers = _readable(folder, names, options.skip_unreadable)
    splits = [_below(names, "train/"), _below(names, "test/")] if own_test else [names]
    classes = _classes(folder, splits)
    if not own_test:
        splits = [[names[i] for i in which] for which in hold_out(len(names), options.test_share, shown(folder))]
    for split, kept in zip(("train", "test"), splits, strict=True):
        if not kept:
            raise UserError(f"--data {shown(folder)} has no images in {split}/.")
    channels = options.channels or (1 if all(header.gray for header in headers) else 3)
    shape = (*_size(folder, names, headers, options.image_size), channels)
    levels, counts = options.levels or 256, [len(split) for split in splits]
    if not 2 <= levels <= 256:
        raise UserError(f"--levels {levels}: image files have 2 to 256 gray levels.")
    name = Path(os.path.abspath(folder)).name or "images"
    files = fingerprint(folder, names)
    spec = DataSpec(name, shape, levels, len(classes), counts[0], counts[1], fingerprint=files)
    numbers = {label: number for number, label in enumerate(classes)}
    labels = [[numbers.get(_label(each, own_test), 0) for each in split] for split in splits]
    train, test = (ImageRecords(folder, *each, spec, options.image_size) for each in zip(splits, labels, strict=True))
    return spec, train, test


def decode(path: Path, channels: int, size: int) -> np.ndarray:
    """The pixels of an image file, uint8 (H, W, C).

    The image is turned upright as its EXIF orientation says, composited on white if it is transparent, converted to
    gray or RGB, cropped to its central square and resized with antialiasing.

    Args:
        path: of the file; of several frames only the first is read.
        channels: 1 (gray, ITU-R 601-2 luma) or 3 (RGB).
        size: side of the square; 0 neither crops nor resizes.
    """
    with open(path, "rb") as file, _open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, channels)


def header(path: Path) -> Header:
    """The size of an image as decoded, and whether it is gray, without decoding it."""
    with open(path, "rb") as file, _open(file) as image:
        width, height = image.size
        if image.format != "TIFF" and _orientation(image) >= 5:  # sides exchanged; Pillow has done so for TIFF
            width, height = height, width
        return Header(width, height, _is_gray(image))


def _open(file: BinaryIO) -> Image.Image:
    """An image that is not decoded yet.

    From a path Pillow 13 would map uncompressed TIFF files into memory, and scramble those that are turned.
    """
    image = Image.open(file, formats=FORMATS)
    if image.mode not in GRAY | COLOR:
        raise ValueError(
            f"it has more than 8 bits per channel (Pillow's mode {image.mode}); convert it, or use an array file"
        )
    return image


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:  # looking further would decode the image
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _is_gray(image: Image.Image) -> bool:
    if image.mode in GRAY:
        return True
    if image.mode != "P" or image.palette is None or image.palette.mode != "RGB":
        return False
    colors = np.frombuffer(bytes(image.palette.palette), np.uint8).reshape(-1, 3)
    return bool((colors == colors[:, :1]).all())


def _image_names(folder: Path) -> list[str]:
    """The relative paths of all images in a folder, sorted by their bytes.

    Raises:
        UserError: there are none.
    """
    others: Counter[str] = Counter()
    names = []
    for name in _files(str(folder)):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            names.append(name)
        else:
            others[suffix or "no suffix"] += 1
    if not names:
        found = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(3)) or "no files"
        raise UserError(f"--data {shown(folder)} contains no images ({', '.join(SUFFIXES)}), but {found}.")
    return sorted(names, key=os.fsencode)


def _files(folder: str, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The relative paths of all files that are not hidden; links are followed, but not in circles."""
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_file() or entry.is_symlink():  # a link to nothing cannot be read, and is reported
                yield prefix + entry.name


def _has_own_test(folder: Path, names: Iterable[str]) -> bool:
    """Whether a folder has train/ and test/.

    Raises:
        UserError: it has only one of them.
    """
    found = {name.split("/")[0] for name in names if "/" in name} & {"train", "test"}
    if len(found) == 1:
        other = ({"train", "test"} - found).pop()
        raise UserError(
            f"--data {shown(folder)} has images in {found.pop()}/ and none in {other}/. Name the folders train and "
            "test, or neither of them so."
        )
    return bool(found)


def _below(names: Iterable[str], folder: str) -> list[str]:
    return [name for name in names if name.startswith(folder)]


def _label(name: str, own_test: bool) -> str:
    """The first folder in a relative path, after train/ or test/; "" without one."""
    folders = name.split("/")[1 if own_test else 0 : -1]
    return folders[0] if folders else ""


def _classes(folder: Path, splits: Sequence[Sequence[str]]) -> list[str]:
    """The labels in their order: numbers by value, other names by their bytes. None if there are fewer than two.

    Raises:
        UserError: some images have labels and others have none, or training images do not have a test image's label.
    """
    own_test, found = len(splits) == 2, []
    for names in splits:
        examples = {_label(name, own_test): name for name in names}
        if "" in examples and len(examples) > 1:
            unlabeled, labeled = examples.pop(""), max(examples.values())
            raise UserError(
                f"--data {shown(folder)}: subfolders are labels, so images belong into subfolders or none does, but "
                f"there are {shown(unlabeled)} and {shown(labeled)}."
            )
        found.append(set(examples) - {""})
    if own_test and (not found[1] <= found[0] or bool(found[0]) != bool(found[1])):
        differing = ", ".join(f"{shown(label)}/" for label in sorted(found[1] ^ found[0])[:SHOWN])
        raise UserError(
            f"--data {shown(folder)}: the subfolders of train/ and test/ are labels and differ: {differing}. "
            "Both need the same."
        )
    labels = list(found[0])
    labels.sort(key=os.fsencode)
    if all(label.isdecimal() for label in labels):
        labels.sort(key=int)
    return labels if len(labels) > 1 else []


def _readable(folder: Path, names: Sequence[str], skip: bool) -> tuple[list[str], list[Header]]:
    """The images that can be read, and their headers. With `skip` they are decoded, and the others left out.

    Raises:
        UserError: an image cannot be read, and `skip` is false or there is no other.
    """

    def check(name: str) -> Header | Exception:
        try:
            if skip:
                decode(folder / name, 3, 0)
            return header(folder / name)
        except Exception as error:  # Pillow raises many kinds for damaged files
            return error

    results = dict(zip(names, in_threads(check, names), strict=True))
    bad = {name: result for name, result in results.items() if isinstance(result, Exception)}
    good = {name: result for name, result in results.items() if isinstance(result, Header)}
    if not bad:
        return list(good), list(good.values())
    listed = "\n".join(f"  {shown(folder / name)}: {error}" for name, error in list(bad.items())[:SHOWN])
    what = f"{len(bad):,} of {len(names):,} images in {shown(folder)} cannot be read"
    if skip and good:
        print(f"{what} and are left out:\n{listed}", flush=True)
        return list(good), list(good.values())
    raise UserError(f"{what}:\n{listed}\nReplace them, or leave them out with --skip-unreadable.")


def _size(folder: Path, names: Sequence[str], headers: Sequence[Header], size: int) -> tuple[int, int]:
    """Height and width of the images as decoded.

    Raises:
        UserError: they differ, and no size is given; names two of them.
    """
    if size:
        return size, size
    first = headers[0]
    for name, each in zip(names, headers, strict=True):
        if each[:2] != first[:2]:
            two = (f"{shown(which)} ({one.width}x{one.height})" for which, one in ((names[0], first), (name, each)))
            raise UserError(
                f"--data {shown(folder)}: the images differ in size, such as {' and '.join(two)}. Give --image-size, "
                "to which all are cropped and resized."
            )
    return first.height, first.width
