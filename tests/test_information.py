"""Expectations over closed-form distributions against scipy, identities, and estimates by the library itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from tests.test_closed_form import COVARIANCES, FACTOR, MEANS, WEIGHTS, distributions
from vdm_jax import closed_form, elbo, information
from vdm_jax.discrete_schedules import discretize
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import LinearLogSNR

SMALL = partial(information.quadrature, nodes=61)
# of every class; the slow ones are of the same classes
NAMES = [
    "gaussian",
    "mixture",
    "pixels",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("low_rank", "points", "independent")),
]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _levels(*log_snr):
    return jax.jit(jax.vmap(level_from_log_snr))(np.asarray(log_snr))


def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.02, 0.3])


def _assert_within(estimate, expected, slack=1e-10):
    assert abs(float(estimate.value) - float(expected)) <= float(estimate.standard_error) + slack


@pytest.mark.parametrize("name", ["mixture", "points"])
def test_quadrature_gives_the_moments(name):
    distribution = distributions()[name]

    @jax.jit
    def second_moment(distribution):
        expected = distribution.covariance()[0, 1] + distribution.mean[0] * distribution.mean[1]
        return SMALL(lambda x: x[0] * x[1], distribution), expected

    second, expected = second_moment(distribution)
    assert float(second.value) == pytest.approx(float(expected), rel=1e-12)
    assert float(second.standard_error) < 1e-12


def test_quadrature_in_three_dimensions():
    distribution = closed_form.low_rank(np.zeros(3), np.array([[1.0, 0.0], [1.0, 0.5], [0.0, 2.0]]), 0.1)
    estimate, c = jax.jit(lambda d: (SMALL(lambda x: (x[0] * x[2]) ** 2, d), d.covariance()))(distribution)
    assert float(estimate.value) == pytest.approx(float(c[0, 0] * c[2, 2] + 2 * c[0, 2] ** 2), rel=1e-9)  # Isserlis


def test_quadrature_error_estimate_is_an_upper_bound():
    distribution = closed_form.gaussian([0.3], [[1.0]])
    expected = integrate.quad(lambda x: np.tanh(5 * x) ** 2 * stats.norm(0.3, 1).pdf(x), -12, 12, limit=500)[0]
    errors = []
    for nodes in (41, 81, 321):
        tanh_squared = partial(information.quadrature, lambda x: jnp.tanh(5 * x[0]) ** 2, nodes=nodes)
        estimate = jax.jit(tanh_squared)(distribution)
        _assert_within(estimate, expected)
        errors.append(abs(float(estimate.value) - expected))
    assert errors[-1] < 1e-12 < errors[0]


@pytest.mark.slow
def test_the_error_of_two_samples_is_half_their_distance():
    distribution, key = closed_form.gaussian([0.0], [[1.0]]), jax.random.key(0)
    estimate = information.monte_carlo(lambda x: x[0], distribution, key, num_samples=2)
    a, b = jax.vmap(distribution.sample)(jax.random.split(key, 2))[:, 0]
    np.testing.assert_allclose(tuple(estimate), [(a + b) / 2, abs(a - b) / 2], rtol=1e-5)


def test_monte_carlo_states_its_standard_error():
    distribution = distributions()["gaussian"]
    estimates = [
        information.monte_carlo(lambda x: jnp.sum(x), distribution, jax.random.key(i), num_samples=2000)
        for i in range(20)
    ]
    z = np.array([(float(e.value) - float(distribution.mean.sum())) / float(e.standard_error) for e in estimates])
    assert np.all(np.abs(z) < 4)
    assert 0.5 < z.std() < 1.6
    expected = np.sqrt(float(distribution.covariance().sum()) / 2000)
    assert float(estimates[0].standard_error) == pytest.approx(expected, rel=0.1)


def test_entropy_is_scipys():
    p = lambda x: 0.3 * stats.norm(-1, 0.02**0.5).pdf(x) + 0.7 * stats.norm(0.8, 0.3**0.5).pdf(x)  # noqa: E731
    expected = integrate.quad(lambda x: -p(x) * np.log(p(x)), -6, 7, points=[-1, 0.8], limit=500, epsabs=1e-13)[0]
    estimate = jax.jit(information.entropy)(_mixture())
    _assert_within(estimate, expected)
    assert float(estimate.value) == pytest.approx(expected, rel=1e-9)
    # independent numbers: the sum
    both = closed_form.Independent(jax.tree.map(lambda leaf: np.stack([leaf] * 2), _mixture()))
    assert float(jax.jit(information.entropy)(both).value) == pytest.approx(2 * expected, rel=1e-9)


def test_mmse_of_two_points():
    # x_0 = +-1: E[x_0 | x_t] = tanh(alpha x_t / sigma^2)
    distribution, levels = closed_form.empirical([[-1.0], [1.0]]), _levels(-3.0, 0.0, 2.0)
    ours = jax.jit(jax.vmap(lambda level: information.mmse(distribution, level).value))(levels)
    for mmse, alpha, sigma in zip(ours, np.asarray(levels.alpha), np.asarray(levels.sigma), strict=True):
        square = lambda x, a=alpha, s=sigma: np.tanh(a * x / s**2) ** 2 * stats.norm(a, s).pdf(x)  # noqa: E731
        expected = 1 - integrate.quad(square, alpha - 10 * sigma, alpha + 10 * sigma, epsabs=1e-13)[0]
        assert float(mmse) == pytest.approx(expected, rel=1e-9)


def test_mmse_of_a_gaussian_by_the_regression_formula():
    distribution = distributions()["low_rank"]
    covariance = FACTOR @ FACTOR.T + 0.1 * np.eye(4)
    level = level_from_log_snr(jnp.asarray(0.7))
    noisy = float(level.alpha) ** 2 * covariance + float(level.sigma) ** 2 * np.eye(4)
    expected = np.trace(covariance - float(level.alpha) ** 2 * covariance @ np.linalg.solve(noisy, covariance))
    assert float(jax.jit(information.mmse)(distribution, level).value) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_i_mmse(name):
    # d I / d SNR = mmse / 2: two integrals that share no formula
    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def slope_and_mmse(distribution, log_snr):
        def mutual_information(log_snr):
            return information.mutual_information(distribution, level_from_log_snr(log_snr), SMALL).value

        mmse = information.mmse(distribution, level_from_log_snr(log_snr), SMALL).value
        return jax.grad(mutual_information)(log_snr), mmse

    log_snr = np.array([-2.0, 1.0])
    slope, mmse = slope_and_mmse(distributions()[name], log_snr)
    np.testing.assert_allclose(slope, 0.5 * np.exp(log_snr) * mmse, rtol=1e-7)


@pytest.mark.parametrize("name", [pytest.param("points", marks=pytest.mark.slow), "pixels"])
def test_information_of_a_finite_distribution_tends_to_its_entropy(name):
    @jax.jit
    def evaluate(distribution, levels):
        information_at = jax.vmap(lambda level: information.mutual_information(distribution, level, SMALL).value)
        return information.entropy(distribution).value, information_at(levels)

    entropy, (clear, blurred) = evaluate(distributions()[name], _levels(9.0, -25.0))
    assert float(clear) == pytest.approx(float(entropy), abs=1e-6)
    assert float(blurred) < 1e-9


@pytest.mark.parametrize("num_steps", [3, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "pixels",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("gaussian", "low_rank", "mixture", "points", "independent")
        ),
    ],
)
def test_optimal_bound_is_the_expectation_of_the_library_s(name, num_steps):
    distribution, schedule = distributions()[name], discretize(LinearLogSNR(3.0, -6.0), num_steps)
    expected = information.optimal_bound(distribution, schedule, SMALL)
    x_0 = jax.jit(jax.vmap(distribution.sample))(jax.random.split(jax.random.key(0), 8000))
    denoiser, decoder = closed_form.OptimalDenoiser(distribution, "x_0"), closed_form.OptimalDecoder(distribution)
    ours = elbo.bound(denoiser, jax.random.key(1), x_0, schedule, decoder, prediction_type="x_0")
    for term, estimate in (*zip(ours, expected, strict=True), (ours.total, expected.total)):
        error = np.std(term) / np.sqrt(len(x_0)) + float(estimate.standard_error)
        assert abs(np.mean(term) - float(estimate.value)) < 4 * error


@pytest.mark.parametrize(
    "name", ["gaussian", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixture", "points"))]
)
def test_optimal_bound_limit_is_approached(name):
    distribution, ends = distributions()[name], discretize(LinearLogSNR(5.0, -3.0), 2)
    limit = information.optimal_bound_limit(distribution, ends(1), ends(2), SMALL).total
    gaps = []
    for num_steps in (100, 200):
        bound = information.optimal_bound(distribution, discretize(LinearLogSNR(5.0, -3.0), num_steps), SMALL).total
        gaps.append(float(bound.value - limit.value))
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.03)  # O(1 / T)
    assert gaps[-1] > 0


def test_optimal_bound_limit_exceeds_the_entropy_by_the_prior_alone():
    # KL(q(x_T) || N(0, 1)) of a one-dimensional mixture, by scipy
    distribution, ends = _mixture(), discretize(LinearLogSNR(8.0, -1.0), 2)
    alpha, sigma = float(ends(2).alpha), float(ends(2).sigma)
    parts = [
        (w, stats.norm(alpha * m, np.sqrt(alpha**2 * v + sigma**2))) for w, m, v in ((0.3, -1, 0.02), (0.7, 0.8, 0.3))
    ]
    q = lambda x: sum(w * n.pdf(x) for w, n in parts)  # noqa: E731
    kl = integrate.quad(lambda x: q(x) * (np.log(q(x)) - stats.norm.logpdf(x)), -9, 9, epsabs=1e-13)[0]
    bound = information.optimal_bound_limit(distribution, ends(1), ends(2)).total.value
    excess = bound - jax.jit(information.entropy)(distribution).value
    assert float(excess) == pytest.approx(kl, rel=1e-7)


def test_another_prior():
    distribution, ends = distributions()["gaussian"], discretize(LinearLogSNR(5.0, -3.0), 2)
    wide = information.optimal_bound_limit(distribution, ends(1), ends(2), prior=Normal(0.3, var=4.0))
    alpha, sigma = float(ends(2).alpha), float(ends(2).sigma)
    data_covariance = FACTOR @ FACTOR.T + np.diag([0.1, 0.2, 0.3, 0.4])
    covariance = alpha**2 * data_covariance + sigma**2 * np.eye(4)
    mean = alpha * np.asarray(distribution.mean).reshape(-1) - 0.3
    # E KL(q(x_T|x_0) || N(0.3, 4 I)) = KL(q(x_T) || N(0.3, 4 I)) + I(x_0; x_T), the first in closed form
    marginal = 0.5 * (np.trace(covariance) / 4 + mean @ mean / 4 - 4 - np.linalg.slogdet(covariance / 4)[1])
    information_left = float(jax.jit(information.mutual_information)(distribution, ends(2)).value)
    assert float(wide.prior.value) == pytest.approx(marginal + information_left, rel=1e-10)
    # the whole bound exceeds the entropy by KL(q(x_T) || N(0.3, 4 I))
    entropy = stats.multivariate_normal(np.zeros(4), data_covariance).entropy()
    assert float(wide.total.value) == pytest.approx(marginal + entropy, rel=1e-10)


def test_quadrature_refuses_unsupported_distributions():
    with pytest.raises(ValueError, match=r"in 4 dimensions: .*monte_carlo"):
        information.quadrature(jnp.sum, distributions()["gaussian"])
    with pytest.raises(ValueError, match="odd"):
        information.quadrature(jnp.sum, closed_form.mixture(WEIGHTS, MEANS, COVARIANCES), nodes=10)


def test_errors_add_up():
    def unsure(function, distribution):
        return information.quadrature(function, distribution)._replace(standard_error=jnp.asarray(1.0))

    distribution, ends = _mixture(), discretize(LinearLogSNR(5.0, -3.0), 3)
    limit = information.optimal_bound_limit(distribution, ends(1), ends(3), unsure)
    # prior: closed form; reconstruction: an entropy and a mutual information; diffusion: two mutual informations
    assert [float(term.standard_error) for term in limit] == [0.0, 2.0, 2.0]
    assert float(limit.total.standard_error) == 4.0
    weights = [0.5 * float(ends(t - 1).snr - ends(t).snr) for t in (2, 3)]
    assert float(information.optimal_bound(distribution, ends, unsure).diffusion.standard_error) == pytest.approx(
        sum(weights), rel=1e-9
    )
