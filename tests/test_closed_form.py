"""Closed-form distributions against scipy, automatic differentiation, and Bayes' rule pointwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vdm_jax import closed_form, elbo, forward
from vdm_jax.likelihoods import normalize
from vdm_jax.noise_levels import level_from_log_snr, step_from_log_snr
from vdm_jax.parameterization import convert
from vdm_jax.schedules import VarianceExploding
from vdm_jax.types import Denoiser

PREDICTION_TYPES = ("x_0", "eps", "v", "score")
MEANS = np.array([[-1.0, 0.5], [0.2, -0.3], [1.0, 1.0]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.05, 0.0], [0.0, 0.4]], [[0.2, -0.15], [-0.15, 0.3]]])
WEIGHTS = np.array([0.5, 0.2, 0.3])
FACTOR = np.array([[1.0, 0.2], [0.3, -0.5], [0.1, 0.4], [-0.6, 0.9]])
MASSES = np.array([[[0.1, 0.6, 0.3], [0.0, 0.5, 0.5]]])  # a 1 x 2 image of three values


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def distributions():
    mean = np.array([[0.3, -0.2], [0.0, 1.0]])
    return {
        "gaussian": closed_form.gaussian(mean, FACTOR @ FACTOR.T + np.diag([0.1, 0.2, 0.3, 0.4])),
        "low_rank": closed_form.low_rank(mean, FACTOR, 0.1),
        "plane": closed_form.low_rank(mean, FACTOR),
        "mixture": closed_form.mixture(WEIGHTS, MEANS, COVARIANCES),
        "points": closed_form.empirical(MEANS, WEIGHTS),
        "pixels": closed_form.independent_pixels(MASSES),
        "independent": closed_form.Independent(_scalars()),
    }


def _scalars():
    """Two one-dimensional mixtures, stacked."""
    mixtures = [closed_form.mixture([0.4, 0.6], [a, b], [0.1, 0.3]) for a, b in ((-1.0, 1.0), (0.0, 2.0))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *mixtures)


NAMES = ["gaussian", "low_rank", "plane", "mixture", "points", "pixels", "independent"]
DENSE = ["gaussian", "low_rank", "mixture", "independent"]  # with a density of x_0
SLOW = ("pixels", "independent")  # of many components, which take long to compile


def _levels():
    return [level_from_log_snr(jnp.asarray(x)) for x in (-5.0, 0.3, 4.0)] + [VarianceExploding(0.2, 5.0)(0.5)]


def _samples(distribution, count, seed=0):
    return jax.vmap(distribution.sample)(jax.random.split(jax.random.key(seed), count))


def _noisy(distribution, level, count=3):
    return _samples(closed_form.marginal(distribution, level), count, seed=1)


def _scipy(name):
    """log p(x) of a flat x, by scipy."""
    mean = distributions()["gaussian"].mean.reshape(-1)
    if name == "gaussian":
        return stats.multivariate_normal(mean, FACTOR @ FACTOR.T + np.diag([0.1, 0.2, 0.3, 0.4])).logpdf
    if name == "low_rank":
        return stats.multivariate_normal(mean, FACTOR @ FACTOR.T + 0.1 * np.eye(4)).logpdf
    normal = stats.multivariate_normal
    return lambda x: np.log(sum(w * normal(m, c).pdf(x) for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)))


@pytest.mark.parametrize("name", ["gaussian", "low_rank", "mixture"])
def test_density_is_scipys(name):
    distribution = distributions()[name]
    for x in _samples(distribution, 5):
        assert float(distribution.log_prob(x)) == pytest.approx(
            float(_scipy(name)(np.asarray(x).reshape(-1))), rel=1e-11
        )


def test_masses_of_finite_distributions():
    distribution = distributions()["points"]
    np.testing.assert_allclose(jax.vmap(distribution.log_prob)(jnp.asarray(MEANS)), np.log(WEIGHTS), rtol=1e-14)
    assert float(distribution.log_prob(jnp.asarray([0.0, 0.0]))) == -np.inf
    assert float(distribution.entropy()) == pytest.approx(stats.entropy(WEIGHTS), rel=1e-14)
    distribution = distributions()["pixels"]
    image = normalize(jnp.asarray([[1, 2]]), 3)
    assert float(distribution.log_prob(image)) == pytest.approx(np.log(0.6 * 0.5), rel=1e-14)
    assert float(distribution.log_prob(normalize(jnp.asarray([[1, 0]]), 3))) == -np.inf
    # a point that occurs twice has both weights
    twice = closed_form.empirical(np.array([[1.0], [1.0], [2.0]]), [1, 2, 1])
    assert float(twice.log_prob(jnp.asarray([1.0]))) == pytest.approx(np.log(0.75), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_the_samples(name):
    distribution = distributions()[name]
    flat = np.asarray(_samples(distribution, 20_000)).reshape(20_000, -1)
    apart = flat - np.asarray(distribution.mean).reshape(-1)
    scatter = apart[:, :, None] * apart[:, None, :]
    for samples, expected in ((flat, distribution.mean.reshape(-1)), (scatter, distribution.covariance())):
        error = samples.std(0) / np.sqrt(len(samples)) + 1e-12
        assert np.all(np.abs(samples.mean(0) - np.asarray(expected)) < 4 * error)
    np.testing.assert_allclose(distribution.variance.reshape(-1), np.diag(distribution.covariance()), rtol=1e-12)
    assert distribution.mean.shape == distribution.variance.shape == flat[0].reshape(distribution.mean.shape).shape


@pytest.mark.parametrize("name", NAMES)
def test_marginal_has_the_moments_of_noisy_data(name):
    distribution = distributions()[name]
    for level in _levels():
        noisy = closed_form.marginal(distribution, level)
        np.testing.assert_allclose(noisy.mean, level.alpha * distribution.mean, rtol=1e-12, atol=1e-14)
        covariance = level.alpha**2 * distribution.covariance() + level.sigma**2 * np.eye(distribution.mean.size)
        np.testing.assert_allclose(noisy.covariance(), covariance, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_score_and_jacobian_are_derivatives_of_the_density(name):
    for level in _levels():
        noisy = closed_form.marginal(distributions()[name], level)
        slope, curvature = jax.jit(jax.grad(noisy.log_prob)), jax.jit(jax.hessian(noisy.log_prob))
        for x in _noisy(distributions()[name], level):
            np.testing.assert_allclose(noisy.score(x), slope(x), rtol=1e-9, atol=1e-10)
            hessian = curvature(x).reshape(x.size, x.size)
            scale = float(np.abs(hessian).max())
            np.testing.assert_allclose(noisy.score_jacobian(x), hessian, rtol=1e-8, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["gaussian", "low_rank", "mixture", "points", "pixels", "independent"])
def test_posterior_is_bayes_rule_pointwise(name):
    distribution = distributions()[name]
    for level in _levels():
        for x_t in _noisy(distribution, level):
            for x_0 in _samples(distribution, 3, seed=2):
                joint = distribution.log_prob(x_0) + forward.marginal(x_0, level).log_prob(x_t)
                bayes = joint - closed_form.marginal(distribution, level).log_prob(x_t)
                assert float(distribution.posterior(x_t, level).log_prob(x_0)) == pytest.approx(
                    float(bayes), rel=1e-8, abs=1e-8
                )


@pytest.mark.parametrize("name", NAMES)
def test_reverse_is_bayes_rule_pointwise(name):
    distribution = distributions()[name]
    for pair in ((5.0, 4.0), (2.0, -3.0)):
        step = step_from_log_snr(*map(jnp.asarray, pair))
        x_s = _noisy(distribution, step.s)
        for x, x_t in zip(x_s, _noisy(distribution, step.t), strict=True):
            joint = closed_form.marginal(distribution, step.s).log_prob(x) + forward.transition(x, step).log_prob(x_t)
            bayes = joint - closed_form.marginal(distribution, step.t).log_prob(x_t)
            assert float(closed_form.reverse_transition(distribution, x_t, step).log_prob(x)) == pytest.approx(
                float(bayes), rel=1e-8, abs=1e-8
            )


@pytest.mark.parametrize("name", NAMES)
def test_every_prediction_type_is_the_same_prediction(name):
    distribution = distributions()[name]
    for level in _levels():
        for x_t in _noisy(distribution, level):
            x_0 = closed_form.optimal_prediction(distribution, x_t, level, "x_0")
            np.testing.assert_allclose(x_0, distribution.posterior(x_t, level).mean)
            for prediction_type in PREDICTION_TYPES:
                ours = closed_form.optimal_prediction(distribution, x_t, level, prediction_type)
                np.testing.assert_allclose(ours, convert(x_0, x_t, level, "x_0", prediction_type), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_covariance_given_x_t_is_tweedies(name):
    # Cov[x_0 | x_t] = (sigma^2 I + sigma^4 grad^2 log q(x_t)) / alpha^2, by the Jacobian of the score
    distribution = distributions()[name]
    for level in _levels():
        for x_t in _noisy(distribution, level):
            jacobian = closed_form.marginal(distribution, level).score_jacobian(x_t)
            tweedie = (level.sigma**2 * np.eye(x_t.size) + level.sigma**4 * jacobian) / level.alpha**2
            np.testing.assert_allclose(distribution.posterior(x_t, level).covariance(), tweedie, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("name", DENSE)
def test_posterior_is_the_prior_at_high_noise_and_a_point_at_low_noise(name):
    distribution = distributions()[name]
    x_t = _samples(distribution, 1)[0]
    blurred = closed_form.optimal_prediction(distribution, x_t, level_from_log_snr(jnp.asarray(-40.0)), "x_0")
    np.testing.assert_allclose(blurred, distribution.mean, atol=1e-8)
    clear = closed_form.optimal_prediction(distribution, x_t, level_from_log_snr(jnp.asarray(40.0)), "x_0")
    np.testing.assert_allclose(clear, x_t, rtol=1e-8)


def test_entropy_of_a_gaussian():
    for name in ("gaussian", "low_rank"):
        distribution = distributions()[name]
        expected = stats.multivariate_normal(np.zeros(4), np.asarray(distribution.covariance())).entropy()
        assert float(distribution.entropy()) == pytest.approx(expected, rel=1e-12)


def test_plane_has_no_density_but_its_noisy_marginal_has():
    plane = distributions()["plane"]
    assert not np.isfinite(float(plane.log_prob(plane.mean + 0.1)))
    level = _levels()[1]
    covariance = level.alpha**2 * FACTOR @ FACTOR.T + level.sigma**2 * np.eye(4)
    x_t = _noisy(plane, level)[0]
    expected = stats.multivariate_normal(level.alpha * plane.mean.reshape(-1), covariance).logpdf(x_t.reshape(-1))
    assert float(closed_form.marginal(plane, level).log_prob(x_t)) == pytest.approx(float(expected), rel=1e-11)


@pytest.mark.parametrize("log_snr", [-20.0, -5.0, 0.0, 5.0, 20.0])
def test_gaussian_is_accurate_in_float32(log_snr):
    # the same float32 numbers, in float32 and in float64
    def evaluate(x_t, lam, distribution):
        level = level_from_log_snr(lam)
        return [
            closed_form.optimal_prediction(distribution, x_t, level, prediction_type)
            for prediction_type in PREDICTION_TYPES
        ]

    distribution = closed_form.gaussian([0.5, -1.0], np.diag([0.3, 2.0]))
    gaussian32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), distribution)
    gaussian64 = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), gaussian32)
    lam = jnp.float32(log_snr)
    x_t = _noisy(gaussian32, level_from_log_snr(lam), 20).astype(jnp.float32)
    for x in x_t:
        ours = evaluate(x, lam, gaussian32)
        expected = evaluate(x.astype(jnp.float64), lam.astype(jnp.float64), gaussian64)
        for mine, true in zip(ours, expected, strict=True):
            assert mine.dtype == jnp.float32
            # x_t - alpha mean has a rounding of its own, relative to the data's size in units of the noise
            level = level_from_log_snr(lam)
            conditioning = 1.0 + float(jnp.abs(level.alpha * gaussian32.mean).max()) / float(
                jnp.sqrt(level.alpha**2 * 0.3 + level.sigma**2)
            )
            scale = np.abs(np.asarray(true)).max() + 1.0
            assert np.max(np.abs(np.asarray(mine, np.float64) - true)) <= 1e-6 * conditioning * scale


def test_denoiser_and_decoder_satisfy_the_network_protocols():
    distribution = distributions()["mixture"]
    denoiser, decoder = closed_form.OptimalDenoiser(distribution, "v"), closed_form.OptimalDecoder(distribution)
    assert isinstance(denoiser, Denoiser)
    assert isinstance(decoder, elbo.DiffusionDecoder)
    level = jax.tree.map(lambda *fields: jnp.stack(fields), *_levels()[:3])
    x_t = _noisy(distribution, _levels()[0])
    for i, row in enumerate(denoiser(x_t, level)):
        expected = closed_form.optimal_prediction(distribution, x_t[i], _levels()[i], "v")
        np.testing.assert_allclose(row, expected, rtol=1e-12)
    given = decoder(x_t[0], x_t[1], _levels()[0])
    np.testing.assert_allclose(given.mean, distribution.posterior(x_t[1], _levels()[0]).mean)


def test_another_distribution_of_the_same_shape_is_not_traced_again():
    traces = []

    @jax.jit
    def evaluate(denoiser, x_t, level):
        traces.append(1)
        return denoiser(x_t, level)

    level = jax.tree.map(lambda leaf: leaf[None], _levels()[0])
    for shift in (0.0, 1.0):
        evaluate(
            closed_form.OptimalDenoiser(closed_form.mixture(WEIGHTS, MEANS + shift, COVARIANCES)),
            jnp.zeros((1, 2)),
            level,
        )
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: closed_form.gaussian([0.0, 0.0], np.eye(3)), "shape \\(2, 2\\)"),
        (lambda: closed_form.gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: closed_form.gaussian([0.0, 0.0], np.diag([1.0, -1.0])), "eigenvalue -1: .*positive semi-definite"),
        (lambda: closed_form.low_rank([0.0, 0.0], np.ones((3, 1))), "factor has shape .*\\(2, R\\)"),
        (lambda: closed_form.low_rank([0.0, 0.0], np.ones((2, 1)), -1.0), "residual_variance is -1.0"),
        (lambda: closed_form.mixture([1.0], MEANS, COVARIANCES), "weights has shape .*3 positive values"),
        (lambda: closed_form.mixture(WEIGHTS, MEANS, COVARIANCES[:2]), "covariances has shape .*3 means"),
        (lambda: closed_form.empirical(MEANS, [1.0, -1.0, 1.0]), "3 positive values"),
        (lambda: closed_form.independent_pixels([[1.0], [1.0]]), "masses"),
        (lambda: closed_form.independent_pixels([[1.0, -0.1]]), "masses"),
        (lambda: closed_form.independent_pixels([[0.0, 0.0]]), "masses"),
        (lambda: closed_form.independent_pixels(0.5), "masses"),
        (lambda: closed_form.independent_pixels([[[0.5, 0.5], [0.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]]), "every pixel"),
        (lambda: closed_form.empirical(MEANS, [1.0, 0.0, 1.0]), "3 positive values"),
    ],
)
def test_invalid_distributions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scalar_variances_mean_spherical_covariances():
    distribution = closed_form.mixture(WEIGHTS, MEANS, [0.1, 0.2, 0.3])
    expected = closed_form.mixture(WEIGHTS, MEANS, np.array([0.1, 0.2, 0.3])[:, None, None] * np.eye(2))
    np.testing.assert_allclose(distribution.covariance(), expected.covariance(), rtol=1e-14)
    np.testing.assert_allclose(distribution.variance, expected.variance, rtol=1e-14)


def test_pixels_of_two_values():
    distribution = closed_form.independent_pixels([[0.25, 0.75]])
    np.testing.assert_allclose(distribution.mean, [0.5])  # values -1 and 1
    assert float(distribution.log_prob(jnp.asarray([-1.0]))) == pytest.approx(np.log(0.25))


def test_degenerate_distributions_are_accepted():
    masses = closed_form.independent_pixels([[1.0, 3.0]])  # counts
    np.testing.assert_allclose(jnp.exp(masses.distribution.log_weights), [[0.25, 0.75]], rtol=1e-14)
    point = closed_form.gaussian([0.7], [[0.0]])  # no variance
    assert float(point.sample(jax.random.key(0))[0]) == 0.7
    singular = closed_form.gaussian([0.0, 0.0], np.ones((2, 2)))
    np.testing.assert_allclose(singular.covariance(), np.ones((2, 2)), rtol=1e-14)
    plane = closed_form.low_rank(np.zeros(3), FACTOR[:3], 0.1)  # one direction outside
    expected = stats.multivariate_normal(np.zeros(3), FACTOR[:3] @ FACTOR[:3].T + 0.1 * np.eye(3)).entropy()
    assert float(plane.entropy()) == pytest.approx(expected, rel=1e-12)
    square = np.array([[1.0, 0.2], [0.3, -0.5]])  # a full rank
    np.testing.assert_allclose(
        closed_form.low_rank([0.0, 0.0], square, 0.1).covariance(), square @ square.T + 0.1 * np.eye(2)
    )
