"""The losses of score matching as functions: values by hand in every shape, keys, batches, evaluations, errors.

That they have one minimum is in `derivations`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.derivations.check import assert_mean
from tests.test_divergence import batch, matrix, mixing
from vdm_jax import score_matching
from vdm_jax.divergence import hutchinson_probes
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.parameterization import prediction_target

KEY = jax.random.key(0)
LEVEL = level_from_log_snr(jnp.float32(0.4))
PREDICTION_TYPES = ("x_0", "eps", "v", "score")


def quadratic(x):
    """An energy with the gradient S x, S symmetric."""
    flat = x.reshape(x.shape[0], -1)
    return 0.5 * jnp.sum(flat * (flat @ jnp.asarray(symmetric(flat.shape[1]), x.dtype)), axis=1)


def symmetric(size):
    return matrix(size) + matrix(size).T


def quartic(x):
    return jnp.sum(x.reshape(x.shape[0], -1) ** 4, axis=1)


def noise(x):
    return Normal(x, var=jnp.full((), 0.3, x.dtype))


def net(w, x_t, level):
    return w * jnp.tanh(x_t + level.sigma.reshape(-1, *[1] * (x_t.ndim - 1)))


NET = Partial(net, jnp.float32(0.7))
LOSSES = {
    "explicit": lambda x: score_matching.explicit(mixing, jnp.sin, x),
    "implicit": lambda x: score_matching.implicit(mixing, x),
    "sliced": lambda x: score_matching.sliced(mixing, KEY, x, trace="gaussian", probes=2),
    "line": lambda x: score_matching.sliced(mixing, KEY, x, trace="sphere", reduced=False),
    "finite_difference": lambda x: score_matching.finite_difference(quartic, KEY, x, 0.1),
    "denoising": lambda x: score_matching.denoising(mixing, KEY, x, noise),
}


@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 3e-6), (jnp.float64, 1e-13)])
def test_by_hand(shape, dtype, rtol):
    with jax.enable_x64(dtype == jnp.float64):
        x = batch(shape, dtype)
        flat = np.asarray(x, np.float64).reshape(5, -1)
        size = flat.shape[1]
        s = flat @ matrix(size).T + flat**3
        explicit = score_matching.explicit(mixing, lambda x: 0.5 * x, x)
        implicit = score_matching.implicit(mixing, x)
        assert explicit.dtype == implicit.dtype == dtype
        np.testing.assert_allclose(explicit, 0.5 * ((s - 0.5 * flat) ** 2).sum(1), rtol=10 * rtol)
        trace = np.trace(matrix(size)) + 3 * (flat**2).sum(1)
        np.testing.assert_allclose(implicit, 0.5 * (s**2).sum(1) + trace, rtol=rtol, atol=10 * rtol)
        for reduced in (True, False):  # along all axes both forms are exact
            sliced = score_matching.sliced(mixing, KEY, x, trace="exact", reduced=reduced)
            np.testing.assert_allclose(sliced, implicit, rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("shape", [(2, 3, 1)])
def test_differences_of_a_quadratic_have_no_error(shape):
    # for every finite step size; the score is -S x
    with jax.enable_x64(True):
        x = batch(shape, jnp.float64)
        flat = np.asarray(x).reshape(5, -1)
        s = symmetric(flat.shape[1])
        expected = 0.5 * ((flat @ s) ** 2).sum(1) - np.trace(s)
        for size in (1e-2, 3.0):
            ours = score_matching.finite_difference(quadratic, KEY, x, size, trace="exact")
            np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.slow
def test_differences_have_an_error_of_the_second_order():
    with jax.enable_x64(True):
        x = batch((3,), jnp.float64)
        expected = score_matching.sliced(lambda x: -4.0 * x**3, KEY, x, reduced=False)
        far, near = (score_matching.finite_difference(quartic, KEY, x, h) - expected for h in (0.02, 0.01))
        np.testing.assert_allclose(far / near, 4.0, rtol=1e-2)
        assert np.all(np.abs(near) > 1e-5)


def test_finite_differences_take_no_derivative_and_the_documented_number_of_evaluations():
    calls = []

    @jax.custom_jvp
    def energy(x):
        jax.debug.callback(lambda: calls.append(1))
        return quartic(x)

    @energy.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    jax.block_until_ready(score_matching.finite_difference(energy, KEY, batch((3,)), 0.1, probes=4))
    jax.effects_barrier()
    assert len(calls) == 2 * 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("trace", ["rademacher", "gaussian", "sphere"])
def test_sliced_losses_average_to_the_exact_loss(trace, reduced):
    x = jnp.broadcast_to(batch((3,))[:1], (20_000, 3))
    ours = score_matching.sliced(mixing, KEY, x, trace=trace, reduced=reduced)
    assert_mean(ours, score_matching.implicit(mixing, x[:1])[0], resolution=1.0)


def test_lines_are_squared_one_by_one():
    # 1/2 (v^T s)^2 + v^T M v of a linear field, averaged over the directions
    x = batch((3,))
    linear = lambda x: x @ jnp.asarray(matrix(3), x.dtype).T  # noqa: E731

    @jax.jit
    def losses(x):
        options = {"trace": "gaussian", "probes": 2}
        both = [score_matching.sliced(linear, KEY, x, reduced=reduced, **options) for reduced in (True, False)]
        return both, hutchinson_probes(KEY, x, "gaussian", 2)

    (reduced, lines), v = losses(x)
    s, v = np.asarray(x, np.float64) @ matrix(3).T, np.asarray(v, np.float64)
    along = np.einsum("kbi,ij,kbj->kb", v, matrix(3), v).mean(0)
    np.testing.assert_allclose(reduced, 0.5 * (s**2).sum(1) + along, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lines, 0.5 * ((v * s[None]).sum(-1) ** 2).mean(0) + along, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_probes_are_averaged():
    x = jnp.broadcast_to(batch((3,))[:1], (4000, 3))
    one, many = (np.var(score_matching.sliced(mixing, KEY, x, trace="gaussian", probes=k)) for k in (1, 16))
    assert 12 < one / many < 21


class Logistic:
    """Noise that is not normal: the score of y - x is -tanh of its half."""

    def __init__(self, x):
        self.x = x

    def sample(self, key):
        return self.x + jax.random.logistic(key, self.x.shape, self.x.dtype)

    def log_prob(self, y):
        return jnp.sum(jax.scipy.stats.logistic.logpdf(y - self.x))


@pytest.mark.parametrize("shape", [(3,), *(pytest.param(s, marks=pytest.mark.slow) for s in ((), (2, 3, 1)))])
def test_a_single_clean_point_leaves_nothing_to_learn(shape):
    # the noisy distribution is q(y|x) itself
    point = batch(shape)[0]
    x = jnp.broadcast_to(point, (6, *shape))

    @jax.jit
    def losses(point, x):
        every = [
            score_matching.denoising(lambda y: (x - y) / 0.3, KEY, x, noise),
            score_matching.denoising(lambda y: -jnp.tanh(0.5 * (y - x)), KEY, x, Logistic),
        ]
        for kind in PREDICTION_TYPES:
            net = Partial(partial(_of_point, kind), point)
            options = {"prediction_type": kind, "weight": _snr}
            every.append(score_matching.denoising_at_level(net, KEY, x, LEVEL, **options))
        return every

    for loss in losses(point, x):
        np.testing.assert_allclose(loss, np.zeros(6), atol=1e-10)


def _snr(level):
    return level.snr


def _of_point(prediction_type, point, x_t, level):
    """The exact denoiser of data that are one point."""
    return jax.vmap(lambda y, lv: prediction_target(point, (y - lv.alpha * point) / lv.sigma, lv, prediction_type))(
        x_t, level
    )


def test_a_score_of_zero_costs_the_noise():
    # 1/2 E ||eps||^2 / var for every x
    x = jnp.broadcast_to(batch((2, 2))[:1], (20_000, 2, 2))
    assert_mean(score_matching.denoising(jnp.zeros_like, KEY, x, noise), 2.0 / 0.3, resolution=0.05)
    loss = score_matching.denoising_at_level(lambda x_t, level: jnp.zeros_like(x_t), KEY, x, LEVEL)
    assert_mean(loss, 2.0, resolution=0.02)


def test_a_weight_multiplies_the_loss():
    x = batch((3,))
    plain = score_matching.denoising_at_level(NET, KEY, x, LEVEL)
    weighted = score_matching.denoising_at_level(NET, KEY, x, LEVEL, weight=lambda level: 3.0 * level.alpha)
    np.testing.assert_allclose(weighted, plain * (3.0 * LEVEL.alpha / LEVEL.sigma**2), rtol=1e-6)


@pytest.mark.slow
def test_each_example_has_its_own_level():
    x = batch((2, 3))
    levels = level_from_log_snr(jnp.linspace(-3.0, 3.0, 5))
    together = score_matching.denoising_at_level(NET, KEY, x, levels)
    for i in range(5):
        one = jax.tree.map(lambda field, i=i: field[i], levels)
        np.testing.assert_allclose(score_matching.denoising_at_level(NET, KEY, x, one)[i], together[i], rtol=1e-6)
    assert score_matching.denoising_at_level(NET, KEY, batch(()), LEVEL).shape == (5,)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_examples_do_not_depend_on_each_other(name):
    x = batch((3,))
    np.testing.assert_allclose(LOSSES[name](x[:1]), LOSSES[name](x)[:1], rtol=2e-6)


@pytest.mark.slow
def test_keys():
    x = batch((3,))
    for loss in (
        lambda key: score_matching.sliced(mixing, key, x, trace="gaussian"),
        lambda key: score_matching.finite_difference(quartic, key, x, 0.1, trace="gaussian"),
        lambda key: score_matching.denoising(mixing, key, x, noise),
        lambda key: score_matching.denoising_at_level(NET, key, x, LEVEL),
    ):
        np.testing.assert_array_equal(loss(KEY), loss(KEY))
        assert np.all(loss(KEY) != loss(jax.random.key(1)))


@pytest.mark.slow
def test_the_score_is_evaluated_once():
    calls = []

    def counted(x, *_):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(x)

    x = batch((3,))
    for loss in (
        lambda: score_matching.implicit(counted, x),
        lambda: score_matching.sliced(counted, KEY, x, probes=4),
        lambda: score_matching.denoising(counted, KEY, x, noise),
        lambda: score_matching.denoising_at_level(counted, KEY, x, LEVEL),
    ):
        calls.clear()
        jax.block_until_ready(loss())
        jax.effects_barrier()
        assert len(calls) == 1


def test_refusals(monkeypatch):
    x = batch((3,))
    for size in (0.0, -0.1, float("nan"), jnp.float32(0.0)):
        with pytest.raises(ValueError, match=r"size is .*: it must be positive"):
            score_matching.finite_difference(quartic, KEY, x, size)
    for field in (score_matching.implicit, lambda s, x: score_matching.sliced(s, KEY, x)):
        with pytest.raises(ValueError, match=r"field returned shape \(5, 2\) for x_t of shape \(5, 3\)"):
            field(lambda x: x[:, :2], x)
    for probes in (0, -1):
        with pytest.raises(ValueError, match=f"probes is {probes}: "):
            score_matching.sliced(mixing, KEY, x, probes=probes)
        with pytest.raises(ValueError, match=f"probes is {probes}: "):
            score_matching.finite_difference(quartic, KEY, x, 0.1, probes=probes)
    clean = NoiseLevel(*(jnp.float32(f) for f in (1.0, 0.0, 0.0, -np.inf)))
    with pytest.raises(ValueError, match=r"sigma = 0\.0: use a level with noise"):
        score_matching.denoising_at_level(NET, KEY, x, clean)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would raise first
    with pytest.raises(ValueError, match="unknown trace 'all'"):
        score_matching.sliced(mixing, KEY, x, trace="all")
    with pytest.raises(ValueError, match="unknown trace 'all'"):
        score_matching.finite_difference(quartic, KEY, x, 0.1, trace="all")
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        score_matching.denoising_at_level(NET, KEY, x, LEVEL, prediction_type="noise")
