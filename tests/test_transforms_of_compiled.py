"""Compiled functions inside and around JAX's transformations, and as Python objects."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from vdm_jax import discrete_schedules, elbo, langevin, losses, samplers, schedules, score_matching
from vdm_jax.compilation import compiled
from vdm_jax.types import Batch, evaluate

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 3))
SCHEDULE = discrete_schedules.linear_betas(4)
TRACES: list[int] = []


@compiled(static=("times",))
def power(network, x: Batch, *, times: int = 1):
    """x, through the network so many times."""
    TRACES.append(times)
    for _ in range(times):
        x = evaluate(network, x)
    return x


def scaled(w, x):
    return jnp.sin(w * x)


def f(w, x):
    return power(Partial(scaled, w), x, times=2)


def plain(w, x):
    return jnp.sin(w * jnp.sin(w * x))


W = jnp.float32(0.7)


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def _scan(f):
    return lambda w, x: jax.lax.scan(lambda x, _: (f(w, x), x), x, None, length=3)


TRANSFORMS = {
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda w, x: f(w, x).sum(), (0, 1)),
    "grad of jit": lambda f: jax.grad(jax.jit(lambda w, x: f(w, x).sum()), (0, 1)),
    "second derivative": lambda f: jax.hessian(lambda w, x: f(w, x).sum()),
    "jvp": lambda f: lambda w, x: jax.jvp(f, (w, x), (jnp.ones_like(w), 2 * x)),
    "jacrev": lambda f: jax.jacrev(f),
    "linearize": lambda f: lambda w, x: jax.linearize(f, w, x)[1](w, x),
    "vmap over a batch of batches": lambda f: lambda w, x: jax.vmap(f, (None, 0))(w, jnp.stack([x, 2 * x])),
    "vmap over parameters": lambda f: lambda w, x: jax.vmap(f, (0, None))(jnp.stack([w, 2 * w]), x),
    "pmap": lambda f: lambda w, x: jax.pmap(f, in_axes=(None, 0))(w, jnp.stack([x, 2 * x])),
    "scan": _scan,
    "grad of scan": lambda f: jax.grad(lambda w, x: _scan(f)(w, x)[0].sum()),
    "checkpoint": lambda f: jax.grad(lambda w, x: jax.checkpoint(f)(w, x).sum()),
    "while_loop": lambda f: lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: f(w, x), x),
    "cond": lambda f: lambda w, x: jax.lax.cond(w > 0, f, lambda w, x: x, w, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations_apply_to_the_compiled_function(transform):
    ours, theirs = jax.jit(lambda w, x: (transform(f)(w, x), transform(plain)(w, x)))(W, X)
    same(ours, theirs)


def test_a_transformation_needs_no_jit_around_it():
    for name in ("grad", "vmap over parameters", "pmap"):
        same(TRANSFORMS[name](f)(W, X), jax.jit(TRANSFORMS[name](plain))(W, X))


def test_a_plain_function_over_a_traced_parameter_has_its_gradient():
    def g(w):
        return power(lambda x: scaled(w, x), X, times=2).sum()

    expected = jax.grad(lambda w: plain(w, X).sum())(W)
    same(jax.grad(g)(W), expected)
    same(jax.grad(g)(W), expected)  # not from a cache of the first trace
    same(jax.jit(jax.grad(g))(W), expected)
    same(jax.vmap(g)(jnp.stack([W, 2 * W])), jnp.stack([g(W), g(2 * W)]))
    same(g(W), plain(W, X).sum())


def test_no_tracer_outlives_its_transformation():
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda w: power(lambda x: w * x, X).sum()))(W)


def test_abstract_evaluation_and_jaxprs():
    shape = jax.eval_shape(f, W, jax.ShapeDtypeStruct((5, 2), jnp.float32))
    assert (shape.shape, shape.dtype) == ((5, 2), jnp.float32)
    program = jax.make_jaxpr(f)(W, X)
    assert program.out_avals[0].shape == X.shape
    assert "name=power" in str(program)
    assert "HloModule" in jax.jit(f).lower(W, X).compile().as_text()


def test_without_jit_every_call_runs_the_function():
    before = len(TRACES)
    with jax.disable_jit():
        same(f(W, X), plain(W, X))
        same(f(W, X), plain(W, X))
    assert len(TRACES) == before + 2


def test_one_trace_for_each_shape_dtype_and_static_value():
    network = Partial(jnp.multiply, W)
    before = len(TRACES)
    for x in (X, X + 1, X[:2], X[:2], X):
        power(network, x)
    assert len(TRACES) == before + 2
    power(network, X, times=3)
    power(network, X, times=np.int64(3))
    power(network, X, times=jnp.int32(3))
    assert len(TRACES) == before + 3
    power(network, X.astype(jnp.bfloat16).astype(jnp.float32))
    assert len(TRACES) == before + 3


def test_settings_of_jax_are_those_of_the_call():
    with jax.enable_x64(True):
        double = power(Partial(jnp.multiply, jnp.float64(W)), jnp.asarray(np.asarray(X), jnp.float64))
        assert double.dtype == jnp.float64
    assert power(Partial(jnp.multiply, W), X).dtype == jnp.float32
    with jax.debug_nans(True):
        same(f(W, X), plain(W, X))
        with pytest.raises(FloatingPointError):
            power(Partial(jnp.divide, jnp.zeros(())), jnp.zeros((2, 2)))


@pytest.mark.parametrize("function", [losses.simple_loss, losses.denoising_loss, elbo.bound, samplers.ddim, power])
def test_compiled_functions_are_functions_to_python(function):
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__doc__
    assert function.__qualname__ == function.__name__
    assert function.__name__ in inspect.getsource(function)
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))
    assert next(iter(inspect.signature(function).parameters)) in ("denoiser", "network")


def test_arguments_are_bound_as_python_does():
    same(power(x=X, network=Partial(jnp.multiply, W)), power(Partial(jnp.multiply, W), X))
    for wrong in ({"steps": 1}, {"x": X}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            power(Partial(jnp.multiply, W), X, **wrong)
    with pytest.raises(TypeError, match="x"):
        power(Partial(jnp.multiply, W))


def test_static_numbers_must_not_be_traced():
    with pytest.raises(TypeError, match="times is traced"):
        jax.jit(lambda times: power(Partial(jnp.multiply, W), X, times=times))(2)


def test_an_array_that_a_compiled_function_captures_is_a_number():
    half, late = jnp.float32(0.5), jnp.float32(1.5)
    score, net = (lambda x: -x), (lambda x, level: x)
    calls = {
        "time": lambda: schedules.Cosine()(half).alpha,
        "size": lambda: score_matching.finite_difference(lambda x: x.sum(1), KEY, X, half),
        "step_size": lambda: langevin.ula(score, KEY, X, half, 2).x,
        "eta": lambda: samplers.ddim(net, KEY, X, SCHEDULE, eta=half).x_0,
        "snr": lambda: samplers.predictor_corrector(net, KEY, X, SCHEDULE, snr=half).x_0,
    }
    for name, call in calls.items():
        assert jax.eval_shape(call).dtype == np.float32, name  # traces as `jax.jit` does
    with pytest.raises(ValueError, match="out of range"):
        jax.eval_shape(lambda: schedules.Cosine()(late))


@pytest.mark.slow
def test_public_functions_have_the_transformations_of_a_loss():
    def mean(w):
        return losses.simple_loss(Partial(lambda w, x, level: w * x, w), KEY, X, SCHEDULE).mean()

    numbers = jnp.stack([W, 2 * W])
    same(jax.vmap(mean)(numbers), jnp.stack([mean(w) for w in numbers]))
    step = 1e-2  # the loss is a parabola in w, whose central difference is exact
    same(jax.grad(mean)(W), (mean(W + step) - mean(W - step)) / (2 * step))
