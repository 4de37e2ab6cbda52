"""A 3 x 3 convolution and its gradients on this machine: XLA's, other formulations of the weight's gradient, PyTorch's.

    python -m benchmarks.convolutions

Each time over XLA's own forward pass. The formulations are seen to give the same gradient before they are timed.
PyTorch's columns need the extra `parity`; its tensors are in channels_last. A second table has the time of evaluations
in `jax.lax.scan` over their time as single calls, with channels last and first (docs/networks.md).
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from benchmarks.clock import in_turns, milliseconds, ratio

SHAPES = (  # batch, side, channels in, channels out: the digits' network's, and two of CIFAR's
    (32, 8, 32, 32),
    (32, 8, 96, 32),
    (32, 4, 64, 64),
    (32, 4, 128, 64),
    (8, 32, 32, 32),
    (8, 32, 128, 128),
)

LOOP_SHAPES = ((8, 16, 32), (8, 32, 32))  # batch, side, channels
EVALUATIONS = 10  # in a loop


def convolve(x: Array, w: Array) -> Array:
    """What nn.Conv does: x (B, H, W, C), w (3, 3, C, O)."""
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def input_gradient(x: Array, w: Array, g: Array) -> Array:
    """XLA's, of the input."""
    return jax.vjp(lambda x: convolve(x, w), x)[1](g)[0]


def weight_gradient(x: Array, w: Array, g: Array) -> Array:
    """XLA's, of the weight: a convolution whose window is the whole image and whose channels are the batch."""
    return jax.vjp(lambda w: convolve(x, w), w)[1](g)[0]


def channels_first(x: Array, w: Array, g: Array) -> Array:
    """XLA's in the other layout."""

    def forward(w):
        return jax.lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2), w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    return jax.vjp(forward, w.transpose(3, 2, 0, 1))[1](g.transpose(0, 3, 1, 2))[0].transpose(2, 3, 1, 0)


def nine_products(x: Array, w: Array, g: Array) -> Array:
    """One product of matrices for each place in the window."""
    return jnp.stack([jnp.einsum("bhwc,bhwo->co", view, g) for view in _views(x)]).reshape(w.shape)


def batch_inside(x: Array, w: Array, g: Array) -> Array:
    """The same with the batch moved next to the channels, so that every view is whole rows."""
    x, g = x.transpose(1, 2, 0, 3), g.transpose(1, 2, 0, 3).reshape(-1, g.shape[-1])
    height, width = x.shape[:2]
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0), (0, 0)))
    views = [x[i : i + height, j : j + width].reshape(-1, x.shape[-1]) for i in range(3) for j in range(3)]
    return jnp.stack([view.T @ g for view in views]).reshape(w.shape)


def one_product(x: Array, w: Array, g: Array) -> Array:
    """im2col: the nine views side by side, and one product."""
    columns = jnp.concatenate(_views(x), -1).reshape(-1, 9 * x.shape[-1])
    return (columns.T @ g.reshape(-1, g.shape[-1])).reshape(w.shape)


def row_convolutions(x: Array, w: Array, g: Array) -> Array:
    """Three convolutions along the rows alone, with batch and height as their channels."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    kernel = g.transpose(2, 0, 1, 3).reshape(width, batch * height, -1)
    rows = [x[:, i : i + height].transpose(3, 2, 0, 1).reshape(channels, width, -1) for i in range(3)]
    numbers = ("NHC", "HIO", "NHC")
    made = [jax.lax.conv_general_dilated(row, kernel, (1,), [(1, 1)], dimension_numbers=numbers) for row in rows]
    return jnp.stack(made).transpose(0, 2, 1, 3)


def _views(x: Array) -> list[Array]:
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


FORMULATIONS = (channels_first, nine_products, batch_inside, one_product, row_convolutions)


def eager(*arrays: np.ndarray) -> dict[str, Callable[[], Any]]:
    """PyTorch's forward pass and both gradients of x, w and g, by name."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    orders = (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
    moved = (torch.from_numpy(array.transpose(order).copy()) for array, order in zip(arrays, orders, strict=True))
    x, w, g = (tensor.contiguous(memory_format=torch.channels_last) for tensor in moved)

    def backward(*wanted: bool) -> None:
        torch.ops.aten.convolution_backward(g, x, w, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)

    def forward() -> None:
        torch.nn.functional.conv2d(x, w, padding=1)

    return {
        "PyTorch, forward": forward,
        "PyTorch, by x": lambda: backward(True, False, False),
        "PyTorch, by w": lambda: backward(False, True, False),
    }


def functions(batch: int, side: int, channels: int, out: int) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, by name, on random arrays; the first is the unit."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (batch, side, side, channels), (3, 3, channels, out), (batch, side, side, out)
    x, w, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    truth = weight_gradient(x, w, g)
    jitted = {"by x": jax.jit(input_gradient), "by w": jax.jit(weight_gradient)}
    for way in FORMULATIONS:
        name = f"by w: {way.__name__.replace('_', ' ')}"
        jitted[name] = jax.jit(way)
        np.testing.assert_allclose(jitted[name](x, w, g), truth, atol=1e-4 * float(jnp.abs(truth).max()))
    first = jax.jit(convolve)
    made = {"forward": lambda: first(x, w), **{name: Partial(f, x, w, g) for name, f in jitted.items()}}
    return made | (eager(*map(np.asarray, (x, w, g))) if importlib.util.find_spec("torch") else {})


def last(x: Array, w: Array) -> Array:
    """A network with channels last, x (B, H, W, C) and w (3, 3, C, C)."""
    return jnp.tanh(convolve(x, w))


def first(x: Array, w: Array) -> Array:
    """The same with channels first, x (B, C, H, W) and w (C, C, 3, 3)."""
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return jnp.tanh(y)


def first_transposed(x: Array, w: Array) -> Array:
    """The same, which transposes what it is given and what it returns."""
    return last(x.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0)).transpose(0, 3, 1, 2)


def evaluations(batch: int, side: int, channels: int) -> dict[str, Callable[[], Any]]:
    """EVALUATIONS calls by name, and one loop of as many by "loop, " and the name."""
    key_x, key_w = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(key_x, (batch, side, side, channels)), jax.random.normal(key_w, (3, 3, channels, channels))
    w = w / (3 * channels**0.5)
    made = {}
    for network, name in ((last, "channels last"), (first, "channels first"), (first_transposed, "transposed inside")):
        own = (x, w) if network is last else (x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1))

        def total(x, w, network=network):
            return network(x, w).sum()

        steps = {
            "": lambda x, w, network=network: (network(x, w), w),
            ", gradient by x": lambda x, w, total=total: (x + 0.01 * jax.grad(total, 0)(x, w), w),
            ", gradient by w": lambda x, w, total=total: (x, w + 1e-6 * jax.grad(total, 1)(x, w)),
        }
        for part, step in steps.items():
            made[name + part] = Partial(_calls, jax.jit(step), own)
            made[f"loop, {name}{part}"] = Partial(jax.jit(Partial(_loop, step)), own)
    return made


def _calls(step: Callable, state: Any) -> Any:
    for _ in range(EVALUATIONS):
        state = step(*state)
    return state


def _loop(step: Callable, state: Any) -> Any:
    return jax.lax.scan(lambda state, _: (step(*state), None), state, None, length=EVALUATIONS)[0]


def print_loops() -> None:
    """Print the table of loops."""
    columns, names = [], []
    for shape in LOOP_SHAPES:
        taken = in_turns(evaluations(*shape), rounds=5)
        names = [name for name in taken if f"loop, {name}" in taken]
        columns.append([milliseconds(taken[name], EVALUATIONS) for name in names])
        columns.append([ratio(taken[f"loop, {name}"], taken[name]) for name in names])
    heads = [head for b, s, c in LOOP_SHAPES for head in (f"{b} x {s} x {s}, {c} to {c}", "in a loop")]
    print(f"\n| | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for name, *cells in zip(names, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Print the tables, the first with a column a shape."""
    columns, names = [], []
    for shape in SHAPES:
        taken = in_turns(functions(*shape), rounds=31)
        names = list(taken)
        unit = taken["forward"]
        columns.append([milliseconds(unit), *(ratio(taken[name], unit) for name in names[1:])])
    heads = [f"{b} x {s} x {s}, {c} to {o}" for b, s, c, o in SHAPES]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for name, *cells in zip(names, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |")
    print_loops()


if __name__ == "__main__":
    main()
