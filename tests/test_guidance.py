"""Guidance is Bayes' rule: compared with conditional distributions derived by hand."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.check import assert_close, assert_mean, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form
from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import discretize
from vdm_jax.guidance import ClassifierFreeGuidance, ClassifierGuidance, LinearMeasurement, ReconstructionGuidance
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.parameterization import convert
from vdm_jax.samplers import ancestral, ddim, dpmpp_2m, heun
from vdm_jax.schedules import LinearLogSNR

WEIGHTS = np.array([0.2, 0.3, 0.1, 0.4])
MEANS = np.array([[-1.0, 0.2], [0.8, -0.4], [0.2, 1.1], [1.2, 0.9]])
COVARIANCES = np.array(
    [[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0.0], [0.0, 0.4]], [[0.3, -0.1], [-0.1, 0.2]], 0.05 * np.eye(2)]
)
CLASS = np.array([0, 2])  # the components of the one class
PREDICTION_TYPES = pytest.mark.parametrize(
    "prediction_type",
    ["eps", *(pytest.param(prediction_type, marks=pytest.mark.slow) for prediction_type in ("x_0", "v", "score"))],
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _mixture(chosen=slice(None)):
    return closed_form.mixture(WEIGHTS[chosen], MEANS[chosen], COVARIANCES[chosen])


def _log_density(x, level, chosen=slice(None)):
    """log sum_k w_k N(x; alpha m_k, alpha^2 S_k + sigma^2), of the chosen components; not normalized."""
    terms = [
        jnp.log(w) + multivariate_normal.logpdf(x, level.alpha * m, level.alpha**2 * c + level.sigma**2 * jnp.eye(2))
        for w, m, c in zip(WEIGHTS[chosen], MEANS[chosen], COVARIANCES[chosen], strict=True)
    ]
    return jax.nn.logsumexp(jnp.stack(terms))


def _log_class(x_t, level):
    return jax.vmap(lambda x, lv: _log_density(x, lv, CLASS) - _log_density(x, lv))(x_t, level)


def _levels(*log_snr):
    level = jax.jit(level_from_log_snr)(np.array(log_snr), np.array(log_snr))
    return level, jnp.asarray(1.5 * np.random.RandomState(1).normal(size=(len(log_snr), 2)))


@compiled()
def _evaluate(net, x_t, level):
    return net(x_t, level)


def _score(distribution, x_t, level):
    return _evaluate(closed_form.OptimalDenoiser(distribution, "score"), x_t, level)


@compiled()
def _as_score(net, x_t, level, prediction_type):
    return jax.vmap(lambda p, x, lv: convert(p, x, lv, prediction_type, "score"))(net(x_t, level), x_t, level)


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
@jax.grad
def _guided_score(x, level, scale):
    """The gradient of log q(x_t) + w log p(y | x_t)."""
    return (1.0 - scale) * _log_density(x, level) + scale * _log_density(x, level, CLASS)


@PREDICTION_TYPES
@pytest.mark.parametrize("scale", [2.5, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (0.0, 1.0))])
def test_class_guidance_has_the_conditional_score(prediction_type, scale):
    level, x_t = _levels(-6.0, -2.0, -0.5, 0.0, 1.0, 3.0, 6.0)
    every, one = (
        closed_form.OptimalDenoiser(distribution, prediction_type) for distribution in (_mixture(), _mixture(CLASS))
    )

    expected = _guided_score(x_t, level, scale)
    for guided in (
        ClassifierFreeGuidance(one, every, scale),
        ClassifierGuidance(every, _log_class, scale, prediction_type),
    ):
        ours = _as_score(guided, x_t, level, prediction_type)
        assert_close(ours, expected, rtol=1e-8, atol=1e-8)
        distribution = {0.0: _mixture(), 1.0: _mixture(CLASS)}.get(scale)
        if distribution is not None:
            assert_close(ours, _score(distribution, x_t, level), rtol=1e-8, atol=1e-8)
        else:
            with refuted():
                assert_close(ours, _score(_mixture(CLASS), x_t, level), rtol=1e-2)


@pytest.mark.slow
def test_the_conditional_denoiser_is_used_outside_of_the_interval():
    level, x_t = _levels(-3.0, -1.0, 0.0, 1.0, 3.0)
    every, one = (closed_form.OptimalDenoiser(distribution) for distribution in (_mixture(), _mixture(CLASS)))
    ours = _evaluate(ClassifierFreeGuidance(one, every, 3.0, log_snr_min=-1.5, log_snr_max=0.5), x_t, level)
    plain, always = _evaluate(one, x_t, level), _evaluate(ClassifierFreeGuidance(one, every, 3.0), x_t, level)
    inside = np.array([False, True, True, False, False])
    assert_close(ours[~inside], plain[~inside])
    assert_close(ours[inside], always[inside])
    with refuted():
        assert_close(plain, always, rtol=0.05)


def _constant(value, level):
    return value


def _linear(slope, x_t, level):
    """A denoiser of every example by itself."""
    return slope * x_t + level.sigma[:, None]


def _quadratic(x_t, level):
    """A log-probability with the gradient -alpha x."""
    return -0.5 * level.alpha * jnp.sum(x_t**2, axis=1)


def test_guidance_by_hand():
    level, x_t = _levels(-3.0, -1.0, 0.0, 1.0, 3.0)
    alpha, sigma = (np.asarray(field)[:, None] for field in level[:2])
    one, every = Partial(_linear, jnp.asarray(0.3)), Partial(_linear, jnp.asarray(0.9))
    scales, weights = jnp.array([0.0, 2.0, 3.0, -1.0, 2.0]), np.array([1.0, 2.0, 3.0, 1.0, 1.0])[:, None]
    low, high = (2 * (level.log_alpha - level.log_sigma))[1:3]
    ours = _evaluate(ClassifierFreeGuidance(one, every, scales, log_snr_min=low, log_snr_max=high), x_t, level)
    assert_close(ours, 0.9 * x_t + sigma + weights * (0.3 - 0.9) * x_t)  # the ends are inside, of weights 2 and 3
    for prediction_type, to_score in (("eps", -1 / sigma), ("score", 1.0)):
        guided = ClassifierGuidance(every, _quadratic, scales, prediction_type)
        change = _evaluate(guided, x_t, level) - _evaluate(every, x_t, level)
        assert_close(change * to_score, np.asarray(scales)[:, None] * -alpha * x_t, rtol=1e-10, atol=1e-12)


def test_guided_denoisers_are_arguments_of_jit_and_their_scale_is_1_by_default():
    level, x_t = _levels(-1.0, 2.0)
    net, first = Partial(_linear, jnp.asarray(0.9)), Partial(lambda x: x[:, :1])
    measured = (net, first, x_t[:, 1:], 0.1)
    call = jax.jit(lambda guided, x_t, level: guided(x_t, level))
    for plain, scaled in (
        (ClassifierGuidance(net, Partial(_quadratic)), ClassifierGuidance(net, Partial(_quadratic), 1.0, "eps")),
        (
            ReconstructionGuidance(*measured),
            ReconstructionGuidance(*measured, scale=1.0, prediction_type="eps"),
        ),
    ):
        assert_close(call(plain, x_t, level), _evaluate(scaled, x_t, level))


def test_a_measurement_by_hand():
    # x_hat = 0.9 x_t of each example, y = the sum of its entries over sqrt(2) and noise
    level, x_t = _levels(-3.0, -1.0, 0.0, 1.0, 3.0)
    alpha, sigma = (np.asarray(field)[:, None] for field in level[:2])
    y, noise, scales = (
        np.arange(5.0)[:, None],
        np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
        np.array([1.0, 2.0, 0.5, 0.0, -1.0]),
    )
    measure, net = lambda x: x.sum(1, keepdims=True) / np.sqrt(2), lambda x, level: 0.9 * x
    level_variance = 0.5 * sigma**2 / (0.5 * alpha**2 + sigma**2)
    constant = Partial(_constant, jnp.asarray(0.7))
    for posterior, data, var in ((None, 1.0, sigma**2), (None, 0.5, level_variance), (constant, 0.5, 0.7)):
        guided = ReconstructionGuidance(
            net, measure, y, jnp.asarray(noise), posterior, jnp.asarray(scales), "x_0", data_variance=data
        )
        residual = y - 0.9 * np.asarray(x_t).sum(1, keepdims=True) / np.sqrt(2)
        gradient = 0.9 / np.sqrt(2) * residual / (noise[:, None] + var)
        expected = 0.9 * x_t + scales[:, None] * sigma**2 / alpha * gradient
        assert_close(_evaluate(guided, x_t, level), expected, rtol=1e-10, atol=1e-12)


def test_the_log_likelihood_of_a_measurement_is_normalized():
    level, x_hat = _levels(-1.0, 2.0)
    y, noise, measure = np.array([[0.3, -0.1], [1.0, 0.2]]), np.array([0.1, 0.2]), lambda x: 0.5 * x
    sigma = np.asarray(level.sigma)
    for options, var in (
        ({}, sigma**2),
        ({"data_variance": 0.5}, 0.5 * sigma**2 / (0.5 * (1 - sigma**2) + sigma**2)),
        ({"posterior_variance": lambda level: 2.0 * level.sigma}, 2 * sigma),
    ):
        ours = LinearMeasurement(measure, y, jnp.asarray(noise), **options)(x_hat, level)
        terms = stats.norm(0.5 * np.asarray(x_hat), np.sqrt(noise + var)[:, None]).logpdf(y)
        assert_close(ours, terms.sum(1))
    clean = jax.tree.map(lambda field: jnp.full(2, field), discretize(LinearLogSNR(9.0, -9.0), 3)(0))
    ours = LinearMeasurement(measure, y, 0.1, data_variance=0.5)(x_hat, clean)
    assert_close(ours, stats.norm(0.5 * np.asarray(x_hat), np.sqrt(0.1)).logpdf(y).sum(1))


def test_the_variance_of_an_exploding_level():
    net, x_t = lambda x, level: 0.5 * x, jnp.array([[1.0]])
    level = NoiseLevel(*(jnp.array([field]) for field in (1.0, 2.0, 0.0, np.log(2.0))))
    ours = _evaluate(
        ReconstructionGuidance(net, lambda x: x, jnp.array([[3.0]]), 0.1, prediction_type="x_0"), x_t, level
    )
    assert_close(ours, 0.5 + 4.0 * 0.5 * 2.5 / (0.1 + 0.8), atol=0.0)  # var_t = sigma^2 / (alpha^2 + sigma^2)


def test_shapes_that_do_not_fit_are_refused():
    level, x_t = _levels(-2.0, 1.0)
    net, measure, y = lambda x, level: x, lambda x: x[:, :1], jnp.ones((2, 1))
    for wrong, message in (
        (ReconstructionGuidance(net, measure, y[:, 0], 0.1), r"y has shape \(2,\), .*\(2, 1\): pass y of that shape"),
        (ReconstructionGuidance(net, measure, y, jnp.ones(3)), r"noise_variance has shape \(3,\): pass a scalar, or 2"),
        (
            ReconstructionGuidance(net, measure, y, 0.1, Partial(_constant, jnp.ones(3))),
            r"posterior_variance has shape",
        ),
        (ReconstructionGuidance(net, measure, y, 0.1, None, jnp.ones((2, 1))), r"scale has shape \(2, 1\)"),
        (ReconstructionGuidance(net, measure, y, 0.1, data_variance=np.ones(2)), r"data_variance has shape \(2,\)"),
        (ClassifierFreeGuidance(net, net, jnp.ones(3)), r"scale has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong(x_t, level)


@pytest.mark.slow
def test_guided_samples_have_the_class_distribution():
    # each with another sampler, as plain functions and as pytrees of arrays
    every, one = (closed_form.OptimalDenoiser(distribution) for distribution in (_mixture(), _mixture(CLASS)))
    schedule, key = discretize(LinearLogSNR(10.0, -9.0), 100), jax.random.key(2)
    x_T = jax.random.normal(key, (4_000, 2))
    guided = ClassifierFreeGuidance(lambda x, level: one(x, level), Partial(lambda x, level: every(x, level)), 1.0)
    distribution = _mixture(CLASS)
    for x_0 in (
        dpmpp_2m(guided, key, x_T, schedule).x_0,
        heun(ClassifierGuidance(every, _log_class, 1.0), key, x_T, schedule).x_0,
    ):
        assert_mean(x_0, distribution.mean, resolution=0.015)
        apart = np.asarray(x_0 - distribution.mean[None])
        assert_mean(apart[:, :, None] * apart[:, None, :], distribution.covariance(), resolution=0.02)


# A measurement y = A x_0 + noise


def _conditioned(weights, means, covariances, a, y, var):
    """The mixture given y, by hand: each component's regression on y, its weight times N(y; A m, A S A^T + var)."""
    distributions, log_weights = [], []
    for w, m, c in zip(weights, means, covariances, strict=True):
        s = a @ c @ a.T + var * np.eye(len(a))
        gain = c @ a.T @ np.linalg.inv(s)
        distributions.append((m + gain @ (y - a @ m), c - gain @ a @ c))
        log_weights.append(np.log(w) + float(multivariate_normal.logpdf(y, a @ m, s)))
    return closed_form.mixture(
        np.exp(log_weights - np.max(log_weights)), *(np.stack(parts) for parts in zip(*distributions, strict=True))
    )


MEAN = np.array([0.3, -0.2, 0.5])
SIGMA = np.array([[1.0, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.5]])
LINE = np.array([[0.6, 0.0, 0.8]])  # A A^T = 1
Y, NOISE = np.array([1.1]), 0.04


def _posterior_variance(level):
    """A Cov[x_0 | x_t] A^T of normal data."""

    def one(alpha, sigma):
        precision = jnp.asarray(np.linalg.inv(SIGMA)) + (alpha / sigma) ** 2 * jnp.eye(3)
        return (LINE @ jnp.linalg.inv(precision) @ LINE.T)[0, 0]

    return jax.vmap(one)(level.alpha, level.sigma)


def _measure(x):
    return x @ LINE.T


def _guided(count, prediction_type="eps", posterior_variance=_posterior_variance):
    best = closed_form.OptimalDenoiser(closed_form.gaussian(MEAN, SIGMA), prediction_type)
    return ReconstructionGuidance(
        best, _measure, jnp.broadcast_to(Y, (count, 1)), NOISE, posterior_variance, prediction_type=prediction_type
    )


@pytest.mark.slow
@PREDICTION_TYPES
def test_a_measurement_of_normal_data_is_exact(prediction_type):
    expected = _conditioned([1.0], [MEAN], [SIGMA], LINE, Y, NOISE)
    level, _ = _levels(-8.0, -2.0, 0.0, 1.0, 4.0, 9.0)
    x_t = jax.random.normal(jax.random.key(3), (6, 3))
    ours = _as_score(_guided(6, prediction_type), x_t, level, prediction_type)
    assert_close(ours, _score(expected, x_t, level), rtol=1e-9, atol=1e-9)
    with refuted():  # whose posterior variance is not that of N(0, I)
        wrong = _as_score(_guided(6, prediction_type, None), x_t, level, prediction_type)
        assert_close(wrong, _score(expected, x_t, level), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("preserving", [True, False])
def test_the_default_posterior_variance_is_that_of_standard_normal_data(preserving):
    # inpainting of one entry from two, with a measurement for each example; a mask is equivalent to a selection
    best = closed_form.OptimalDenoiser(closed_form.gaussian(np.zeros(3), np.eye(3)))
    level, _ = _levels(-3.0, 0.0, 3.0)
    if not preserving:
        sigma = level.sigma / level.alpha
        level = NoiseLevel(jnp.ones(3), sigma, jnp.zeros(3), jnp.log(sigma), level.t)
    x_t, y = (jax.random.normal(jax.random.key(seed), (3, 3)) for seed in (4, 5))
    mask = jnp.broadcast_to(jnp.array([1.0, 0.0, 1.0]), (3, 3))
    selected = _evaluate(ReconstructionGuidance(best, lambda x: x[:, ::2], y[:, ::2], 0.1), x_t, level)
    masked = _evaluate(ReconstructionGuidance(best, lambda x: mask * x, mask * y, 0.1), x_t, level)
    assert_close(selected, masked, atol=1e-12)
    for i in range(3):
        distribution = _conditioned([1.0], [np.zeros(3)], [np.eye(3)], np.eye(3)[::2], np.asarray(y[i, ::2]), 0.1)
        expected = _evaluate(closed_form.OptimalDenoiser(distribution), x_t, level)
        assert_close(selected[i], expected[i], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_sampling_by_a_measurement_has_the_posterior():
    expected = _conditioned([1.0], [MEAN], [SIGMA], LINE, Y, NOISE)
    schedule, key = discretize(LinearLogSNR(10.0, -9.0), 150), jax.random.key(6)
    x_T = jax.random.normal(key, (5_000, 3))
    for x_0 in (heun(_guided(5_000), key, x_T, schedule).x_0, ancestral(_guided(5_000), key, x_T, schedule).x_0):
        assert_mean(x_0, expected.mean, resolution=0.015)
        apart = np.asarray(x_0 - expected.mean[None])
        assert_mean(apart[:, :, None] * apart[:, None, :], expected.covariance(), resolution=0.015)
    free = ddim(_guided(5_000).denoiser, key, x_T, schedule).x_0
    with refuted():
        assert_mean(free, expected.mean)


def _first(x):
    return x[:, :1]


@pytest.mark.slow
def test_a_mixture_s_measurement_is_approximate_and_best_at_little_noise():
    # compared with the posterior of the mixture, at samples of its noisy marginal
    a, y = np.array([[1.0, 0.0]]), np.array([0.6])
    expected = _conditioned(WEIGHTS, MEANS, COVARIANCES, a, y, 0.05)
    best, errors = closed_form.OptimalDenoiser(_mixture()), []
    for log_snr in (-6.0, -3.0, 0.0, 3.0, 6.0, 9.0):
        one = level_from_log_snr(jnp.asarray(log_snr))
        x_t = draws(closed_form.marginal(expected, one), jax.random.key(7), 2_000)
        level = jax.tree.map(lambda field: jnp.full(2_000, field), one)
        posterior_variance = jax.jit(jax.vmap(lambda x, lv: best.distribution.posterior(x, lv).covariance()[0, 0]))(
            x_t, level
        ).mean()
        guided = ReconstructionGuidance(
            best, _first, jnp.full((2_000, 1), y[0]), 0.05, Partial(_constant, posterior_variance)
        )
        ours, plain, ideal = (
            _evaluate(net, x_t, level) for net in (guided, best, closed_form.OptimalDenoiser(expected))
        )
        size = jnp.mean((plain - ideal) ** 2)  # of the guidance
        errors.append(float(jnp.sqrt(jnp.mean((ours - ideal) ** 2) / size)))
    print(f"error of the guidance over its size, log-SNR -6..9: {np.round(errors, 4)}")
    assert errors[-1] < 0.05
    assert np.all(np.array(errors) < 1.0)  # nowhere worse than without guidance
    assert max(errors) > 0.1  # and not exact


@pytest.mark.slow
def test_the_guidance_is_proportional_to_the_scale():
    level, _ = _levels(-2.0, 1.0)
    x_t = jax.random.normal(jax.random.key(3), (2, 3))
    full = _guided(2)
    free = _evaluate(full.denoiser, x_t, level)
    half = ReconstructionGuidance(full.denoiser, _measure, full.y, NOISE, _posterior_variance, 0.5)
    assert_close(_evaluate(half, x_t, level) - free, 0.5 * (_evaluate(full, x_t, level) - free), atol=1e-12)


# The choice of the posterior variance, compared with the exact posterior


def _data_variance_formula(v):
    return lambda level: v * level.sigma**2 / (v * level.alpha**2 + level.sigma**2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _ExactCovariance:
    """Reconstruction guidance with A Cov[x_0 | x_t] A^T of every x_t in place of var_t I, or its diagonal."""

    data: Any
    operator: Any
    y: Any
    noise_variance: Any
    diagonal: bool = field(metadata={"static": True})

    def __call__(self, x_t, level):
        def one(x, lv):
            posterior = self.data.posterior(x, lv)
            covariance = closed_form.matmul(self.operator, posterior.covariance()) @ self.operator.T
            covariance = covariance * jnp.eye(len(self.y)) if self.diagonal else covariance
            gram = covariance + self.noise_variance * jnp.eye(len(self.y))
            residual = jnp.linalg.solve(gram, self.y - self.operator @ posterior.mean)
            slope = jax.vjp(lambda x: self.data.posterior(x, lv).mean, x)[1](self.operator.T @ residual)[0]
            return (x - lv.alpha * posterior.mean) / lv.sigma - lv.sigma * slope

        return jax.vmap(one)(x_t, level)


def _worlds():
    """Name -> data, measured entries, y, noise variance."""
    pairs = np.array([[-1.0, -1.0], [1.0, 1.0]])
    correlated = np.array([[1.0, 0.8], [0.8, 1.0]])
    decay = 0.25 * 0.9 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    return {
        "two modes, v = 1.1": (closed_form.mixture([0.5, 0.5], pairs, [0.1, 0.1]), [0], [0.3], 0.05),
        "two modes, v = 0.18": (closed_form.mixture([0.5, 0.5], 0.4 * pairs, [0.016, 0.016]), [0], [0.12], 0.008),
        "three modes, v = 0.61": (
            closed_form.mixture(WEIGHTS[:3], MEANS[:3], COVARIANCES[:3]), [0], [0.6], 0.05
        ),
        "normal, v = 1": (closed_form.gaussian(np.zeros(2), correlated), [0], [1.5], 0.01),
        "normal, v = 0.1": (closed_form.gaussian(np.zeros(2), 0.1 * correlated), [0], [0.5], 0.001),
        "normal, v = 9": (closed_form.gaussian(np.zeros(2), 9.0 * correlated), [0], [4.5], 0.09),
        "normal, 8 entries, v = 0.25": (
            closed_form.gaussian(np.zeros(8), decay), [0, 1, 2, 6, 7], [0.5, 0.4, 0.6, -0.3, -0.5], 0.001
        ),
    }  # fmt: skip


@pytest.mark.slow
def test_the_posterior_variance_that_comes_closest_to_the_exact_posterior():
    count, table = 5_000, {}
    schedule, x_T = discretize(LinearLogSNR(10.0, -9.0), 200), jax.random.normal(jax.random.key(3), (5_000, 8))
    for name, (data, entries, y, noise) in _worlds().items():
        dims, y = data.mean.size, jnp.asarray(y)
        operator = jnp.eye(dims)[np.array(entries)]
        best, posterior = closed_form.OptimalDenoiser(data), closed_form.linear_posterior(data, operator, y, noise)
        v = float(np.mean(np.asarray(data.variance)[entries]))
        measured = Partial(_times, operator), jnp.broadcast_to(y, (count, len(entries))), noise
        guided = {
            "0": ReconstructionGuidance(best, *measured, Partial(_no_variance)),
            "sigma^2 / alpha^2": ReconstructionGuidance(
                best, *measured, lambda level: (level.sigma / level.alpha) ** 2
            ),
            "data_variance=1": ReconstructionGuidance(best, *measured),
            "data_variance=v": ReconstructionGuidance(best, *measured, data_variance=v),
            "diagonal": _ExactCovariance(data, operator, y, noise, True),
            "covariance": _ExactCovariance(data, operator, y, noise, False),
        }
        hidden = [i for i in range(dims) if i not in entries]
        truth = np.asarray(draws(posterior, jax.random.key(1), count))[:, hidden]
        table[name] = {}
        for how, net in guided.items():
            x_0 = np.asarray(ancestral(net, jax.random.key(4), x_T[:, :dims], schedule).x_0)[:, hidden]
            distances = [stats.wasserstein_distance(*pair) for pair in zip(x_0.T, truth.T, strict=True)]
            table[name][how] = float(np.mean(distances / truth.std(0))) if np.all(np.isfinite(x_0)) else np.inf
    rows = {name: {how: round(value, 3) for how, value in row.items()} for name, row in table.items()}
    mean = {how: np.mean([row[how] for row in table.values()]) for how in guided}
    print(
        "\nW1 of the unmeasured entries to the exact posterior, in its standard deviations:",
        *rows.items(),
        mean,
        sep="\n",
    )
    assert mean["data_variance=v"] < 0.8 * min(mean[how] for how in ("sigma^2 / alpha^2", "data_variance=1"))
    assert mean["data_variance=v"] < 1.1 * mean["diagonal"]  # the exact variances are no better on average
    for name in ("normal, v = 0.1", "normal, v = 9"):
        assert table[name]["data_variance=v"] < 0.5 * table[name]["data_variance=1"]


def _times(operator, x):
    return x @ operator.T


def _no_variance(level):
    return 0.0 * level.sigma
