"""Checks that a checkpoint is restored bit by bit as it was saved."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vdm_jax.training.runtime.devices import replicate

DIGEST = "digest"


class Corrupted(Exception):
    """A checkpoint can be read but differs from what was saved."""


class NonFiniteState(Exception):
    """The state to be saved contains NaN or infinity."""


class ArraySummary(NamedTuple):
    """Whether all numbers of a pytree are finite, and a checksum of their bits."""

    finite: bool
    checksum: int


def summarize(tree: Any) -> ArraySummary:
    """Summarize the arrays of a pytree, one after the other, on the host.

    The checksum is the CRC-32 of all bytes: it detects every change within 32 adjacent bits, and any other with
    probability 1 - 2^-32. It does not depend on the shardings.
    """
    finite, checksum = True, 0
    for leaf in jax.tree.leaves(tree):
        x = np.ascontiguousarray(_on_host(leaf))
        if jnp.issubdtype(x.dtype, jnp.inexact):  # unlike NumPy's, it knows bfloat16
            finite = finite and bool(np.isfinite(x).all())
        checksum = zlib.crc32(x.reshape(-1).view(np.uint8), checksum)
    return ArraySummary(finite, checksum)


def _on_host(x: Array) -> np.ndarray:
    return np.asarray(replicate(x).addressable_data(0))


def is_readable(folder: Path) -> bool:
    """Whether this process can read every array that Orbax wrote to a folder.

    Processes that restore together read a part each and wait for each other; a failure of one would block the others.
    """
    import tensorstore

    files = {"driver": "ocdbt", "base": folder.absolute().as_uri()}
    try:
        names = tensorstore.KvStore.open(files).result().list().result()
        for name in (name.decode() for name in names if name.endswith(b"/.zarray")):
            array = {"driver": "zarr", "kvstore": {**files, "path": name.removesuffix(".zarray")}}
            tensorstore.open(array).result().read().result()
    except ValueError:
        return False
    return True


def with_digest(notes: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their SHA-256 digest added."""
    return {**notes, DIGEST: _digest(notes)}


def without_digest(notes: dict[str, Any]) -> dict[str, Any]:
    """The values without their digest, after checking it.

    Raises:
        Corrupted: the values have changed, or have no digest.
    """
    without = {name: value for name, value in notes.items() if name != DIGEST}
    if notes.get(DIGEST) != _digest(without):
        raise Corrupted("its notes differ from those that were written")
    return without


def _digest(notes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
