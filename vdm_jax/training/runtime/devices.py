"""Meshes and shardings: batches are split over all devices; the state is replicated or sharded."""

from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Int

AXIS = "batch"
MIN_SHARDED_SIZE = 2**10  # smaller arrays are replicated


def make_mesh(local: int | None = None) -> Mesh:
    """A mesh with one axis: all devices of all processes, or the first `local` devices of this process."""
    devices = jax.devices() if local is None else jax.local_devices()[:local]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding with the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def longest_axis_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding along the longest divisible axis; small and indivisible arrays are replicated."""
    longest_first = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    axis = next((axis for axis in longest_first if shape[axis] % mesh.size == 0), None)
    if axis is None or np.prod(shape) < MIN_SHARDED_SIZE:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def local_rows(mesh: Mesh, size: int) -> Int[np.ndarray, " rows"]:
    """The indices of the rows of a batch of this size that belong to the devices of this process."""
    places = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def make_global(rows: Any, sharding: Sharding) -> Any:
    """Global arrays of a whole batch, from a pytree with the rows of this process."""
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def replicate(x: Array) -> Array:
    """The array, replicated on every device."""
    if x.is_fully_replicated:
        return x
    sharding: Any = x.sharding
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(x)


def on_one_device(tree: Any) -> Any:
    """A pytree on the first device of this process, for work on a single device."""
    return jax.tree.map(lambda x: replicate(x).addressable_data(0), tree)
