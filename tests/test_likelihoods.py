"""Decoders: masses against numerical integration and Bayes' rule, edges, tails, samples."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import stats

from tests.derivations.check import assert_mean
from vdm_jax.dequantization import TruncatedNormal, Uniform
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedGaussian,
    DiscretizedLogisticMixture,
    _from_integer,
    denormalize,
    normalize,
    on_grid,
)
from vdm_jax.noise_levels import level_from_log_snr

LEVELS = [2, 17, 256]

parametrize = pytest.mark.parametrize
_normalize = jax.jit(normalize, static_argnames="levels")
_denormalize = jax.jit(denormalize, static_argnames="levels")


@partial(jax.jit, static_argnames="levels")
@partial(jax.vmap, in_axes=(0, 0, None))
def _discretized_masses(mean, scale, levels):
    return DiscretizedGaussian(mean, scale=scale, levels=levels).log_masses()


@jax.jit
@partial(jax.vmap, in_axes=(0, None, 0))
@partial(jax.value_and_grad, argnums=(0, 1))
def _discretized_slopes(mean, scale, x):
    """log P(x) of one number with 17 levels, and its derivatives in the mean and the scale."""
    return DiscretizedGaussian(mean[None], scale=scale, levels=17).log_prob(x[None])


@parametrize("levels", LEVELS)
def test_normalize_and_denormalize_are_inverse(levels):
    values = np.arange(levels)
    unit = np.asarray(_normalize(values, levels))
    assert unit[0] == -1.0
    assert unit[-1] == pytest.approx(1.0, abs=1e-6)
    nudge = np.float32(
        0.49 * 2 / (levels - 1)
    )  # points in a bin belong to its value, points outside to the nearest end
    points = np.r_[unit, unit + nudge, unit - nudge, np.float32([-7.0, 7.0])]
    assert np.array_equal(_denormalize(points, levels), [*values, *values, *values, 0, levels - 1])


@parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@parametrize("levels", [2, 17, 256, 65536])
def test_values_are_on_the_grid_however_they_are_rounded(levels, dtype):
    if float(jnp.finfo(dtype).eps) * (levels - 1) > 2.0:
        pytest.skip("neighboring values are the same number in this dtype")
    index = np.arange(levels)
    with jax.enable_x64(dtype == jnp.float64):
        x = np.stack(
            [
                np.asarray(_normalize(index, levels)).astype(dtype),
                (2.0 * (index / (levels - 1)) - 1.0).astype(dtype),
                (index.astype(np.float32) / np.float32((levels - 1) / 2) - np.float32(1.0)).astype(dtype),
                np.linspace(-1.0, 1.0, levels).astype(dtype),
            ]
        )
        on, back = jax.jit(lambda x: (on_grid(x, levels), denormalize(x, levels)))(x)
        assert np.array_equal(on, np.ones((4, levels)))
        assert np.array_equal(back, np.broadcast_to(index, (4, levels)))


@parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_data_in_another_range_are_off_the_grid(dtype):
    index = np.arange(256)
    for x in (index / 255, index * 1.0, index / 128 - 1, (index / 255 - 0.5) / 0.25):
        with pytest.raises(ValueError, match=r"256 values.*normalize\(values, 256\)"):
            on_grid(jnp.asarray(x, dtype), 256)
    every_other = jax.jit(lambda x: on_grid(x, 256))(jnp.asarray(index / 255, dtype))
    assert np.array_equal(np.isnan(every_other), index % 2 == 0)  # the others are values on [-1, 1] as well


Z = jnp.asarray([0.3, -0.2])
DECODERS = {
    "discretized": lambda p, x: DiscretizedGaussian(p, scale=jnp.float32(0.1), levels=17).log_prob(x),
    "categorical": lambda p, x: Categorical(p, level_from_log_snr(jnp.float32(3.0)), 17).log_prob(x),
    "mixture": lambda p, x: DiscretizedLogisticMixture(
        jnp.zeros(3), p[:, None] * jnp.ones((2, 3)), jnp.zeros((2, 3)), 17
    ).log_prob(x),
    "uniform": lambda p, x: p.sum() + Uniform(x, 17).log_prob(Z),
    "uniform's sample": lambda p, x: (p * Uniform(x, 17).sample(jax.random.key(0))).sum(),
    "truncated": lambda p, x: TruncatedNormal(x, levels=17, mean=p, scale=jnp.float32(1.0)).log_prob(Z),
    "truncated's sample": lambda p, x: (
        TruncatedNormal(x, levels=17, mean=p, scale=jnp.float32(1.0)).sample(jax.random.key(0)).sum()
    ),
}


@parametrize("decoder", DECODERS)
def test_decoders_take_values_on_their_grid_only(decoder):
    log_prob = DECODERS[decoder]
    traced = jax.jit(jax.value_and_grad(log_prob))  # x is traced and cannot be checked
    for value in (0.1, -1.01, 200.0, float("nan")):
        x = jnp.asarray([0.5, value])
        with pytest.raises(ValueError, match=rf"1 of 2 numbers .* 17 values.*such as {value}"):
            jax.eval_shape(lambda p, x=x: log_prob(p, x), Z)  # x is concrete
        number, slope = traced(Z, x)
        assert np.isnan(number)
        assert np.isnan(slope[1]) or decoder in ("uniform", "uniform's sample", "truncated's sample")
    number, slope = traced(Z, jnp.asarray([0.5, -0.25]))
    assert np.all(np.isfinite([number, *slope]))


@parametrize("distribution", [Normal, DiscretizedGaussian, TruncatedNormal])
def test_the_scale_is_a_keyword(distribution):
    # A standard deviation in one, a variance in the other: by position, one would pass for the other.
    with pytest.raises(TypeError, match="positional argument"):
        distribution(*[jnp.ones(2)] * (4 if distribution is TruncatedNormal else 3 - (distribution is Normal)))


@parametrize(
    "make",
    [
        lambda m, s: Normal(m, var=s),
        lambda m, s: DiscretizedGaussian(m, scale=s, levels=17),
        lambda m, s: TruncatedNormal(0.0 * m, levels=17, mean=m, scale=s),
    ],
)
def test_distributions_are_pytrees(make):
    means, scales, x = np.float32([[0.1, 0.2], [-0.3, 0.4]]), np.float32([0.1, 0.7]), np.zeros((2, 2), np.float32)
    distributions = jax.jit(jax.vmap(make))(means, scales)  # any number of levels is static
    together = jax.jit(jax.vmap(lambda distribution, x: distribution.log_prob(x)))(distributions, x)
    log_prob = jax.jit(lambda mean, scale, x: make(mean, scale).log_prob(x))
    np.testing.assert_allclose(together, [log_prob(*row) for row in zip(means, scales, x, strict=True)], rtol=1e-6)


def test_normalize_takes_integers_only():
    for bad, error in (
        (np.linspace(0.0, 255.0, 5), TypeError),
        (np.float32([0.0, 1.0]), TypeError),
        (np.array([0, 256]), ValueError),
        (np.array([-1, 3]), ValueError),
    ):
        with pytest.raises(error, match=r"0\.\.255"):
            normalize(bad, 256)
    traced = jax.jit(lambda i: normalize(i, 17))(jnp.asarray([-1, 0, 16, 17]))
    np.testing.assert_array_equal(traced, [np.nan, -1.0, 1.0, np.nan])
    assert np.array_equal(normalize(np.array([False, True]), 2), [-1.0, 1.0])


def test_decoders_compute_in_float32_where_their_parameters_have_fewer_digits():
    x, z = normalize(np.array([100, 128]), 256), jnp.asarray([-0.2, 0.01], jnp.bfloat16)
    scale, level = jnp.asarray(0.05, jnp.bfloat16), level_from_log_snr(jnp.float32(6.0))

    def log_probs(z, scale, x):
        wide = z[:, None, None]
        return (
            DiscretizedGaussian(z, scale=scale, levels=256).log_prob(x),
            Categorical(z, level, 256).log_prob(x),
            DiscretizedLogisticMixture(wide[:, 0] * 0.0, wide, -3.0 * jnp.ones_like(wide), 256).log_prob(x[:, None]),
        )

    @partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def narrow_and_wide(z, scale, x):
        return log_probs(z, scale, x.astype(z.dtype)), log_probs(z.astype(x.dtype), scale.astype(x.dtype), x)

    ours, expected = narrow_and_wide(z, scale, x)
    assert all(number.dtype == jnp.float32 for number in ours)
    assert list(map(float, ours)) == list(map(float, expected))


def test_samples_of_distributions_with_nan_parameters_are_nan():
    level = level_from_log_snr(jnp.float32(0.0))

    @jax.jit
    def samples(bad, key):
        distributions = (
            DiscretizedGaussian(bad, scale=jnp.float32(0.1), levels=17),
            Categorical(bad, level, 17),
            Bernoulli(bad),
            DiscretizedLogisticMixture(jnp.zeros((2, 1)), bad[:, None, None], jnp.zeros((2, 1, 1)), 17),
        )
        return [distribution.sample(key).ravel() for distribution in distributions]

    for sample in samples(jnp.asarray([0.0, jnp.nan]), jax.random.key(0)):
        assert np.array_equal(np.isnan(sample), [False, True])


@parametrize("levels", LEVELS)
def test_discretized_masses_sum_to_one(levels):
    means = np.float32([-3.0, -1.0, -0.999, 0.0, 0.37, 1.0, 1.7])
    means, scales = map(np.ravel, np.meshgrid(means, np.float32([1e-3, 0.01, 0.1, 1.0, 30.0])))
    masses = np.asarray(_discretized_masses(means, scales, levels), np.float64)
    assert masses.shape == (35, levels)
    np.testing.assert_allclose(np.exp(masses).sum(-1), 1.0, atol=1e-6)
    # far outside, nearly all mass is in the nearest edge; a closed bin would have almost no mass
    assert np.exp(masses)[(means == -3.0) & (scales == np.float32(0.1)), 0] == pytest.approx(1.0, abs=1e-6)
    mirrored = np.asarray(_discretized_masses(-means, scales, levels), np.float64)
    np.testing.assert_allclose(mirrored[:, ::-1], masses, rtol=2e-6, atol=1e-9)


@parametrize(
    ("levels", "means", "scales"),
    [(17, (0.2, -1.2, 0.0), (0.1, 0.05, 2.0)), (256, (0.9, 0.5, 0.0), (0.004, 0.003, 0.1))],
)
def test_discretized_mass_is_the_integral_over_the_bin(levels, means, scales):
    with jax.enable_x64(True), mpmath.workdps(40):
        masses = np.asarray(_discretized_masses(np.array(means), np.array(scales), levels))
        half = mpmath.mpf(1) / (levels - 1)
        for ours, m, s in zip(masses, map(mpmath.mpf, means), map(mpmath.mpf, scales), strict=True):
            for i in np.unique(np.linspace(0, levels - 1, 9).astype(int)):
                value = -1 + 2 * mpmath.mpf(int(i)) / (levels - 1)
                low = -mpmath.inf if i == 0 else (value - half - m) / s  # the edge bins are open
                high = mpmath.inf if i == levels - 1 else (value + half - m) / s
                # integrated on the side where it does not cancel
                flip = low > 0
                a, b = (-high, -low) if flip else (low, high)
                mass = mpmath.ncdf(b) - mpmath.ncdf(a)
                assert ours[i] == pytest.approx(float(mpmath.log(mass)), rel=1e-9), (m, s, i)


@pytest.mark.slow
def test_discretized_log_prob_picks_and_sums_the_masses():
    levels = 17
    mean, scale = jnp.asarray([[0.1, -0.5], [0.9, 2.0]]), jnp.asarray([[0.3, 0.1], [0.2, 0.5]])
    index = jnp.asarray([[0, levels - 1], [1, levels // 2]])
    distribution = DiscretizedGaussian(mean, scale=scale, levels=levels)
    masses = np.take_along_axis(np.asarray(distribution.log_masses()), np.asarray(index)[..., None], -1)
    assert float(distribution.log_prob(normalize(index, levels))) == pytest.approx(masses.sum(), rel=1e-6)


def test_discretized_gradient_does_not_vanish_in_the_tails():
    with jax.enable_x64(True), mpmath.workdps(60):
        scale, distances = 0.1, np.array([2.0, 10.0, 40.0, 100.0])
        means = -0.5 + distances * scale
        values, (slopes, by_scale) = _discretized_slopes(means, scale, np.full(4, -0.5))

        def expected(mean, scale):
            a, b = ((mpmath.mpf(-0.5) + k * mpmath.mpf(1) / 16 - mean) / scale for k in (-1, 1))
            return mpmath.log(mpmath.ncdf(b) - mpmath.ncdf(a))

        h, s = mpmath.mpf(10) ** -25, mpmath.mpf(scale)
        for m, value, slope, along in zip(map(mpmath.mpf, means), values, slopes, by_scale, strict=True):
            assert float(value) == pytest.approx(float(expected(m, s)), rel=1e-9)
            numeric = (expected(m + h, s) - expected(m - h, s)) / (2 * h)
            assert float(slope) == pytest.approx(float(numeric), rel=1e-8)
            assert abs(float(slope)) > 1.0
            numeric = (expected(m, s + h) - expected(m, s - h)) / (2 * h)
            assert float(along) == pytest.approx(float(numeric), rel=1e-8)


def test_discretized_gradient_of_the_open_edge():
    # P(edge) = Phi(u): d/dmean log Phi is the inverse Mills ratio, from scipy, in the far tail too
    with jax.enable_x64(True):
        distances = np.array([0.5, 5.0, 30.0, -1.0])
        _, (slopes, _) = _discretized_slopes(-1 + 1 / 16 + distances * 0.1, 0.1, np.full(4, -1.0))
        expected = -np.exp(stats.norm.logpdf(distances) - stats.norm.logcdf(-distances)) / 0.1
        np.testing.assert_allclose(slopes, expected, rtol=1e-9)


@parametrize("decoder", ["discretized", "categorical"])
def test_samples_follow_the_masses(decoder):
    @jax.jit
    def samples_and_masses(center, key):
        if decoder == "discretized":
            distribution = DiscretizedGaussian(center, scale=jnp.float32(0.6), levels=5)
        else:
            distribution = Categorical(center, level_from_log_snr(jnp.float32(0.5)), 5)
        return distribution.sample(key), distribution.log_masses()

    x, log_masses = samples_and_masses(np.tile(np.float32([-0.9, 0.2]), (40_000, 1)), jax.random.key(0))
    onehot = np.abs(np.asarray(x)[..., None] - np.linspace(-1.0, 1.0, 5)) < 1e-6
    assert np.all(onehot.sum(-1) == 1)  # on the grid
    assert_mean(onehot, np.exp(log_masses[0]))


@parametrize("levels", LEVELS)
def test_categorical_masses_sum_to_one(levels):
    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def log_masses(z, log_snr):
        return Categorical(z, level_from_log_snr(log_snr), levels).log_masses()

    ours = np.asarray(log_masses(np.float32([-1.3, -0.5, 0.01, 0.7]), np.float32([-8.0, 0.0, 6.0, 13.3])), np.float64)
    np.testing.assert_allclose(np.exp(ours).sum(-1), 1.0, atol=1e-6)


def test_categorical_is_bayes_rule():
    with jax.enable_x64(True):
        level, levels, z = level_from_log_snr(jnp.asarray(1.5)), 17, np.array([-0.8, 0.05, 1.1])
        grid = np.linspace(-1, 1, levels)
        joint = stats.norm(float(level.alpha) * grid, float(level.sigma)).pdf(z[:, None]) / levels
        bayes = joint / joint.sum(-1, keepdims=True)

        logits = np.random.RandomState(0).randn(3, levels)

        @jax.jit
        def evaluate(z, level, logits, x):
            distribution = Categorical(z, level, levels)
            weighted = distribution._replace(logits=logits)
            return distribution.log_masses(), distribution.log_prob(x), distribution.mean(), weighted.log_masses()

        log_masses, log_prob, mean, weighted = evaluate(z, level, logits, grid[[3, 8, 16]])
        np.testing.assert_allclose(np.exp(log_masses), bayes, rtol=1e-11)
        np.testing.assert_allclose(mean, bayes @ grid, rtol=1e-11)
        prior = np.exp(logits) * bayes  # of every value
        np.testing.assert_allclose(np.exp(weighted), prior / prior.sum(-1, keepdims=True), rtol=1e-11)
        assert float(log_prob) == pytest.approx(np.log(bayes[0, 3] * bayes[1, 8] * bayes[2, 16]), rel=1e-12)


def test_categorical_gradient_does_not_vanish_in_the_tails():
    # far from z the log-odds of a value are a parabola: their slope in z is alpha (x - x') / sigma^2
    with jax.enable_x64(True):
        level = level_from_log_snr(jnp.asarray(10.0))

        @jax.jit
        @jax.grad
        def slope(z, level):
            return Categorical(z[None], level, 17).log_prob(jnp.asarray([-1.0]))

        expected = float(-2.0 * level.alpha / level.sigma**2)
        assert float(slope(level.alpha, level)) == pytest.approx(expected, rel=1e-6)


def test_distance_from_a_value_keeps_its_digits_in_float32():
    # A narrow distribution next to a pixel's value, evaluated at the next bin: the log-mass is a squared distance.
    # And a far narrower one at an edge of the bin, where the distance from the edge is small.
    random = np.random.RandomState(0)
    index = random.randint(1, 254, 200)
    scale = np.repeat(np.float32([3e-4, 3e-6]), 100)
    mean = np.r_[2.0 * index[:100] / 255 - 1 + 0.002 * random.randn(100), (2.0 * index[100:] + 1) / 255 - 1]
    mean = (mean + 3e-6 * random.randn(200)).astype(np.float32)

    @jax.jit
    def log_mass(mean, scale):
        return DiscretizedGaussian(mean, scale=scale, levels=256)._log_mass(jnp.asarray(index + 1))

    with jax.enable_x64(True):
        expected = log_mass(mean.astype(np.float64), scale.astype(np.float64))
    np.testing.assert_allclose(log_mass(mean, scale), expected, rtol=2e-6, atol=1e-6)
    # Operation by operation, since a compiler that fuses a product with a sum hides what a plain product loses.
    center = 2 * index - 255
    with jax.disable_jit():
        apart = _from_integer(jnp.asarray(mean), jnp.asarray(center), 256)
    np.testing.assert_allclose(apart, 255 * mean.astype(np.float64) - center, rtol=2e-7)


def test_gradients_of_a_wide_distribution_are_those_of_the_density():
    # bins far narrower than the distribution: d/dscale log N, independent of the branches not taken
    x, mean = np.float32([-0.5, 0.25]), np.float32([0.3, -0.4])
    apart = np.asarray(x, np.float64) - mean
    for scale in (1e2, 1e5, 1e8):
        _, (by_mean, by_scale) = _discretized_slopes(mean, np.float32(scale), x)
        np.testing.assert_allclose(by_mean, apart / scale**2, rtol=1e-3)
        np.testing.assert_allclose(by_scale, apart**2 / scale**3 - 1 / scale, rtol=1e-5)


def test_bernoulli_against_fifty_digits():
    logits, signs = np.float32([-80.0, -11.0, -1.3, 0.0, 0.002, 0.9, 17.0, 60.0]), np.float32([-1.0, 1.0])

    @jax.jit
    def evaluate(logits):
        log_prob = jax.value_and_grad(lambda logit, sign: Bernoulli(logit[None]).log_prob(sign[None]))
        each = jax.vmap(jax.vmap(log_prob, (None, 0)), (0, None))
        return *each(logits, signs), Bernoulli(logits).log_masses(), Bernoulli(logits).mean()

    ours, slopes, masses, mean = evaluate(logits)
    with mpmath.workdps(50):
        expected = [[float(-mpmath.log(1 + mpmath.exp(-sign * float(logit)))) for sign in signs] for logit in logits]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(masses, expected, rtol=1e-6)
    np.testing.assert_allclose(mean, np.exp(expected) @ signs, rtol=1e-5)
    # d/dlogit log sigmoid(x logit) = x sigmoid(-x logit), in both tails
    np.testing.assert_allclose(slopes, signs * np.exp(np.asarray(expected)[:, ::-1]), rtol=2e-6)


def test_bernoulli_is_the_other_decoders_at_two_levels():
    with jax.enable_x64(True):

        @jax.jit
        def log_probs(z, level, x):
            mixture = jnp.zeros((3, 1)), z[:, None, None], jnp.full((3, 1, 1), np.log(0.4))
            return (
                Bernoulli(2.0 * level.alpha * z / level.sigma**2).log_prob(x),
                Categorical(z, level, 2).log_prob(x),
                Bernoulli(z / 0.4).log_prob(x),
                DiscretizedLogisticMixture(*mixture, 2).log_prob(x[:, None]),
            )

        level = level_from_log_snr(jnp.asarray(0.7))
        by_z, categorical, scaled, logistic = log_probs(np.array([-0.8, 0.3, 1.4]), level, np.array([1.0, 1.0, -1.0]))
        assert float(by_z) == pytest.approx(float(categorical), rel=1e-12)
        assert float(scaled) == pytest.approx(float(logistic), rel=1e-12)


def test_bernoulli_takes_binary_data_only():
    logits = jnp.asarray([0.3, -0.2])
    traced = jax.jit(jax.value_and_grad(lambda logits, x: Bernoulli(logits).log_prob(x)))  # x cannot be checked
    for value in (0.0, 0.5, 2.0, float("nan")):
        x = jnp.asarray([1.0, value])
        with pytest.raises(ValueError, match=r"-1 and 1.*normalize\(values, 2\)"):
            jax.eval_shape(lambda logits, x=x: Bernoulli(logits).log_prob(x), logits)  # x is concrete
        number, slope = traced(logits, x)
        assert np.isnan(number)
        assert np.isnan(slope[1])
    binary = normalize(np.array([1, 0]), 2)
    concrete = jax.jit(lambda logits: Bernoulli(logits).log_prob(binary))(logits)
    assert float(concrete) == pytest.approx(float(traced(logits, binary)[0]), rel=1e-6)


def test_bernoulli_samples_have_its_mean():
    @jax.jit
    def samples_and_mean(logits, key):
        return Bernoulli(logits).sample(key), Bernoulli(logits).mean()

    x, mean = samples_and_mean(np.tile(np.float32([-2.0, 0.4]), (20_000, 1)), jax.random.key(0))
    assert np.all(np.abs(x) == 1.0)
    assert_mean(x, mean[0], resolution=0.01)


def _mixture_parameters(seed, channels, components, pixels=()):
    """logits, means, log-scales from e^-8 to e^3, coefficients."""
    random = np.random.RandomState(seed)
    pairs = channels * (channels - 1) // 2
    return (
        random.randn(*pixels, components),
        random.uniform(-1.5, 1.5, (*pixels, channels, components)),
        random.uniform(-8.0, 3.0, (*pixels, channels, components)),
        np.tanh(random.randn(*pixels, pairs, components)),
    )


def _mixture(logits, means, log_scales, coefficients, levels):
    logits, means, log_scales, coefficients = map(jnp.asarray, (logits, means, log_scales, coefficients))
    return DiscretizedLogisticMixture(logits, means, log_scales, levels, coefficients)


def _sigmoid(x):
    return mpmath.mpf(int(x > 0)) if mpmath.isinf(x) else 1 / (1 + mpmath.exp(-x))


def _exact_mixture(logits, means, log_scales, coefficients, levels, index):
    """log P of one pixel by differences of logistic distribution functions, in mpmath."""

    def number(array):  # a NumPy scalar's value, not its shortest decimal
        return np.vectorize(lambda v: v if isinstance(v, mpmath.mpf) else mpmath.mpf(float(v)), otypes=[object])(array)

    logits, means, log_scales = number(logits), number(means), number(log_scales)
    coefficients = number(coefficients) if np.size(coefficients) else coefficients
    x, half = [-1 + 2 * mpmath.mpf(int(i)) / (levels - 1) for i in index], mpmath.mpf(1) / (levels - 1)
    total = mpmath.mpf(0)
    for k in range(len(logits)):
        mass, pair = mpmath.exp(logits[k]), 0
        for c in range(len(x)):
            mean = means[c, k]
            for j in range(c):
                mean, pair = mean + coefficients[pair, k] * x[j], pair + 1
            low, high = ((x[c] + sign * half - mean) * mpmath.exp(-log_scales[c, k]) for sign in (-1, 1))
            low = -mpmath.inf if index[c] == 0 else low  # the edge bins are open
            high = mpmath.inf if index[c] == levels - 1 else high
            low, high = (-high, -low) if low > 0 else (low, high)  # on the side where it does not cancel
            mass *= _sigmoid(high) - _sigmoid(low)
        total += mass
    return mpmath.log(total) - mpmath.log(sum(mpmath.exp(logit) for logit in logits))


@parametrize(("channels", "levels"), [(1, 256), (2, 17), (4, 3)])
def test_mixture_masses_sum_to_one(channels, levels):
    x = normalize(np.array(list(itertools.product(range(levels), repeat=channels))), levels)
    cases = [_mixture_parameters(seed, channels, 3) for seed in range(5)]
    parameters = [np.stack(arrays).astype(np.float32) for arrays in zip(*cases, strict=True)]

    @jax.jit
    @jax.vmap
    def log_probs(*parameters):
        return jax.vmap(_mixture(*parameters, levels).log_prob)(x)

    np.testing.assert_allclose(np.exp(np.asarray(log_probs(*parameters), np.float64)).sum(-1), 1.0, atol=1e-6)


def test_mixture_without_coefficients_has_independent_channels():
    logits, means, log_scales, coefficients = _mixture_parameters(0, 3, 2)
    x = normalize(np.array([3, 0, 16]), 17)

    @jax.jit
    def log_probs(logits, means, log_scales):
        without = DiscretizedLogisticMixture(logits, means, log_scales, 17)
        return without.log_prob(x), without._replace(coefficients=jnp.zeros((3, 2))).log_prob(x)

    without, zero = log_probs(*(array.astype(np.float32) for array in (logits, means, log_scales)))
    assert float(without) == float(zero)
    with pytest.raises(ValueError, match=r"coefficients.* 1 .*3 channels.* 3"):
        _mixture(logits, means, log_scales, coefficients[:1], 17)._coefficients()


def test_mixture_of_one_is_a_difference_of_distribution_functions():
    with jax.enable_x64(True):
        mean, scale, levels = 0.3, 0.35, 9
        edges = np.concatenate([[-np.inf], np.linspace(-1, 1, levels)[:-1] + 1 / (levels - 1), [np.inf]])
        expected = np.diff(stats.logistic(mean, scale).cdf(edges))
        distribution = _mixture(
            np.zeros(1), np.full((1, 1), mean), np.full((1, 1), np.log(scale)), np.zeros((0, 1)), levels
        )
        ours = jax.jit(jax.vmap(distribution.log_prob))(np.linspace(-1, 1, levels)[:, None])
        np.testing.assert_allclose(np.exp(ours), expected, rtol=1e-12)


def test_mixture_against_fifty_digits_in_float32():
    levels, random = 256, np.random.RandomState(1)
    parameters = [a.astype(np.float32) for a in _mixture_parameters(0, 3, 2, (60,))]
    parameters[1][:10] *= 40.0  # far outside
    index = random.randint(0, levels, (60, 3))
    index[:20] = random.choice([0, levels - 1], (20, 3))
    for c in range(3):  # half of them with means that all but cancel, near the value: there digits are lost
        regression = sum(
            parameters[3][30:, c * (c - 1) // 2 + j] * (2 * index[30:, j, None] / 255 - 1) for j in range(c)
        )
        near = 2 * index[30:, c, None] / 255 - 1 - regression + 0.01 * random.randn(30, 2)
        parameters[1][30:, c] = near.astype(np.float32)
    log_probs = jax.jit(jax.vmap(lambda x, *p: _mixture(*p, levels).log_prob(x)))
    ours = log_probs(normalize(index, levels), *parameters)
    with mpmath.workdps(50):
        expected = [float(_exact_mixture(*(a[i] for a in parameters), levels, index[i])) for i in range(60)]
    assert min(expected) < -1e4
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_mixture_gradients_against_fifty_digits():
    levels, index = 17, [5, 16, 0]
    parameters = [a.astype(np.float32) for a in _mixture_parameters(3, 3, 2)]
    parameters[1][1, 0] = 30.0  # in the far tail the other component dominates, and the gradients do not vanish
    parameters[2] = np.clip(parameters[2], -3.0, 1.0)
    x = normalize(np.array(index), levels)
    slopes = jax.jit(jax.grad(lambda p: _mixture(*p, levels).log_prob(x)))(parameters)
    with mpmath.workdps(50):
        h = mpmath.mpf(10) ** -20

        def expected(which, place, step):
            moved = [array.astype(object) for array in parameters]
            moved[which][place] = mpmath.mpf(float(moved[which][place])) + step
            return _exact_mixture(*moved, levels, index)

        for which, slope in enumerate(slopes):
            for place in np.ndindex(slope.shape):
                numeric = float((expected(which, place, h) - expected(which, place, -h)) / (2 * h))
                assert float(slope[place]) == pytest.approx(numeric, rel=1e-5, abs=1e-6), (which, place)


def test_mixture_is_finite_with_its_gradients():
    x = normalize(np.array([0, 100, 255]), 256)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def log_prob(means, log_scales, coefficients):
        return _mixture(jnp.zeros(1), means, log_scales, coefficients, 256).log_prob(x)

    means, log_scales = np.repeat(np.float32([-30.0, 0.1, 30.0]), 4), np.tile(np.float32([-70.0, -8.0, 0.0, 70.0]), 3)
    parameters = (np.tile(array[:, None, None], (1, 3, 1)) for array in (means, log_scales))
    value, slopes = log_prob(*parameters, np.full((3, 1), 0.1, np.float32))
    assert all(np.all(np.isfinite(number)) for number in (value, *slopes))
    # Moving the distribution towards the middle value improves it: the gradient has this sign at any distance.
    improves = np.sign(slopes[0][:, 1, 0]) == np.sign(x[1] - means - 0.1 * x[0])
    assert np.all(improves | (log_scales == 70.0))


def test_each_pixel_of_an_image_samples_its_own_component():
    """2 x 3 pixels and two components, one at each end of the range, of which a pixel has one alone."""
    which = np.array([[0, 1, 1], [1, 0, 1]])
    logits = jnp.asarray(np.stack([-1e4 * which, -1e4 * (1 - which)], -1), jnp.float32)
    means = jnp.broadcast_to(jnp.float32([-1.0, 1.0]), (2, 3, 1, 2))
    sample = DiscretizedLogisticMixture(logits, means, jnp.full((2, 3, 1, 2), -9.0), 17).sample(jax.random.key(0))
    np.testing.assert_array_equal(sample[..., 0], 2 * which - 1)


def test_mixture_samples_follow_its_masses():
    levels = 3
    parameters = (
        np.float32([0.4, -0.3]),
        np.float32([[-0.8, 0.5], [0.2, -0.1]]),
        np.log(np.float32([[0.3, 0.2], [0.25, 0.4]])),
        np.float32([[0.9, -0.7]]),
    )
    grid = normalize(np.array(list(itertools.product(range(levels), repeat=2))), levels)

    @jax.jit
    def masses_and_samples(*parameters):
        log_prob = _mixture(*parameters, levels).log_prob
        many = (jnp.broadcast_to(array, (40_000, *array.shape)) for array in parameters)
        return jnp.exp(jax.vmap(log_prob)(grid)), _mixture(*many, levels).sample(jax.random.key(0))

    masses, x = map(np.asarray, masses_and_samples(*parameters))
    onehot = np.all(x[:, None, :] == np.asarray(grid), axis=-1)
    assert np.all(onehot.sum(-1) == 1)  # on the grid
    assert_mean(onehot, masses, resolution=0.003)


@pytest.mark.slow
def test_mixture_of_an_image_is_the_sum_of_its_pixels():
    parameters = _mixture_parameters(5, 3, 4, (2, 3))
    x = _mixture(*parameters, 256).sample(jax.random.key(0))
    assert x.shape == (2, 3, 3)
    whole = _mixture(*parameters, 256).log_prob(x)
    pixels = jax.vmap(jax.vmap(lambda x, *p: _mixture(*p, 256).log_prob(x)))(x, *parameters)
    assert float(whole) == pytest.approx(float(pixels.sum()), rel=1e-6)
