"""Array files (.npy, .npz, .safetensors): integers are images, floating-point numbers are vectors or series.

An .npy or .safetensors file may be larger than memory; an .npz file is read into memory. Nothing is unpickled.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from vdm_jax.training.data.spec import DataOptions, DataSpec
from vdm_jax.training.data.user_files import fingerprint, hold_out, refuse_unused, shown
from vdm_jax.training.runtime.errors import UserError

CHECKED_AT_ONCE = 2**30  # bytes; the numbers of larger arrays are checked batch by batch
CHUNK = 2**26  # bytes
MAX_LEVELS = 2**16
SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
CONVENTION = (
    "Name them x_train and x_test, with labels y_train and y_test; or x, with labels y. A single array may have any "
    "name."
)


class Part(NamedTuple):
    """Examples, as an array that may be on the disk, and their labels or None."""

    x: Any
    labels: np.ndarray | None


class ArrayRecords:
    """Examples of an array by index, checked and converted when they are read.

    Args:
        part: the array and its labels.
        rows: the indices of these examples in the array.
        spec: the description of the data.
        path: of the file, for messages.
    """

    def __init__(self, part: Part, rows: np.ndarray, spec: DataSpec, path: Path):
        self._part, self._rows, self._spec, self._path = part, rows, spec, path

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at these indices.

        Raises:
            UserError: a number is not finite, or a pixel value is not in 0 .. levels - 1.
        """
        rows = self._rows[indices]
        values = np.asarray(self._part.x[rows])
        check_values(self._path, values, rows, self._spec.levels)
        values = values.astype(self._spec.dtype).reshape(-1, *self._spec.shape)
        labels = np.zeros(len(rows), np.int32) if self._part.labels is None else self._part.labels[rows]
        return [{"image": value, "label": int(label)} for value, label in zip(values, labels, strict=True)]


def open_array(path: Path, options: DataOptions) -> tuple[DataSpec, ArrayRecords, ArrayRecords]:
    """Open an array file.

    Args:
        path: of the file. Integers of shape (N, H, W) or (N, H, W, C) are images, floating-point numbers of shape
            (N, D) or (N, L, C) are vectors or series. Several arrays in a file: see CONVENTION.
        options: `levels`, by default the largest pixel value plus 1, and `test_share`, unless the file has test
            examples.

    Returns:
        the description, the training examples, the test examples.

    Raises:
        UserError: the file cannot be read, or its arrays do not have such types, shapes, names or values.
    """
    try:
        parts = _parts(path, open_file(path))
    except UserError:
        raise
    except Exception as error:  # NumPy, zipfile and safetensors raise errors of their own
        if "object" in str(error).lower():
            raise UserError(
                f"--data {shown(path)} holds Python objects, which are never unpickled. Save an array of numbers: "
                "np.save(path, x.astype(np.float32))."
            ) from error
        raise UserError(f"--data {shown(path)} cannot be read: {error}. Save it again.") from error
    own_test = len(parts) == 2
    shape = _example_shape(path, [part.x for part in parts])
    real = parts[0].x.dtype.kind == "f"
    refuse_unused(str(path), options, [*([] if real else ["levels"]), *([] if own_test else ["test_share"])])
    levels = 0 if real else options.levels or _levels(path, [part.x for part in parts])
    if not real and not 2 <= levels <= MAX_LEVELS:
        raise UserError(f"--levels {levels}: images have 2 to {MAX_LEVELS:,} gray levels.")
    rows = [np.arange(len(part.x)) for part in parts]
    if not own_test:
        parts, rows = [*parts, *parts], hold_out(len(parts[0].x), options.test_share, shown(path))
    counts, digest = [len(each) for each in rows], fingerprint(path.parent, [path.name])
    spec = DataSpec(path.stem, shape, levels, _num_classes(path, parts), counts[0], counts[1], fingerprint=digest)
    for part in parts if own_test else parts[:1]:
        if part.x.nbytes <= CHECKED_AT_ONCE:
            for first, chunk in _chunks(part.x):
                check_values(path, chunk, np.arange(first, first + len(chunk)), levels)
    train, test = (ArrayRecords(part, which, spec, path) for part, which in zip(parts, rows, strict=True))
    return spec, train, test


def check_values(path: Path, values: np.ndarray, rows: np.ndarray, levels: int) -> None:
    """Check numbers read from an array.

    Args:
        path: of the file, for the message.
        values: examples.
        rows: their indices in the array, for the message.
        levels: pixel values must be in 0 .. levels - 1; 0 for real numbers, which must be finite in float32.

    Raises:
        UserError: names the first example with another number.
    """
    flat = values.reshape(len(values), -1)
    if levels:
        good, wanted = (flat >= 0) & (flat < levels), f"0 .. {levels - 1}; check the data, or set --levels"
    else:
        with np.errstate(over="ignore"):
            good, wanted = np.isfinite(flat.astype(np.float32)), "a finite float32; remove or replace it"
    if not good.all():
        row, place = np.argwhere(~good)[0]
        raise UserError(
            f"--data {shown(path)}: example {rows[row]} contains {flat[row, place]}, which is not {wanted}."
        )


def open_file(path: Path) -> Mapping[str, Any]:
    """The arrays in a file by name; each has a shape, a dtype and nbytes, and is read when it is indexed."""
    match path.suffix:
        case ".npy":
            return {path.stem: npy.open_memmap(path, mode="r")}
        case ".npz":
            with zipfile.ZipFile(path) as members:
                names = {name.removesuffix(".npy"): name for name in members.namelist() if name.endswith(".npy")}
                return _Members(path, names)
        case _:
            from safetensors import safe_open

            file = safe_open(path, "numpy")
            names = file.keys()
            return {name: _Tensor(file.get_slice(name)) for name in names}


class _Members(Mapping):
    """Arrays in an .npz file, each read into memory when it is used."""

    def __init__(self, path: Path, names: Mapping[str, str]):
        self._path, self._names = path, names

    def __getitem__(self, name: str) -> np.ndarray:
        with zipfile.ZipFile(self._path) as members, members.open(self._names[name]) as member:
            return npy.read_array(member)  # raises an error for Python objects

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Tensor:
    """A tensor of a safetensors file, of which only the indexed rows are read."""

    def __init__(self, tensor: Any):
        self._tensor = tensor
        self.shape = tuple(tensor.get_shape())
        if tensor.get_dtype() not in SAFETENSORS:
            raise ValueError(f"it has a tensor of type {tensor.get_dtype()}, which NumPy lacks")
        self.dtype = np.dtype(SAFETENSORS[tensor.get_dtype()])
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            return self._tensor[slice(*rows.indices(len(self)))]  # an end beyond the last row is an error there
        return np.stack([self._tensor[int(row)] for row in rows]) if len(rows) else self._tensor[:0]


def _parts(path: Path, arrays: Mapping[str, Any]) -> list[Part]:
    """The training and the test examples of a file, or all examples in one part, found by the names of the arrays.

    Raises:
        UserError: the names or the labels are not those of CONVENTION.
    """
    names = set(arrays)
    if names & {"x_train", "x_test"}:
        needed = {"x_train", "x_test", *(("y_train", "y_test") if names & {"y_train", "y_test"} else ())}
        pairs = [("x_train", "y_train"), ("x_test", "y_test")]
    else:
        labels = next((name for name in ("y", "labels") if name in names), "")
        others = sorted(names - {labels})
        needed = {"x"} if len(others) != 1 else {others[0]}
        pairs = [(*needed, labels)]
    if missing := needed - names:
        found = ", ".join(sorted(names)) or "none"
        raise UserError(f"--data {shown(path)} has no array {min(missing)}; its arrays: {found}. {CONVENTION}")
    parts = []
    for x, y in pairs:
        examples, labels = arrays[x], arrays[y] if y in names else None
        parts.append(Part(examples, None if labels is None else _checked_labels(path, y, labels, examples)))
    return parts


def _checked_labels(path: Path, name: str, labels: Any, examples: Any) -> np.ndarray:
    if labels.shape != examples.shape[:1] or labels.dtype.kind not in "iu" or int(labels[:].min(initial=0)) < 0:
        raise UserError(
            f"--data {shown(path)}: the labels {name} must be integers 0, 1, 2, ... of shape {examples.shape[:1]}, "
            f"one for each example, not {labels.dtype} of shape {labels.shape}."
        )
    return np.asarray(labels[:]).astype(np.int32)


def _num_classes(path: Path, parts: Sequence[Part]) -> int:
    """The number of classes; 0 without labels, or if there is a single one.

    Raises:
        UserError: the test examples have a label that no training example has.
    """
    train, test = (part.labels for part in parts)
    if train is None or test is None:
        return 0
    unknown = np.setdiff1d(test, train)
    if len(unknown):
        raise UserError(
            f"--data {shown(path)}: the test label {unknown[0]} is the label of no training example. Both need the "
            "same classes."
        )
    count = int(train.max()) + 1
    return count if count > 1 else 0


def _example_shape(path: Path, arrays: Sequence[Any]) -> tuple[int, ...]:
    """The shape of an example, from that of the arrays.

    Raises:
        UserError: the arrays are neither integers (N, H, W[, C]) nor floating-point numbers (N, D) or (N, L, C).
    """
    first, what = arrays[0], f"--data {shown(path)}"
    for x in arrays:
        if x.shape[1:] != first.shape[1:] or x.dtype.kind != first.dtype.kind:
            raise UserError(
                f"{what}: training and test examples differ: {first.dtype} {first.shape}, {x.dtype} {x.shape}."
            )
        if 0 in x.shape:
            raise UserError(f"{what} is empty: its shape is {x.shape}.")
    shape, kind = first.shape, first.dtype.kind
    integers, real = kind in "biu", kind == "f"
    if real and len(shape) in (2, 3):
        return shape[1:]
    if integers and len(shape) in (3, 4):
        height, width, channels = (*shape[1:], 1)[:3]
        if height in (1, 3) and channels not in (1, 3):
            raise UserError(
                f"{what}: images of shape {shape} have their channels first. Save x.transpose(0, 2, 3, 1), of shape "
                "(N, H, W, C)."
            )
        return height, width, channels
    advice = ""
    if real and len(shape) == 4:
        advice = " For images, save integers, such as (255 * x).round().astype(np.uint8)."
    elif integers and len(shape) == 2:
        advice = " For vectors, save x.astype(np.float32)."
    raise UserError(
        f"{what}: {first.dtype} of shape {shape} is neither integers (N, H, W) or (N, H, W, C), which are images, nor "
        f"floating-point numbers (N, D) or (N, L, C), which are vectors and series.{advice}"
    )


def _levels(path: Path, arrays: Sequence[Any]) -> int:
    """The number of gray levels: the largest pixel value plus 1.

    Raises:
        UserError: it is not in 2 .. MAX_LEVELS.
    """
    largest = 0
    for x in arrays:
        most = 1 if x.dtype.kind == "b" else np.iinfo(x.dtype).max
        for _, chunk in _chunks(x):
            largest = max(largest, int(chunk.max()))
            if largest == most:  # photographs in uint8 reach it at once
                break
    if not 1 <= largest < MAX_LEVELS:
        raise UserError(
            f"--data {shown(path)}: the largest pixel value is {largest}, and images have pixel values 0 .. K - 1 with "
            f"2 to {MAX_LEVELS:,} gray levels K."
        )
    return largest + 1


def _chunks(x: Any) -> Iterator[tuple[int, np.ndarray]]:
    """An array in chunks that fit in memory, each with the index of its first example."""
    size = max(CHUNK // max(x.nbytes // len(x), 1), 1)
    for first in range(0, len(x), size):
        yield first, np.asarray(x[first : first + size])
