"""Where arrays lie: batches split over all devices of all processes, the state whole on each or spread over them."""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Int

AXIS = "batch"
WORTH_SPREADING = 2**10  # numbers in an array


def make_mesh(own: int | None = None) -> Mesh:
    """All devices of all processes, or the first so many of this one, along one axis."""
    devices = jax.devices() if own is None else jax.local_devices()[:own]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Every device holds its part of the first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def spread(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Every device holds its part of the longest axis that can be divided; of small arrays, and where none can, all."""
    longest_first = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    axis = next((axis for axis in longest_first if shape[axis] % mesh.size == 0), None)
    if axis is None or np.prod(shape) < WORTH_SPREADING:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def own_rows(mesh: Mesh, size: int) -> Int[np.ndarray, " rows"]:
    """Which rows of a batch of this size the devices of this process hold."""
    places = split(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def put(rows: Any, sharding: Sharding) -> Any:
    """A pytree of this process's rows of a batch as arrays of the whole batch, over all devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def whole(x: Array) -> Array:
    """An array with all of it on every device."""
    if x.is_fully_replicated:
        return x
    sharding: Any = x.sharding
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(x)


def on_one_device(tree: Any) -> Any:
    """A pytree on this process's first device, for work that one device does alone."""
    return jax.tree.map(lambda x: whole(x).addressable_data(0), tree)
