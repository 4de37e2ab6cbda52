"""A user's own files as data: which names are paths, test examples held out, a fingerprint that notices changes."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from vdm_jax.training.data.spec import DataOptions
from vdm_jax.training.runtime.errors import UserError

ARRAYS = (".npy", ".npz", ".safetensors")
READ_WHOLE = 2**30  # bytes; of larger data only both ends of each file enter the fingerprint
ENDS = 2**16  # bytes at each end
BLOCK = 2**20  # bytes read at once
NAMES = 256  # file names that a thread takes at once
THREADS = 8
TFDS_CONFIG = re.compile(r"[a-z][a-z0-9_]*/[\w.+-]+(:[\d.]+)?")  # a set of TFDS with its config, such as emnist/letters
T = TypeVar("T")


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
    sizes = in_threads(lambda name: os.stat(os.path.join(folder, name)).st_size, names)
    whole = sum(sizes) <= READ_WHOLE

    def content(name: str) -> bytes:
        with open(os.path.join(folder, name), "rb") as file:
            digest = hashlib.sha256(file.read(ENDS))
            rest = os.fstat(file.fileno()).st_size - ENDS
            if rest > ENDS and not whole:
                file.seek(rest)
            while block := file.read(BLOCK):
                digest.update(block)
            return digest.digest()

    digest = hashlib.sha256()
    for name, size, part in zip(names, sizes, in_threads(content, names), strict=True):
        digest.update(os.fsencode(name) + b"\0%d\0" % size + part)
    return digest.hexdigest()


def in_threads(function: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """The values of a function of file names, in their order, called in several threads, since files wait for the disk.

    A thread takes many names at a time, which costs less than taking one by one.
    """
    blocks = [names[first : first + NAMES] for first in range(0, len(names), NAMES)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [
            value for values in pool.map(lambda block: [function(name) for name in block], blocks) for value in values
        ]
