"""Image sets of TensorFlow Datasets, read without TensorFlow."""

import difflib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from vdm_jax.training.errors import UserError, disk_is_full
from vdm_jax.training.planes import PLANES


def open_set(name: str) -> tuple[tuple[int, int, int], int, Sequence[Any], Sequence[Any]]:
    """Open an image set, preparing it first where it is not yet here.

    Args:
        name: as TFDS spells it, such as "cifar10"; the folder is TFDS_DATA_DIR or TFDS's own default.

    Returns:
        image shape, number of classes (0 without labels), training records, test records.

    Raises:
        UserError: unknown set, not images of one size, or not here and not to be had.
    """
    builder = _builder(name)
    shape, num_classes = _features(builder)
    if not builder.is_prepared():
        _prepare(builder)
    missing = {"train", "test"} - builder.info.splits.keys()
    if missing:
        raise UserError(f"The data set {name!r} has no {' and no '.join(sorted(missing))} split; choose another.")
    return shape, num_classes, builder.as_data_source(split="train"), builder.as_data_source(split="test")


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"), file_format="array_record")
    except DatasetNotFoundError:
        near = difflib.get_close_matches(
            name, ["digits", *PLANES, *tfds.list_builders(with_community_datasets=False)], n=3
        )
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"There is no data set {name!r}. {hint}Take digits, mnist, fashion_mnist, cifar10, or another image set "
            f"of TFDS by its name; of points in a plane, {', '.join(PLANES)}."
        ) from None
    except ModuleNotFoundError as error:  # some sets need TensorFlow to be described at all
        raise UserError(_remedies(name, "its description needs TensorFlow, which is not installed")) from error


def _features(builder: Any) -> tuple[tuple[int, int, int], int]:
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    shape = getattr(features.get("image"), "shape", None)
    if shape is None or len(shape) != 3 or None in shape:
        raise UserError(f"The data set {builder.name!r} does not hold images of one size; choose one that does.")
    return tuple(shape), getattr(features.get("label"), "num_classes", None) or 0


def _prepare(builder: Any) -> None:
    """Download and prepare a set once; TFDS needs TensorFlow for this, and only for this."""
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
        f"  Either set TFDS_DATA_DIR to a folder that holds {name} as TFDS prepared it (array_record),\n"
        '  or, with a network, `.venv/bin/pip install -e ".[tfds]"` and let TFDS download and prepare it.\n'
        "  The digits need neither: `make train`."
    )


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:200] + "..."
