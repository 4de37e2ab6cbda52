"""Energies as functions: scores, constants and differences by hand, what runs through the chains, refusals.

The theorems are in `derivations`.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.check import assert_moments
from tests.test_divergence import batch
from vdm_jax import closed_form, energy, langevin

KEY = jax.random.key(0)
MIXTURE = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])


def quartic(x):
    return 0.25 * jnp.sum(x.reshape(x.shape[0], -1) ** 4, axis=1)


def bell(w, x):
    """w ||x||^2 / 2: the distribution N(0, I / w)."""
    return 0.5 * w * jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)


def of_mixture(x):
    """The energy of a normalized distribution, minus 3."""
    return -jax.vmap(MIXTURE.log_prob)(x) - 3.0


@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.float64, 1e-14)])
def test_by_hand(shape, dtype, rtol):
    with jax.enable_x64(dtype == jnp.float64):
        x = batch(shape, dtype)
        flat = np.asarray(x, np.float64).reshape(5, -1)
        ours = energy.score(quartic, x)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, -(np.asarray(x, np.float64) ** 3), rtol=rtol)
        np.testing.assert_allclose(energy.log_density(quartic, x), -0.25 * (flat**4).sum(1), rtol=rtol)
        np.testing.assert_allclose(
            energy.log_density(quartic, x, jnp.asarray(2.0, dtype)), -0.25 * (flat**4).sum(1) - 2.0, rtol=rtol
        )


@pytest.mark.slow
def test_log_partition_by_quadrature_and_by_samples():
    nodes = jnp.linspace(-9.0, 9.0, 401)
    log_weights = jnp.full(401, np.log(18.0 / 400), jnp.float32)
    expected = 0.5 * np.log(2 * np.pi / 1.7)
    weighed = Partial(bell, jnp.float32(1.7))
    np.testing.assert_allclose(energy.log_partition(weighed, nodes, log_weights), expected, rtol=1e-6)
    # with it the density is that of N(0, 1 / 1.7), and far from 0 nothing underflows or overflows
    ours = energy.log_density(weighed, nodes[::50], energy.log_partition(weighed, nodes, log_weights))
    np.testing.assert_allclose(ours, stats.norm(0, 1.7**-0.5).logpdf(np.linspace(-9, 9, 9)), rtol=2e-6)
    high = energy.log_partition(lambda x: weighed(x) + 1000.0, nodes, log_weights)
    np.testing.assert_allclose(high, expected - 1000.0, rtol=1e-6)
    # samples of the distribution itself have equal weights: exact for any number of samples
    x = jax.vmap(MIXTURE.sample)(jax.random.split(KEY, 3))
    log_weights = -jnp.log(jnp.float32(3.0)) - jax.vmap(MIXTURE.log_prob)(x)
    np.testing.assert_allclose(energy.log_partition(of_mixture, x, log_weights), 3.0, rtol=1e-6)


def _round(u, start, end):
    """A curved path between the two points."""
    aside = jnp.sin(jnp.pi * u) * jnp.asarray([1.0, -0.5], start.dtype)
    return start + u**2 * (end - start) + aside[None]


def test_log_partition_by_hand():
    nodes, log_weights = batch((3,)), jnp.asarray([0.1, -1.0, 0.5, 2.0, 0.0])
    expected = np.log(np.sum(np.exp(log_weights) * np.exp(-np.asarray(quartic(nodes), np.float64))))
    np.testing.assert_allclose(energy.log_partition(quartic, nodes, log_weights), expected, rtol=1e-5)
    far = energy.log_partition(lambda x: quartic(x) + 1000.0, nodes, log_weights)
    np.testing.assert_allclose(far + 1000.0, expected, atol=1e-3)


def test_line_integral_along_a_path():
    # around a circle of radius 0.7, a rotation (-y, x) gives twice its area, and nothing along a path of no length
    turning = Partial(lambda x: jnp.stack([-x[:, 1], x[:, 0]], axis=1))
    straight, around = (energy.line_integral(turning, batch((2,)), batch((2,)), path=path) for path in (None, _circle))
    np.testing.assert_allclose(straight, np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(around, np.full(5, 2 * np.pi * 0.49), rtol=1e-4)


@pytest.mark.slow
def test_line_integral_gives_the_density_back_along_any_path():
    score = jax.vmap(MIXTURE.score)
    start, end = batch((2,)), batch((2,), count=10)[5:]
    expected = jax.vmap(MIXTURE.log_prob)(end) - jax.vmap(MIXTURE.log_prob)(start)
    for path in (None, _round):
        ours = energy.line_integral(score, start, end, path=path, nodes=128)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def _circle(u, start, end):
    angle = 2 * jnp.pi * u
    return start + 0.7 * jnp.stack([jnp.cos(angle) - 1.0, jnp.sin(angle)])[None]


@pytest.mark.parametrize("shape", [(2, 3, 1)])
def test_nodes_of_a_line_integral(shape):
    # n nodes are exact up to degree 2 n - 1: two nodes are exact for a quartic energy, one is not
    with jax.enable_x64(True):
        start, end = batch(shape, jnp.float64), batch(shape, jnp.float64, count=10)[5:]
        expected = quartic(start) - quartic(end)
        two, one = (energy.line_integral(lambda x: -(x**3), start, end, nodes=n) for n in (2, 1))
        assert two.dtype == jnp.float64
        np.testing.assert_allclose(two, expected, rtol=1e-12)
        assert np.all(np.abs(one - expected) > 1e-3)


def test_the_score_is_evaluated_once_per_node():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    jax.block_until_ready(energy.line_integral(counted, batch((3,)), batch((3,)), nodes=7))
    jax.effects_barrier()
    assert len(calls) == 7


@pytest.mark.parametrize("shape", [(3,), *(pytest.param(s, marks=pytest.mark.slow) for s in ((), (2, 3, 1)))])
def test_contrast_by_hand(shape):
    # E = w ||x||^2 / 2: its slope by w is half the mean square, of the data less that of where the chains ended
    x, start, w = batch(shape), batch(shape, count=8), jnp.float32(1.3)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def slope_and_terms(w):
        terms = energy.contrastive_divergence(Partial(bell, w), KEY, x, start, 0.1, 3)
        return terms.loss, (terms, terms.loss)

    slope, (ours, loss) = slope_and_terms(w)
    assert (ours.data.shape, ours.model.shape, ours.negatives.shape) == ((5,), (8,), (8, *shape))
    half = [0.5 * np.square(np.asarray(y, np.float64)).reshape(len(y), -1).sum(1) for y in (x, ours.negatives)]
    np.testing.assert_allclose(ours.data, 1.3 * half[0], rtol=1e-6)
    np.testing.assert_allclose(ours.model, 1.3 * half[1], rtol=1e-6)
    np.testing.assert_allclose(loss, 1.3 * (half[0].mean() - half[1].mean()), rtol=1e-5, atol=1e-6)
    # the chains are `langevin.ula`'s, and have no gradient
    same = langevin.ula(lambda x: -1.3 * x, KEY, start, 0.1, 3).x
    np.testing.assert_allclose(ours.negatives, same, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, half[0].mean() - half[1].mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_no_gradient_runs_through_the_chains():
    x, start = batch((3,)), batch((3,), count=8)

    def negatives(w, start):
        return energy.contrastive_divergence(Partial(bell, w), KEY, x, start, 0.1, 3).negatives

    w = jnp.float32(1.3)
    assert np.all(negatives(w, start) != negatives(2 * w, start))  # they do depend on it
    for moved in jax.jacrev(negatives, (0, 1))(w, start):
        np.testing.assert_array_equal(moved, 0.0)


@pytest.mark.slow
def test_the_chains_are_langevin_s_on_the_energy():
    start = jnp.zeros((20_000, 2))
    ours = energy.contrastive_divergence(Partial(bell, jnp.float32(2.0)), KEY, batch((2,)), start, 0.1, 60).negatives
    assert_moments(ours, 0.0, 0.5 / (1 - 0.1))  # x <- 0.8 x + noise of variance 0.2
    same = langevin.ula(lambda x: -2.0 * x, KEY, start, 0.1, 60).x
    np.testing.assert_allclose(ours, same, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_keys_and_other_examples():
    x = batch((3,))

    def negatives(key, start):
        return energy.contrastive_divergence(quartic, key, x, start, 0.1, 3).negatives

    np.testing.assert_array_equal(negatives(KEY, x), negatives(KEY, x))
    np.testing.assert_allclose(negatives(KEY, x[:1]), negatives(KEY, x)[:1], rtol=1e-5, atol=1e-6)
    assert np.all(negatives(KEY, x) != negatives(jax.random.key(1), x))
    np.testing.assert_allclose(energy.score(quartic, x[:1]), energy.score(quartic, x)[:1], rtol=1e-6)
    alone, beside = (energy.line_integral(lambda x: -(x**3), y, 2.0 * y) for y in (x[:1], x))
    np.testing.assert_allclose(alone, beside[:1], rtol=1e-6)


def test_refusals():
    x = batch((2, 3))
    for wrong, shape in ((lambda x: x[:, 0], r"\(5, 3\)"), (jnp.sum, r"\(\)")):
        message = rf"the energy returned shape {shape}: it must return shape \(5,\)"
        for call in (
            lambda e: energy.score(e, x),
            lambda e: energy.log_density(e, x),
            lambda e: energy.log_partition(e, x, jnp.zeros(5)),
            lambda e: energy.contrastive_divergence(e, KEY, x, x, 0.1, 3),
        ):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    with pytest.raises(ValueError, match=r"log_weights has shape \(4,\): it must be \(5,\)"):
        inspect.unwrap(energy.log_partition)(quartic, x, jnp.zeros(4))
    with pytest.raises(ValueError, match="log_partition"):
        inspect.unwrap(energy.log_density)(quartic, x, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"start has shape \(5, 2, 3\) and end \(4, 2, 3\)"):
        inspect.unwrap(energy.line_integral)(lambda x: -x, x, x[:4])
    for nodes in (0, -1):
        with pytest.raises(ValueError, match=f"nodes is {nodes}: "):
            energy.line_integral(lambda x: -x, x, x, nodes=nodes)
    with pytest.raises(ValueError, match=r"step_size is 0.0: it must be positive"):
        energy.contrastive_divergence(quartic, KEY, x, x, 0.0, 3)
    with pytest.raises(ValueError, match="num_steps is 0: "):
        energy.contrastive_divergence(quartic, KEY, x, x, 0.1, 0)
