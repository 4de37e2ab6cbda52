"""Divergences as functions: values by hand in every shape, the directions' distributions, one evaluation, errors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vdm_jax.divergence import check_trace, hutchinson_probes, value_and_divergence

SHAPES = [(), (3,), (2, 3, 1)]
RANDOM = ["rademacher", "gaussian", "sphere"]
KEY = jax.random.key(0)


def batch(shape, dtype=jnp.float32, count=5):
    return jnp.asarray(np.random.RandomState(0).normal(size=(count, *shape)), dtype)


def matrix(size):
    return np.random.RandomState(1).normal(size=(size, size))


def mixing(x):
    """x -> M x + x^3, whose divergence is tr M + 3 ||x||^2."""
    flat = x.reshape(x.shape[0], -1)
    return (flat @ jnp.asarray(matrix(flat.shape[1]), x.dtype).T).reshape(x.shape) + x**3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.float64, 1e-14)])
def test_by_hand(shape, dtype, rtol):
    with jax.enable_x64(dtype == jnp.float64):
        x = batch(shape, dtype)
        value, divergence = jax.jit(lambda x: value_and_divergence(mixing, x, hutchinson_probes(None, x, "exact")))(x)
        assert value.dtype == divergence.dtype == dtype
        flat = np.asarray(x, np.float64).reshape(5, -1)
        np.testing.assert_allclose(divergence, np.trace(matrix(flat.shape[1])) + 3 * (flat**2).sum(1), rtol=rtol)
        np.testing.assert_allclose(value, (flat @ matrix(flat.shape[1]).T + flat**3).reshape(x.shape), rtol=10 * rtol)


@pytest.mark.parametrize("trace", RANDOM)
def test_directions_follow_their_distribution(trace):
    v = jax.jit(lambda x: hutchinson_probes(KEY, x, trace, probes=5))(batch((2, 3), count=400))
    assert v.shape == (5, 400, 2, 3)
    assert len(np.unique(np.asarray(v).reshape(2000, 6), axis=0)) == (64 if trace == "rademacher" else 2000)
    v = np.asarray(v, np.float64).reshape(-1, 6)
    if trace == "rademacher":
        assert np.array_equal(np.unique(v), [-1.0, 1.0])
    if trace == "sphere":  # in six dimensions a coordinate's square, over 6, is Beta(1/2, 5/2)
        np.testing.assert_allclose((v**2).sum(1), 6.0, rtol=1e-6)
        assert stats.kstest(v[:, 0] ** 2 / 6, stats.beta(0.5, 2.5).cdf).pvalue > 1e-3
    if trace == "gaussian":
        assert stats.kstest(v.reshape(-1), "norm").pvalue > 1e-3
    np.testing.assert_allclose(v.T @ v / 2000, np.eye(6), atol=0.15)


def test_exact_directions_are_complete():
    v = np.asarray(hutchinson_probes(None, batch((2, 3)), "exact")).reshape(6, 5, 6)
    np.testing.assert_allclose(np.einsum("kbi,kbj->bij", v, v) / 6, np.broadcast_to(np.eye(6), (5, 6, 6)), atol=1e-6)


@pytest.mark.slow
def test_signs_are_exact_where_the_jacobian_is_diagonal():
    x = batch((2, 3))
    exact = value_and_divergence(jnp.sin, x, hutchinson_probes(None, x, "exact"))[1]
    np.testing.assert_allclose(value_and_divergence(jnp.sin, x, hutchinson_probes(KEY, x))[1], exact, rtol=1e-5)
    gaussian = value_and_divergence(jnp.sin, x, hutchinson_probes(KEY, x, "gaussian"))[1]
    assert np.all(np.abs(gaussian - exact) > 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("trace", RANDOM)
def test_directions_do_not_depend_on_other_examples(trace):
    x = batch((3,))
    v = hutchinson_probes(KEY, x, trace, probes=2)
    np.testing.assert_array_equal(hutchinson_probes(KEY, x[:1], trace, probes=2), v[:, :1])
    np.testing.assert_array_equal(hutchinson_probes(KEY, x, trace, probes=2), v)
    assert not np.array_equal(hutchinson_probes(jax.random.key(1), x, trace, probes=2), v)


def test_the_field_is_evaluated_once():
    traces, calls = [], []

    def counted(x):
        traces.append(x.shape)
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(x)

    x = batch((3,))
    jax.block_until_ready(value_and_divergence(counted, x, hutchinson_probes(KEY, x, probes=7)))
    jax.effects_barrier()
    assert (len(traces), len(calls)) == (1, 1)


def test_one_direction_and_the_mean_over_several_by_hand():
    # M x is linear: v^T J v = v^T M v + 3 x^2 v^2
    x, v = batch((3,)), batch((3,), count=10).reshape(2, 5, 3)
    flat, directions = np.asarray(x, np.float64), np.asarray(v, np.float64)
    each = np.einsum("kbi,ij,kbj->kb", directions, matrix(3), directions) + 3 * (flat**2 * directions**2).sum(-1)

    @jax.jit
    def divergences(x, v):
        given = (x, v), (x, v[1:]), (x[:1], v[:, :1])
        return [value_and_divergence(mixing, x, v)[1] for x, v in given]

    two, one, of_one_example = divergences(x, v)
    np.testing.assert_allclose(of_one_example, each.mean(0)[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(two, each.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one, each[1], rtol=1e-5, atol=1e-5)


def test_refusals():
    x = batch((3,))
    # unwrapped, since the tests' run-time type checker would raise first
    for function in (
        lambda: inspect.unwrap(hutchinson_probes)(KEY, x, "all"),
        lambda: inspect.unwrap(check_trace)("all", 1),
    ):
        with pytest.raises(ValueError, match="unknown trace 'all': choose 'exact', 'rademacher', 'gaussian' or 'sph"):
            function()
    for trace in ("exact", *RANDOM):
        with pytest.raises(ValueError, match="probes is 0: "):
            hutchinson_probes(KEY, x, trace, probes=0)
    for trace in RANDOM:
        with pytest.raises(ValueError, match=f"key is None and trace is {trace!r}: pass a key, or trace='ex"):
            hutchinson_probes(None, x, trace)
    with pytest.raises(ValueError, match=r"directions of shape \(2, 4, 3\) for x of shape \(5, 3\)"):
        inspect.unwrap(value_and_divergence)(jnp.sin, x, jnp.ones((2, 4, 3)))
    with pytest.raises(ValueError, match=r"field returned shape \(5, 2\) for x_t of shape \(5, 3\)"):
        value_and_divergence(lambda x: x[:, :2], x, hutchinson_probes(KEY, x))
