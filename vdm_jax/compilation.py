"""Compilation of public functions: a `jax.jit` decorator that accepts callables, and a scan for any dtype and mesh.

`compiled` compiles a function of arrays, schedules and callables (a network, a decoder) into one `jax.jit` program.
Each callable may be a pytree or a plain function. `scan` is `jax.lax.scan` with a carry that keeps its dtype.
"""

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vdm_jax.closures import Held, Opaque, functions_of_partials

__all__ = [
    "ARGUMENT_CHECKS",
    "compiled",
    "scan",
    "varying_like",
]

_F = TypeVar("_F", bound=Callable)
ARGUMENT_CHECKS: dict[Any, Callable[[str, Any], None]] = {}  # annotation -> check(name, value)


def compiled(*, static: tuple[str, ...] = (), check: Callable[..., None] | None = None) -> Callable[[_F], _F]:
    """Compile a public function once for each shape, dtype and static value of its arguments.

    Arrays in pytrees are traced. All other leaves are static: strings, booleans, and functions such as the activation
    of an Equinox module.

    A plain function is compiled again if anything that it depends on has changed: its closure, its attributes, or the
    globals of its module. Its result therefore never depends on old parameters. Functions with the same code and the
    same contents share a program. `jax.tree_util.Partial(apply, params)` is compiled once for all parameters, as long
    as nothing changes that `apply` itself depends on.

    On a mesh with Explicit axes the function and its networks run with Auto axes. Results with the axis of the batch
    are sharded like the batch; all others are replicated. Arrays on such a mesh must be arguments, for instance of a
    `Partial`: a plain function cannot close over them.

    Args:
        static: names of arguments that are compile-time constants, such as a number of steps. 0-d arrays are accepted.
        check: a function that raises for invalid *values*, called before tracing with the arguments that it names.
            Shapes, dtypes and static values are best checked by the function itself.

    Returns:
        A decorator. The decorated function keeps its name, signature and docstring.

    Raises:
        TypeError: (by the decorated function) a static argument is traced, or an argument does not match its
            annotation.
        ValueError: a batch is empty, a plain function depends on too many objects, or as the function itself.
    """
    return lambda function: _compile(function, static, check)


def _compile(function: Any, static: tuple[str, ...], check: Callable[..., None] | None) -> Any:
    signature = inspect.signature(function)
    hints = [(name, parameter.annotation) for name, parameter in signature.parameters.items()]
    checks = [(name, ARGUMENT_CHECKS[hint]) for name, hint in hints if hint in ARGUMENT_CHECKS]
    static = (*static, *(name for name, hint in hints if hint is bool and name not in static))
    checked = inspect.signature(check).parameters if check else ()

    def program(rest, arrays):
        given = signature.bind_partial()
        given.arguments.update(rest.join(arrays))
        return function(*given.args, **given.kwargs)

    programs = _Programs(program, function.__name__)

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        arguments.update({name: _python_value(name, arguments[name]) for name in static})
        for name, look in checks:
            look(name, arguments[name])
        if check is not None:
            check(**{name: arguments[name] for name in checked})
        return programs(*_split(arguments, static))

    return call


_ARRAY = None  # placeholder of an array: None is never a leaf of a pytree
_NUMBERS = (jax.Array, np.ndarray, np.generic, int, float, complex)
_FLAGS = (bool, str, np.bool_, np.character)


class _Rest:
    """The arguments without their arrays, hashable: a program is compiled for each value."""

    def __init__(self, treedef, values: tuple, static: tuple, functions: list):
        self.treedef, self.values, self.static = treedef, values, static
        held = Held([values, functions]) if functions else None
        self.bytes, self.traced, self.kept = (held.bytes, held.traced, held.kept) if held else (0, False, [])
        self.key = (treedef, static, tuple(held.tokens) if held else values)
        self.hash = hash(self.key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other) -> bool:
        return self.key == other.key

    def join(self, arrays: list) -> dict[str, Any]:
        """The arguments, with these arrays."""
        given = iter(arrays)
        leaves = [next(given) if value is _ARRAY else value for value in self.values]
        return jax.tree.unflatten(self.treedef, leaves) | dict(self.static)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, _NUMBERS) and not isinstance(leaf, _FLAGS)


def _split(arguments: dict[str, Any], static: tuple[str, ...]) -> tuple[_Rest, list]:
    """The arguments without their arrays, and the arrays."""
    traced = {name: value for name, value in arguments.items() if name not in static}
    leaves, treedef = jax.tree.flatten(traced)
    values = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
    arrays = [leaf for leaf, value in zip(leaves, values, strict=True) if value is _ARRAY]
    functions = [value for value in values if value is not _ARRAY and not isinstance(value, _FLAGS)]
    functions += functions_of_partials(traced)
    return _Rest(treedef, values, tuple((name, arguments[name]) for name in static), functions), arrays


class _Programs(Opaque):
    """A cache of the compiled programs of one function, one for each `_Rest`; the least recently used are dropped.

    A program keeps alive the arrays that the functions of its `_Rest` hold. They are freed with it.
    """

    most, most_bytes = 1024, 2**28

    def __init__(self, program: Callable[[_Rest, list], Any], name: str):
        self.program, self.name = program, name
        self.known: OrderedDict[_Rest, Callable[[list], Any]] = OrderedDict()
        self.lock = threading.Lock()
        self.now = threading.local()

    def __call__(self, rest: _Rest, arrays: list) -> Any:
        jitted = self._make() if rest.traced else self._find(rest)  # tracers are valid in this call only
        before, self.now.rest = getattr(self.now, "rest", None), rest
        try:
            return jitted(arrays)
        finally:
            self.now.rest = before

    def _make(self) -> Callable[[list], Any]:
        def program(arrays):
            rest = self.now.rest  # of this call: the functions of the first call may have changed since
            return _on_auto_axes(functools.partial(self.program, rest), arrays)

        program.__name__ = self.name  # the name in profiles and compiler logs
        return jax.jit(program)

    def _find(self, rest: _Rest) -> Callable[[list], Any]:
        with self.lock:
            found = self.known.pop(rest, None)
            if found is None:
                found = self._make()
                held = rest.bytes + sum(other.bytes for other in self.known)
                while self.known and (held > self.most_bytes or len(self.known) >= self.most):
                    held -= self.known.popitem(last=False)[0].bytes
            self.known[rest] = found  # the most recent is last
        return found


def _on_auto_axes(function: Callable[[list], Any], arrays: list) -> Any:
    """Evaluate a function of arrays on a mesh, with Auto axes in place of Explicit ones.

    With Explicit axes the sharding is part of an array's type, and every `full` and `broadcast_to` of the function and
    its networks would need one. A result whose first or second axis has the length of a sharded axis of the arguments
    is returned with the sharding of that axis.
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return function(arrays)
    specs = [(np.shape(x), jax.typeof(x).sharding.spec) for x in arrays]
    axes = {shape[0]: spec[0] for shape, spec in specs if spec and spec[0]}

    def place(y):
        where = next((i for i, size in enumerate(y.shape[:2]) if size in axes), None)
        spec = () if where is None else (None,) * where + (axes[y.shape[where]],)
        return jax.sharding.reshard(y, NamedSharding(mesh, PartitionSpec(*spec)))

    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(auto):
        result = function(jax.sharding.reshard(arrays, PartitionSpec()))
    return jax.tree.map(place, result)


def _explicit_mesh(arrays: list) -> AbstractMesh | None:
    now = jax.sharding.get_abstract_mesh()  # under `jax.shard_map` its axes are Manual
    meshes = [now] if not now.empty else [jax.typeof(x).sharding.mesh for x in arrays]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _python_value(name: str, value: Any) -> Any:
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced, but it must be a compile-time constant: pass a Python number")
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.ndim(value) == 0:
        return value.item()
    return value


def scan(body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` whose carry keeps its initial dtype and may vary over the devices of a mesh.

    If a step computes in float32 on a bfloat16 state, the new state is converted to bfloat16. Under `jax.shard_map` an
    initial carry that is the same on all devices is converted to one that varies over the axes of the body's result.

    Args:
        body: (carry, x) -> (carry, y).
        carry: the initial carry, a pytree of arrays.
        xs: a pytree of arrays, scanned over their leading axis.

    Returns:
        (carry, ys).
    """

    def keep(carry, x):
        new, y = body(carry, x)
        return jax.tree.map(lambda old, new: new if new.dtype == old.dtype else new.astype(old.dtype), carry, new), y

    return jax.lax.scan(keep, _varying(keep, carry, xs), xs)


def _varying(body: Callable, carry: Any, xs: Any) -> Any:
    """The carry, varying over the axes of a `shard_map` that the body's result varies over."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    first = jax.tree.map(lambda x: x[0] if x.shape[0] else jax.numpy.zeros(x.shape[1:], x.dtype), xs)
    while True:
        after = jax.eval_shape(lambda carry, x: body(carry, x)[0], carry, first)
        wanted = jax.tree.map(lambda old, new: tuple(_axes(new) - _axes(old)), carry, after)
        if not any(jax.tree.leaves(wanted)):
            return carry
        carry = jax.tree.map(lambda x, axes: jax.lax.pcast(x, axes, to="varying") if axes else x, carry, wanted)


def varying_like(value: jax.Array, *others: Any) -> jax.Array:
    """The same value, varying over all axes of a `jax.shard_map` that any array of the others varies over.

    Custom gradients need it if the cotangent varies over axes that the value does not vary over.

    Args:
        value: an array.
        others: pytrees.
    """
    arrays = [leaf for leaf in jax.tree.leaves(others) if isinstance(leaf, jax.Array)]
    axes = tuple(frozenset().union(*map(_axes, arrays)) - _axes(value))
    return jax.lax.pcast(value, axes, to="varying") if axes else value


def _axes(value: Any) -> frozenset[str]:
    """The axes of a `shard_map` that an array or abstract value varies over."""
    kind = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying if kind.manual_axis_type else frozenset()  # with check_vma=False
    return frozenset(getattr(kind, "vma", None) or ())  # before JAX 0.11
