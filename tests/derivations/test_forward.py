"""FWD: the forward process. Noises are folded symbolically, kernels composed by numerical integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from scipy import integrate, stats

from tests.derivations.algebra import (
    ADDED,
    BETAS,
    IN_BETAS,
    KEEP,
    LEVELS,
    a_s,
    a_t,
    at_levels,
    beta,
    expected,
    g_s,
    g_t,
    log_normal,
    x_0,
    x_s,
    x_t,
)
from tests.derivations.check import assert_close, assert_disproved, assert_proved, refuted
from tests.derivations.worlds import exact_step, number
from vdm_jax import elbo, forward
from vdm_jax.discrete_schedules import (
    discretize,
    from_betas,
    from_gammas,
    from_standard_deviations,
    linear_betas,
    to_betas,
    to_gammas,
    to_standard_deviations,
)
from vdm_jax.gaussian import Normal, kl
from vdm_jax.schedules import Cosine, LinearBeta, LinearLogSNR, Sigmoid, VarianceExploding

SCHEDULES = [LinearBeta(), Cosine(), Sigmoid(), LinearLogSNR(), VarianceExploding(0.1, 5.0)]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _schedule():
    return from_betas(np.array([float(b) for b in BETAS]))


def _fold(betas):
    """x_t as a sum: the coefficient of x_0 and the total variance of all noises, from x_k = sqrt(1-b) x + sqrt(b) e."""
    x = x_0
    noises = sp.symbols(f"eps_1:{len(betas) + 1}")
    for b, eps in zip(betas, noises, strict=True):
        x = sp.sqrt(1 - b) * x + sp.sqrt(b) * eps
    x = sp.expand(x)
    return x.coeff(x_0), sp.simplify(sum(x.coeff(eps) ** 2 for eps in noises))  # variances add, not scales


def test_FWD_1_one_step_has_variance_beta():
    # q(x_t|x_s) of adjacent steps: alpha_t / alpha_s = sqrt(1 - beta), and the variance added is beta
    assert_proved(KEEP.subs(IN_BETAS), sp.sqrt(1 - beta))
    assert_proved(ADDED.subs(IN_BETAS), beta)
    x = jnp.asarray([1.7, -0.4])
    for t, b in enumerate(BETAS, start=1):
        distribution = forward.transition(x, _schedule().step(t - 1, t))
        assert_close(distribution.mean, x * float(sp.sqrt(1 - b)), rtol=1e-14)
        assert_close(distribution.var, b, rtol=1e-13)


def test_FWD_2_marginal_folds_the_noises():
    # symbolically, for any betas
    b = sp.symbols("b_1:4", positive=True)
    signal, noise = _fold(b)
    keep = sp.prod(1 - k for k in b)
    assert_proved(signal**2, keep)
    assert_proved(noise, 1 - keep)
    # and the library, at rational betas
    for t in range(1, 5):
        signal, noise = _fold(BETAS[:t])
        distribution = forward.marginal(jnp.asarray([2.0]), _schedule()(t))
        assert_close(distribution.mean[0], 2 * signal, rtol=1e-14)
        assert_close(distribution.var, noise, rtol=1e-14)


def test_FWD_3_any_pair_folds_the_noises_between():
    # the noises after s alone: the gain on x_s is alpha_t / alpha_s, and the variance adds up to that at t
    b = sp.symbols("b_1:5", positive=True)
    abar = [sp.prod(1 - k for k in b[:t]) for t in range(5)]
    signal, noise = _fold(b[2:])
    here = {a_s: sp.sqrt(abar[2]), g_s: sp.sqrt(1 - abar[2]), a_t: sp.sqrt(abar[4]), g_t: sp.sqrt(1 - abar[4])}
    assert_proved(signal**2, KEEP.subs(here) ** 2)
    assert_proved(noise, ADDED.subs(here))
    for s in range(4):
        for t in range(s + 1, 5):
            signal, noise = _fold(BETAS[s:t])
            distribution = forward.transition(jnp.asarray([2.0]), _schedule().step(s, t))
            assert_close(distribution.mean[0], 2 * signal, rtol=1e-14)
            assert_close(distribution.var, noise, rtol=1e-13)


def test_FWD_3_the_marginals_determine_the_transition():
    # x_t = k x_s + sqrt(v) eps must have the marginal at t: two equations for k and v, for any levels
    k, v = sp.symbols("k v")
    (found,) = sp.solve([k * a_s - a_t, k**2 * g_s**2 + v - g_t**2], [k, v], dict=True)
    assert_proved(found[k], KEEP)
    assert_proved(found[v], ADDED)
    assert_proved(found[v], g_t**2 * (1 - (a_t / g_t) ** 2 / (a_s / g_s) ** 2))  # sigma_t^2 (1 - r)
    for levels in LEVELS:
        distribution = forward.transition(jnp.asarray([2.0]), exact_step(*levels))
        assert_close(distribution.mean[0], at_levels(2 * found[k], levels), rtol=1e-14)
        assert_close(distribution.var, at_levels(found[v], levels), rtol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_FWD_3_variance_makes_up_the_marginal(schedule):
    # Var[x_t] = (alpha_t / alpha_s)^2 Var[x_s] + added noise; also where variance is not preserved
    for s, t in [(0.1, 0.9), (0.4, 0.5), (0.01, 0.99)]:
        step = schedule.step(s, t)
        x_0 = jnp.asarray([0.7])
        before, after = forward.marginal(x_0, step.s), forward.marginal(x_0, step.t)
        distribution = forward.transition(before.mean, step)
        scale = forward.transition(jnp.asarray([1.0]), step).mean[0]
        assert_close(distribution.mean, after.mean, rtol=1e-12)
        assert_close(scale**2 * before.var + distribution.var, after.var, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_FWD_3_transitions_compose(schedule):
    # Chapman-Kolmogorov: q(x_t|x_s) = integral of q(x_t|x_u) q(x_u|x_s) over x_u
    s, u, t, x_s = 0.2, 0.5, 0.8, jnp.asarray([1.3])
    first, whole = forward.transition(x_s, schedule.step(s, u)), forward.transition(x_s, schedule.step(s, t))
    reach = 10 * float(jnp.sqrt(first.var))
    grid = jnp.linspace(float(first.mean[0]) - reach, float(first.mean[0]) + reach, 4001)
    second = forward.transition(grid, schedule.step(u, t))
    for deviations in (-2.0, 0.0, 1.5):
        x_t = float(whole.mean[0] + deviations * jnp.sqrt(whole.var))
        density = stats.norm(first.mean[0], jnp.sqrt(first.var)).pdf(grid)
        density = density * stats.norm(second.mean, jnp.sqrt(second.var)).pdf(x_t)
        truth = stats.norm(whole.mean[0], jnp.sqrt(whole.var)).pdf(x_t)
        assert_close(integrate.trapezoid(density, grid), truth, rtol=1e-10)


def test_FWD_4_the_last_marginal_becomes_the_prior():
    # the divergence, integrated, tends to 0 with abar_T, led by the signal alpha_T^2 x_0^2 / 2 ...
    abar, steps = sp.symbols("abar T", positive=True)
    log_ratio = log_normal(x_t, a_t * x_0, g_t**2) - log_normal(x_t, 0, 1)
    divergence = expected(log_ratio, x_t, a_t * x_0, g_t**2)
    by_abar = sp.simplify(divergence.subs({a_t: sp.sqrt(abar), g_t: sp.sqrt(1 - abar)}))
    assert_proved(sp.limit(by_abar, abar, 0, "+"))
    assert_proved(sp.limit(by_abar / abar, abar, 0, "+"), x_0**2 / 2)
    # ... and abar_T = (1 - beta)^T to 0 with T
    assert_proved(sp.limit((1 - BETAS[0]) ** steps, steps, sp.oo))
    # the library: at rational levels, for Ho et al.'s schedule, and its rate with beta fixed
    prior = Normal(jnp.zeros(1), var=jnp.asarray(1.0))
    for levels in LEVELS:
        level, truth = exact_step(*levels).t, at_levels(divergence, levels, x_0=sp.Rational(7, 10))
        assert_close(elbo.prior_kl(jnp.asarray([0.7]), level), truth, rtol=1e-13)
        assert_close(kl(forward.marginal(jnp.asarray([0.7]), level), prior), truth, rtol=1e-13)
    x, prior = jnp.asarray([1.0, -1.0, 0.3]), Normal(jnp.zeros(3), var=jnp.asarray(1.0))
    along = [float(kl(forward.marginal(x, linear_betas()(t)), prior)) for t in (1, 10, 100, 400, 700, 1000)]
    assert np.all(np.diff(along) < 0)
    assert along[0] > 10
    assert along[-1] < 1e-4
    schedule = from_betas(np.full(400, 0.05))
    for num_steps in (30, 300):
        remaining = by_abar.subs(abar, sp.Rational(19, 20) ** num_steps)
        truth = sum(sp.N(remaining.subs(x_0, sp.Rational(value)), 30) for value in ("1", "-1", "0.3"))
        assert_close(elbo.prior_kl(x, schedule(num_steps)), truth, rtol=1e-12)
    assert abs(elbo.prior_kl(x, schedule(301)) / elbo.prior_kl(x, schedule(300)) / 0.95 - 1) < 1e-5


def test_FWD_5_markov():
    # Conditioning the joint distribution of x_s and x_t given x_0 on x_s: E[x_t] + Cov / Var (x_s - E[x_s]) has no x_0
    covariance = KEEP * g_s**2
    mean = a_t * x_0 + covariance / g_s**2 * (x_s - a_s * x_0)
    assert_proved(sp.diff(mean, x_0))
    assert_proved(mean, KEEP * x_s)
    assert_proved(g_t**2 - covariance**2 / g_s**2, ADDED)
    # Bayes' rule with the posterior: q(x_t|x_s,x_0) = q(x_s|x_t,x_0) q(x_t|x_0) / q(x_s|x_0) is free of it too
    r = (a_t / g_t) ** 2 / (a_s / g_s) ** 2
    posterior = log_normal(x_s, a_s * (r * x_t / a_t + (1 - r) * x_0), g_s**2 * (1 - r))
    bayes = posterior + log_normal(x_t, a_t * x_0, g_t**2) - log_normal(x_s, a_s * x_0, g_s**2)
    assert_proved(sp.diff(bayes, x_0))
    assert_proved(bayes, log_normal(x_t, KEEP * x_s, ADDED))


def test_FWD_5_markov_in_the_library():
    step = _schedule().step(1, 3)

    def log_conditional(x_0, x_s, x_t):
        posterior = forward.posterior(x_t, x_0, step).log_prob(x_s)
        return posterior + forward.marginal(x_0, step.t).log_prob(x_t) - forward.marginal(x_0, step.s).log_prob(x_s)

    for point in np.random.default_rng(0).normal(size=(5, 3, 1)):
        start, before, after = map(jnp.asarray, point)
        value, slope = jax.value_and_grad(log_conditional)(start, before, after)
        assert_close(slope, 0.0, atol=1e-12)
        assert_close(value, forward.transition(before, step).log_prob(after), rtol=1e-11)


def test_FWD_6_three_conventions_give_the_same_kernels():
    # a squared deviation is a variance, and alpha^2 = sigmoid(-gamma): each equals Ho et al.'s alpha
    deviation, abar = sp.symbols("deviation abar", positive=True)
    assert_proved(sp.sqrt(1 - deviation**2).subs(deviation, sp.sqrt(beta)), sp.sqrt(1 - beta))
    gamma = sp.log((1 - abar) / abar)  # -log SNR
    assert_proved(1 / (1 + sp.exp(gamma)), abar)
    assert_proved(1 / (1 + sp.exp(-gamma)), 1 - abar)
    # three discrete schedules from exact numbers, in the three conventions
    abars = [sp.prod(1 - b for b in BETAS[:t]) for t in range(1, 5)]
    numbers = [BETAS, [sp.sqrt(b) for b in BETAS], [gamma.subs(abar, a) for a in abars]]
    makers = [from_betas, from_standard_deviations, from_gammas]
    x, x_0 = jnp.asarray([0.3]), jnp.asarray([-1.0])
    for make, given in zip(makers, numbers, strict=True):
        schedule = make(np.array(given, np.float64))
        for s, t in [(1, 2), (1, 4), (2, 3)]:
            exact = [sp.sqrt(f) for a in (abars[s - 1], abars[t - 1]) for f in (a, 1 - a)]
            for kernel in (forward.transition, lambda x, step: forward.posterior(x, x_0, step)):
                distribution, truth = kernel(x, schedule.step(s, t)), kernel(x, exact_step(*exact))
                assert_close(distribution.mean, truth.mean, rtol=1e-12)
                assert_close(distribution.var, truth.var, rtol=1e-11)
        assert_close(to_betas(schedule).beta, numbers[0], rtol=1e-12)
        assert_close(to_standard_deviations(schedule).beta, numbers[1], rtol=1e-12)
        assert_close(to_gammas(schedule), numbers[2], rtol=1e-12)


def test_FWD_7_schedules():
    # The formulas of each are in tests/test_schedules.py. Here: each is a forward process, whose one-step kernels,
    # chained, reach its marginals.
    for continuous in SCHEDULES:
        schedule = discretize(continuous, 10)
        mean, var = jnp.asarray([0.8]), 0.0
        for t in range(1, 11):
            step = schedule.step(t - 1, t)
            scale = forward.transition(jnp.asarray([1.0]), step).mean[0]
            distribution = forward.transition(mean, step)
            mean, var = distribution.mean, scale**2 * var + distribution.var
            truth = forward.marginal(jnp.asarray([0.8]), step.t)
            assert_close(mean, truth.mean, rtol=1e-11)
            assert_close(var, truth.var, rtol=1e-10)


def test_exact_step_is_exact():
    # the helper for the other chapters: 3-4-5 and 5-12-13 levels
    step = exact_step(sp.Rational(12, 13), sp.Rational(5, 13), sp.Rational(3, 5), sp.Rational(4, 5))
    assert_close(step.snr_ratio, (9 / 16) / (144 / 25), rtol=1e-15)
    assert_close(step.one_minus_ratio, 1 - (9 / 16) / (144 / 25), rtol=1e-15)
    assert float(number(sp.Rational(1, 3))) == 1 / 3


# Misprints: the printed form fails the check that the correct one passes.


def test_erratum_alpha_of_a_standard_deviation():
    # beta a standard deviation: alpha = sqrt(1 - beta^2) keeps the variance of unit-variance data, 1 - beta^2 does not
    correct, printed = sp.sqrt(1 - beta**2), 1 - beta**2
    assert_proved(correct**2 + beta**2, 1)
    assert_disproved(printed**2 + beta**2, 1)
    ours = from_standard_deviations(np.array([0.6]))(1).alpha
    assert_close(ours, correct.subs(beta, sp.Rational(3, 5)), rtol=1e-14)
    with refuted():
        assert_close(ours, printed.subs(beta, sp.Rational(3, 5)), rtol=0.1)


def test_erratum_product_to_i():
    # abar_i = prod_{k=1..i}; the printed prod_{k=1..k} binds k twice: as one factor it is wrong from i = 2 on
    for i in range(2, 5):
        signal, _ = _fold(BETAS[:i])
        ours = to_betas(_schedule()).abar[i - 1]
        assert_close(ours, signal**2, rtol=1e-13)
        with refuted():
            assert_close(ours, 1 - BETAS[i - 1], rtol=0.01)


def test_erratum_noise_scale_of_one_step():
    # beta a variance: sqrt(beta) eps keeps unit variance, the printed beta eps does not
    correct, printed = sp.sqrt(beta) ** 2, beta**2  # variance of the noise
    assert_proved((1 - beta) + correct, 1)
    assert_disproved((1 - beta) + printed, 1)
    ours = forward.transition(jnp.asarray([1.0]), _schedule().step(0, 1)).var
    assert_close(ours, correct.subs(beta, BETAS[0]), rtol=1e-13)
    with refuted():
        assert_close(ours, printed.subs(beta, BETAS[0]), rtol=0.1)
