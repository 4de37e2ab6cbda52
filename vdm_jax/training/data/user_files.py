"""A user's own files as data: which names are paths, test examples held out, a fingerprint that notices changes."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vdm_jax.training.data.spec import DataOptions
from vdm_jax.training.runtime.errors import UserError

ARRAYS = (".npy", ".npz", ".safetensors")
READ_WHOLE = 2**30  # bytes; of larger data only both ends of each file enter the fingerprint
ENDS = 2**16  # bytes at each end
THREADS = 8  # they wait for the disk
TFDS_CONFIG = re.compile(r"[a-z][a-z0-9_]*/[\w.+-]+(:[\d.]+)?")  # a set of TFDS with its config, such as emnist/letters


def is_path(name: str) -> bool:
    """Whether a name of a data set is a path and not the name of a known set.

    A path begins with ".", "/" or "~", ends like an array file, or contains a separator. A name such as emnist/letters
    is a path only if it exists.
    """
    if name.startswith((".", "~", os.sep)) or name.endswith(ARRAYS):
        return True
    return os.sep in name and (os.path.exists(name) or not TFDS_CONFIG.fullmatch(name))


def existing(name: str) -> Path:
    """The path of a name for which `is_path` holds.

    Raises:
        UserError: there is no such file or folder.
    """
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):  # accepts any characters
        raise UserError(f"--data {shown(name)}: there is no such file or folder.")
    return path


def shown(path: str | Path) -> str:
    """A path as messages show it: without characters that cannot be printed, and not too long."""
    text = os.fsencode(path).decode(errors="replace") if not _unpaired(str(path)) else ascii(str(path))
    return text if len(text) <= 300 else f"{text[:150]}...{text[-150:]}"


def _unpaired(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return True
    return False


def refuse_unused(name: str, options: DataOptions, used: Sequence[str] = ()) -> None:
    """Reject options that have no effect on this data set.

    Raises:
        UserError: names an option.
    """
    for field, default in DataOptions._field_defaults.items():
        if field not in used and getattr(options, field) != default:
            flag = "--" + field.replace("_", "-")
            raise UserError(f"{flag} {getattr(options, field)} does not apply to --data {shown(name)}: remove it.")


def hold_out(count: int, share: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test examples: a random split that is the same in every run.

    Args:
        count: number of examples.
        share: of the test examples, rounded to a whole number, but at least one.
        what: the data, for messages.

    Raises:
        UserError: no training or no test example would be left.
    """
    test = max(round(share * count), 1) if share > 0 else 0
    if not 0 < test < count:
        raise UserError(
            f"--test-share {share:g} of the {count:,} examples of {what} leaves {test:,} for testing and "
            f"{count - test:,} for training: at least one of each is needed."
        )
    order = np.random.RandomState(0).permutation(count)  # RandomState's stream never changes
    return np.sort(order[test:]), np.sort(order[:test])


def fingerprint(folder: Path, names: Sequence[str]) -> str:
    """A digest of files that changes if one is renamed, added, removed or changed, and does not if they are copied.

    It covers names, sizes and contents; of files of more than 1 GiB in all, only 64 KiB at both ends of each.

    Args:
        folder: where the files are.
        names: their paths relative to the folder, in a fixed order.
    """
    sizes = [os.stat(folder / name).st_size for name in names]
    whole = sum(sizes) <= READ_WHOLE

    def content(name: str) -> bytes:
        with open(folder / name, "rb") as file:
            if whole:
                return hashlib.file_digest(file, "sha256").digest()
            digest = hashlib.sha256(file.read(ENDS))
            file.seek(max(os.fstat(file.fileno()).st_size - ENDS, 0))
            digest.update(file.read(ENDS))
            return digest.digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        for name, size, part in zip(names, sizes, pool.map(content, names), strict=True):
            digest.update(os.fsencode(name) + b"\0%d\0" % size + part)
    return digest.hexdigest()
