"""The values that a callable depends on through its closure, attributes and globals, to detect changes of them."""

import contextlib
import dis
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    NoneType,
)
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

__all__ = [
    "Held",
    "Opaque",
    "functions_of_partials",
]


class Opaque:
    """Base class of objects whose contents are not inspected."""


_VALUES = frozenset({bool, int, float, complex, str, bytes, NoneType, CodeType})
_CONTAINERS = (tuple, list, dict, set, frozenset, deque, MappingProxyType)
_CONSTANT = (ModuleType, inspect.Signature, Opaque)
_METHODS = (MethodType, BuiltinMethodType, MethodWrapperType)
_SHOWN = ("__eq__", "__hash__", "__repr__", "__replace__")  # methods of dataclasses that networks do not call
_MOST = 100_000  # objects that a function may depend on
_INSTALLED = (sysconfig.get_path("stdlib"), os.path.dirname(__file__))


class Held:
    """The contents of a value, traversed recursively, as tokens that can be compared.

    Numbers and strings are compared by value; functions, containers and Python objects by their contents; NumPy arrays
    by their contents, because they can be modified in place; JAX arrays, classes and all other objects by identity. The
    contents of the standard library and of installed packages are assumed to be constant.

    Fields:
        tokens: hashable; equal tokens mean equal values in the same places.
        kept: the objects compared by identity, kept alive so that their ids are not reused.
        bytes: total size of all arrays.
        traced: whether any array is a tracer.
    """

    def __init__(self, value: Any):
        self.tokens, self.kept, self.bytes, self.traced = [], [], 0, False
        seen, waiting = {}, [value]
        while waiting:
            one = waiting.pop()
            kind = type(one)
            if kind in _VALUES:
                self.tokens.append((kind, repr(one) if kind in (float, complex) else one))  # NaN equals itself
            elif id(one) in seen:
                self.tokens.append(seen[id(one)][0])
            else:
                seen[id(one)] = len(seen), one  # kept alive, so that its id is not reused
                token, parts = self._look(one, kind)
                self.tokens += (token, len(parts))
                waiting.extend(parts)
            if len(self.tokens) + len(waiting) > _MOST:
                raise ValueError(
                    f"a function depends on more than {_MOST} objects, too many to check for changes: pass "
                    "jax.tree_util.Partial(apply, params), where apply depends on its arguments only"
                )

    def _look(self, one: Any, kind: type) -> tuple[Any, list]:
        """The token of an object and the objects it contains."""
        if _is_of_installed_module(one):
            return id(one), []
        if kind is FunctionType:
            rest = (one.__defaults__, one.__kwdefaults__, one.__dict__)
            return one.__code__, [*_named(one), *(part for part in rest if part)]
        if kind in _METHODS:
            return (kind, one.__name__), [one.__self__, getattr(one, "__func__", None)]
        if kind in _CONTAINERS:
            return kind, _items(one)
        if isinstance(one, type):
            self.kept.append(one)
            return id(one), [] if _is_installed(kind.__module__) and _is_installed(one.__module__) else _members(one)
        if isinstance(one, np.generic) or (isinstance(one, np.ndarray) and one.dtype != object):
            self.bytes += one.nbytes
            return (one.shape, one.dtype, hashlib.sha1(one.tobytes(), usedforsecurity=False).digest()), []
        if isinstance(one, (Tracer, jax.Array)):
            self.traced |= isinstance(one, Tracer)
            self.bytes += one.nbytes
            parts = []
        else:
            parts = [] if isinstance(one, _CONSTANT) else [*_items(one), *_attributes(one), kind]
            if len(parts) > 1 and _is_of_python(kind):  # a plain object() is compared by identity
                return kind, parts
        self.kept.append(one)
        return id(one), parts


def _items(one: Any) -> list:
    """The items of a container or of a subclass of one."""
    match one:
        case dict() | MappingProxyType():
            return [*one, *one.values()]
        case tuple() | list() | set() | frozenset() | deque():
            return [*one]
        case np.ndarray():
            return [*one.flat]
        case weakref.ref():
            return [one()]
    return []


def _attributes(one: Any) -> list:
    found = _items(getattr(one, "__dict__", ()))
    for slot in _slots(type(one)):
        with contextlib.suppress(AttributeError):  # empty
            found.append(slot.__get__(one))
    return found


@functools.lru_cache
def _slots(kind: type) -> list[MemberDescriptorType]:
    return [value for base in kind.__mro__ for value in vars(base).values() if isinstance(value, MemberDescriptorType)]


@functools.lru_cache
def _is_of_python(kind: type) -> bool:
    """Whether instances are containers or have only attributes and slots, without state hidden in C."""
    size = object.__basicsize__ + tuple.__itemsize__ * (len(_slots(kind)) + 1)  # one for weak references
    return issubclass(kind, (*_CONTAINERS, functools.partial, weakref.ref)) or kind.__basicsize__ <= size


def _is_of_installed_module(one: Any) -> bool:
    """Whether a function or class is accessible by name in an installed module, such as `jax.nn.relu`."""
    module, name = getattr(one, "__module__", None), getattr(one, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _is_installed(module):
        return False
    return getattr(sys.modules.get(module), name, None) is one


def _members(kind: type) -> list:
    """The methods and other values of a class and its bases, except those of installed packages."""
    found = [item for base in kind.__mro__ if not _is_installed(base.__module__) for item in vars(base).items()]
    return [value for name, value in found if name[:2] != "__" or (callable(value) and name not in _SHOWN)]


def _named(function: FunctionType) -> list:
    """The values that a function's code refers to: in its closure, in its module, and in modules that it imports."""
    found = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # an empty one
    modules = [value for value in found if isinstance(value, ModuleType)]
    if not modules and _is_installed(function.__globals__.get("__name__")):
        return found
    scopes = {id(scope): scope for scope in (function.__globals__, *map(vars, modules))}
    waiting = list(scopes.values())
    read, names = _names(function.__code__)
    while waiting:
        scope = waiting.pop()
        if _is_installed(scope.get("__name__")):
            continue
        for name in read if scope is function.__globals__ else names:
            value = scope[name] if name in scope else sys.modules.get(name)
            if not isinstance(value, ModuleType):
                found.append(value)
            elif id(vars(value)) not in scopes:
                scopes[id(vars(value))] = vars(value)
                waiting.append(vars(value))
    return found


def functions_of_partials(tree: Any) -> Iterator[Callable]:
    """The functions of all `Partial`s in a pytree, which are not leaves, except methods of immutable Flax modules."""
    for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Partial)):
        if isinstance(leaf, Partial):
            if not hasattr(getattr(leaf.func, "__self__", None), "init_with_output"):
                yield leaf.func
            yield from functions_of_partials([arg for arg in leaf.args if isinstance(arg, (Partial, tuple))])


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[list[str], list[str]]:
    """The names that code and its inner functions look up in their module; and all names, including attributes."""
    inside = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    steps = ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")
    read = {step.argval for step in dis.get_instructions(code) if step.opname in steps}
    return sorted(read.union(*(names[0] for names in inside))), sorted({*code.co_names}.union(*(n[1] for n in inside)))


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python, an installed package or this package: its contents are assumed constant."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return module in sys.builtin_module_names or file.startswith(_INSTALLED) or f"-packages{os.sep}" in file
