"""Image sets of TensorFlow Datasets, read without TensorFlow."""

import difflib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.runtime.errors import UserError, disk_is_full

NAME = re.compile(r"[a-z][a-z0-9_]{0,99}(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,99})?(:\d+\.\d+\.\d+)?")  # set/config:version
OURS = "tensorflow_datasets."  # the only package whose classes a prepared set may name


def open_set(name: str, *, trust_code: bool = False) -> tuple[tuple[int, int, int], int, "Records", "Records"]:
    """Open an image set, downloading and preparing it first if necessary.

    Args:
        name: TFDS's name, such as "cifar10". The data folder is TFDS_DATA_DIR, or TFDS's default.
        trust_code: import the classes that a prepared set names, also those outside TFDS.

    Returns:
        the image shape, the number of classes (0 without labels), the training records, the test records.

    Raises:
        UserError: the set is unknown, damaged or unavailable, or does not contain images of a fixed size.
    """
    if not NAME.fullmatch(name):  # TFDS downloads code for other names, such as "huggingface:..."
        raise _unknown(name, PLANES)
    if not trust_code:
        _refuse_code(name)
    builder = _builder(name)
    shape, num_classes = _features(builder)
    if not builder.is_prepared():
        _prepare(builder)
    missing = {"train", "test"} - builder.info.splits.keys()
    if missing:
        raise UserError(
            f"The data set {name!r} has no {' and no '.join(sorted(missing))} split; choose another --data."
        )
    train, test = (Records(builder, split, shape, num_classes) for split in ("train", "test"))
    return shape, num_classes, train, test


class Records:
    """The examples of a split by index; a damaged file is reported as a UserError.

    Args:
        builder: the TFDS builder of a prepared set.
        split: "train" or "test".
        shape: of every image.
        num_classes: number of classes; 0 ignores labels.
    """

    def __init__(self, builder: Any, split: str, shape: tuple[int, int, int], num_classes: int):
        self._what = f"{split!r} of the data set {builder.name!r}", builder.data_dir
        self._shape, self._num_classes = shape, num_classes
        try:
            missing = [path.name for path in map(Path, builder.info.splits[split].filepaths) if not path.is_file()]
            if missing:
                raise FileNotFoundError(f"{len(missing)} files are missing, such as {missing[0]}")
            self._source = builder.as_data_source(split=split)
        except Exception as error:  # TFDS, array_record and protobuf raise errors of their own
            raise _damaged(*self._what, error) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at these indices, read in one batch.

        Raises:
            UserError: a file is missing, truncated or damaged, or an example contradicts the set's description.
        """
        try:
            return [self._checked(example) for example in self._source.__getitems__(indices)]
        except Exception as error:
            raise _damaged(*self._what, error) from error

    def _checked(self, example: dict[str, Any]) -> dict[str, Any]:
        image, label = example["image"], int(example["label"]) if self._num_classes else 0
        if image.shape != self._shape or image.dtype != np.uint8:
            raise ValueError(f"an image of {image.dtype} {image.shape}, not uint8 {self._shape}")
        if not 0 <= label < max(self._num_classes, 1):
            raise ValueError(f"label {label} of {self._num_classes} classes")
        return {"image": image, "label": label}


def _damaged(what: str, folder: Any, error: Exception) -> UserError:
    return UserError(
        f"{what} cannot be read from {folder}: {_first_line(error)}.\n"
        "  A file is missing or damaged. Delete that folder and prepare the data set again, or restore it from a "
        "backup.\n"
        "  Saved checkpoints are kept; the same command then resumes the run."
    )


def _unknown(name: str, known: Any) -> UserError:
    near = difflib.get_close_matches(name[:100], ["digits", *known], n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        f"Unknown data set {name[:100]!r}. {hint}Use --data digits, mnist, fashion_mnist, cifar10 or the name of "
        f"another image set of TFDS; for points in the plane, {', '.join(PLANES)}; for your own data, the path of a "
        f"folder of images or an array file.{_local(name)}"
    )


def _local(name: str) -> str:
    """A hint if a name is also that of a folder."""
    return f" For the folder of this name, write --data ./{name}." if os.path.isdir(name) else ""


def _refuse_code(name: str) -> None:
    """Reject a prepared set whose description names classes outside TFDS, since TFDS would import their modules.

    Raises:
        UserError: names the class.
    """
    from tensorflow_datasets.core.utils.file_utils import list_data_dirs

    folders = [Path(root) / re.split("[/:]", name)[0] for root in list_data_dirs(os.environ.get("TFDS_DATA_DIR"))]
    layouts = ("*/features.json", "*/*/features.json")  # of versions, and of configs with versions; links are followed
    for path in (path for folder in folders for layout in layouts for path in folder.glob(layout)):
        try:
            strange = [each for each in _classes(json.loads(path.read_bytes())) if not each.startswith(OURS)]
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(f"The data set {name!r}", path.parent, error) from error
        if strange:
            raise UserError(
                f"{path} names the class {strange[0][:100]!r}, which is not part of TensorFlow Datasets: reading the "
                "data set would execute untrusted code. Prepare it again from a source that you trust; or, if that "
                "class is your own, give --trust-data-code."
            )


def _classes(value: Any) -> Iterator[str]:
    """The Python classes that a description names, under every key that TFDS reads."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str):
            yield inner
        yield from _classes(inner)


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"), file_format="array_record")
    except DatasetNotFoundError:
        raise _unknown(name, [*PLANES, *tfds.list_builders(with_community_datasets=False)]) from None
    except ModuleNotFoundError as error:  # the description of some sets needs TensorFlow
        raise UserError(_remedies(name, "its description needs TensorFlow, which is not installed")) from error
    except Exception as error:  # an unknown version or config, or a damaged description
        raise UserError(
            f"The data set {name!r} cannot be opened: {_first_line(error)}.\n  Use another version or config of it, or "
            "name neither. If its files are damaged, prepare it again or restore it from a backup."
        ) from error


def _features(builder: Any) -> tuple[tuple[int, int, int], int]:
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    shape = getattr(features.get("image"), "shape", None)
    if shape is None or len(shape) != 3 or None in shape:
        raise UserError(
            f"The data set {builder.name!r} does not contain images of a fixed size; choose another --data."
        )
    return tuple(shape), getattr(features.get("label"), "num_classes", None) or 0


def _prepare(builder: Any) -> None:
    """Download and prepare a data set once; only this step needs TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(_remedies(builder.name, "preparing it needs TensorFlow, which is not installed"))
    print(f"Preparing {builder.name} in {builder.data_dir} (once).", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        if disk_is_full(error):
            raise
        raise UserError(_remedies(builder.name, f"preparing it failed ({_first_line(error)})")) from error


def _remedies(name: str, reason: str) -> str:
    folder = os.environ.get("TFDS_DATA_DIR", "TFDS's own folder (TFDS_DATA_DIR is not set)")
    return (
        f"The data set {name!r} is not in {folder}, and {reason}.\n"
        f"  Either set TFDS_DATA_DIR to a folder that holds {name} as prepared by TFDS (array_record),\n"
        f"  or, with a network connection, install TensorFlow (`{sys.executable} -m pip install tensorflow`), so that "
        "TFDS can download and prepare it.\n"
        f"  --data digits needs no download.{_local(name)}"
    )


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:200] + "..."
