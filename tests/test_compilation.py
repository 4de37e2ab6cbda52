"""Compiled functions: no result depends on old variables, and nothing is compiled twice."""

import collections
import functools
import gc
import sys
import threading
import types
import weakref
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import Partial

from vdm_jax import compilation, discrete_schedules, elbo, gaussian, losses, parameterization, samplers
from vdm_jax.compilation import compiled
from vdm_jax.types import evaluate

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 3))
SCHEDULE = discrete_schedules.linear_betas(4)
TRACES: list[str] = []


@compiled()
def call(network: Any, x: Any) -> Any:
    TRACES.append("call")
    return evaluate(network, x)


def traces(network, x=X) -> int:
    """The number of times that a call traces the function."""
    before = len(TRACES)
    call(network, x)
    return len(TRACES) - before


def decoder(x_hat, x_1, level):
    return gaussian.Normal(x_hat, var=level.sigma**2)


@compiled()
def predict(network: Any, x: Any, level: Any) -> Any:
    return evaluate(network, x, level)


def prediction(network):
    return predict(network, X, SCHEDULE(np.array([1, 2, 3, 4])))


def loss(network):
    return losses.simple_loss(network, KEY, X, SCHEDULE)


def bound(network):
    return elbo.bound(network, KEY, X, SCHEDULE, decoder).total


def ddim(network):
    return samplers.ddim(network, KEY, X, SCHEDULE).x_0


THROUGH = pytest.mark.parametrize(
    "through", [prediction, *(pytest.param(f, marks=pytest.mark.slow) for f in (loss, bound, ddim))]
)


# Every way in which a plain function can depend on a factor that changes from 1 to 2: (network, change).


def _dictionary():
    holder = {"scale": jnp.float32(1.0)}
    return (lambda x: x * holder["scale"]), lambda: holder.update(scale=jnp.float32(2.0))


def _nested_dictionary():
    holder = {"a": [({"b": 1.0},)]}
    return (lambda x: x * holder["a"][0][0]["b"]), lambda: holder["a"][0][0].update(b=2.0)


def _numpy_in_place():
    scale = np.ones((), np.float32)
    return (lambda x: x * scale), lambda: scale.fill(2.0)


def _numpy_of_objects():
    scale = np.array([1.0], object)
    return (lambda x: x * scale[0]), lambda: scale.fill(2.0)


GLOBAL: Any = 1.0


def _rebind_global():
    global GLOBAL
    GLOBAL = 2.0


def _scale_by_global(x):
    return x * GLOBAL


def _global():
    global GLOBAL
    GLOBAL = 1.0
    return (lambda x: x * GLOBAL), _rebind_global


def _global_of_a_helper():
    global GLOBAL
    GLOBAL = 1.0
    return (lambda x: _scale_by_global(x)), _rebind_global


def _attribute_of_a_module():
    module = types.ModuleType("own_module")
    exec("scale = 1.0\ndef network(x): return x * scale", vars(module))
    sys.modules["own_module"] = module
    return (lambda x: module.network(x)), lambda: setattr(module, "scale", 2.0)


def _local():
    scale = 1.0

    def change():
        nonlocal scale
        scale = 2.0

    return (lambda x: x * scale), change


class Scaled:
    factor = 1.0

    def __init__(self):
        self.scale = 1.0

    def __call__(self, x):
        return x * self.scale * self.factor

    def method(self, x):
        return x * self.scale

    @property
    def by_property(self):
        return self.scale


def _attribute():
    owner = Scaled()
    return (lambda x: owner(x)), lambda: setattr(owner, "scale", 2.0)


def _object():
    owner = Scaled()
    return owner, lambda: setattr(owner, "scale", 2.0)


def _property():
    owner = Scaled()
    return (lambda x: x * owner.by_property), lambda: setattr(owner, "scale", 2.0)


def _bound_method():
    owner = Scaled()
    return owner.method, lambda: setattr(owner, "scale", 2.0)


def _attribute_of_a_class():
    prediction_type = type("Own", (Scaled,), {"factor": 1.0})
    return prediction_type(), lambda: setattr(prediction_type, "factor", 2.0)


def _slots():
    class Slotted:
        __slots__ = ("scale",)

        def __call__(self, x):
            return x * self.scale

    owner = Slotted()
    owner.scale = 1.0
    return owner, lambda: setattr(owner, "scale", 2.0)


def _cycle():
    owner = types.SimpleNamespace(scale=1.0)
    owner.self = [owner]
    return (lambda x: x * owner.self[0].scale), lambda: setattr(owner, "scale", 2.0)


def _nested_functions():
    holder = [1.0]

    def scale():
        return (lambda: holder[0])()

    return (lambda x: (lambda: x * scale())()), lambda: holder.__setitem__(0, 2.0)


def _partial():
    holder = {"scale": 1.0}
    return functools.partial(lambda held, x: x * held["scale"], holder), lambda: holder.update(scale=2.0)


def _vmap():
    holder = {"scale": 1.0}
    return jax.vmap(lambda x: x * holder["scale"]), lambda: holder.update(scale=2.0)


def _decorated():
    holder = collections.deque([1.0])

    def network(x):
        return x * holder[0]

    @functools.wraps(network)
    def wrapper(x):
        return network(x)

    return wrapper, lambda: holder.__setitem__(0, 2.0)


def _default_argument():
    def network(x, scale=1.0):
        return x * scale

    return network, lambda: setattr(network, "__defaults__", (2.0,))


def _attribute_of_a_function():
    def network(x):
        return x * network.scale

    network.scale = 1.0
    return network, lambda: setattr(network, "scale", 2.0)


def _tree_of_partials():
    holder = {"scale": 1.0}
    return Partial(lambda offset, x: x * holder["scale"] + offset, 0.0), lambda: holder.update(scale=2.0)


def _partial_of_a_method():
    owner = Scaled()
    return Partial(owner.method), lambda: setattr(owner, "scale", 2.0)


def _partial_in_a_partial():
    holder = {"scale": jnp.ones(())}
    inner = Partial(lambda x: x * holder["scale"])
    return Partial(lambda inner, x: inner(x), inner), lambda: holder.update(scale=jnp.float32(2.0))


def _partial_of_a_partial_of_functools():
    holder = {"scale": 1.0}
    inner = functools.partial(lambda held, x: x * held["scale"], holder)
    return Partial(lambda x: inner(x)), lambda: holder.update(scale=2.0)


ZOO = [
    _dictionary, _nested_dictionary, _numpy_in_place, _numpy_of_objects, _global, _global_of_a_helper,
    _attribute_of_a_module, _local, _attribute, _object, _property, _bound_method, _attribute_of_a_class, _slots,
    _cycle, _nested_functions, _partial, _vmap, _decorated, _default_argument, _attribute_of_a_function,
    _tree_of_partials, _partial_of_a_method, _partial_in_a_partial, _partial_of_a_partial_of_functools,
]  # fmt: skip


@pytest.mark.parametrize("make", ZOO)
def test_a_network_is_compiled_again_when_and_only_when_what_it_holds_changes(make):
    network, change = make()
    np.testing.assert_array_equal(call(network, X), X)
    assert traces(network) == 0
    change()
    np.testing.assert_array_equal(call(network, X), 2 * X)
    assert traces(network) == 0


def test_a_function_made_anew_of_the_same_code_and_variables_is_not_compiled_again():
    scale = jnp.float32(2.0)
    assert [traces(lambda x: x * scale) for _ in range(3)] == [1, 0, 0]


def test_one_program_serves_all_parameters_of_a_partial():
    assert [traces(Partial(jnp.multiply, jnp.float32(scale))) for scale in (1.0, 2.0, 3.0)] == [1, 0, 0]
    assert traces(Partial(jnp.multiply, jnp.float32(1.0)), X[:2]) == 1


def test_other_variables_of_the_same_name_do_not_matter():
    module = types.SimpleNamespace(GLOBAL=2.0)
    network = lambda x: x * module.GLOBAL  # noqa: E731
    assert traces(network) == 1
    _rebind_global()
    globals()["GLOBAL"] = 3.0
    assert traces(network) == 0


class ElementwiseEqual:
    """A callable without a hash, whose == returns an array."""

    def __eq__(self, other):
        return np.array([True, False])

    def __call__(self, x):
        return x * 2


def test_callables_need_no_hash_and_no_equality():
    network = ElementwiseEqual()
    assert [traces(network), traces(network)] == [1, 0]


def test_a_nan_variable_is_the_same_at_every_call():
    holder = {"scale": float("nan")}
    network = lambda x: x * holder["scale"]  # noqa: E731
    assert [traces(network), traces(network)] == [1, 0]


def test_a_new_object_is_not_confused_with_a_deleted_one():
    for scale in range(4):  # CPython reuses the memory, and so the id, for the next object
        owner = Scaled()
        owner.scale = jnp.float32(scale)
        assert call(lambda x, owner=owner: owner(x), X)[0, 0] == scale * X[0, 0]
        del owner


def test_a_function_that_holds_too_much_to_compare_is_refused():
    holder = [object() for _ in range(100_001)]
    with pytest.raises(ValueError, match="100000"):
        call(lambda x: x * len(holder), X)


def test_parameters_in_closures_are_freed(monkeypatch):
    monkeypatch.setattr(compilation._Programs, "most_bytes", 2**24)

    class Owner:
        pass

    alive = weakref.WeakSet()
    for step in range(8):
        owner = Owner()
        owner.scale = jnp.full((2**20,), step, jnp.float32)  # 4 MiB
        alive.add(owner)
        call(lambda x, owner=owner: x * owner.scale[0], X)
    del owner
    gc.collect()
    assert len(alive) <= 4  # 16 MiB


def test_threads_get_their_own_results():
    results = {}

    def work(scale):
        holder = {"scale": scale}
        results[scale] = [float(call(lambda x: x * holder["scale"], X)[0, 0]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(float(scale),)) for scale in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {scale: [pytest.approx(scale * float(X[0, 0]))] * 5 for scale in results}
    assert len(results) == 8


# Networks of the libraries, through a compiled function, a loss, a bound and a sampler.


def same(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, level, train: bool = False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))


class Nnx(nnx.Module):
    def __init__(self, *, dropout: bool = False, norm: bool = False):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5 if dropout else 0.0, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs) if norm else None

    def __call__(self, x, level, rngs=None):
        x = self.dropout(self.dense(x), rngs=rngs)
        return x if self.norm is None else self.norm(x)


class Equinox(eqx.Module):
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self):
        self.mlp = eqx.nn.MLP(3, 3, 4, 1, key=KEY)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)

    def __call__(self, x, level, key=None):
        return self.dropout(jax.vmap(self.mlp)(x), key=key, inference=key is None)


@THROUGH
def test_linen_networks_give_the_same_in_every_form(through):
    net = Linen()
    params = net.init(KEY, X, None)
    doubled = jax.tree.map(lambda w: 2 * w, params)
    right, changed = through(Partial(net.apply, params)), through(Partial(net.apply, doubled))
    assert not np.allclose(right, changed)
    same(through(net.bind(params)), right)
    holder = {"params": params}
    network = lambda x, level: net.apply(holder["params"], x, level)  # noqa: E731
    same(through(network), right)
    holder["params"] = doubled
    same(through(network), changed)
    same(through(net.bind(doubled)), changed)


@THROUGH
def test_nnx_modules_give_the_same_in_every_form_and_follow_their_parameters(through):
    net = Nnx()
    network = lambda x, level: net(x, level)  # noqa: E731
    before = through(net)
    same(through(network), before)
    net.dense.kernel[...] = 2 * net.dense.kernel[...]
    after = through(net)
    assert not np.allclose(before, after)
    same(through(network), after)
    graph, state = nnx.split(net)
    same(through(Partial(lambda state, x, level: nnx.merge(graph, state)(x, level), state)), after)


@pytest.mark.parametrize("options", [{"dropout": True}, {"norm": True}])
@THROUGH
def test_nnx_modules_that_change_their_state_are_refused_in_every_form(through, options):
    net = Nnx(**options)
    graph, state = nnx.split(net)
    for network in (
        net,
        lambda x, level: net(x, level),
        net.__call__,
        Partial(lambda net, x, level: net(x, level), net),
        Partial(lambda state, x, level: nnx.merge(graph, state)(x, level), state),
    ):
        with pytest.raises(ValueError, match="changes its own state"):
            through(network)
    net.eval()
    same(through(lambda x, level: net(x, level)), through(net))


@THROUGH
def test_equinox_modules_are_passed_as_they_are(through):
    net = Equinox()
    right = through(Partial(lambda net, x, level: net(x, level), net))
    same(through(net), right)
    same(through(lambda x, level: net(x, level)), right)
    changed = eqx.tree_at(lambda net: net.mlp.layers[0].weight, net, replace_fn=lambda w: 2 * w)
    assert not np.allclose(through(changed), right)


@compiled()
def squares(network: Any, x: Any, level: Any) -> Any:
    TRACES.append("squares")
    return jnp.sum(evaluate(network, x, level) ** 2)


class AffineNnx(nnx.Module):
    def __init__(self, kernel, bias):
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.dense.kernel[...], self.dense.bias[...] = kernel, bias

    def __call__(self, x, level):
        return self.dense(x)


class AffineEquinox(eqx.Module):
    dense: eqx.nn.Linear

    def __call__(self, x, level):
        return jax.vmap(self.dense)(x)


APPLY = Linen().apply  # once: another object would be another program


def _affine_linen(kernel, bias):
    return Partial(APPLY, {"params": {"Dense_0": {"kernel": kernel, "bias": bias}}})


def _affine_equinox(kernel, bias):
    dense = eqx.nn.Linear(3, 3, key=KEY)
    return AffineEquinox(eqx.tree_at(lambda dense: (dense.weight, dense.bias), dense, (kernel.T, bias)))


def _affine(params, x, timestep):
    return jnp.matmul(x, params["kernel"]) + params["bias"][None]


def _affine_of_timestep(kernel, bias):
    return parameterization.from_timesteps(Partial(_affine, {"kernel": kernel, "bias": bias}), SCHEDULE)


def _step(network, gradient):
    return jax.tree.map(lambda w, dw: w - 0.01 * dw, network, gradient)


def _step_in_place(network, gradient):
    nnx.Optimizer(network, optax.sgd(0.01), wrt=nnx.Param).update(network, gradient)
    return network


@pytest.mark.parametrize(
    ("make", "grad", "step"),
    [
        (_affine_linen, jax.grad, _step),
        (AffineNnx, nnx.grad, _step_in_place),
        (_affine_equinox, eqx.filter_grad, _step),
        (_affine_of_timestep, jax.grad, _step),
    ],
    ids=["linen", "nnx", "equinox", "from_timesteps"],
)
def test_a_step_of_gradient_descent_by_one_program_and_without_old_parameters(make, grad, step):
    """f(x) = x W + b of every library, before and after a step, against the sums and the gradient by NumPy."""
    x, kernel, bias = np.asarray(X), np.diag([0.5, 1.0, 2.0]).astype(np.float32), np.float32([0.1, 0.2, 0.3])
    y, level, before = x @ kernel + bias, SCHEDULE(np.array([1, 2, 3, 4])), len(TRACES)
    stepped = kernel - 0.02 * x.T @ y, bias - 0.02 * y.sum(0)
    network = make(jnp.asarray(kernel), jnp.asarray(bias))
    same(squares(network, X, level), np.sum(y**2))
    network = step(network, grad(lambda network: squares(network, X, level))(network))
    value = squares(network, X, level)
    same(value, np.sum((x @ stepped[0] + stepped[1]) ** 2))
    same(value, squares(make(*map(jnp.asarray, stepped)), X, level))
    assert len(TRACES) - before == 1


def test_gradients_flow_to_what_a_plain_function_closes_over():
    x, kernel, bias = np.asarray(X), jnp.diag(jnp.array([0.5, 1.0, 2.0])), jnp.array([0.1, 0.2, 0.3])
    level, params = SCHEDULE(np.array([1, 2, 3, 4])), {"kernel": kernel, "bias": bias}
    gradient = jax.grad(lambda params: squares(lambda x, level: _affine(params, x, level), X, level))(params)
    y = x @ np.asarray(kernel) + np.asarray(bias)
    jax.tree.map(same, gradient, {"kernel": 2 * x.T @ y, "bias": 2 * y.sum(0)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "dropout",
    [
        lambda key: Partial(Linen().apply, Linen().init(KEY, X, None), train=True, rngs={"dropout": key}),
        lambda key: Partial(lambda net, key, x, level: net(x, level, nnx.Rngs(key)), Nnx(dropout=True), key),
        lambda key: Partial(lambda net, key, x, level: net(x, level, key), Equinox(), key),
    ],
    ids=["linen", "nnx", "equinox"],
)
def test_dropout_keys_are_arguments(dropout):
    first, again, other = (loss(dropout(jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
