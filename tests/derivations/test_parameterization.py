"""PAR: four prediction types, all equivalent; the conditional score and the marginal score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp

from tests.derivations.algebra import R, log_normal
from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from tests.derivations.worlds import draws, number
from vdm_jax import closed_form, forward
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.parameterization import convert, prediction_target, to_eps, to_score, to_v, to_x_0
from vdm_jax.schedules import VarianceExploding

PREDICTION_TYPES = ("x_0", "eps", "v", "score")
a, g = sp.symbols("alpha sigma", positive=True)
x_0, eps, x_t, value = sp.symbols("x_0 eps x_t value", real=True)
# the definition of each prediction type, in the true x_0 and eps
DEFINITIONS = {"x_0": x_0, "eps": eps, "v": a * eps - g * x_0, "score": -eps / g}
TO = {"x_0": to_x_0, "eps": to_eps, "v": to_v, "score": to_score}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _points():
    return closed_form.empirical([[-1.0, 0.5], [0.2, -0.3], [1.0, 1.0]], [0.5, 0.2, 0.3])


def _levels():
    preserving = [level_from_log_snr(jnp.asarray(x)) for x in (-6.0, -1.0, 0.0, 2.0, 6.0)]
    return preserving + [VarianceExploding(0.1, 5.0)(t) for t in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
def test_PAR_1_round_trips(source, wanted):
    # every prediction type against its definition from the true (x_0, eps), and back again
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 5))
    for level in _levels():
        x_t = level.alpha * x_0 + level.sigma * eps
        given = prediction_target(x_0, eps, level, source)
        there = convert(given, x_t, level, source, wanted)
        assert_close(there, prediction_target(x_0, eps, level, wanted), rtol=1e-8, atol=1e-10)
        assert_close(convert(there, x_t, level, wanted, source), given, rtol=1e-8, atol=1e-10)


def _level(alpha, sigma):
    alpha, sigma = number(alpha), number(sigma)
    return NoiseLevel(alpha, sigma, jnp.log(alpha), jnp.log(sigma))


def _average(w, first, second):
    """E[x_0|x_t] of two points with weights w and 1 - w."""
    p, q = w * sp.exp(log_normal(x_t, a * first, g**2)), (1 - w) * sp.exp(log_normal(x_t, a * second, g**2))
    return (p * first + q * second) / (p + q)


def _solve(prediction_type):
    """x_0 and eps from x_t and a prediction of this type: two linear equations."""
    return sp.solve([a * x_0 + g * eps - x_t, DEFINITIONS[prediction_type] - value], [x_0, eps])


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
def test_PAR_1_solves_the_two_linear_equations(source, wanted):
    # the target prediction type, at the x_0 and eps that solve for the source
    formula = DEFINITIONS[wanted].subs(_solve(source), simultaneous=True)
    # and back: the true source gives the true target
    truth = {value: DEFINITIONS[source], x_t: a * x_0 + g * eps}
    assert_proved(formula.subs(truth, simultaneous=True), DEFINITIONS[wanted])
    for alpha, sigma in [(R(3, 5), R(4, 5)), (R(1, 2), R(3)), (R(1), R(1, 10))]:  # preserving, neither, exploding
        exact = formula.subs({a: alpha, g: sigma, value: R(-2, 3), x_t: R(7, 5)})
        given = number(R(-2, 3))[None], number(R(7, 5))[None], _level(alpha, sigma)
        assert_close(convert(*given, source, wanted)[0], exact, rtol=1e-13)
        assert_close(TO[wanted](*given, source)[0], exact, rtol=1e-13)


def test_PAR_2_conditional_score():
    # the derivative of log q(x_t|x_0), at the x_t of x_0 and eps
    score = sp.diff(log_normal(x_t, a * x_0, g**2), x_t)
    assert_proved(score.subs(x_t, a * x_0 + g * eps), DEFINITIONS["score"])


def test_PAR_2_conditional_score_in_the_library():
    # by automatic differentiation of log q(x_t|x_0)
    clean, noise = jax.random.normal(jax.random.key(1), (2, 5))
    for level in _levels():
        noisy = level.alpha * clean + level.sigma * noise
        slope = jax.grad(forward.marginal(clean, level).log_prob)(noisy)
        assert_close(prediction_target(clean, noise, level, "score"), slope, rtol=1e-9)
        assert_close(to_score(noise, noisy, level, "eps"), slope, rtol=1e-9)


@pytest.mark.slow
def test_PAR_2_marginal_score_of_two_points():
    # q(x_t) of two points: the derivative of its log is the mean of the conditional scores, weighted by q(x_0|x_t)
    w, first, second = sp.symbols("w c_1 c_2", positive=True)
    terms = [weight * sp.exp(log_normal(x_t, a * c, g**2)) for weight, c in ((w, first), (1 - w, second))]
    score = sp.diff(sp.log(sum(terms)), x_t)
    conditional = [-(x_t - a * c) / g**2 for c in (first, second)]
    assert_proved(score, sum(p * s for p, s in zip(terms, conditional, strict=True)) / sum(terms))
    # and the score of the average of the two points
    assert_proved(score, (a * _average(w, first, second) - x_t) / g**2)
    distribution = closed_form.empirical([[0.25], [1.5]], [0.375, 0.625])
    for alpha, sigma in [(R(3, 5), R(4, 5)), (R(1, 2), R(3))]:
        truth = score.subs({w: R(3, 8), first: R(1, 4), second: R(3, 2), a: alpha, g: sigma, x_t: R(7, 5)})
        noisy, level = number(R(7, 5))[None], _level(alpha, sigma)
        x_hat = closed_form.optimal_prediction(distribution, noisy, level, "x_0")
        assert_close(to_score(x_hat, noisy, level, "x_0")[0], sp.N(truth, 30), rtol=1e-13)


@pytest.mark.slow
def test_PAR_2_marginal_score_is_the_conditional_expectation():
    # grad log q(x_t) of the exact mixture = the score of the exact denoiser E[x_0 | x_t]
    distribution = _points()
    for level in _levels():
        for x_t in jax.random.normal(jax.random.key(2), (4, 2)):
            truth = jax.grad(closed_form.marginal(distribution, level).log_prob)(x_t)
            x_hat = closed_form.optimal_prediction(distribution, x_t, level, "x_0")
            assert_close(to_score(x_hat, x_t, level, "x_0"), truth, rtol=1e-7, atol=1e-9)


def test_erratum_marginal_score_is_not_minus_eps_over_sigma():
    # Printed for the marginal: -eps / sigma with the eps that made x_t. The correct form passes the same check.
    distribution, level = _points(), level_from_log_snr(jnp.asarray(0.0))
    x_0 = draws(distribution, jax.random.key(3), 20_000)
    eps = jnp.asarray(np.random.RandomState(4).randn(*x_0.shape))

    @jax.jit
    @jax.vmap
    def scores(x_0, eps):
        x_t = level.alpha * x_0 + level.sigma * eps
        x_hat = closed_form.optimal_prediction(distribution, x_t, level, "x_0")
        marginal = jax.grad(closed_form.marginal(distribution, level).log_prob)(x_t)
        return x_t, marginal, to_score(x_hat, x_t, level, "x_0"), prediction_target(x_0, eps, level, "score")

    x_t, marginal, correct, printed = map(np.asarray, scores(x_0, eps))
    assert_close(correct, marginal, rtol=1e-8, atol=1e-10)
    with refuted():
        assert_close(printed, marginal, rtol=1e-8, atol=0.1)
    assert np.mean(np.abs(printed - marginal)) > 0.1
    # both agree on average given x_t: no function of x_t distinguishes them
    for probe in (np.ones_like(x_t), x_t, np.tanh(3 * x_t), x_t**3):
        assert_mean((printed - marginal) * probe, 0.0)


@pytest.mark.slow
def test_PAR_3_the_optimal_denoiser_averages_clean_points():
    distribution = _points()
    for level in _levels():
        for x_t in jax.random.normal(jax.random.key(5), (4, 2)):
            # three points in the plane: solve for the weights of the average
            noise = closed_form.optimal_prediction(distribution, x_t, level, "eps")  # the optimal network output
            prediction = np.asarray(to_x_0(noise, x_t, level, "eps"))
            system = np.vstack([np.asarray(distribution.points).T, np.ones(3)])
            weights = np.linalg.solve(system, np.append(prediction, 1.0))
            assert np.all(weights > -1e-9)
    # much noise: the mean of the data, blurred; little noise: one of the points
    noisy = jnp.asarray([0.3, -0.2])
    blurred = closed_form.optimal_prediction(distribution, noisy, level_from_log_snr(jnp.asarray(-20.0)), "x_0")
    np.testing.assert_allclose(blurred, distribution.mean, atol=1e-3)
    sharp = closed_form.optimal_prediction(distribution, noisy, level_from_log_snr(jnp.asarray(9.0)), "x_0")
    np.testing.assert_allclose(sharp, distribution.points[1], atol=1e-6)


def test_PAR_3_much_noise_blurs_and_little_does_not():
    # E[x_0|x_t] of two points, where the signal vanishes and where the noise does, from an x_t nearer to the first
    w, first, gap = sp.symbols("w c_1 gap", positive=True)
    x_hat = _average(w, first, first + gap)
    assert_proved(sp.limit(x_hat, a, 0), w * first + (1 - w) * (first + gap))
    near = x_hat.subs(x_t, a * (first + gap / 4))
    assert_proved(sp.limit(sp.simplify(near), g, 0, "+"), first)


def test_PAR_3_the_average_is_optimal_for_every_prediction_type():
    # conditional expectations commute with the (affine) conversions: E[type | x_t] = convert(E[x_0 | x_t])
    distribution, level = _points(), level_from_log_snr(jnp.asarray(0.5))
    x_t = jnp.asarray([0.1, 0.4])
    weights = jnp.exp(distribution.posterior(x_t, level).log_weights)
    for prediction_type in PREDICTION_TYPES:
        values = jax.vmap(
            lambda x, prediction_type=prediction_type: prediction_target(
                x, (x_t - level.alpha * x) / level.sigma, level, prediction_type
            )
        )(distribution.points)
        ours = convert(
            closed_form.optimal_prediction(distribution, x_t, level, "x_0"), x_t, level, "x_0", prediction_type
        )
        assert_close(weights @ values, ours, rtol=1e-12)
