"""Langevin chains as programs: a step by hand, paths, keys, batches, levels, refusals.

Their stationary distributions are tested in `derivations`.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.check import assert_mean, assert_moments
from tests.test_divergence import SHAPES, batch
from vdm_jax import closed_form, langevin
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.parameterization import convert
from vdm_jax.schedules import VarianceExploding

KEY = jax.random.key(0)
PREDICTION_TYPES = ("x_0", "eps", "v", "score")
MIXTURE = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
LEVELS = level_from_log_snr(jnp.linspace(-5.0, 4.0, 6))
POINT = closed_form.empirical([[0.4, -0.7, 0.1]])


def last(levels):
    return jax.tree.map(lambda field: field[-1], levels)


def quartic(x):
    return -0.25 * jnp.sum(x.reshape(x.shape[0], -1) ** 4, axis=1)


def minus_cube(x):
    return -(x**3)


def net(w, x_t, level):
    return w * jnp.tanh(x_t + level.sigma.reshape(-1, *[1] * (x_t.ndim - 1)))


NET = Partial(net, jnp.float32(0.7))
CHAINS = {
    "unadjusted": lambda key, x, **options: langevin.ula(minus_cube, key, x, 0.05, 4, **options),
    "metropolis": lambda key, x, **options: langevin.mala(quartic, key, x, 0.3, 4, **options),
    "annealed": lambda key, x, **options: langevin.annealed_langevin(
        NET, key, x, LEVELS, prediction_type="eps", steps=2, denoise=False, **options
    ),
}


def test_kernel_by_hand():
    distribution = langevin.langevin_kernel(jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 3.0]), jnp.float32(0.2))
    np.testing.assert_allclose(distribution.mean, [1.1, -1.4], rtol=1e-6)
    expected = stats.norm([1.1, -1.4], np.sqrt(0.4)).logpdf([0.3, 0.2]).sum()
    np.testing.assert_allclose(distribution.log_prob(jnp.asarray([0.3, 0.2])), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3,), *(pytest.param(s, marks=pytest.mark.slow) for s in ((), (2, 3, 1)))])
def test_a_step_is_a_drift_and_fresh_noise(shape):
    x = batch(shape, count=600)
    chain = langevin.ula(minus_cube, KEY, x, 0.02, 3, path=True)
    path = np.asarray(chain.path)
    np.testing.assert_array_equal(chain.x, path[-1])
    np.testing.assert_array_equal(chain.acceptance_rate, np.ones(600))
    before = np.concatenate([x[None], path[:-1]])
    noise = ((path - before + 0.02 * before**3) / np.sqrt(0.04)).reshape(-1)
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert len(np.unique(noise.round(5))) > 0.9 * noise.size  # for every step, example and dimension


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_path_is_the_same_chain(name, shape):
    x = batch(shape)
    short, long = CHAINS[name](KEY, x), CHAINS[name](KEY, x, path=True)
    assert short.path.shape == (0, 5, *shape)
    assert long.path.shape == (len(LEVELS.alpha) if name == "annealed" else 4, 5, *shape)
    np.testing.assert_array_equal(long.path[-1], long.x)
    np.testing.assert_allclose(short.x, long.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(short.acceptance_rate, long.acceptance_rate)
    assert np.all(np.diff(np.asarray(long.path), axis=0).any(axis=1).reshape(-1))  # it moves in every dimension


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_keys_and_other_examples(name):
    x = batch((3,))
    chain = CHAINS[name]
    ours = chain(KEY, x)
    np.testing.assert_array_equal(chain(KEY, x).x, ours.x)
    assert np.all(np.any(chain(jax.random.key(1), x).x != ours.x, axis=1))
    np.testing.assert_allclose(chain(KEY, x[:1]).x, ours.x[:1], rtol=1e-5, atol=1e-6)
    if name != "metropolis":
        np.testing.assert_array_equal(ours.acceptance_rate, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_float64_is_kept(name):
    with jax.enable_x64(True):
        levels = level_from_log_snr(jnp.linspace(-5.0, 4.0, 3))
        x, wide = batch((3,), jnp.float64), Partial(net, jnp.asarray(0.7))
        chain = {
            "unadjusted": lambda: langevin.ula(minus_cube, KEY, x, 0.05, 2, path=True),
            "metropolis": lambda: langevin.mala(quartic, KEY, x, 0.3, 2, path=True),
            "annealed": lambda: langevin.annealed_langevin(wide, KEY, x, levels, steps=2, path=True),
        }[name]()
        assert {leaf.dtype for leaf in chain} == {jnp.dtype("float64")}
        assert np.any(np.asarray(chain.x) != np.asarray(chain.x, np.float32))


@pytest.mark.slow
def test_metropolis_counts_what_it_accepts_and_keeps_the_rest():
    x = batch((3,), count=50)
    chain = langevin.mala(quartic, KEY, x, 0.5, 40, path=True)
    moved = np.any(np.diff(np.concatenate([x[None], chain.path]), axis=0) != 0, axis=2)
    np.testing.assert_allclose(chain.acceptance_rate, moved.mean(0), rtol=1e-6)
    assert 0.1 < moved.mean() < 0.95
    tiny = langevin.mala(quartic, KEY, x, 1e-5, 40)
    np.testing.assert_array_equal(tiny.acceptance_rate, 1.0)


def test_metropolis_is_exact_at_a_step_of_any_size():
    # N(0, 1) at eta = 1.5: without rejections the variance would be 4
    still, sampled = np.zeros((15_000, 1)), np.random.RandomState(0).normal(size=(15_000, 1))
    x = jnp.asarray(np.concatenate([still, sampled]), jnp.float32)
    chain = langevin.mala(lambda x: -0.5 * jnp.sum(x**2, axis=1), KEY, x, 1.5, 8, path=True)
    assert_moments(chain.x[15_000:], 0.0, 1.0)
    # from x = 0 a proposal is y ~ N(0, 3), accepted with probability e^(-y^2 / 2) k(0|y) / k(y|0) = e^(-3 y^2 / 8)
    first = np.asarray(chain.path)[0, :15_000]
    assert_mean(first != 0, (1 + 3 * 3 / 4) ** -0.5, resolution=0.005)
    assert_mean(first**2, 3.0 * (1 + 3 * 3 / 4) ** -1.5, resolution=0.02)
    np.testing.assert_array_equal(chain.path[-1], chain.x)
    moved = np.diff(np.concatenate([x[None], chain.path]), axis=0)[..., 0] != 0
    np.testing.assert_allclose(chain.acceptance_rate, moved.mean(0), rtol=1e-6)


@pytest.mark.slow
def test_metropolis_never_accepts_a_point_of_zero_density():
    # uniform on a box: proposals inside are accepted, others rejected; uniform samples stay uniform
    def box(x):
        return jnp.where(jnp.all(jnp.abs(x) < 1.0, axis=1), 0.0, -jnp.inf).astype(x.dtype)

    x = jax.random.uniform(KEY, (2000, 2), minval=-1.0, maxval=1.0)
    chain = langevin.mala(box, KEY, x, 0.2, 20, path=True)
    assert np.all(np.abs(chain.path) < 1.0)
    assert 0.3 < np.mean(chain.acceptance_rate) < 0.8
    assert stats.kstest(np.asarray(chain.x).reshape(-1), stats.uniform(-1.0, 2.0).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_metropolis_has_the_exact_distribution_at_a_step_where_ula_is_biased():
    # N(0, 1) at eta = 1.5: x <- -0.5 x + noise of variance 3, whose stationary variance is 4
    x, score = jax.random.normal(KEY, (20_000, 1)), lambda x: -x
    plain = langevin.ula(score, KEY, x, 1.5, 20).x
    exactly = langevin.mala(lambda x: -0.5 * jnp.sum(x**2, axis=1), KEY, x, 1.5, 20).x
    assert_moments(plain, 0.0, 4.0)
    assert_moments(exactly, 0.0, 1.0)


def _point(x_t, level):
    """The x_0 predicted for data at one point."""
    return jnp.broadcast_to(jnp.asarray([[0.4, -0.7]], x_t.dtype), x_t.shape)


@pytest.mark.parametrize("denoise", [True, False])
def test_levels_follow_each_other_by_hand(denoise):
    # for data at a point: the ratio of alphas, then x <- x - rate (x - alpha point) + sqrt(2 rate) sigma xi, two times
    levels = jax.tree.map(lambda field: field[::2], LEVELS)
    chain = langevin.annealed_langevin(
        _point, KEY, jnp.full((20_000, 2), 5.0), levels,
        prediction_type="x_0", rate=0.3, steps=2, denoise=denoise, path=True,
    )  # fmt: skip
    assert chain.path.shape == (3, 20_000, 2)
    point, mean, var, before = np.array([0.4, -0.7]), np.full(2, 5.0), 0.0, levels.alpha[0]
    for alpha, sigma, x in zip(levels.alpha, levels.sigma, chain.path, strict=True):
        mean, var, before = mean * alpha / before, var * (alpha / before) ** 2, alpha
        for _ in range(2):
            mean, var = mean - 0.3 * (mean - alpha * point), 0.7**2 * var + 2 * 0.3 * sigma**2
        assert_moments(x, mean, var)
    expected = np.broadcast_to(point, (20_000, 2)) if denoise else chain.path[-1]
    np.testing.assert_allclose(chain.x, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_prediction_types_make_the_same_chain(prediction_type):
    x = batch((2,))

    def run(prediction_type):
        return langevin.annealed_langevin(
            closed_form.OptimalDenoiser(MIXTURE, prediction_type),
            KEY,
            x,
            LEVELS,
            prediction_type=prediction_type,
            steps=3,
        ).x

    np.testing.assert_allclose(run(prediction_type), run("score"), rtol=1e-3, atol=1e-4)


def _rescaled(levels):
    """The variance-exploding level (alpha = 1) with the same signal-to-noise ratio."""
    ones, log_sigma = jnp.ones_like(levels.alpha), levels.log_sigma - levels.log_alpha
    return NoiseLevel(ones, jnp.exp(log_sigma), jnp.zeros_like(ones), log_sigma)


@pytest.mark.slow
@pytest.mark.parametrize("denoise", [True, False])
def test_preserving_and_exploding_levels_make_the_same_chain(denoise):
    # rescaled by alpha, up to rounding; the denoiser is the exact one of each process
    x, exploding = batch((2,)), _rescaled(LEVELS)
    options = {"prediction_type": "eps", "steps": 4, "denoise": denoise, "path": True}
    best = closed_form.OptimalDenoiser(MIXTURE)
    preserving = langevin.annealed_langevin(best, KEY, x * LEVELS.alpha[0], LEVELS, **options)
    other = langevin.annealed_langevin(best, KEY, x, exploding, **options)
    np.testing.assert_allclose(jax.vmap(jnp.divide)(preserving.path, LEVELS.alpha), other.path, rtol=1e-3, atol=1e-4)
    scale = 1.0 if denoise else LEVELS.alpha[-1]
    np.testing.assert_allclose(preserving.x / scale, other.x, rtol=1e-3, atol=1e-4)
    # a different exploding schedule gives another chain
    schedule = jax.vmap(VarianceExploding(0.2, 5.0))(jnp.linspace(1.0, 0.0, 4))
    assert not np.allclose(langevin.annealed_langevin(best, KEY, x, schedule, **options).x, other.x, atol=1e-2)


@pytest.mark.slow
def test_each_level_has_its_stationary_distribution():
    # data that are a point: x <- x - rate (x - alpha m) + sqrt(2 rate) sigma xi, of variance sigma^2 / (1 - rate / 2)
    rate, score = 0.3, closed_form.OptimalDenoiser(POINT, "score")
    x = jnp.zeros((4000, 3))
    ends = langevin.annealed_langevin(score, KEY, x, LEVELS, rate=rate, steps=60, path=True)
    np.testing.assert_allclose(ends.x, jnp.broadcast_to(POINT.points, (4000, 3)), atol=1e-5)  # denoised: the point
    for i in range(len(LEVELS.alpha)):
        mean, var = LEVELS.alpha[i] * POINT.points[0], LEVELS.sigma[i] ** 2 / (1 - rate / 2)
        assert_moments(ends.path[i], mean, var)
    noisy = langevin.annealed_langevin(score, KEY, x, LEVELS, rate=rate, steps=60, denoise=False)
    np.testing.assert_allclose(noisy.x, ends.path[-1], rtol=1e-4, atol=1e-5)


def test_the_end_is_the_denoiser_s():
    x = batch((2,))
    best = closed_form.OptimalDenoiser(MIXTURE, "v")
    chain = langevin.annealed_langevin(best, KEY, x, LEVELS, prediction_type="v", steps=3, path=True)
    expected = jax.vmap(lambda x_t: MIXTURE.posterior(x_t, last(LEVELS)).mean)(chain.path[-1])
    np.testing.assert_allclose(chain.x, expected, rtol=1e-4, atol=1e-5)


def test_the_corrector_s_drift_to_noise_ratio_is_snr():
    # where the score has the norm of a conditional distribution's score, sqrt(D) / sigma
    level, many, snr = last(LEVELS), 200_000, 0.3
    sigma, direction = float(level.sigma), np.sqrt(3.0) * np.array([0.48, -0.6, 0.64])
    x = jnp.broadcast_to(batch((3,))[:1], (many, 3))
    constant = lambda x_t, level: jnp.broadcast_to(jnp.asarray(direction, x_t.dtype)[None], x_t.shape)  # noqa: E731
    moved = langevin.langevin_corrector(constant, KEY, x, level, prediction_type="eps", snr=snr) - x
    noise = moved - moved.mean(0)[None]
    drift, size = np.linalg.norm(np.asarray(moved, np.float64).mean(0)), np.sqrt((np.asarray(noise) ** 2).sum(1).mean())
    np.testing.assert_allclose(drift / size, snr, rtol=0.02)
    assert_moments(moved, -2 * (snr * sigma) ** 2 * direction / sigma, (2 * snr * sigma) ** 2)


@pytest.mark.slow
def test_the_corrector_preserves_the_distribution():
    # where steps of eta ~ 1 / ||score||^2 would end in D + 2 for the mean of ||x||^2
    level = level_from_log_snr(jnp.zeros(()))
    x = jax.random.normal(KEY, (2_000, 4))
    denoiser, snr, steps = (lambda x, level: level.sigma[:, None] * x), 0.05, 1_000  # eps of N(0, I)
    kept = langevin.langevin_corrector(
        denoiser, jax.random.key(1), x, level, prediction_type="eps", snr=snr, steps=steps
    )
    eta = 2 * (snr * float(level.sigma)) ** 2
    assert_moments(kept, np.zeros(4), 1.0 / (1.0 - 0.5 * eta))


@pytest.mark.slow
def test_the_corrector_as_a_program():
    x, level = batch((2, 3)), last(LEVELS)
    for prediction_type in PREDICTION_TYPES:  # of one prediction

        def converted(x_t, level, prediction_type=prediction_type):
            return jax.vmap(lambda value, x, lv: convert(value, x, lv, "eps", prediction_type))(
                NET(x_t, level), x_t, level
            )

        ours = langevin.langevin_corrector(converted, KEY, x, level, prediction_type=prediction_type, steps=3)
        np.testing.assert_allclose(
            ours, langevin.langevin_corrector(NET, KEY, x, level, prediction_type="eps", steps=3), rtol=1e-3, atol=1e-4
        )
    assert langevin.langevin_corrector(NET, KEY, batch(()), level).shape == (5,)
    assert np.all(
        langevin.langevin_corrector(NET, jax.random.key(1), x, level) != langevin.langevin_corrector(NET, KEY, x, level)
    )


@pytest.mark.parametrize("name", ["unadjusted", "metropolis"])
def test_refusals_of_a_chain(name):
    def run(step_size=0.1, num_steps=3):
        function, field = {
            "unadjusted": (langevin.ula, minus_cube),
            "metropolis": (langevin.mala, quartic),
        }[name]
        return function(field, KEY, batch((3,)), step_size, num_steps)

    for size in (0.0, -0.1, float("nan"), jnp.float32(0.0)):
        with pytest.raises(ValueError, match=r"step_size is .*: it must be positive"):
            run(step_size=size)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"num_steps is {count}: .*at least 1"):
            run(num_steps=count)


def test_refusals_of_levels(monkeypatch):
    def anneal(levels=LEVELS, **options):
        return langevin.annealed_langevin(NET, KEY, batch((3,)), levels, **options)

    def correct(**options):
        return langevin.langevin_corrector(NET, KEY, batch((3,)), last(LEVELS), **options)

    rising = jax.tree.map(lambda field: field[::-1], LEVELS)
    staying = jax.tree.map(lambda field: jnp.stack([field[0], field[0]]), LEVELS)
    for levels in (rising, staying):
        with pytest.raises(ValueError, match=r"must decrease from each.*reverse their order"):
            anneal(levels)
    langevin.check_decreasing_noise(jax.tree.map(lambda field: field[:1], LEVELS))  # a single level
    for levels, shape in ((last(LEVELS), r"\(\)"), (jax.tree.map(lambda field: field[:0], LEVELS), r"\(0,\)")):
        with pytest.raises(ValueError, match=f"levels have shape {shape}: pass at least one level"):
            anneal(levels)
    for function, name in ((anneal, "rate"), (correct, "snr")):
        for size in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"{name} is {size}: it must be positive"):
                function(**{name: size})
        with pytest.raises(ValueError, match=r"steps is 0: .*at least 1"):
            function(steps=0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its error would come first
    for function in (anneal, correct):
        with pytest.raises(ValueError, match=r"unknown .*'noise'"):
            function(prediction_type="noise")
    langevin.check_decreasing_noise(LEVELS)
    for field in ("log_alpha", "log_sigma"):  # traced fields are not checked

        @jax.jit
        def check(value, field=field):
            langevin.check_decreasing_noise(rising._replace(**{field: value}))
            return value

        assert check(getattr(rising, field)).shape == (6,)


@pytest.mark.slow
def test_a_point_s_chain_of_one_level_has_the_mean_of_its_start_shrunk():
    # the distance of the mean to the point is multiplied by (1 - rate)^steps
    level = jax.tree.map(lambda field: field[-1:], LEVELS)
    start = jnp.full((20_000, 3), 5.0)
    best = closed_form.OptimalDenoiser(POINT)
    ours = langevin.annealed_langevin(
        best, KEY, start, level, prediction_type="eps", rate=0.2, steps=5, denoise=False
    ).x
    center = level.alpha[0] * POINT.points[0]
    assert_mean(ours, center + 0.8**5 * (5.0 - center), resolution=0.01)
