"""Decoders: masses against numerical integration and Bayes' rule, edges, tails, samples."""

import itertools

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
    denormalize,
    normalize,
    on_grid,
)
from vdm_jax.noise_levels import level_from_log_snr

LEVELS = [2, 17, 256]
SCALES = [1e-3, 0.01, 0.1, 1.0, 30.0]
MEANS = [-3.0, -1.0, -0.999, 0.0, 0.37, 1.0, 1.7]

parametrize = pytest.mark.parametrize


def _discretized(mean, scale, levels):
    return DiscretizedGaussian(jnp.asarray(mean), scale=jnp.asarray(scale), levels=levels)


@parametrize("levels", LEVELS)
def test_normalize_and_denormalize_are_inverse(levels):
    values = jnp.arange(levels)
    unit = normalize(values, levels)
    assert float(unit[0]) == -1.0
    assert float(unit[-1]) == pytest.approx(1.0, abs=1e-6)
    assert np.array_equal(denormalize(unit, levels), values)
    nudge = 0.49 * 2 / (levels - 1)  # points in a bin belong to its value, points outside to the nearest end
    assert np.array_equal(denormalize(unit + nudge, levels), values)
    assert np.array_equal(denormalize(unit - nudge, levels), values)
    assert np.array_equal(denormalize(jnp.asarray([-7.0, 7.0]), levels), [0, levels - 1])


@parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@parametrize("levels", [2, 3, 17, 100, 256, 65536])
def test_values_are_on_the_grid_however_they_are_rounded(levels, dtype):
    if float(jnp.finfo(dtype).eps) * (levels - 1) > 2.0:
        pytest.skip("neighboring values are the same number in this dtype")
    index = np.arange(levels)
    makers = (
        lambda i: np.asarray(normalize(jnp.asarray(i), levels)),
        lambda i: 2.0 * (i / (levels - 1)) - 1.0,
        lambda i: i.astype(np.float32) / np.float32((levels - 1) / 2) - np.float32(1.0),
        lambda i: np.linspace(-1.0, 1.0, levels),
    )
    with jax.enable_x64(dtype == jnp.float64):
        for make in makers:
            x = jnp.asarray(make(index), dtype)
            assert np.array_equal(on_grid(x, levels), np.ones(levels))
            assert np.array_equal(denormalize(x, levels), index)


@parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_data_in_another_range_are_off_the_grid(dtype):
    index = np.arange(256)
    with jax.enable_x64(dtype == jnp.float64):
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
        jnp.zeros((2, 3)), p[:, None, None] * jnp.ones((2, 1, 3)), jnp.zeros((2, 1, 3)), 17
    ).log_prob(x[:, None]),
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
            log_prob(Z, x)
        number, slope = traced(Z, x)
        assert np.isnan(number)
        assert np.isnan(slope[1]) or decoder in ("uniform", "uniform's sample", "truncated's sample")
    number, slope = traced(Z, x.at[1].set(-0.25))
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
    means, scales, x = jnp.asarray([[0.1, 0.2], [-0.3, 0.4]]), jnp.asarray([0.1, 0.7]), jnp.zeros((2, 2))
    distributions = jax.jit(lambda distributions: distributions)(
        jax.vmap(make)(means, scales)
    )  # any number of levels is static
    together = jax.vmap(lambda distribution, x: distribution.log_prob(x))(distributions, x)
    each = [make(*row).log_prob(x[0]) for row in zip(means, scales, strict=True)]
    np.testing.assert_allclose(together, each, rtol=1e-6)


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
    x, z = normalize(jnp.asarray([100, 128]), 256), jnp.asarray([-0.2, 0.01], jnp.bfloat16)
    level = level_from_log_snr(jnp.float32(6.0))
    mixture = DiscretizedLogisticMixture(z[:, None] * 0.0, z[:, None, None], z[:, None, None] - 3.0, 256)
    for distribution in (
        DiscretizedGaussian(z, scale=jnp.asarray(0.05, jnp.bfloat16), levels=256),
        Categorical(z, level, 256),
        mixture,
    ):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if hasattr(leaf, "astype") else leaf, distribution)
        given = x[:, None] if isinstance(distribution, DiscretizedLogisticMixture) else x
        ours = distribution.log_prob(given.astype(jnp.bfloat16))
        assert ours.dtype == jnp.float32
        assert float(ours) == float(wide.log_prob(given))


def test_samples_of_distributions_with_nan_parameters_are_nan():
    bad, key, level = jnp.asarray([0.0, jnp.nan]), jax.random.key(0), level_from_log_snr(jnp.float32(0.0))
    for distribution in (
        DiscretizedGaussian(bad, scale=jnp.float32(0.1), levels=17),
        Categorical(bad, level, 17),
        Bernoulli(bad),
        DiscretizedLogisticMixture(jnp.zeros((2, 1)), bad[:, None, None], jnp.zeros((2, 1, 1)), 17),
    ):
        assert np.array_equal(np.isnan(distribution.sample(key).ravel()), [False, True])


@parametrize("levels", LEVELS)
@parametrize("scale", SCALES)
def test_discretized_masses_sum_to_one(levels, scale):
    means = jnp.asarray(MEANS)
    log_masses = jax.jit(lambda m, s: DiscretizedGaussian(m, scale=s, levels=levels).log_masses())(
        means, jnp.asarray(scale)
    )
    assert log_masses.shape == (len(MEANS), levels)
    np.testing.assert_allclose(np.exp(np.asarray(log_masses, np.float64)).sum(-1), 1.0, atol=1e-6)


@parametrize(
    "mean,scale,levels", [(0.2, 0.1, 17), (-1.2, 0.05, 17), (0.9, 0.004, 256), (0.0, 2.0, 8), (0.5, 0.003, 256)]
)
def test_discretized_mass_is_the_integral_over_the_bin(mean, scale, levels):
    with jax.enable_x64(True), mpmath.workdps(40):
        ours = np.asarray(_discretized([mean], scale, levels).log_masses())[0]
        half, m, s = mpmath.mpf(1) / (levels - 1), mpmath.mpf(mean), mpmath.mpf(scale)
        for i in np.unique(np.linspace(0, levels - 1, 9).astype(int)):
            value = -1 + 2 * mpmath.mpf(int(i)) / (levels - 1)
            low = -mpmath.inf if i == 0 else (value - half - m) / s  # the edge bins are open
            high = mpmath.inf if i == levels - 1 else (value + half - m) / s
            # integrated on the side where it does not cancel
            flip = low > 0
            a, b = (-high, -low) if flip else (low, high)
            mass = mpmath.ncdf(b) - mpmath.ncdf(a)
            assert ours[i] == pytest.approx(float(mpmath.log(mass)), rel=1e-9), i


def test_discretized_edge_bins_are_open():
    # far outside, all mass is in the nearest edge; a closed bin would have almost no mass
    for mean, edge in [(-4.0, 0), (4.0, -1)]:
        masses = np.exp(_discretized([mean], 0.1, 17).log_masses()[0])
        assert masses[edge] == pytest.approx(1.0, abs=1e-6)


def test_discretized_is_symmetric():
    masses = _discretized([0.3], 0.2, 17).log_masses()[0]
    mirrored = _discretized([-0.3], 0.2, 17).log_masses()[0]
    np.testing.assert_allclose(masses, mirrored[::-1], rtol=2e-6)


def test_discretized_tends_to_the_density_times_the_bin():
    with jax.enable_x64(True):
        x = normalize(jnp.asarray([100, 128]), 256)
        mean, scale = jnp.asarray([0.0, 0.1]), jnp.asarray(0.7)
        density = Normal(mean, var=scale**2).log_prob(x) + 2 * np.log(2 / 255)
        assert float(DiscretizedGaussian(mean, scale=scale, levels=256).log_prob(x)) == pytest.approx(
            float(density), rel=1e-5
        )


@pytest.mark.slow
def test_discretized_log_prob_picks_and_sums_the_masses():
    levels = 17
    mean, scale = jnp.asarray([[0.1, -0.5], [0.9, 2.0]]), jnp.asarray([[0.3, 0.1], [0.2, 0.5]])
    index = jnp.asarray([[0, levels - 1], [1, levels // 2]])
    distribution = DiscretizedGaussian(mean, scale=scale, levels=levels)
    masses = np.take_along_axis(np.asarray(distribution.log_masses()), np.asarray(index)[..., None], -1)
    assert float(distribution.log_prob(normalize(index, levels))) == pytest.approx(masses.sum(), rel=1e-6)


@parametrize("distance", [2.0, *(pytest.param(far, marks=pytest.mark.slow) for far in (10.0, 40.0)), 100.0])
def test_discretized_gradient_does_not_vanish_in_the_tails(distance):
    with jax.enable_x64(True), mpmath.workdps(60):
        scale, levels = 0.1, 17
        x, mean = normalize(jnp.asarray(4), levels), -0.5 + distance * scale

        def log_prob(mean):
            return DiscretizedGaussian(jnp.reshape(mean, (1,)), scale=jnp.asarray(scale), levels=levels).log_prob(
                jnp.reshape(x, (1,))
            )

        value, slope = jax.value_and_grad(log_prob)(jnp.asarray(mean))

        def expected(mean):
            a, b = ((mpmath.mpf(-0.5) + k * mpmath.mpf(1) / 16 - mean) / mpmath.mpf(scale) for k in (-1, 1))
            return mpmath.log(mpmath.ncdf(b) - mpmath.ncdf(a))

        assert float(value) == pytest.approx(float(expected(mpmath.mpf(mean))), rel=1e-9)
        h = mpmath.mpf(10) ** -25
        numeric = (expected(mpmath.mpf(mean) + h) - expected(mpmath.mpf(mean) - h)) / (2 * h)
        assert float(slope) == pytest.approx(float(numeric), rel=1e-8)
        assert abs(float(slope)) > 1.0


def test_discretized_gradient_of_the_open_edge():
    # P(edge) = Phi(u): d/dmean log Phi is the inverse Mills ratio, from scipy, in the far tail too
    with jax.enable_x64(True):
        for distance in (0.5, 5.0, 30.0):
            mean = jnp.asarray([-1 + 1 / 16 + distance * 0.1])

            def log_prob(mean):
                return DiscretizedGaussian(mean, scale=jnp.asarray(0.1), levels=17).log_prob(jnp.asarray([-1.0]))

            expected = -np.exp(stats.norm.logpdf(distance) - stats.norm.logcdf(-distance)) / 0.1
            assert float(jax.grad(log_prob)(mean)[0]) == pytest.approx(expected, rel=1e-9)


@parametrize("decoder", ["discretized", "categorical"])
def test_samples_follow_the_masses(decoder):
    center = jnp.asarray([-0.9, 0.2])
    if decoder == "discretized":
        distribution = DiscretizedGaussian(center, scale=jnp.asarray(0.6), levels=5)
    else:
        distribution = Categorical(center, level_from_log_snr(jnp.asarray(0.5)), 5)
    x = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(0), 40_000))
    onehot = np.asarray(jax.nn.one_hot(denormalize(x, 5), 5))
    assert np.allclose(x, normalize(denormalize(x, 5), 5), atol=1e-6)  # on the grid
    assert_mean(onehot, np.exp(distribution.log_masses()))


@parametrize("levels", LEVELS)
@parametrize("log_snr", [-8.0, 0.0, 6.0, 13.3])
def test_categorical_masses_sum_to_one(levels, log_snr):
    z = jnp.asarray([-1.3, -0.5, 0.01, 0.7])
    level = level_from_log_snr(jnp.asarray(log_snr))
    log_masses = jax.jit(lambda z, level: Categorical(z, level, levels).log_masses())(z, level)
    np.testing.assert_allclose(np.exp(np.asarray(log_masses, np.float64)).sum(-1), 1.0, atol=1e-6)


def test_categorical_is_bayes_rule_under_a_uniform_prior():
    with jax.enable_x64(True):
        level, levels, z = level_from_log_snr(jnp.asarray(1.5)), 17, np.array([-0.8, 0.05, 1.1])
        grid = np.linspace(-1, 1, levels)
        joint = stats.norm(float(level.alpha) * grid, float(level.sigma)).pdf(z[:, None]) / levels
        bayes = joint / joint.sum(-1, keepdims=True)
        distribution = Categorical(jnp.asarray(z), level, levels)
        np.testing.assert_allclose(np.exp(distribution.log_masses()), bayes, rtol=1e-11)
        x = jnp.asarray(grid[[3, 8, 16]])
        expected = np.log(bayes[0, 3] * bayes[1, 8] * bayes[2, 16])
        assert float(distribution.log_prob(x)) == pytest.approx(expected, rel=1e-12)


def test_categorical_gradient_does_not_vanish_in_the_tails():
    # far from z the log-odds of a value are a parabola: their slope in z is alpha (x - x') / sigma^2
    with jax.enable_x64(True):
        level = level_from_log_snr(jnp.asarray(10.0))

        def log_prob(z):
            return Categorical(z, level, 17).log_prob(jnp.asarray([-1.0]))

        slope = float(jax.grad(log_prob)(level.alpha * jnp.asarray([1.0]))[0])
        assert slope == pytest.approx(float(-2.0 * level.alpha / level.sigma**2), rel=1e-6)


def test_distance_from_a_value_keeps_its_digits_in_float32():
    # A narrow distribution next to a pixel's value, evaluated at the next bin: the log-mass is a squared distance.
    # Operation by operation, since a compiler that fuses a product with a sum hides what a plain product loses.
    random = np.random.RandomState(0)
    index = random.randint(1, 254, 200)
    mean = (2.0 * index / 255 - 1 + 0.002 * random.randn(200)).astype(np.float32)
    scale = np.float32(3e-4)

    def log_mass(dtype):
        distribution = DiscretizedGaussian(jnp.asarray(mean, dtype), scale=jnp.asarray(scale, dtype), levels=256)
        return distribution._log_mass(jnp.asarray(index + 1))

    with jax.enable_x64(True):
        expected = log_mass(jnp.float64)
    with jax.enable_x64(False), jax.disable_jit():
        np.testing.assert_allclose(log_mass(jnp.float32), expected, rtol=2e-6, atol=1e-9)


def test_gradients_of_a_wide_distribution_are_those_of_the_density():
    # bins far narrower than the distribution: d/dscale log N, independent of the branches not taken
    for scale in (1e2, 1e5, 1e8):
        x, mean = normalize(jnp.asarray([60, 128]), 256), jnp.asarray([0.3, -0.4])
        by_mean, by_scale = jax.grad(
            lambda m, s, x=x: DiscretizedGaussian(m, scale=s, levels=256).log_prob(x), argnums=(0, 1)
        )(mean, jnp.asarray(scale, mean.dtype))
        apart = np.asarray(x - mean, np.float64)
        np.testing.assert_allclose(by_mean, apart / scale**2, rtol=1e-3)
        np.testing.assert_allclose(by_scale, np.sum(apart**2 / scale**3 - 1 / scale), rtol=1e-5)


def test_bernoulli_against_fifty_digits():
    logits = jnp.asarray([-80.0, -11.0, -1.3, 0.0, 0.002, 0.9, 17.0, 60.0])
    signs = np.asarray([-1.0, 1.0])
    ours = np.asarray([[Bernoulli(logit[None]).log_prob(jnp.full(1, sign)) for sign in signs] for logit in logits])
    with mpmath.workdps(50):
        expected = [[float(-mpmath.log(1 + mpmath.exp(-sign * float(logit)))) for sign in signs] for logit in logits]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(Bernoulli(logits).log_masses(), expected, rtol=1e-6)
    np.testing.assert_allclose(Bernoulli(logits).mean(), np.exp(expected) @ signs, rtol=1e-5)
    # d/dlogit log sigmoid(x logit) = x sigmoid(-x logit), in both tails
    slopes = jax.grad(lambda logits: Bernoulli(logits).log_prob(jnp.ones(8)))(logits)
    np.testing.assert_allclose(slopes, np.exp(np.asarray(expected)[:, 0]), rtol=2e-6)


def test_bernoulli_is_the_other_decoders_at_two_levels():
    with jax.enable_x64(True):
        z, level, x = jnp.asarray([-0.8, 0.3, 1.4]), level_from_log_snr(jnp.asarray(0.7)), jnp.asarray([1.0, 1.0, -1.0])
        by_z = Bernoulli(2.0 * level.alpha * z / level.sigma**2).log_prob(x)
        assert float(by_z) == pytest.approx(float(Categorical(z, level, 2).log_prob(x)), rel=1e-12)
        mixture = DiscretizedLogisticMixture(jnp.zeros((3, 1)), z[:, None, None], jnp.full((3, 1, 1), np.log(0.4)), 2)
        logistic = mixture.log_prob(x[:, None])
        assert float(Bernoulli(z / 0.4).log_prob(x)) == pytest.approx(float(logistic), rel=1e-12)


@parametrize("value", [0.0, 0.5, 2.0, float("nan")])
def test_bernoulli_takes_binary_data_only(value):
    x, distribution = jnp.asarray([1.0, value]), Bernoulli(jnp.asarray([0.3, -0.2]))
    with pytest.raises(ValueError, match=r"-1 and 1.*normalize\(values, 2\)"):
        distribution.log_prob(x)
    log_prob = jax.jit(lambda logits, x: Bernoulli(logits).log_prob(x))  # x is traced and cannot be checked
    assert np.isnan(log_prob(distribution.logits, x))
    assert np.isnan(jax.grad(log_prob)(distribution.logits, x)[1])
    binary = normalize(jnp.asarray([1, 0]), 2)
    assert float(log_prob(distribution.logits, binary)) == pytest.approx(float(distribution.log_prob(binary)), rel=1e-6)


def test_bernoulli_samples_have_its_mean():
    distribution = Bernoulli(jnp.asarray([[-2.0], [0.4]]))
    x = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(0), 20_000))
    assert np.all(np.abs(x) == 1.0)
    assert_mean(x, distribution.mean(), resolution=0.01)


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


@parametrize(("channels", "levels"), [(1, 2), (1, 256), (2, 17), (3, 6), (4, 3)])
def test_mixture_masses_sum_to_one(channels, levels):
    x = normalize(jnp.asarray(list(itertools.product(range(levels), repeat=channels))), levels)
    cases = [_mixture_parameters(seed, channels, 3) for seed in range(5)]
    parameters = [np.stack(arrays).astype(np.float32) for arrays in zip(*cases, strict=True)]

    @jax.jit
    @jax.vmap
    def log_probs(*parameters):
        return jax.vmap(_mixture(*parameters, levels).log_prob)(x)

    np.testing.assert_allclose(np.exp(np.asarray(log_probs(*parameters), np.float64)).sum(-1), 1.0, atol=1e-6)


def test_mixture_without_coefficients_has_independent_channels():
    logits, means, log_scales, coefficients = _mixture_parameters(0, 3, 2)
    x = normalize(jnp.asarray([3, 0, 16]), 17)
    without = DiscretizedLogisticMixture(jnp.asarray(logits), jnp.asarray(means), jnp.asarray(log_scales), 17).log_prob(
        x
    )
    zero = _mixture(logits, means, log_scales, 0.0 * coefficients, 17).log_prob(x)
    assert float(without) == float(zero)
    with pytest.raises(ValueError, match=r"coefficients.* 1 .*3 channels.* 3"):
        _mixture(logits, means, log_scales, coefficients[:1], 17).log_prob(x)


def test_mixture_of_one_is_a_difference_of_distribution_functions():
    with jax.enable_x64(True):
        mean, scale, levels = 0.3, 0.35, 9
        edges = np.concatenate([[-np.inf], np.linspace(-1, 1, levels)[:-1] + 1 / (levels - 1), [np.inf]])
        expected = np.diff(stats.logistic(mean, scale).cdf(edges))
        distribution = _mixture(
            np.zeros(1), np.full((1, 1), mean), np.full((1, 1), np.log(scale)), np.zeros((0, 1)), levels
        )
        ours = jax.vmap(distribution.log_prob)(normalize(jnp.arange(levels)[:, None], levels))
        np.testing.assert_allclose(np.exp(ours), expected, rtol=1e-12)


def test_mixture_against_fifty_digits_in_float32():
    # Operation by operation, since a compiler that fuses a product with a sum hides what a plain product loses.
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
    ours = jax.vmap(lambda x, *p: _mixture(*p, levels).log_prob(x))(normalize(jnp.asarray(index), levels), *parameters)
    with mpmath.workdps(50):
        expected = [float(_exact_mixture(*(a[i] for a in parameters), levels, index[i])) for i in range(60)]
    assert min(expected) < -1e4
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_mixture_gradients_against_fifty_digits():
    levels, index = 17, [5, 16, 0]
    parameters = [a.astype(np.float32) for a in _mixture_parameters(3, 3, 2)]
    parameters[1][1, 0] = 30.0  # in the far tail the other component dominates, and the gradients do not vanish
    parameters[2] = np.clip(parameters[2], -3.0, 1.0)
    x = normalize(jnp.asarray(index), levels)
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


@parametrize("log_scale", [-70.0, -8.0, 0.0, 70.0])
@parametrize("mean", [-30.0, 0.1, 30.0])
def test_mixture_is_finite_with_its_gradients(mean, log_scale):
    x = normalize(jnp.asarray([0, 100, 255]), 256)

    def log_prob(*parameters):
        return _mixture(*parameters, 256).log_prob(x)

    parameters = (jnp.zeros(1), jnp.full((3, 1), mean), jnp.full((3, 1), log_scale), jnp.full((3, 1), 0.1))
    value, slopes = jax.jit(jax.value_and_grad(log_prob, argnums=(1, 2, 3)))(*parameters)
    assert all(np.all(np.isfinite(number)) for number in (value, *slopes))
    # Moving the distribution towards the middle value improves it: the gradient has this sign at any distance.
    assert np.all(np.sign(slopes[0][1]) == np.sign(x[1] - mean - 0.1 * x[0])) or log_scale == 70.0


def test_mixture_samples_follow_its_masses():
    levels = 3
    parameters = (
        np.asarray([0.4, -0.3]),
        np.asarray([[-0.8, 0.5], [0.2, -0.1]]),
        np.log([[0.3, 0.2], [0.25, 0.4]]),
        np.asarray([[0.9, -0.7]]),
    )
    distribution = _mixture(*parameters, levels)
    grid = normalize(jnp.asarray(list(itertools.product(range(levels), repeat=2))), levels)
    masses = np.exp(jax.vmap(distribution.log_prob)(grid))
    x = np.asarray(jax.vmap(distribution.sample)(jax.random.split(jax.random.key(0), 40_000)))
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
