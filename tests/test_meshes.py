"""Batches sharded on a mesh with Explicit axes, `jax.make_mesh`'s default: the same numbers, sharded as the batch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from vdm_jax import discrete_schedules, elbo, gaussian, losses, samplers, schedules
from vdm_jax.compilation import compiled
from vdm_jax.types import Batch, evaluate

KEY = jax.random.key(0)
X = jnp.asarray(np.random.RandomState(0).normal(size=(8, 6)), jnp.float32)
SCHEDULE = discrete_schedules.linear_betas(4)
MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])


def network(weight, x, level):
    return jnp.tanh(x @ weight)


WEIGHT = jnp.asarray(np.random.RandomState(1).normal(size=(6, 6)) / 3, jnp.float32)


def decoder(x_hat, x_1, level):
    return gaussian.Normal(x_hat, var=level.sigma**2)


def loss(weight, x):
    return losses.simple_loss(Partial(network, weight), KEY, x, SCHEDULE)


def bound(weight, x):
    return elbo.bound(Partial(network, weight), KEY, x, SCHEDULE, decoder).total


def continuous_bound(weight, x):
    return elbo.continuous_bound(Partial(network, weight), KEY, x, schedules.LinearLogSNR(), decoder).total


def ddim(weight, x):
    return samplers.ddim(Partial(network, weight), KEY, x, SCHEDULE).x_0


def ancestral(weight, x):
    return samplers.ancestral(Partial(network, weight), KEY, x, SCHEDULE).x_0


def functions(quick):
    """All functions but the quick one are marked slow."""
    others = [f for f in (loss, bound, continuous_bound, ddim, ancestral) if f is not quick]
    return pytest.mark.parametrize("function", [quick, *(pytest.param(f, marks=pytest.mark.slow) for f in others)])


CONTEXTS = pytest.mark.parametrize(
    "context", [lambda: jax.set_mesh(MESH), contextlib.nullcontext], ids=["set_mesh", "types_alone"]
)


def sharded(x):
    return jax.device_put(x, NamedSharding(MESH, PartitionSpec("data")))


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), jax.device_get(a), b)


@functions(ddim)
def test_a_batch_on_explicit_axes_gives_the_same_numbers_sharded_alike(function):
    expected = function(WEIGHT, X)
    with jax.set_mesh(MESH):
        found = function(WEIGHT, sharded(X))
        assert jax.typeof(found).sharding.spec[0] == "data"
    same(found, expected)


@functions(loss)
def test_gradients_on_explicit_axes_are_the_same(function):
    gradient = jax.jit(jax.grad(lambda weight, x: function(weight, x).sum(), (0, 1)))
    # In float64, since sums in another order differ by rounding, which cancellation magnifies in float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        weight, x = (jnp.asarray(np.asarray(value), jnp.float64) for value in (WEIGHT, X))
        expected = jax.device_get(gradient(weight, x))
        with jax.set_mesh(MESH):
            found = gradient(jax.device_put(weight, PartitionSpec()), sharded(x))
            assert jax.typeof(found[1]).sharding.spec[0] == "data"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), jax.device_get(found), expected)


@compiled()
def call(network, x: Batch):
    y = evaluate(network, x)
    return y, jnp.stack([y, y, y]), jnp.sum(y)


@CONTEXTS
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["called", "jitted"])
def test_results_with_the_batch_axis_are_sharded_and_others_replicated(context, transform):
    with context():
        x = sharded(X)
        y, stacked, total = transform(lambda x: call(Partial(jnp.tanh), x))(x)
        specs = [tuple(jax.typeof(value).sharding.spec) for value in (y, stacked, total)]
    assert specs == [("data", None), (None, "data", None), ()]
    same((y, stacked), (np.tanh(X), np.stack([np.tanh(X)] * 3)))


@CONTEXTS
def test_the_axes_are_those_of_the_mesh_again_after_the_call(context):
    with context():
        before = jax.sharding.get_abstract_mesh()
        call(Partial(jnp.tanh), sharded(X))
        assert jax.sharding.get_abstract_mesh() == before


@pytest.mark.slow
def test_a_mesh_with_explicit_and_auto_axes():
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = ddim(WEIGHT, jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))))
        assert jax.typeof(found).sharding.spec[0] == "data"
    same(found, ddim(WEIGHT, X))


@pytest.mark.slow
def test_parameters_sharded_on_an_explicit_axis():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    gradient = jax.grad(lambda weight, x: loss(weight, x).sum())
    with jax.set_mesh(mesh):
        x, weight = jax.device_put((X, WEIGHT), (PartitionSpec("data"), PartitionSpec(None, "model")))
        found, slope = loss(weight, x), gradient(weight, x)
        assert jax.typeof(slope).sharding.spec == PartitionSpec(None, "model")
    same((found, slope), (loss(WEIGHT, X), gradient(WEIGHT, X)))


@pytest.mark.slow
def test_a_function_may_hold_arrays_that_are_not_on_the_mesh():
    with jax.set_mesh(MESH):
        found = losses.simple_loss(lambda x, level: network(WEIGHT, x, level), KEY, sharded(X), SCHEDULE)
    same(found, loss(WEIGHT, X))


def test_parameters_as_long_as_the_batch_do_not_take_its_sharding():
    with jax.set_mesh(MESH):
        weight = jax.device_put(jnp.ones((8, 6)), PartitionSpec())
        y, _, _ = call(Partial(lambda weight, x: x * weight, weight), sharded(X))
        assert jax.typeof(y).sharding.spec[0] == "data"


@pytest.mark.slow
def test_a_whole_batch_on_every_device():
    with jax.set_mesh(MESH):
        found = ddim(WEIGHT, jax.device_put(X, PartitionSpec()))
    same(found, ddim(WEIGHT, X))


@pytest.mark.slow
def test_the_data_of_each_device_under_shard_map():
    spec = PartitionSpec("data")
    with jax.set_mesh(MESH):
        found = jax.jit(jax.shard_map(lambda x: ddim(WEIGHT, x), in_specs=spec, out_specs=spec))(sharded(X))
    same(found, ddim(WEIGHT, X))


def test_the_values_are_divided_among_the_devices():
    with jax.set_mesh(MESH):
        text = jax.jit(lambda x: ddim(WEIGHT, x)).lower(sharded(X)).compile().as_text()
    assert "f32[2,6]" in text  # 8 examples on 4 devices
    assert "f32[8,6]" not in text
