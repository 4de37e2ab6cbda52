"""Stein's estimate as a function: values by hand in every shape, thresholds by search, keys, batches, errors.

That it has no bias is in `derivations`.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.test_divergence import batch, matrix, mixing
from vdm_jax import sure

KEY = jax.random.key(0)


def soft(threshold):
    return Partial(lambda t, y: sure.soft_threshold(y, t), jnp.asarray(threshold))


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 2e-6), (jnp.float64, 1e-13)])
@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
def test_by_hand(shape, dtype, rtol):
    with jax.enable_x64(dtype == jnp.float64):
        y = batch(shape, dtype)
        flat = np.asarray(y, np.float64).reshape(5, -1)
        size = flat.shape[1]
        moved = flat @ matrix(size).T + flat**3 - flat
        divergence = np.trace(matrix(size)) + 3 * (flat**2).sum(1)
        expected = (moved**2).sum(1) - 0.49 * size + 2 * 0.49 * divergence
        for sigma in (0.7, jnp.asarray(0.7, dtype)):
            ours = sure.sure(mixing, None, y, sigma, trace="exact")
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours, expected, rtol=rtol, atol=10 * rtol)


def test_best_threshold_by_hand():
    # the least sum of min(|y|, t)^2 + sigma^2 (dim - 2 #{|y| <= t}), over t = 0 and every |y|
    y, sigma = 1.5 * np.random.RandomState(3).normal(size=(4, 3)), 0.7
    every = np.r_[0.0, np.abs(y).ravel()]
    risks = [np.sum(np.minimum(np.abs(y), t) ** 2) + sigma**2 * (12 - 2 * np.sum(np.abs(y) <= t)) for t in every]
    with jax.enable_x64(True):
        threshold, risk = jax.jit(sure.sure_threshold)(y, sigma)
    assert 0.0 < every[np.argmin(risks)] < every.max()
    np.testing.assert_allclose((threshold, risk), (every[np.argmin(risks)], np.min(risks)), rtol=1e-12)


def test_soft_threshold_has_slope_one_outside_and_zero_at_the_threshold():
    slope = jax.vmap(jax.grad(lambda y: sure.soft_threshold(y[None], 0.5)[0]))
    np.testing.assert_array_equal(slope(jnp.asarray([-2.0, -0.5, 0.0, 0.3, 0.5, 1.0])), [1, 0, 0, 0, 0, 1])


def test_doing_nothing_costs_the_noise_and_forgetting_all_costs_the_rest():
    y = batch((2, 3))
    kept, forgotten = jax.jit(lambda y: [sure.sure(d, KEY, y, 0.3) for d in (lambda y: y, jnp.zeros_like)])(y)
    np.testing.assert_allclose(kept, np.full(5, 6 * 0.09), rtol=1e-5)
    np.testing.assert_allclose(forgotten, np.square(np.asarray(y)).reshape(5, 6).sum(1) - 6 * 0.09, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["rademacher", "gaussian", "sphere"])
def test_directions_give_the_exact_estimate_on_average(trace):
    y = jnp.broadcast_to(batch((3,))[:1], (20_000, 3))
    ours = np.asarray(sure.sure(mixing, KEY, y, 0.5, trace=trace, probes=2), np.float64)
    error = ours.std() / np.sqrt(20_000)
    assert abs(ours.mean() - float(sure.sure(mixing, None, y[:1], 0.5, trace="exact")[0])) < 4 * error
    assert error < 0.05
    one = sure.sure(mixing, KEY, y, 0.5, trace=trace)
    assert 1.7 < np.var(one) / ours.var() < 2.3


def test_soft_threshold_by_hand():
    y = jnp.asarray([[-3.0, -1.0, -0.25], [0.0, 0.5, 2.0]])
    np.testing.assert_array_equal(sure.soft_threshold(y, jnp.float32(0.5)), [[-2.5, -0.5, 0.0], [0.0, 0.0, 1.5]])
    np.testing.assert_array_equal(sure.soft_threshold(y, jnp.float32(0.0)), y)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (200,), (20, 5, 2)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_best_threshold_by_a_search(shape, scale):
    # sparse numbers in noise: `sure` returns no lower estimate at any of many other thresholds
    rng = np.random.RandomState(0)
    y = jnp.asarray(scale * rng.normal(size=shape) * (rng.uniform(size=shape) < 0.2) + rng.normal(size=shape))
    threshold, risk = sure.sure_threshold(y, 1.0)
    every = np.linspace(0.0, float(np.abs(y).max()) + 1.0, 700) + 1e-4
    evaluate = jax.jit(jax.vmap(lambda t: sure.sure(soft(t), None, y[None], 1.0, trace="exact")[0]))
    searched = np.asarray(evaluate(jnp.asarray(every, y.dtype)))
    tolerance = 1e-5 * (1.0 + float(jnp.sum(y**2)))
    assert searched.min() > risk - tolerance
    # just above it, where nothing has a kink, the estimate is the one that was given
    np.testing.assert_allclose(evaluate(threshold[None] * (1 + 1e-6) + 1e-30)[0], risk, atol=tolerance)


def test_best_threshold_of_nothing_and_of_much():
    small, large = jnp.asarray([0.01, -0.03, 0.02]), jnp.asarray([50.0, -80.0, 60.0])
    best = jax.jit(sure.sure_threshold)
    threshold, risk = best(small, 1.0)
    assert threshold == jnp.float32(0.03)  # all set to 0
    np.testing.assert_allclose(risk, -3.0 + 0.0014, rtol=1e-6)
    threshold, risk = best(large, 1.0)
    assert threshold == 0.0  # all kept
    assert risk == 3.0
    with jax.enable_x64(True):
        assert all(number.dtype == jnp.float64 for number in best(np.ones(3), 0.5))


@pytest.mark.slow
def test_examples_do_not_depend_on_each_other():
    y = batch((3,))
    for trace in ("exact", "rademacher", "gaussian", "sphere"):
        alone, beside = (sure.sure(mixing, KEY, y, 0.5, trace=trace, probes=2) for y in (y[:1], y))
        np.testing.assert_allclose(alone, beside[:1], rtol=2e-6)


@pytest.mark.slow
def test_keys():
    y = batch((3,))
    np.testing.assert_array_equal(sure.sure(mixing, KEY, y, 0.5), sure.sure(mixing, KEY, y, 0.5))
    other = sure.sure(mixing, jax.random.key(1), y, 0.5, trace="gaussian")
    assert np.all(sure.sure(mixing, KEY, y, 0.5, trace="gaussian") != other)


@pytest.mark.slow
def test_trained_from_noisy_data_alone():
    # D(y) = w y of N(0, 4) data in noise of 1: the least risk is at w = 0.8, and the gradient leads there
    y = jnp.sqrt(5.0) * jax.random.normal(KEY, (4000, 3))
    slope = jax.grad(lambda w: sure.sure(Partial(lambda w, y: w * y, w), KEY, y, 1.0).mean())
    least = 1.0 - 3.0 / float(jnp.mean(jnp.sum(y**2, axis=1)))
    np.testing.assert_allclose(slope(jnp.float32(least)), 0.0, atol=1e-4)
    assert slope(jnp.float32(0.7)) < 0 < slope(jnp.float32(0.9))
    assert abs(least - 0.8) < 0.01


def test_refusals(monkeypatch):
    y = batch((3,))
    with pytest.raises(ValueError, match="probes is 0: "):
        sure.sure(mixing, KEY, y, 0.5, probes=0)
    with pytest.raises(ValueError, match=r"key is None .*trace='exact'"):
        sure.sure(mixing, None, y, 0.5)
    with pytest.raises(ValueError, match=r"field returned shape \(5, 2\) for x_t of shape \(5, 3\)"):
        sure.sure(lambda y: y[:, :2], KEY, y, 0.5)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would raise first
    with pytest.raises(ValueError, match="unknown trace 'all'"):
        sure.sure(mixing, KEY, y, 0.5, trace="all")
