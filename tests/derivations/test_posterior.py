"""POST: the posterior of the forward process, by Bayes' rule and by completing the square symbolically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp

from tests.derivations.algebra import (
    ABAR_T,
    ADDED,
    BETAS,
    IN_BETAS,
    KEEP,
    LEVELS,
    R,
    a_s,
    a_t,
    abar_s,
    at_levels,
    at_step,
    beta,
    eps,
    g_s,
    g_t,
    log_normal,
    score,
    x_0,
    x_s,
    x_t,
)
from tests.derivations.check import assert_close, assert_disproved, assert_proved, refuted
from tests.derivations.worlds import exact_step
from vdm_jax import closed_form, forward, information
from vdm_jax.discrete_schedules import from_betas, linear_betas
from vdm_jax.gaussian import Normal, kl
from vdm_jax.noise_levels import step_from_log_snr
from vdm_jax.schedules import Cosine, LinearBeta, LinearLogSNR, Sigmoid, VarianceExploding

SCHEDULES = [LinearBeta(), Cosine(), Sigmoid(), LinearLogSNR(), VarianceExploding(0.1, 5.0)]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _complete_the_square():
    """Mean and variance in x_s of q(x_t|x_s) q(x_s|x_0): -log of it is A x_s^2 / 2 - B x_s + const."""
    exponent = (x_t - KEEP * x_s) ** 2 / (2 * ADDED) + (x_s - a_s * x_0) ** 2 / (2 * g_s**2)
    poly = sp.Poly(sp.expand(exponent), x_s)
    curvature, slope = 2 * poly.coeff_monomial(x_s**2), -poly.coeff_monomial(x_s)
    return sp.factor(slope / curvature), sp.factor(1 / curvature)


MEAN, VAR = _complete_the_square()
RATIO = (a_t / g_t) ** 2 / (a_s / g_s) ** 2  # r = SNR(t) / SNR(s)
# the noise in x_t, in the place of the clean x_0
BY_EPS = {x_0: (x_t - g_t * eps) / a_t}
BY_SCORE = {x_0: (x_t + g_t**2 * score) / a_t}


def _arrays(*numbers):
    return (jnp.asarray([number]) for number in numbers)


def _schedule():
    return from_betas(np.array(BETAS, np.float64))


def _log_bayes(x_s, x_t, x_0, step):
    """log of q(x_t|x_s) q(x_s|x_0) / q(x_t|x_0)."""
    joint = forward.transition(x_s, step).log_prob(x_t) + forward.marginal(x_0, step.s).log_prob(x_s)
    return joint - forward.marginal(x_0, step.t).log_prob(x_t)


def test_POST_1_bayes_pointwise():
    # in x_s, q(x_t|x_s) q(x_s|x_0) / q(x_t|x_0) is the normal density that completing the square finds
    ratio = log_normal(x_t, KEEP * x_s, ADDED) + log_normal(x_s, a_s * x_0, g_s**2) - log_normal(x_t, a_t * x_0, g_t**2)
    assert_proved(ratio, log_normal(x_s, MEAN, VAR))
    for levels in LEVELS:
        truth = sp.N(at_levels(ratio, levels, x_s=R(2, 5), x_t=R(7, 10), x_0=R(-3, 2)), 30)
        distribution = forward.posterior(*_arrays(0.7, -1.5), exact_step(*levels))
        assert_close(distribution.log_prob(*_arrays(0.4)), truth, rtol=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_POST_1_bayes_on_schedules(schedule):
    rng = np.random.default_rng(0)
    for _ in range(6):
        s, t = np.sort(rng.uniform(0.02, 0.98, 2))
        clean, before, after = (jnp.asarray(rng.normal(size=3)) for _ in range(3))
        step = schedule.step(float(s), float(t))
        ours = forward.posterior(after, clean, step).log_prob(before)
        assert_close(ours, _log_bayes(before, after, clean, step), rtol=1e-9)


def test_POST_1_bayes_on_a_discrete_schedule():
    schedule, rng = linear_betas(), np.random.default_rng(1)
    for s, t in [(1, 2), (1, 1000), (499, 500), (999, 1000), (3, 700)]:
        clean, before, after = (jnp.asarray(rng.normal(size=3)) for _ in range(3))
        step = schedule.step(s, t)
        ours = forward.posterior(after, clean, step).log_prob(before)
        assert_close(ours, _log_bayes(before, after, clean, step), rtol=1e-8)


def test_POST_2_mean_by_completing_the_square():
    # Ho et al.'s form and the SNR form both follow from the square ...
    ho = (sp.sqrt(1 - beta) * (1 - abar_s) * x_t + sp.sqrt(abar_s) * beta * x_0) / (1 - ABAR_T)
    assert_proved(MEAN.subs(IN_BETAS), ho)
    assert_proved(MEAN, a_s * (RATIO * x_t / a_t + (1 - RATIO) * x_0))
    # ... and both equal the library's
    for levels in LEVELS:
        distribution = forward.posterior(*_arrays(0.7, -1.5), exact_step(*levels))
        assert_close(distribution.mean[0], at_levels(MEAN, levels, x_t=R(7, 10), x_0=R(-3, 2)), rtol=1e-14)
    for t in (2, 3):
        distribution = forward.posterior(*_arrays(0.7, -1.5), _schedule().step(t - 1, t))
        assert_close(distribution.mean[0], at_step(ho, t, x_t=R(7, 10), x_0=R(-3, 2)), rtol=1e-13)


def test_POST_3_variance_by_completing_the_square():
    ho = beta * (1 - abar_s) / (1 - ABAR_T)
    assert_proved(VAR.subs(IN_BETAS), ho)
    assert_proved(VAR, g_s**2 * (1 - RATIO))
    for levels in LEVELS:
        step = exact_step(*levels)
        assert_close(forward.posterior_variance(step), at_levels(VAR, levels), rtol=1e-14)
        assert_close(forward.posterior(*_arrays(0.7, -1.5), step).var, at_levels(VAR, levels), rtol=1e-14)
    for t in (2, 3):
        assert_close(forward.posterior_variance(_schedule().step(t - 1, t)), at_step(ho, t), rtol=1e-13)


def test_POST_3_a_clean_s_is_the_limit():
    # sigma_s -> 0: the mean tends to alpha_s x_0, the variance to 0
    assert_proved(sp.limit(MEAN, g_s, 0), a_s * x_0)
    assert_proved(sp.limit(VAR, g_s, 0))
    distribution = forward.posterior(*_arrays(0.7, -1.5), linear_betas().step(0, 600))
    assert_close(distribution.mean[0], -1.5, rtol=0)
    assert_close(distribution.var, 0.0, rtol=0)


def test_POST_4_mean_by_noise():
    # x_0 = (x_t - sigma_t eps) / alpha_t in the mean of POST-2
    mean = MEAN.subs(BY_EPS)
    assert_proved(mean.subs(IN_BETAS), (x_t - beta / sp.sqrt(1 - ABAR_T) * eps) / sp.sqrt(1 - beta))
    for levels in LEVELS:
        distribution = forward.posterior_from_eps(*_arrays(0.7, -1.5), exact_step(*levels))
        assert_close(distribution.mean[0], at_levels(mean, levels, x_t=R(7, 10), eps=R(-3, 2)), rtol=1e-13)
        assert_close(distribution.var, at_levels(VAR, levels), rtol=1e-14)


def test_POST_5_mean_by_score():
    # the score of q(x_t|x_0) contains x_0; solved for x_0, the mean of POST-2 depends on x_t and the score
    assert_proved(sp.diff(log_normal(x_t, a_t * x_0, g_t**2), x_t).subs(BY_SCORE), score)
    mean = MEAN.subs(BY_SCORE)
    assert_proved(mean.subs(IN_BETAS), (x_t + beta * score) / sp.sqrt(1 - beta))
    for levels in LEVELS:
        distribution = forward.posterior_from_score(*_arrays(0.7, -1.5), exact_step(*levels))
        assert_close(distribution.mean[0], at_levels(mean, levels, x_t=R(7, 10), score=R(-3, 2)), rtol=1e-13)
        assert_close(distribution.var, at_levels(VAR, levels), rtol=1e-14)


def test_POST_5_score_is_that_of_the_conditional_marginal():
    # the score by automatic differentiation of log q(x_t|x_0), not by formula
    step, clean, noisy = exact_step(*LEVELS[0]), jnp.asarray([0.4, -1.0]), jnp.asarray([0.1, 0.9])
    slope = jax.grad(forward.marginal(clean, step.t).log_prob)(noisy)
    truth = forward.posterior(noisy, clean, step)
    assert_close(forward.posterior_from_score(noisy, slope, step).mean, truth.mean, rtol=1e-13)


def test_POST_6_interpolation_form():
    # linear in x_t and x_0 by the square; the noise scale is the root of its variance
    in_both = sp.expand(MEAN)
    c_1, c_2 = in_both.coeff(x_t), in_both.coeff(x_0)
    assert_proved(MEAN, c_1 * x_t + c_2 * x_0)
    for levels in LEVELS:
        ours = forward.posterior_coefficients(exact_step(*levels))
        assert_close(ours.c_1, at_levels(c_1, levels), rtol=1e-14)
        assert_close(ours.c_2, at_levels(c_2, levels), rtol=1e-14)
        assert_close(ours.sigma, at_levels(sp.sqrt(VAR), levels), rtol=1e-14)


def test_POST_6_interpolation_reproduces_the_marginal():
    # x_t sampled from q(x_t|x_0), then x_s from the posterior: x_s has q(x_s|x_0). Means and variances, exactly.
    c_1, c_2 = sp.expand(MEAN).coeff(x_t), sp.expand(MEAN).coeff(x_0)
    assert_proved(c_1 * a_t + c_2, a_s)
    assert_proved(c_1**2 * g_t**2 + VAR, g_s**2)
    for levels in LEVELS:
        step = exact_step(*levels)
        ours = forward.posterior_coefficients(step)
        assert_close(ours.c_1 * step.t.alpha + ours.c_2, step.s.alpha, rtol=1e-14)
        assert_close(ours.c_1**2 * step.t.sigma**2 + ours.sigma**2, step.s.sigma**2, rtol=1e-13)


# POST-7 and POST-8: non-Gaussian data

TWO = [0.5, 0.5], [[-1.0], [1.0]], [0.01, 0.01]  # two narrow modes


def _modes(density):
    """The number of maxima of a density, on a grid of [-3, 3]."""
    values = np.asarray(jax.vmap(density)(jnp.linspace(-3.0, 3.0, 2001)[:, None]))
    return int(np.sum((values[1:-1] > values[:-2]) & (values[1:-1] > values[2:])))


def _shortfall(distribution):
    """KL(p || the normal of its mean and variance) = h(normal) - h(p): 0 for a normal distribution alone."""
    normal = 0.5 * jnp.log(2 * jnp.pi * jnp.e * distribution.variance[0])
    return float(normal - information.entropy(distribution).value)


def test_POST_7_reverse_kernel_is_bayes_rule_over_the_data():
    distribution, x_t = closed_form.mixture(*TWO), jnp.asarray([0.2])
    for high, low in ((4.0, 3.5), (3.0, -2.0)):
        step = step_from_log_snr(jnp.asarray(high), jnp.asarray(low))
        kernel = closed_form.reverse_transition(distribution, x_t, step)
        for x in jnp.linspace(-2.0, 2.0, 9)[:, None]:
            # q(x_s|x_t) = q(x_t|x_s) q(x_s) / q(x_t)
            joint = forward.transition(x, step).log_prob(x_t) + closed_form.marginal(distribution, step.s).log_prob(x)
            assert_close(
                kernel.log_prob(x),
                joint - closed_form.marginal(distribution, step.t).log_prob(x_t),
                rtol=1e-9,
                atol=1e-9,
            )


@pytest.mark.slow
def test_POST_7_normal_for_small_beta_and_multimodal_for_large():
    # from x_t = 0.1 at log-SNR -2, backwards by steps of several sizes
    distribution, x_t, low = closed_form.mixture(*TWO), jnp.asarray([0.1]), jnp.asarray(-2.0)
    drops = np.array([0.05, 0.1, 0.2, 0.4, 6.0])
    kernels = [closed_form.reverse_transition(distribution, x_t, step_from_log_snr(low + drop, low)) for drop in drops]
    assert [_modes(kernel.log_prob) for kernel in kernels] == [1, 1, 1, 1, 2]
    shortfall = np.array([_shortfall(kernel) for kernel in kernels])
    assert np.all(np.diff(shortfall) > 0)
    assert shortfall[-1] > 0.5  # nats: no normal distribution is close to this kernel
    # In units of its width the kernel's fourth cumulant falls as beta^2, and with its square the KL
    slopes = np.diff(np.log(shortfall[:4])) / np.diff(np.log(drops[:4]))
    assert np.all(slopes > 2.5), slopes


@pytest.mark.slow
def test_POST_7_the_normal_step_loses_less_the_smaller_the_step():
    # per unit of log-SNR: KL(q(x_s|x_t) || N(mean, sigma_q^2)) / drop -> 0, so chains of small steps have no gap
    distribution, x_t, low = closed_form.mixture(*TWO), jnp.asarray([0.3]), jnp.asarray(-1.0)
    losses = []
    for drop in (0.1, 0.05, 0.025, 0.0125):
        step = step_from_log_snr(low + drop, low)
        kernel = closed_form.reverse_transition(distribution, x_t, step)
        model = forward.posterior(x_t, closed_form.optimal_prediction(distribution, x_t, step.t, "x_0"), step)
        cross = information.quadrature(lambda x, model=model: -model.log_prob(x), kernel).value
        losses.append(float(cross - information.entropy(kernel).value) / drop)
    np.testing.assert_allclose(np.array(losses[:-1]) / np.array(losses[1:]), 2.0, rtol=0.05)


def test_POST_8_two_divergences_differ_by_a_constant_in_symbols():
    # By E (m_q - m)^2 = Var m_q + (E m_q - m)^2, for any distribution of m_q: only the second term contains m.
    p, m_1, m_2, m = sp.symbols("p m_1 m_2 m", real=True)
    mean = p * m_1 + (1 - p) * m_2
    variance = p * (m_1 - mean) ** 2 + (1 - p) * (m_2 - mean) ** 2
    assert_proved(p * (m_1 - m) ** 2 + (1 - p) * (m_2 - m) ** 2, variance + (mean - m) ** 2)


@pytest.mark.slow
def test_POST_8_two_divergences_differ_by_a_constant():
    # For data of three points, both divergences for any model N(m, v), at one x_t: each x_0 by its weight given x_t
    distribution, step = (
        closed_form.empirical([[-1.0], [0.2], [1.0]], [0.5, 0.2, 0.3]),
        step_from_log_snr(*map(jnp.asarray, (1.0, -1.0))),
    )
    x_t = jnp.asarray([0.3])
    shares, kernel = (
        jnp.exp(distribution.posterior(x_t, step.t).log_weights),
        closed_form.reverse_transition(distribution, x_t, step),
    )

    @jax.jit
    def marginal(model):
        return information.quadrature(lambda x: kernel.log_prob(x) - model.log_prob(x), kernel).value

    @jax.jit
    def conditional(model):
        terms = jax.vmap(lambda x_0: kl(forward.posterior(x_t, x_0, step), model))(distribution.points)
        return shares @ terms

    models = [Normal(jnp.asarray([m]), var=jnp.asarray(v)) for m in (-1.0, 0.0, 0.4) for v in (0.1, 0.5, 3.0)]
    differences = np.array([conditional(model) - marginal(model) for model in models])
    assert_close(differences, np.full(9, differences[0]), rtol=1e-9)
    # one minimizer, for any variance: E[mu_q | x_t]
    best = shares @ jax.vmap(lambda x_0: forward.posterior(x_t, x_0, step).mean)(distribution.points)
    for divergence in (marginal, conditional):
        slope = jax.grad(lambda m, d=divergence: d(Normal(m, var=jnp.asarray(0.5))))(best)
        assert_close(slope, jnp.zeros(1), atol=1e-9)
        curvature = jax.grad(jax.grad(lambda m, d=divergence: d(Normal(m[None], var=jnp.asarray(0.5)))))(best[0])
        assert_close(curvature, 1 / 0.5, rtol=1e-9)
    assert_close(closed_form.reverse_transition(distribution, x_t, step).mean, best, rtol=1e-12)


@pytest.mark.slow
def test_POST_8_the_constant_is_the_conditional_mutual_information():
    # over all x_t: I(x_0; x_s | x_t) = I(x_0; x_s) - I(x_0; x_t), since x_0 -> x_s -> x_t is a Markov chain
    distribution, step = (
        closed_form.empirical([[-1.0], [0.2], [1.0]], [0.5, 0.2, 0.3]),
        step_from_log_snr(*map(jnp.asarray, (1.0, -1.0))),
    )
    small = lambda f, distribution: information.quadrature(f, distribution, nodes=101)  # noqa: E731

    def difference(x_t):
        model, kernel = Normal(x_t, var=jnp.asarray(0.7)), closed_form.reverse_transition(distribution, x_t, step)
        shares = jnp.exp(distribution.posterior(x_t, step.t).log_weights)
        conditional = shares @ jax.vmap(lambda x_0: kl(forward.posterior(x_t, x_0, step), model))(distribution.points)
        return conditional - small(lambda x: kernel.log_prob(x) - model.log_prob(x), kernel).value

    constant = small(difference, closed_form.marginal(distribution, step.t)).value
    high, low = (information.mutual_information(distribution, level).value for level in (step.s, step.t))
    assert_close(constant, high - low, rtol=1e-9)


def test_erratum_scale_of_the_posterior_mean():
    # printed with 1 / sqrt(abar_t) in the place of 1 / sqrt(1 - beta_t): fails the square from t = 2 on
    inner = x_t - beta / sp.sqrt(1 - ABAR_T) * eps
    correct, printed = inner / sp.sqrt(1 - beta), inner / sp.sqrt(ABAR_T)
    square = MEAN.subs(BY_EPS).subs(IN_BETAS)
    assert_proved(square, correct)
    assert_disproved(square, printed)
    ours = forward.posterior_from_eps(*_arrays(0.7, -1.5), _schedule().step(2, 3)).mean[0]
    assert_close(ours, at_step(correct, 3, x_t=R(7, 10), eps=R(-3, 2)), rtol=1e-13)
    with refuted():
        assert_close(ours, at_step(printed, 3, x_t=R(7, 10), eps=R(-3, 2)), rtol=0.01)
