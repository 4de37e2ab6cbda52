"""PAR: four things to predict, one prediction; what the score of the conditional law has to do with the marginal's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp

from tests.derivations.worlds import PointWorld, assert_mean
from vdm_jax import forward
from vdm_jax.levels import level_from_log_snr
from vdm_jax.parameterization import convert, target, to_eps, to_score, to_x_0
from vdm_jax.schedules import VarianceExploding

KINDS = ("x_0", "eps", "v", "score")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _world():
    return PointWorld(jnp.asarray([[-1.0, 0.5], [0.2, -0.3], [1.0, 1.0]]), jnp.asarray([0.5, 0.2, 0.3]))


def _levels():
    preserving = [level_from_log_snr(jnp.asarray(x)) for x in (-6.0, -1.0, 0.0, 2.0, 6.0)]
    return preserving + [VarianceExploding(0.1, 5.0)(t) for t in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_PAR_1_round_trips(source, wanted):
    # every kind against its definition from the true (x_0, eps), and back again
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 5))
    for level in _levels():
        x_t = level.alpha * x_0 + level.sigma * eps
        given = target(x_0, eps, level, source)
        there = convert(given, x_t, level, source, wanted)
        np.testing.assert_allclose(there, target(x_0, eps, level, wanted), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(convert(there, x_t, level, wanted, source), given, rtol=1e-8, atol=1e-10)


def test_PAR_1_solves_the_two_linear_equations():
    # x_t and v are two equations in x_0 and eps: let sympy solve them, at alpha = 1/2 and sigma = 3 (not preserving)
    x_0, eps = sp.symbols("x_0 eps")
    alpha, sigma, x_t, v = sp.Rational(1, 2), 3, sp.Rational(7, 5), sp.Rational(-2, 3)
    solution = sp.solve([alpha * x_0 + sigma * eps - x_t, alpha * eps - sigma * x_0 - v], [x_0, eps])
    level = level_from_log_snr(jnp.asarray(0.0))._replace(alpha=jnp.asarray(0.5), sigma=jnp.asarray(3.0))
    given = jnp.asarray([float(v)]), jnp.asarray([float(x_t)]), level, "v"
    assert float(to_x_0(*given)[0]) == pytest.approx(float(solution[x_0]), rel=1e-14)
    assert float(to_eps(*given)[0]) == pytest.approx(float(solution[eps]), rel=1e-14)


def test_PAR_2_conditional_score():
    # by automatic differentiation of log q(x_t|x_0)
    x_0, eps = jax.random.normal(jax.random.key(1), (2, 5))
    for level in _levels():
        x_t = level.alpha * x_0 + level.sigma * eps
        score = jax.grad(forward.marginal(x_0, level).log_prob)(x_t)
        np.testing.assert_allclose(target(x_0, eps, level, "score"), score, rtol=1e-9)
        np.testing.assert_allclose(to_score(eps, x_t, level, "eps"), score, rtol=1e-9)


def test_PAR_2_marginal_score_is_the_conditional_expectation():
    # grad log q(x_t) of the exact mixture = the score of the exact denoiser E[x_0 | x_t]
    world = _world()
    for level in _levels():
        for x_t in jax.random.normal(jax.random.key(2), (4, 2)):
            truth = jax.grad(world.log_marginal)(x_t, level)
            np.testing.assert_allclose(
                to_score(world.x_hat(x_t, level), x_t, level, "x_0"), truth, rtol=1e-7, atol=1e-9
            )


def test_erratum_marginal_score_is_not_minus_eps_over_sigma():
    # Printed for the marginal law: -eps / sigma with the eps that made x_t. The correct form passes the same check.
    world, level = _world(), level_from_log_snr(jnp.asarray(0.0))
    x_0 = world.sample(jax.random.key(3), 20_000)
    eps = jax.random.normal(jax.random.key(4), x_0.shape)
    x_t = level.alpha * x_0 + level.sigma * eps
    marginal = jax.vmap(lambda x: jax.grad(world.log_marginal)(x, level))(x_t)
    printed = jax.vmap(lambda x, e: target(x, e, level, "score"))(x_0, eps)
    correct = jax.vmap(lambda x: to_score(world.x_hat(x, level), x, level, "x_0"))(x_t)
    np.testing.assert_allclose(correct, marginal, rtol=1e-8, atol=1e-10)
    assert np.mean(np.abs(printed - marginal)) > 0.1
    # true on average over what may have made x_t: no function of x_t tells them apart
    for probe in (jnp.ones_like(x_t), x_t, jnp.tanh(3 * x_t), x_t**3):
        assert_mean((printed - marginal) * probe, 0.0)


def test_PAR_3_the_optimal_denoiser_averages_clean_points():
    world = _world()
    for level in _levels():
        for x_t in jax.random.normal(jax.random.key(5), (4, 2)):
            # three points of the plane: solve for the weights of the average
            prediction = np.asarray(world.x_hat(x_t, level))
            system = np.vstack([np.asarray(world.points).T, np.ones(3)])
            weights = np.linalg.solve(system, np.append(prediction, 1.0))
            assert np.all(weights > -1e-9)
    # much noise: the mean of the data, blurred; little noise: one of the points
    x_t = jnp.asarray([0.3, -0.2])
    blurred = world.x_hat(x_t, level_from_log_snr(jnp.asarray(-20.0)))
    np.testing.assert_allclose(blurred, world.weights @ world.points, atol=1e-3)
    np.testing.assert_allclose(world.x_hat(x_t, level_from_log_snr(jnp.asarray(9.0))), world.points[1], atol=1e-6)


def test_PAR_3_in_every_kind_the_average_is_optimal():
    # conditional expectations commute with the (affine) conversions: E[kind | x_t] = convert(E[x_0 | x_t])
    world, level = _world(), level_from_log_snr(jnp.asarray(0.5))
    x_t = jnp.asarray([0.1, 0.4])
    weights = jax.nn.softmax(world.log_terms(x_t, level))
    for kind in KINDS:
        values = jax.vmap(lambda x, kind=kind: target(x, (x_t - level.alpha * x) / level.sigma, level, kind))(
            world.points
        )
        ours = convert(world.x_hat(x_t, level), x_t, level, "x_0", kind)
        np.testing.assert_allclose(weights @ values, ours, rtol=1e-12)
