"""POST: the posterior of the forward process, by Bayes' rule and by completing the square symbolically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp

from tests.derivations.worlds import exact_step, number
from vdm_jax import forward
from vdm_jax.schedules import Cosine, LinearBeta, LinearLogSNR, Sigmoid, VarianceExploding
from vdm_jax.tables import from_betas, linear_betas

SCHEDULES = [LinearBeta(), Cosine(), Sigmoid(), LinearLogSNR(), VarianceExploding(0.1, 5.0)]
R = sp.Rational
# exact levels (alpha_s, sigma_s, alpha_t, sigma_t): variance preserving, neither, and exploding
LEVELS = [(R(12, 13), R(5, 13), R(3, 5), R(4, 5)), (R(2), R(1, 3), R(3, 2), R(4)), (R(1), R(1, 10), R(1), R(7))]
BETAS = [R(1, 10), R(1, 5), R(1, 3)]

a_s, g_s, a_t, g_t = sp.symbols("alpha_s sigma_s alpha_t sigma_t", positive=True)
x_s, x_t, x_0, eps, score = sp.symbols("x_s x_t x_0 eps score", real=True)
abar_s, beta = sp.symbols("abar_s beta", positive=True)  # abar_{t-1} and beta_t
ABAR_T = abar_s * (1 - beta)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _complete_the_square():
    """Mean and variance in x_s of q(x_t|x_s) q(x_s|x_0): -log of it is A x_s^2 / 2 - B x_s + const."""
    keep = a_t / a_s
    exponent = (x_t - keep * x_s) ** 2 / (2 * (g_t**2 - keep**2 * g_s**2)) + (x_s - a_s * x_0) ** 2 / (2 * g_s**2)
    poly = sp.Poly(sp.expand(exponent), x_s)
    curvature, slope = 2 * poly.coeff_monomial(x_s**2), -poly.coeff_monomial(x_s)
    return sp.factor(slope / curvature), sp.factor(1 / curvature)


MEAN, VAR = _complete_the_square()
IN_BETAS = {a_s: sp.sqrt(abar_s), g_s: sp.sqrt(1 - abar_s), a_t: sp.sqrt(ABAR_T), g_t: sp.sqrt(1 - ABAR_T)}
# the same with the clean x_0 replaced by what made x_t
BY_EPS = {x_0: (x_t - g_t * eps) / a_t}
BY_SCORE = {x_0: (x_t + g_t**2 * score) / a_t}


def _equal(left, right):
    return sp.simplify(sp.expand(sp.simplify(left) - sp.simplify(right))) == 0


def _named(values):
    return {{"x_t": x_t, "x_0": x_0, "eps": eps, "score": score}[name]: value for name, value in values.items()}


def _at_levels(expression, levels, **values):
    return float(expression.subs(dict(zip((a_s, g_s, a_t, g_t), levels, strict=True))).subs(_named(values)))


def _at_betas(expression, t, **values):
    """A formula in abar_{t-1} and beta_t at step t of BETAS."""
    return float(
        sp.N(
            expression.subs({abar_s: sp.prod(1 - b for b in BETAS[: t - 1]), beta: BETAS[t - 1]}).subs(_named(values)),
            30,
        )
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_POST_1_bayes_pointwise(schedule):
    rng = np.random.default_rng(0)
    for _ in range(6):
        s, t = np.sort(rng.uniform(0.02, 0.98, 2))
        x_0, x_s, x_t = (jnp.asarray(rng.normal(size=3)) for _ in range(3))
        step = schedule.step(float(s), float(t))
        joint = forward.transition(x_s, step).log_prob(x_t) + forward.marginal(x_0, step.s).log_prob(x_s)
        bayes = joint - forward.marginal(x_0, step.t).log_prob(x_t)
        assert float(forward.posterior(x_t, x_0, step).log_prob(x_s)) == pytest.approx(float(bayes), rel=1e-9, abs=1e-9)


def test_POST_1_bayes_on_a_table():
    table, rng = linear_betas(), np.random.default_rng(1)
    for s, t in [(1, 2), (1, 1000), (499, 500), (999, 1000), (3, 700)]:
        x_0, x_s, x_t = (jnp.asarray(rng.normal(size=3)) for _ in range(3))
        step = table.step(s, t)
        joint = forward.transition(x_s, step).log_prob(x_t) + forward.marginal(x_0, step.s).log_prob(x_s)
        bayes = joint - forward.marginal(x_0, step.t).log_prob(x_t)
        assert float(forward.posterior(x_t, x_0, step).log_prob(x_s)) == pytest.approx(float(bayes), rel=1e-8)


def test_POST_2_mean_by_completing_the_square():
    # Ho et al.'s form and the SNR form are both what the square gives ...
    ho = (sp.sqrt(1 - beta) * (1 - abar_s) * x_t + sp.sqrt(abar_s) * beta * x_0) / (1 - ABAR_T)
    assert _equal(MEAN.subs(IN_BETAS), ho)
    r = (a_t / g_t) ** 2 / (a_s / g_s) ** 2
    assert _equal(MEAN, a_s * (r * x_t / a_t + (1 - r) * x_0))
    # ... and what the library gives
    for levels in LEVELS:
        mean = forward.posterior(jnp.asarray([0.7]), jnp.asarray([-1.5]), exact_step(*levels)).mean[0]
        assert float(mean) == pytest.approx(_at_levels(MEAN, levels, x_t=R(7, 10), x_0=R(-3, 2)), rel=1e-14)
    table = from_betas(np.array([float(b) for b in BETAS]))
    for t in (2, 3):
        mean = forward.posterior(jnp.asarray([0.7]), jnp.asarray([-1.5]), table.step(t - 1, t)).mean[0]
        assert float(mean) == pytest.approx(_at_betas(ho, t, x_t=R(7, 10), x_0=R(-3, 2)), rel=1e-13)


def test_POST_3_variance_by_completing_the_square():
    ho = beta * (1 - abar_s) / (1 - ABAR_T)
    assert _equal(VAR.subs(IN_BETAS), ho)
    r = (a_t / g_t) ** 2 / (a_s / g_s) ** 2
    assert _equal(VAR, g_s**2 * (1 - r))
    for levels in LEVELS:
        step = exact_step(*levels)
        assert float(forward.posterior_variance(step)) == pytest.approx(_at_levels(VAR, levels), rel=1e-14)
        assert float(forward.posterior(jnp.zeros(1), jnp.zeros(1), step).var) == pytest.approx(_at_levels(VAR, levels))
    table = from_betas(np.array([float(b) for b in BETAS]))
    for t in (2, 3):
        assert float(forward.posterior_variance(table.step(t - 1, t))) == pytest.approx(_at_betas(ho, t), rel=1e-13)


def test_POST_3_a_clean_s_is_the_limit():
    # sigma_s -> 0: the mean tends to alpha_s x_0, the variance to 0
    assert sp.limit(MEAN, g_s, 0) == a_s * x_0
    assert sp.limit(VAR, g_s, 0) == 0
    law = forward.posterior(jnp.asarray([0.7]), jnp.asarray([-1.5]), linear_betas().step(0, 600))
    assert float(law.mean[0]) == -1.5
    assert float(law.var) == 0.0


def test_POST_4_mean_by_noise():
    printed = (x_t - beta / sp.sqrt(1 - ABAR_T) * eps) / sp.sqrt(1 - beta)
    mean = MEAN.subs(BY_EPS)
    assert _equal(mean.subs(IN_BETAS), printed)
    for levels in LEVELS:
        law = forward.posterior_from_eps(jnp.asarray([0.7]), jnp.asarray([-1.5]), exact_step(*levels))
        assert float(law.mean[0]) == pytest.approx(_at_levels(mean, levels, x_t=R(7, 10), eps=R(-3, 2)), rel=1e-13)
        assert float(law.var) == pytest.approx(_at_levels(VAR, levels), rel=1e-14)


def test_POST_5_mean_by_score():
    printed = (x_t + beta * score) / sp.sqrt(1 - beta)
    mean = MEAN.subs(BY_SCORE)
    assert _equal(mean.subs(IN_BETAS), printed)
    for levels in LEVELS:
        law = forward.posterior_from_score(jnp.asarray([0.7]), jnp.asarray([-1.5]), exact_step(*levels))
        assert float(law.mean[0]) == pytest.approx(_at_levels(mean, levels, x_t=R(7, 10), score=R(-3, 2)), rel=1e-13)
        assert float(law.var) == pytest.approx(_at_levels(VAR, levels), rel=1e-14)


def test_POST_5_score_is_that_of_the_conditional_marginal():
    # the score by automatic differentiation of log q(x_t|x_0), not by formula
    step, x_0, x_t = exact_step(*LEVELS[0]), jnp.asarray([0.4, -1.0]), jnp.asarray([0.1, 0.9])
    score = jax.grad(forward.marginal(x_0, step.t).log_prob)(x_t)
    truth = forward.posterior(x_t, x_0, step)
    np.testing.assert_allclose(forward.posterior_from_score(x_t, score, step).mean, truth.mean, rtol=1e-13)


def test_POST_6_interpolation_form():
    # linear in x_t and x_0 by the square; the noise scale is the root of its variance
    for levels in LEVELS:
        c_1, c_2, sigma = forward.posterior_coefficients(exact_step(*levels))
        expanded = sp.expand(MEAN)
        assert float(c_1) == pytest.approx(_at_levels(expanded.coeff(x_t), levels), rel=1e-14)
        assert float(c_2) == pytest.approx(_at_levels(expanded.coeff(x_0), levels), rel=1e-14)
        assert float(sigma) == pytest.approx(_at_levels(sp.sqrt(VAR), levels), rel=1e-14)


def test_POST_6_interpolation_reproduces_the_marginal():
    # x_t drawn from q(x_t|x_0), then x_s from the posterior: x_s has q(x_s|x_0). Means and variances, exactly.
    m, n = sp.expand(MEAN).coeff(x_t), sp.expand(MEAN).coeff(x_0)
    assert sp.simplify(m * a_t + n - a_s) == 0
    assert sp.simplify(m**2 * g_t**2 + VAR - g_s**2) == 0
    for levels in LEVELS:
        step = exact_step(*levels)
        c_1, c_2, sigma = forward.posterior_coefficients(step)
        assert float(c_1 * step.t.alpha + c_2) == pytest.approx(float(step.s.alpha), rel=1e-14)
        assert float(c_1**2 * step.t.sigma**2 + sigma**2) == pytest.approx(float(step.s.sigma**2), rel=1e-13)


def test_erratum_scale_of_the_posterior_mean():
    # printed with 1 / sqrt(abar_t) in the place of 1 / sqrt(1 - beta_t): fails the square from t = 2 on
    inner = x_t - beta / sp.sqrt(1 - ABAR_T) * eps
    square = MEAN.subs(BY_EPS).subs(IN_BETAS)
    assert _equal(square, inner / sp.sqrt(1 - beta))
    assert not _equal(square, inner / sp.sqrt(ABAR_T))
    at = {"x_t": R(7, 10), "eps": R(-3, 2)}
    table = from_betas(np.array([float(b) for b in BETAS]))
    ours = forward.posterior_from_eps(jnp.asarray([0.7]), number(at["eps"])[None], table.step(2, 3)).mean[0]
    assert float(ours) == pytest.approx(_at_betas(inner / sp.sqrt(1 - beta), 3, **at), rel=1e-13)
    assert float(ours) != pytest.approx(_at_betas(inner / sp.sqrt(ABAR_T), 3, **at), rel=0.01)
