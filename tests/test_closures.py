"""Closures of functions: every change is detected, and nothing else counts as a change."""

import collections
import contextvars
import dataclasses
import enum
import functools
import sys
import threading
import types
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.closures import Held
from vdm_jax.compilation import compiled
from vdm_jax.types import Batch, evaluate


def held(value):
    return Held(value).tokens


class Box:
    """A class with slots, one of them empty, and a base class with a mangled name."""

    __slots__ = ("_Box__value", "empty")

    def __init__(self, value):
        self.set(value)

    def set(self, value):
        self.__value = value

    def get(self):
        return self.__value


class Dictionary(dict):
    """A user-defined class."""


class Elementwise:
    """== returns an array, and there is no hash."""

    def __init__(self):
        self.values = np.ones(3)

    def __eq__(self, other):
        return self.values == other.values


@dataclasses.dataclass
class Unhashable:
    value: float


class Mode(enum.Enum):
    TRAIN = "train"
    EVALUATE = "evaluate"


def _of_items(prediction_type):
    holder = prediction_type(a=1.0)
    return (lambda: holder["a"]), lambda: holder.update(a=2.0)


def _bound_method_of_a_dictionary():
    holder = {"a": 1.0}
    get = holder.get
    return (lambda: get("a")), lambda: holder.update(a=2.0)


def _of_an_attribute(before, after):
    holder = types.SimpleNamespace(value=before)
    return (lambda: holder.value), lambda: setattr(holder, "value", after)


def _slot():
    holder = Box(1.0)
    return holder.get, lambda: holder.set(2.0)


def _slot_that_was_empty():
    holder = Box(1.0)
    return holder.get, lambda: setattr(holder, "empty", 2.0)


def _numpy(dtype):
    array = np.ones((2, 3), dtype)
    return (lambda: array), lambda: array.__setitem__((1, 2), 2)


def _numpy_view():
    array = np.ones((2, 3))
    view = array[::2, ::-1]
    return (lambda: view), lambda: array.fill(2.0)


def _elementwise():
    holder = Elementwise()
    return (lambda: holder), lambda: holder.values.fill(2.0)


def _unhashable():
    holder = Unhashable(1.0)
    return (lambda: holder), lambda: setattr(holder, "value", 2.0)


def _weak_reference():
    holder = Unhashable(1.0)
    reference = weakref.ref(holder)
    return (lambda holder=holder: reference()), lambda: setattr(holder, "value", 2.0)


def _reference_that_dies():
    holder = [Elementwise()]
    reference = weakref.ref(holder[0])
    return (lambda: reference()), holder.clear


def _deep():
    holder = {"a": 1.0}
    network = lambda: holder["a"]  # noqa: E731
    for _ in range(1500):  # deeper than Python recurses
        network = (lambda inner: lambda: inner())(network)
    return network, lambda: holder.update(a=2.0)


def _import_inside():
    module = types.ModuleType("a_module_of_the_user")
    module.__dict__["scale"] = 1.0
    sys.modules[module.__name__] = module

    def network():
        import a_module_of_the_user  # pyright: ignore

        return a_module_of_the_user.scale

    return network, lambda: setattr(module, "scale", 2.0)


def _module_in_a_module():
    outer, inner = types.ModuleType("outer_module_of_the_user"), types.ModuleType("inner_module_of_the_user")
    outer.__dict__["inner"], inner.__dict__["scale"] = inner, 1.0
    return (lambda: outer.inner.scale), lambda: setattr(inner, "scale", 2.0)


def _thread_local():
    holder = threading.local()
    holder.value = 1.0
    return (lambda: holder.value), lambda: setattr(holder, "value", 2.0)


def _wrapped(wrap):
    def make():
        holder = {"a": 1.0}
        return wrap(lambda x: x * holder["a"]), lambda: holder.update(a=2.0)

    return make


def _class_variable_of_a_base():
    base = type("Base", (), {"factor": 1.0})
    holder = type("Derived", (base,), {"__slots__": ()})()
    return (lambda: holder.factor), lambda: setattr(base, "factor", 2.0)


def _method_of_a_class():
    prediction_type = type("Kind", (), {"__call__": lambda self: 1.0})
    return prediction_type(), lambda: setattr(prediction_type, "__call__", lambda self: 2.0)


CHANGES = {
    "ordered dictionary": lambda: _of_items(collections.OrderedDict),
    "default dictionary": lambda: _of_items(functools.partial(collections.defaultdict, int)),
    "own dictionary": lambda: _of_items(Dictionary),
    "method of a dictionary": _bound_method_of_a_dictionary,
    "text": lambda: _of_an_attribute("eps", "v"),
    "signed zero": lambda: _of_an_attribute(0.0, -0.0),
    "not a number": lambda: _of_an_attribute(1.0, float("nan")),
    "type of a number": lambda: _of_an_attribute(1, True),
    "whole or not": lambda: _of_an_attribute(1, 1.0),
    "None": lambda: _of_an_attribute(1.0, None),
    "NumPy scalar": lambda: _of_an_attribute(np.float32(1), np.float64(1)),
    "member of an enum": lambda: _of_an_attribute(Mode.TRAIN, Mode.EVALUATE),
    "sentinel": lambda: _of_an_attribute(object(), object()),
    "class": lambda: _of_an_attribute(type("A", (), {}), type("A", (), {})),
    "JAX array": lambda: _of_an_attribute(jnp.ones(3), jnp.ones(3) + 0),
    "random key": lambda: _of_an_attribute(jax.random.key(0), jax.random.key(1)),
    "JAX function": lambda: _of_an_attribute(jnp.sin, jnp.cos),
    "function": lambda: _of_an_attribute(lambda: 1.0, lambda: 2.0),
    "set": lambda: _of_an_attribute({1.0}, {2.0}),
    "range": lambda: _of_an_attribute(range(3), range(4)),
    "slot": _slot,
    "empty slot": _slot_that_was_empty,
    "NumPy array": lambda: _numpy(np.float64),
    "NumPy bfloat16": lambda: _numpy(jnp.bfloat16),
    "NumPy objects": lambda: _numpy(object),
    "NumPy view": _numpy_view,
    "elementwise ==": _elementwise,
    "no hash": _unhashable,
    "weak reference": _weak_reference,
    "weak reference to what is gone": _reference_that_dies,
    "1500 closures deep": _deep,
    "import inside": _import_inside,
    "module in a module": _module_in_a_module,
    "thread's own": _thread_local,
    "vmap": _wrapped(jax.vmap),
    "jit": _wrapped(jax.jit),
    "grad of vmap": _wrapped(lambda f: jax.grad(jax.vmap(f))),
    "checkpoint": _wrapped(jax.checkpoint),
    "custom gradient": _wrapped(jax.custom_jvp),
    "cached": _wrapped(functools.cache),
    "class variable of a base": _class_variable_of_a_base,
    "method of a class": _method_of_a_class,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_and_only_a_change_is_detected(name):
    network, change = CHANGES[name]()
    before = held(network)
    assert held(network) == before
    assert hash(tuple(before)) == hash(tuple(held(network)))
    change()
    after = held(network)
    assert after != before
    assert held(network) == after


def test_equal_functions_have_equal_closures():
    def make(array, scale):
        return functools.partial(lambda kept, x: x * kept[0] * scale, (array, {"a": [Box(scale)]}))

    array = jnp.ones(3)
    assert held(make(array, 2.0)) == held(make(array, 2.0))
    assert held(make(array, 2.0)) != held(make(array, 3.0))
    assert held(make(array, 2.0)) != held(make(jnp.ones(3), 2.0))


def test_a_shared_object_differs_from_two_equal_objects():
    box, other = Box(1.0), Box(1.0)
    assert held((box, box)) != held((box, other))
    assert held((box, other)) == held((other, box))


def test_identities_are_of_objects_that_stay_alive():
    first = Held(object())
    assert all(Held(object()).tokens != first.tokens for _ in range(100))  # CPython reuses memory immediately


def test_arrays_are_counted_and_tracers_are_detected():
    arrays = {"a": jnp.ones((3, 4)), "b": [np.ones(5, np.float64)]}
    assert Held(lambda: arrays).bytes == 3 * 4 * 4 + 5 * 8
    assert not Held(lambda: arrays).traced
    traced = []
    jax.jit(lambda x: traced.append(Held(lambda: x).traced))(1.0)
    assert traced == [True]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(8)(x)))


@pytest.mark.parametrize("value", [jax.nn.relu, jnp.sin, nn.Dense, nn.Dense(3), jax.jit(jnp.sin), Network().apply, jnp])
def test_packages_are_not_inspected(value):
    assert len(held(value)) < 300


def test_objects_that_cannot_be_inspected_are_compared_by_identity():
    for value in (iter([]), threading.Lock(), contextvars.ContextVar("name"), (i for i in range(3)), sys.stdout, 3j):
        assert held(value) == held(value)


GLOBAL = 1.0


def test_names_of_attributes_are_not_variables():
    def network(x):
        return x.GLOBAL

    before = held(network)
    globals()["GLOBAL"] = 2.0
    assert held(network) == before


def test_a_program_uses_the_closure_at_the_time_of_tracing():
    """Two functions that hold the same share a program, until one of them holds something else."""

    @compiled()
    def call(network, x: Batch):
        return evaluate(network, x)

    def make(holder):
        return lambda x: x * holder["scale"]

    first, second = {"scale": 1.0}, {"scale": 1.0}
    x = jnp.ones((2, 3))
    call(make(first), x)
    first["scale"] = 2.0
    np.testing.assert_array_equal(call(make(second), x[:1]), x[:1])  # another shape: the program is traced anew
    np.testing.assert_array_equal(call(make(first), x), 2 * x)
