"""How public functions are compiled: one decorator for all, and a scan that works on any float type and any mesh.

`compiled` makes a function of arrays, schedules and callables (a network, a decoder) one `jax.jit` program, whatever
pytree or plain function each callable is. `scan` is `jax.lax.scan` with a carry that keeps its type.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

F = TypeVar("F", bound=Callable)
ARGUMENT_CHECKS: dict[Any, Callable[[str, Any], None]] = {}  # annotation -> check(name, value)
_NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
_DEPTH = 4  # of objects within objects that a plain function's variables are followed into


def compiled(*, static: tuple[str, ...] = (), check: Callable[..., None] | None = None) -> Callable[[F], F]:
    """Compile a public function once for each shape, dtype and static value of its arguments.

    Arrays are traced, in whatever pytree they are. Anything else in a pytree is static: strings, booleans, and the
    functions of a callable, such as an Equinox module's activation. A plain function is compiled again when a variable
    that it closes over has changed, so that its result never depends on old parameters;
    `jax.tree_util.Partial(apply, params)` needs no second compilation.

    Args:
        static: names of numbers that the program is compiled for, such as a number of steps. 0-d arrays are accepted.
        check: called before tracing with those arguments that it names, to refuse *values*. Shapes, dtypes and static
            values are best checked by the function itself.

    Returns:
        A decorator. The function it returns has the name, signature and docstring of the one given.

    Raises:
        TypeError: (by the decorated function) a static argument is traced, or an argument of another kind than its
            annotation says. ValueError: a batch is empty, or as the function itself.
    """
    return lambda function: _compile(function, static, check)


def _compile(function: Any, static: tuple[str, ...], check: Callable[..., None] | None) -> Any:
    signature = inspect.signature(function)
    checks = _argument_checks(signature)
    checked = inspect.signature(check).parameters if check else ()

    def program(arrays, rest):
        call = signature.bind_partial()
        call.arguments.update(rest.join(arrays))
        return function(*call.args, **call.kwargs)

    program.__name__ = function.__name__  # what profilers and compiler logs call it
    program = jax.jit(program, static_argnums=1)

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
        return program(*_split(arguments, static))

    return call


def _argument_checks(signature: inspect.Signature) -> list[tuple[str, Callable[[str, Any], None]]]:
    hints = [(name, parameter.annotation) for name, parameter in signature.parameters.items()]
    return [(name, ARGUMENT_CHECKS[hint]) for name, hint in hints if hint in ARGUMENT_CHECKS]


class _Rest:
    """What of the arguments is no array: hashed and compared, as a static argument of `jax.jit` must be."""

    def __init__(self, treedef, values: tuple, static: tuple):
        self.treedef, self.values, self.static = treedef, values, static
        self.hash = hash((treedef, values, static))

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other) -> bool:
        mine, others = (self.treedef, self.values, self.static), (other.treedef, other.values, other.static)
        return mine == others

    def join(self, arrays: list) -> dict[str, Any]:
        """The arguments again, from their arrays."""
        given = iter(arrays)
        leaves = [next(given) if value is _ARRAY else value.value for value in self.values]
        return jax.tree.unflatten(self.treedef, leaves) | dict(self.static)


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, _NUMBERS) and not isinstance(leaf, bool)


_ARRAY = object()  # stands where an array was


def _split(arguments: dict[str, Any], static: tuple[str, ...]) -> tuple[list, _Rest]:
    """The arrays of the arguments, and everything else."""
    traced = {name: value for name, value in arguments.items() if name not in static}
    leaves, treedef = jax.tree.flatten(traced)
    arrays = [leaf for leaf in leaves if _is_traced(leaf)]
    values = tuple(_ARRAY if _is_traced(leaf) else _Static(leaf) for leaf in leaves)
    return arrays, _Rest(treedef, values, tuple((name, arguments[name]) for name in static))


class _Static:
    """A leaf that is no array: equal to another of the same value that closes over the same variables."""

    def __init__(self, value: Any):
        self.value = value
        self.variables = list(_variables(value, _home(value), _DEPTH, set())) if callable(value) else []
        self.identities = tuple(_identity(variable) for variable in self.variables)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return id(self.value)

    def __eq__(self, other) -> bool:
        same = self.value is other.value or self.value == other.value
        return bool(same) and self.identities == other.identities


def _identity(variable: Any) -> Any:
    """What changes when a variable does; NumPy arrays change in place."""
    return (id(variable), variable.tobytes()) if isinstance(variable, np.ndarray) else id(variable)


def _home(value: Any) -> dict | None:
    """The globals of the module that a callable comes from."""
    while isinstance(value, (functools.partial, MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    return getattr(inspect.unwrap(value), "__globals__", None)


def _variables(value: Any, home: dict | None, depth: int, seen: set[int]) -> Iterator[Any]:
    """The numbers that a callable holds: by closure, by attribute, and by name in its own module."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, _NUMBERS):
            yield leaf
        elif depth and id(leaf) not in seen and not isinstance(leaf, (ModuleType, type)):
            seen.add(id(leaf))
            for part in _parts(leaf, home):
                yield from _variables(part, home, depth - 1, seen)


def _parts(value: Any, home: dict | None) -> list[Any]:
    match value:
        case FunctionType():
            inside = inspect.getclosurevars(value)
            named = inside.globals.values() if value.__globals__ is home else ()
            return [*inside.nonlocals.values(), *named, value.__defaults__, value.__kwdefaults__]
        case MethodType():
            return [value.__self__, value.__func__]
        case functools.partial():
            return [value.func, value.args, value.keywords]
        case _ if hasattr(value, "__wrapped__"):  # a compiled or otherwise decorated function
            return [value.__wrapped__]
    return list(getattr(value, "__dict__", {}).values())


def _python_value(name: str, value: Any) -> Any:
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced, but the program is compiled for its value: pass a Python number")
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.ndim(value) == 0:
        return value.item()
    return value


def scan(body: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` whose carry keeps the dtype that it starts with, and may differ from device to device.

    A step that computes in float32 on a bfloat16 state returns to bfloat16. Under `jax.shard_map` a carry that starts
    alike everywhere becomes one that varies over the mesh axes its body's result varies over.

    Args:
        body: (carry, x) -> (carry, y).
        carry: the start, a pytree of arrays.
        xs: what is scanned over, a pytree of arrays with a leading axis.

    Returns:
        (carry, ys).
    """

    def keep(carry, x):
        new, y = body(carry, x)
        return jax.tree.map(lambda old, new: new if new.dtype == old.dtype else new.astype(old.dtype), carry, new), y

    return jax.lax.scan(keep, _varying(keep, carry, xs), xs)


def _varying(body: Callable, carry: Any, xs: Any) -> Any:
    """The carry, varying over those axes of a `shard_map` that the body's result varies over."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    first = jax.tree.map(lambda x: x[0], xs)
    while True:
        after = jax.eval_shape(lambda carry, x: body(carry, x)[0], carry, first)
        wanted = jax.tree.map(lambda old, new: tuple(_axes(new) - _axes(old)), carry, after)
        if not any(jax.tree.leaves(wanted)):
            return carry
        carry = jax.tree.map(lambda x, axes: jax.lax.pcast(x, axes, to="varying") if axes else x, carry, wanted)


def varying_like(value: jax.Array, *others: Any) -> jax.Array:
    """The same value, as one that varies over those axes of a `jax.shard_map` that any array of the others varies over.

    A custom gradient needs it where what comes back to a value varies and the value itself does not.

    Args:
        value: an array.
        others: pytrees.
    """
    arrays = [leaf for leaf in jax.tree.leaves(others) if isinstance(leaf, jax.Array)]
    axes = tuple(frozenset().union(*map(_axes, arrays)) - _axes(value))
    return jax.lax.pcast(value, axes, to="varying") if axes else value


def _axes(value: Any) -> frozenset[str]:
    """The axes of a `shard_map` that an array, or its abstract value, varies over."""
    kind = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying if kind.manual_axis_type else frozenset()  # with check_vma=False
    return frozenset(getattr(kind, "vma", None) or ())  # before JAX 0.11
