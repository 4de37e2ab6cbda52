"""Whether what is read back is what was saved, to the bit."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vdm_jax.training.runtime.devices import whole

SEAL = "seal"


class Damaged(Exception):
    """Something can be read, and is not what was saved."""


class BadNumbers(Exception):
    """There is a NaN or an infinity in what is to be saved."""


class Look(NamedTuple):
    """What there is to see of arrays: whether all their numbers are finite, and a checksum of their bits."""

    finite: bool
    checksum: int


def look(tree: Any) -> Look:
    """Look at every array of a pytree, one after the other, on the host.

    The checksum is the CRC-32 of all their bytes: a change of up to 32 neighbouring bits always shows, any other but
    once in 2^32; however the arrays lie on devices, it is the same.
    """
    finite, checksum = True, 0
    for leaf in jax.tree.leaves(tree):
        x = np.ascontiguousarray(_on_host(leaf))
        if jnp.issubdtype(x.dtype, jnp.inexact):  # JAX's: NumPy does not know bfloat16
            finite = finite and bool(np.isfinite(x).all())
        checksum = zlib.crc32(x.reshape(-1).view(np.uint8), checksum)
    return Look(finite, checksum)


def _on_host(x: Array) -> np.ndarray:
    return np.asarray(whole(x).addressable_data(0))


def decodes(folder: Path) -> bool:
    """Whether every array that Orbax wrote into a folder can be read, by this process alone.

    Several processes that restore together each read a part, and wait for each other: were one of them to fail, the
    others would not know.
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


def sealed(notes: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their own digest among them."""
    return {**notes, SEAL: _digest(notes)}


def unsealed(notes: dict[str, Any]) -> dict[str, Any]:
    """What was sealed.

    Raises:
        Damaged: it has changed since, or has no digest.
    """
    without = {name: value for name, value in notes.items() if name != SEAL}
    if notes.get(SEAL) != _digest(without):
        raise Damaged("its notes are not those that were written")
    return without


def _digest(notes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
