"""Closed-form distributions against scipy, automatic differentiation, and Bayes' rule pointwise."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vdm_jax import closed_form, elbo
from vdm_jax.likelihoods import normalize
from vdm_jax.noise_levels import level_from_log_snr, step_from_log_snr
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


@functools.cache
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


LOG_SNR = (-4.0, 0.3, 3.0, 4.0)
STEPS = ((3, 2), (1, 0))  # s and t, as indices of LOG_SNR: a short and a long one


def _levels():
    """At LOG_SNR, of an exploding variance, and of nearly no signal and nearly no noise."""
    at = [level_from_log_snr(jnp.asarray(log_snr)) for log_snr in (*LOG_SNR, -40.0, 40.0)]
    return [*at[:-2], VarianceExploding(0.2, 5.0)(0.5)._replace(t=None), *at[-2:]]


def _stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@jax.jit
def _evaluate(distribution, levels, steps, eps, key):
    x_0 = jax.vmap(distribution.sample)(jax.random.split(key, 20_000))

    def given(x_t, level):
        marginal, posterior = closed_form.marginal(distribution, level), distribution.posterior(x_t, level)
        prediction = functools.partial(closed_form.optimal_prediction, distribution, x_t, level)
        return {
            "log_prob": marginal.log_prob(x_t),
            "score": marginal.score(x_t),
            "score_jacobian": marginal.score_jacobian(x_t),
            "slope": jax.grad(marginal.log_prob)(x_t),
            "curvature": jax.jacfwd(marginal.score)(x_t).reshape(x_t.size, x_t.size),
            "posterior_mean": posterior.mean,
            "posterior_covariance": posterior.covariance(),
            "log_posterior": jax.vmap(posterior.log_prob)(x_0[:3]),
            "predictions": {each: prediction(each) for each in PREDICTION_TYPES},
        }

    def at_level(level):
        marginal = closed_form.marginal(distribution, level)
        x_t = level.alpha * x_0[3:6] + level.sigma * eps
        moments = {"x_t": x_t, "noisy_mean": marginal.mean, "noisy_covariance": marginal.covariance()}
        return moments | jax.vmap(given, (0, None))(x_t, level)

    def reverse(x_s, x_t, step):
        return closed_form.reverse_transition(distribution, x_t, step).log_prob(x_s)

    whole = {"x_0": x_0, "mean": distribution.mean, "variance": distribution.variance}
    whole |= {"covariance": distribution.covariance(), "log_prior": jax.vmap(distribution.log_prob)(x_0[:3])}
    whole |= jax.vmap(at_level)(levels)
    s, t = np.transpose(STEPS)
    whole["reverse"] = jax.vmap(jax.vmap(reverse, (0, 0, None)))(whole["x_t"][s], whole["x_t"][t], steps)
    return whole


@functools.cache
def values(name):
    """The library's numbers for a distribution, at seven levels for three x_t each, by one program."""
    distribution = distributions()[name]
    steps = _stack(*(step_from_log_snr(*(jnp.asarray(LOG_SNR[i]) for i in pair)) for pair in STEPS))
    eps = np.random.RandomState(1).randn(3, *distribution.mean.shape)
    result = _evaluate(distribution, _stack(*_levels()), steps, eps, jax.random.key(0))
    alpha_sigma = [(float(level.alpha), float(level.sigma)) for level in _levels()]
    return SimpleNamespace(**jax.tree.map(np.asarray, result), alpha_sigma=alpha_sigma)


def _log_normal(x, mean, var):
    """Summed over the entries of an example of any shape, the trailing axes of mean."""
    terms = -0.5 * ((x - mean) ** 2 / var + np.log(2 * np.pi * var))
    return terms.reshape(*terms.shape[:2], -1).sum(-1)


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
    ours = values(name)
    np.testing.assert_allclose(ours.log_prior, _scipy(name)(ours.x_0[:3].reshape(3, -1)), rtol=1e-11)


def test_masses_of_finite_distributions():
    log_prob = jax.jit(lambda distribution, x: distribution.log_prob(x))
    distribution = distributions()["points"]
    ours = [float(log_prob(distribution, x)) for x in (*MEANS, np.zeros(2))]
    np.testing.assert_allclose(ours, [*np.log(WEIGHTS), -np.inf], rtol=1e-14)
    assert float(jax.jit(type(distribution).entropy)(distribution)) == pytest.approx(stats.entropy(WEIGHTS), rel=1e-14)
    never = closed_form.Empirical(jnp.asarray([-jnp.inf, 0.0]), jnp.zeros((2, 1)))  # a point without weight
    assert float(jax.jit(closed_form.Empirical.entropy)(never)) == 0.0
    distribution = distributions()["pixels"]
    image, impossible = normalize(np.array([[1, 2]]), 3), normalize(np.array([[1, 0]]), 3)
    assert float(log_prob(distribution, image)) == pytest.approx(np.log(0.6 * 0.5), rel=1e-14)
    assert float(log_prob(distribution, impossible)) == -np.inf
    # a point that occurs twice has both weights
    twice = closed_form.empirical(np.array([[1.0], [1.0], [2.0]]), [1, 2, 1])
    assert float(log_prob(twice, np.ones(1))) == pytest.approx(np.log(0.75), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_the_samples(name):
    ours = values(name)
    flat = ours.x_0.reshape(20_000, -1)
    apart = flat - ours.mean.reshape(-1)
    scatter = apart[:, :, None] * apart[:, None, :]
    for samples, expected in ((flat, ours.mean.reshape(-1)), (scatter, ours.covariance)):
        error = samples.std(0) / np.sqrt(len(samples)) + 1e-12
        assert np.all(np.abs(samples.mean(0) - expected) < 4 * error)
    np.testing.assert_allclose(ours.variance.reshape(-1), np.diag(ours.covariance), rtol=1e-12)
    assert ours.mean.shape == ours.variance.shape == ours.x_0.shape[1:]


@pytest.mark.parametrize("name", NAMES)
def test_marginal_has_the_moments_of_noisy_data(name):
    ours = values(name)
    for (alpha, sigma), mean, covariance in zip(ours.alpha_sigma, ours.noisy_mean, ours.noisy_covariance, strict=True):
        np.testing.assert_allclose(mean, alpha * ours.mean, rtol=1e-12, atol=1e-14)
        expected = alpha**2 * ours.covariance + sigma**2 * np.eye(ours.mean.size)
        np.testing.assert_allclose(covariance, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_score_and_jacobian_are_derivatives_of_the_density(name):
    ours = values(name)
    for i in range(5):
        np.testing.assert_allclose(ours.score[i], ours.slope[i], rtol=1e-9, atol=1e-10)
        scale = float(np.abs(ours.curvature[i]).max())
        np.testing.assert_allclose(ours.score_jacobian[i], ours.curvature[i], rtol=1e-8, atol=1e-9 * scale)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plane"])
def test_posterior_is_bayes_rule_pointwise(name):
    ours = values(name)
    for i, (alpha, sigma) in enumerate(ours.alpha_sigma[:5]):
        log_likelihood = _log_normal(ours.x_t[i][:, None], alpha * ours.x_0[:3], sigma**2)
        bayes = ours.log_prior + log_likelihood - ours.log_prob[i][:, None]
        np.testing.assert_allclose(ours.log_posterior[i], bayes, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_reverse_is_bayes_rule_pointwise(name):
    ours = values(name)
    for reverse, (s, t) in zip(ours.reverse, STEPS, strict=True):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = ours.alpha_sigma[s], ours.alpha_sigma[t]
        alpha = alpha_t / alpha_s  # of q(x_t | x_s)
        transition = _log_normal(ours.x_t[t][None], alpha * ours.x_t[s][None], sigma_t**2 - (alpha * sigma_s) ** 2)[0]
        bayes = ours.log_prob[s] + transition - ours.log_prob[t]
        np.testing.assert_allclose(reverse, bayes, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_prediction_type_is_the_same_prediction(name):
    ours = values(name)
    for i, (alpha, sigma) in enumerate(ours.alpha_sigma[:5]):
        x_0 = ours.posterior_mean[i]
        eps = (ours.x_t[i] - alpha * x_0) / sigma
        expected = {"x_0": x_0, "eps": eps, "v": alpha * eps - sigma * x_0, "score": -eps / sigma}
        for prediction_type in PREDICTION_TYPES:
            prediction = ours.predictions[prediction_type][i]
            np.testing.assert_allclose(prediction, expected[prediction_type], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_covariance_given_x_t_is_tweedies(name):
    # Cov[x_0 | x_t] = (sigma^2 I + sigma^4 grad^2 log q(x_t)) / alpha^2, by the Jacobian of the score
    ours = values(name)
    for i, (alpha, sigma) in enumerate(ours.alpha_sigma[:5]):
        tweedie = (sigma**2 * np.eye(ours.mean.size) + sigma**4 * ours.score_jacobian[i]) / alpha**2
        np.testing.assert_allclose(ours.posterior_covariance[i], tweedie, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("name", DENSE)
def test_posterior_is_the_prior_at_high_noise_and_a_point_at_low_noise(name):
    ours = values(name)
    blurred, clear = ours.posterior_mean[5:]
    np.testing.assert_allclose(blurred, np.broadcast_to(ours.mean, blurred.shape), atol=1e-7)
    np.testing.assert_allclose(clear, ours.x_t[6], rtol=1e-8)


def test_entropy_of_a_gaussian():
    for name in ("gaussian", "low_rank"):
        distribution = distributions()[name]
        expected = stats.multivariate_normal(np.zeros(4), values(name).covariance).entropy()
        assert float(jax.jit(type(distribution).entropy)(distribution)) == pytest.approx(expected, rel=1e-12)


def test_plane_has_no_density_but_its_noisy_marginal_has():
    plane, ours = distributions()["plane"], values("plane")
    assert not np.isfinite(float(jax.jit(lambda plane, x: plane.log_prob(x))(plane, ours.mean + 0.1)))
    alpha, sigma = ours.alpha_sigma[1]
    normal = stats.multivariate_normal(
        alpha * ours.mean.reshape(-1), alpha**2 * FACTOR @ FACTOR.T + sigma**2 * np.eye(4)
    )
    np.testing.assert_allclose(ours.log_prob[1], normal.logpdf(ours.x_t[1].reshape(3, -1)), rtol=1e-11)


def test_gaussian_is_accurate_in_float32():
    # the same float32 numbers, in float32 and in float64
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(1, 0, None))
    def evaluate(x_t, lam, distribution):
        level = level_from_log_snr(lam)
        prediction = jax.vmap(closed_form.optimal_prediction, (None, 0, None, None))
        return [prediction(distribution, x_t, level, each) for each in PREDICTION_TYPES], (level.alpha, level.sigma)

    distribution = closed_form.gaussian([0.5, -1.0], np.diag([0.3, 2.0]))
    gaussian32 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), distribution)
    gaussian64 = jax.tree.map(lambda leaf: leaf.astype(np.float64), gaussian32)
    lam = np.float32([-20.0, -5.0, 0.0, 5.0, 20.0])
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-lam))), np.sqrt(1 / (1 + np.exp(lam)))
    random = np.random.RandomState(1)
    x_0 = np.array([0.5, -1.0]) + np.sqrt([0.3, 2.0]) * random.randn(20, 1, 2)
    x_t = (alpha[:, None] * x_0 + sigma[:, None] * random.randn(20, 5, 2)).astype(np.float32)
    ours, _ = evaluate(x_t, lam, gaussian32)
    expected, (alpha, sigma) = evaluate(x_t.astype(np.float64), lam.astype(np.float64), gaussian64)
    # x_t - alpha mean has a rounding of its own, relative to the data's size in units of the noise
    conditioning = 1.0 + np.asarray(alpha / np.sqrt(alpha**2 * 0.3 + sigma**2))
    for mine, true in zip(ours, map(np.asarray, expected), strict=True):
        assert mine.dtype == jnp.float32
        error, scale = np.abs(np.asarray(mine, np.float64) - true).max(-1), np.abs(true).max(-1) + 1.0
        assert np.all(error <= 1e-6 * conditioning[:, None] * scale)


# The posterior given a linear measurement y = A x_0 + noise

OPERATOR = np.random.RandomState(5).randn(3, 4)
MEASURABLE = [pytest.param("gaussian", marks=pytest.mark.slow), "low_rank", "plane", "mixture", "points"]


def _halves(x):
    """Two measurements of a batch of examples (B, 2, 2), of shape (B, 2, 1)."""
    return x.sum(-1, keepdims=True) / jnp.sqrt(2.0)


@jax.jit
def _measured(distribution, operator, y, noise, x_t, level):
    posterior = closed_form.linear_posterior(distribution, operator, y, noise)
    evidence = closed_form.linear_measurement(distribution, operator, noise).log_prob(y)
    x_0 = jax.vmap(distribution.sample)(jax.random.split(jax.random.key(1), 3))
    both = closed_form.linear_posterior(distribution.posterior(x_t, level), operator, y, noise)
    other = posterior.posterior(x_t, level)
    return {
        "mean": posterior.mean,
        "covariance": posterior.covariance(),
        "evidence": evidence,
        "x_0": x_0,
        "log_prior": jax.vmap(distribution.log_prob)(x_0),
        "log_posterior": jax.vmap(posterior.log_prob)(x_0),
        "two_orders": [(each.mean, each.covariance()) for each in (both, other)],
        "slope": jax.grad(lambda y: closed_form.linear_measurement(distribution, operator, noise).log_prob(y))(y),
    }


def _measure(name, noise):
    distribution = distributions()[name]
    dims = distribution.mean.size
    operator, y = (
        OPERATOR[:, :dims],
        np.array([0.4, -0.7, 0.2]),
    )  # fewer measurements than four dimensions, more than two
    level = level_from_log_snr(jnp.asarray(0.3))
    x_t = 0.3 * np.arange(1.0, dims + 1).reshape(distribution.mean.shape)
    ours = _measured(distribution, operator, y, noise, x_t, level)
    return SimpleNamespace(**jax.tree.map(np.asarray, ours), operator=operator, y=y)


@pytest.mark.parametrize("name", MEASURABLE)
def test_the_posterior_of_a_measurement_is_bayes_rule(name):
    noise = 0.3
    ours, distribution = _measure(name, noise), distributions()[name]
    if name in ("gaussian", "low_rank", "plane"):  # regression on y
        mean, covariance = np.asarray(distribution.mean).reshape(-1), values(name).covariance
        gram = ours.operator @ covariance @ ours.operator.T + noise * np.eye(len(ours.y))
        gain = covariance @ ours.operator.T @ np.linalg.inv(gram)
        np.testing.assert_allclose(ours.mean.reshape(-1), mean + gain @ (ours.y - ours.operator @ mean), rtol=1e-11)
        np.testing.assert_allclose(ours.covariance, covariance - gain @ ours.operator @ covariance, atol=1e-13)
        evidence = stats.multivariate_normal(ours.operator @ mean, gram).logpdf(ours.y)
        np.testing.assert_allclose(ours.evidence, evidence, rtol=1e-11)
    if name != "plane":  # which has no density; the constant is the evidence
        residual = ours.y - ours.x_0.reshape(3, -1) @ ours.operator.T
        log_likelihood = stats.multivariate_normal(np.zeros(len(ours.y)), noise * np.eye(len(ours.y))).logpdf(residual)
        bayes = ours.log_prior + log_likelihood - ours.evidence
        np.testing.assert_allclose(ours.log_posterior, bayes, rtol=1e-10, atol=1e-10)
    for first, second in zip(*ours.two_orders, strict=True):  # given y and x_t, in either order
        np.testing.assert_allclose(first, second, rtol=1e-9, atol=1e-11)
    assert np.all(np.isfinite(ours.slope))


def test_an_operator_is_a_matrix_or_a_linear_map_of_batches():
    distribution, y = distributions()["gaussian"], np.array([[0.4], [-0.7]])
    matrix = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]) / np.sqrt(2)

    @jax.jit
    def both(distribution, y):
        maps = closed_form.linear_posterior(distribution, _halves, y, 0.1)
        products = closed_form.linear_posterior(distribution, matrix, y.reshape(-1), 0.1)
        measurements = closed_form.linear_measurement(distribution, _halves, 0.1)
        batch = jax.vmap(lambda y: closed_form.linear_posterior(distribution, _halves, y, 0.1).mean)(jnp.stack([-y, y]))
        return (maps.mean, maps.covariance()), (products.mean, products.covariance()), measurements.mean, batch

    maps, products, mean, batch = both(distribution, y)
    for ours, expected in zip(maps, products, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(mean, _halves(distribution.mean[None])[0], rtol=1e-14)
    np.testing.assert_allclose(batch[1], maps[0], rtol=1e-12)


def test_the_posterior_of_a_precise_measurement_is_accurate_in_float32():
    # the same float32 numbers, in float32 and in float64; more measurements than dimensions, and an idle one
    random, moments = np.random.RandomState(6), jax.jit(lambda *a: _moments(closed_form.linear_posterior(*a)))
    gaussian32 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), distributions()["gaussian"])
    for rows, noise in ((2, 1e-4), (6, 1e-2)):
        operator = np.float32(random.randn(rows, 4) * (np.arange(4) != 2))  # nothing measures the third entry
        arguments = (operator, np.float32(random.randn(rows)), np.float32(noise))
        ours = moments(gaussian32, *arguments)
        truth = moments(jax.tree.map(np.float64, gaussian32), *jax.tree.map(np.float64, arguments))
        for mine, true in zip(ours, truth, strict=True):
            assert mine.dtype == jnp.float32
            np.testing.assert_allclose(mine, true, rtol=0.0, atol=5e-6 * np.abs(true).max())


def _moments(distribution):
    return distribution.mean, distribution.covariance()


def test_invalid_measurements_are_refused():
    gaussian, y = distributions()["gaussian"], np.zeros(3)
    for operator, value, noise, message in (
        (OPERATOR[:, :3], y, 0.1, r"operator has shape \(3, 3\): it must be \(M, 4\)"),
        (OPERATOR[0], y, 0.1, r"operator has shape \(4,\)"),
        (OPERATOR, y[:1], 0.1, r"y has shape \(1,\), but the operator returns \(3,\)"),
        (_halves, y[:2], 0.1, r"y has shape \(2,\), but the operator returns \(2, 1\)"),
        (OPERATOR, y, 0.0, "noise_variance is 0.0: it must be positive"),
        (OPERATOR, y, np.full(3, 0.1), r"noise_variance has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            closed_form.linear_posterior(gaussian, operator, value, noise)
    with pytest.raises(TypeError, match="no closed form for a linear measurement of Independent data: use"):
        closed_form.linear_posterior(distributions()["independent"], np.eye(2), np.zeros(2), 0.1)
    with pytest.raises(TypeError, match="of Independent data"):
        closed_form.linear_measurement(distributions()["independent"], np.eye(2), 0.1)


def test_denoiser_and_decoder_satisfy_the_network_protocols():
    distribution, ours = distributions()["mixture"], values("mixture")
    denoiser, decoder = closed_form.OptimalDenoiser(distribution, "v"), closed_form.OptimalDecoder(distribution)
    assert isinstance(denoiser, Denoiser)
    assert isinstance(decoder, elbo.DiffusionDecoder)
    batch = jax.jit(lambda denoiser, x_t, level: denoiser(x_t, level))(
        denoiser, ours.x_t[:3, 0], _stack(*_levels()[:3])
    )
    np.testing.assert_allclose(batch, ours.predictions["v"][:3, 0], rtol=1e-12)
    given = jax.jit(lambda decoder, *args: decoder(*args).mean)(decoder, ours.x_t[0, 0], ours.x_t[0, 1], _levels()[0])
    np.testing.assert_allclose(given, ours.posterior_mean[0, 1])


def test_another_distribution_of_the_same_shape_is_not_traced_again():
    traces = []

    @jax.jit
    def evaluate(denoiser, x_t, level):
        traces.append(1)
        return denoiser(x_t, level)

    level, zero = jax.tree.map(lambda leaf: leaf[None], _levels()[0]), jnp.zeros((1, 2))
    for shift in (0.0, 1.0):
        shifted = closed_form.mixture(WEIGHTS, MEANS + shift, COVARIANCES)
        jax.eval_shape(evaluate, closed_form.OptimalDenoiser(shifted), zero, level)
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
    covariance = jax.jit(closed_form.Mixture.covariance)
    distribution = closed_form.mixture(WEIGHTS, MEANS, [0.1, 0.2, 0.3])
    expected = closed_form.mixture(WEIGHTS, MEANS, np.array([0.1, 0.2, 0.3])[:, None, None] * np.eye(2))
    np.testing.assert_allclose(covariance(distribution), covariance(expected), rtol=1e-14)


def test_pixels_of_two_values():
    distribution = closed_form.independent_pixels([[0.25, 0.75]])
    mean, log_prob = jax.jit(lambda d: (d.mean, d.log_prob(jnp.asarray([-1.0]))))(distribution)
    np.testing.assert_allclose(mean, [0.5])  # values -1 and 1
    assert float(log_prob) == pytest.approx(np.log(0.25))


def test_degenerate_distributions_are_accepted():
    masses = closed_form.independent_pixels([[1.0, 3.0]])  # counts
    np.testing.assert_allclose(np.exp(np.asarray(masses.distribution.log_weights)), [[0.25, 0.75]], rtol=1e-14)
    point = closed_form.gaussian([0.7], [[0.0]])  # no variance
    assert float(jax.jit(closed_form.Gaussian.sample)(point, jax.random.key(0))[0]) == 0.7
    covariance, entropy = jax.jit(closed_form.Gaussian.covariance), jax.jit(closed_form.Gaussian.entropy)
    singular = closed_form.gaussian([0.0, 0.0], np.ones((2, 2)))
    np.testing.assert_allclose(covariance(singular), np.ones((2, 2)), rtol=1e-14)
    plane = closed_form.low_rank(np.zeros(3), FACTOR[:3], 0.1)  # one direction outside
    expected = stats.multivariate_normal(np.zeros(3), FACTOR[:3] @ FACTOR[:3].T + 0.1 * np.eye(3)).entropy()
    assert float(entropy(plane)) == pytest.approx(expected, rel=1e-12)
    square = np.array([[1.0, 0.2], [0.3, -0.5]])  # a full rank
    full = covariance(closed_form.low_rank([0.0, 0.0], square, 0.1))
    np.testing.assert_allclose(full, square @ square.T + 0.1 * np.eye(2))
