"""ELBO: the bound, its two forms, its weights and its optimum, for distributions whose log p is known."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from scipy import stats

from tests.derivations.algebra import (
    ABAR_T,
    ADDED,
    IN_BETAS,
    KEEP,
    LEVELS,
    R,
    a_s,
    a_t,
    abar_s,
    at_levels,
    beta,
    expected,
    g_s,
    g_t,
    log_normal,
    x_0,
    x_t,
)
from tests.derivations.check import assert_close, assert_disproved, assert_mean, assert_proved, refuted
from tests.derivations.worlds import GaussianWorld, denoiser, draws, exact_step
from vdm_jax import closed_form, elbo, forward, information, losses, path_bounds
from vdm_jax.discrete_schedules import discretize, from_betas, linear_betas
from vdm_jax.gaussian import Normal, kl
from vdm_jax.likelihoods import Categorical, DiscretizedGaussian, normalize
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.parameterization import convert, prediction_target
from vdm_jax.schedules import LinearLogSNR

DATA = GaussianWorld(0.4, 0.5)
PREDICTION_TYPES = ("x_0", "eps", "v", "score")


def _schedule(num_steps):
    return linear_betas(num_steps, 0.1 / num_steps, min(20 / num_steps, 0.9))


def _gaussian_decoder(x_hat, x_1, level):
    """p(x_0|x_1) with the exact posterior variance of DATA."""
    return Normal(x_hat, var=DATA.var_x_0(level))


def test_ELBO_1_gap_is_a_divergence():
    # One step, any reverse kernel N(k x_1 + c, v): p(x_0, x_1) = p(x_0) p(x_1|x_0), so that on every path
    # log p(x_0, x_1) / q(x_1|x_0) = log p(x_0) - log q(x_1|x_0) / p(x_1|x_0), in expectation less than log p by a KL.
    x_1, k, c = sp.symbols("x_1 k c", real=True)
    v, u = sp.symbols("v u", positive=True)
    joint = log_normal(x_1, 0, 1) + log_normal(x_0, k * x_1 + c, v)
    posterior = log_normal(x_1, k * (x_0 - c) / (k**2 + v), v / (k**2 + v))
    assert_proved(joint, log_normal(x_0, c, k**2 + v) + posterior)
    # ELBO-6's divergence is a square plus u - 1 - log u, u a ratio of variances: convex, with minimum 0
    excess = u - 1 - sp.log(u)
    assert_proved(sp.diff(excess, u, 2), 1 / u**2)
    (least,) = sp.solve(sp.diff(excess, u), u)
    assert_proved(excess.subs(u, least), 0)


def test_ELBO_1_and_3_are_one_sum():
    # Path by path, with each log q(x_t|x_{t-1}) written by Bayes' rule (POST-1): the marginals' logarithms telescope.
    # Lists have an entry a t, from 0: log q(x_t|x_0), log q(x_{t-1}|x_t,x_0), log p(x_{t-1}|x_t).
    T, prior = 5, sp.Symbol("log_p_T")
    marginal, posterior, model = (sp.symbols(f"{name}_0:{T + 1}") for name in ("m", "q", "p"))
    forward_steps = [marginal[1], *(posterior[t] + marginal[t] - marginal[t - 1] for t in range(2, T + 1))]
    joint = prior + sum(model[1:]) - sum(forward_steps)
    bound = model[1] - (marginal[T] - prior) - sum(posterior[t] - model[t] for t in range(2, T + 1))
    assert_proved(joint, bound)


def test_ELBO_1_and_3_have_one_expectation():
    # path by path over fixed data; with an inexact denoiser, since the identity holds for any model
    schedule, x_0 = _schedule(6), jnp.full((100_000, 1), 0.9)
    wrong = denoiser(DATA, shift=0.2)
    joint = np.asarray(
        path_bounds.joint_log_ratio(wrong, jax.random.key(0), x_0, schedule, _gaussian_decoder), np.float64
    )
    bound = np.asarray(elbo.bound(wrong, jax.random.key(1), x_0, schedule, _gaussian_decoder).total, np.float64)
    assert_mean(-joint - bound, 0.0, resolution=0.03)


@pytest.mark.slow
def test_ELBO_3_has_less_variance_for_an_insensitive_denoiser():
    # One-sample variances at fixed x_0, of a model that hardly depends on x_t: it assumes far narrower data.
    insensitive = denoiser(GaussianWorld(DATA.mean, DATA.var / 50))
    schedule, x_0 = linear_betas(10, 0.1, 0.5), jnp.full((20_000, 4), 0.9)
    joint = path_bounds.joint_log_ratio(insensitive, jax.random.key(0), x_0, schedule, _gaussian_decoder)
    bound = elbo.bound(insensitive, jax.random.key(1), x_0, schedule, _gaussian_decoder).total
    assert np.var(bound) > 0
    assert np.var(joint) > 20 * np.var(bound)


@pytest.mark.slow
def test_ELBO_3_has_more_variance_at_the_optimum():
    # Not "strictly": p(x_0:T) / q(x_1:T|x_0) of the *exact* reverse process is p(x_0) on every path. With the exact
    # denoiser and many steps ELBO-1 is close to that, while ELBO-3 keeps the variance of log p(x_0|x_1).
    schedule, x_0 = discretize(LinearLogSNR(5.0, -10.0), 400), jnp.full((5000, 1), 0.9)
    joint = path_bounds.joint_log_ratio(denoiser(DATA), jax.random.key(0), x_0, schedule, _gaussian_decoder)
    bound = elbo.bound(denoiser(DATA), jax.random.key(1), x_0, schedule, _gaussian_decoder).total
    assert np.var(joint) < np.var(bound) / 2


def test_ELBO_4_prior_vanishes_with_the_signal():
    # the expected log ratio of q(x_T|x_0) and the prior N(0, v), integrated
    v = sp.Symbol("v", positive=True)
    log_ratio = log_normal(x_t, a_t * x_0, g_t**2) - log_normal(x_t, 0, v)
    closed = ((a_t * x_0) ** 2 / v + g_t**2 / v - 1 - sp.log(g_t**2 / v)) / 2
    assert_proved(expected(log_ratio, x_t, a_t * x_0, g_t**2), closed)
    with jax.enable_x64(True):
        for levels in LEVELS:
            ours = [
                elbo.prior_kl(jnp.asarray([0.7]), exact_step(*levels).t, Normal(0.0, var=var)) for var in (1.0, 9.0)
            ]
            assert_close(ours, [at_levels(closed, levels, x_0=R(7, 10), v=var) for var in (1, 9)], rtol=1e-13)
        x = jnp.asarray([1.0, -0.5])
        values = [float(elbo.prior_kl(x, from_betas(np.full(n, 0.02))(n))) for n in (10, 100, 300, 600)]
        assert np.all(np.diff(values) < 0)
        assert values[-1] < 1e-5


@pytest.mark.parametrize(
    "decoder", ["gaussian", *(pytest.param(d, marks=pytest.mark.slow) for d in ("discretized", "categorical"))]
)
def test_ELBO_5_decoders_are_normalized_distributions(decoder):
    with jax.enable_x64(True):
        level = linear_betas(10, 0.1, 0.5)(3)
        center = jnp.asarray([0.3])
        if decoder == "gaussian":
            grid = jnp.linspace(-8.0, 8.0, 4001)
            log_p = jax.vmap(lambda x: Normal(center, var=level.sigma**2).log_prob(x[None]))(grid)
            assert_close(np.trapezoid(np.exp(log_p), grid), 1.0, rtol=1e-10)
            return
        distribution = (
            DiscretizedGaussian(center, scale=level.sigma, levels=17)
            if decoder == "discretized"
            else Categorical(center, level, 17)
        )
        grid = normalize(jnp.arange(17), 17)
        masses = np.exp(jax.vmap(lambda x: distribution.log_prob(x[None]))(grid))
        assert_close(masses.sum(), 1.0, rtol=1e-12)
        if decoder == "discretized":  # open edges: bins by a difference of scipy's normal CDF
            edges = np.r_[-np.inf, (np.asarray(grid)[1:] + np.asarray(grid)[:-1]) / 2, np.inf]
            truth = np.diff(stats.norm(0.3, float(level.sigma)).cdf(edges))
        else:  # Bayes' rule under a uniform prior
            likelihood = stats.norm(float(level.alpha) * np.asarray(grid), float(level.sigma)).pdf(0.3)
            truth = likelihood / likelihood.sum()
        assert_close(masses, truth, rtol=1e-10)


def test_ELBO_6_kl_of_equal_variances():
    # E log p/q of any two normals, integrated: Kingma & Welling's form; with equal variances, the distance of the means
    x, m, n = sp.symbols("x m n", real=True)
    v, w = sp.symbols("v w", positive=True)
    closed = ((m - n) ** 2 / w + v / w - 1 - sp.log(v / w)) / 2
    assert_proved(expected(log_normal(x, m, v) - log_normal(x, n, w), x, m, v), closed)
    assert_proved(closed.subs(w, v), (m - n) ** 2 / (2 * v))
    with jax.enable_x64(True):
        first, second = (
            Normal(jnp.asarray([0.5]), var=jnp.asarray(0.4)),
            Normal(jnp.asarray([-0.25]), var=jnp.asarray(1.75)),
        )
        truth = closed.subs({m: R(1, 2), v: R(2, 5), n: R(-1, 4), w: R(7, 4)})
        assert_close(kl(first, second), truth, rtol=1e-14)


@pytest.mark.slow
def test_ELBO_6_diffusion_term_is_the_kl_of_two_posteriors():
    with jax.enable_x64(True):
        noisy, clean, x_hat = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(3, 4)))
        for levels in LEVELS:
            step = exact_step(*levels)
            q, p = forward.posterior(noisy, clean, step), forward.posterior(noisy, x_hat, step)
            ours = elbo.diffusion_kl(clean, x_hat, step, "x_0")
            assert_close(ours, kl(q, p), rtol=1e-11)


def test_ELBO_6_l_ddpm_is_the_sum_over_t():
    # against the closed form of each term, Gaussian data: a shifted x_hat has the error shift^2 + variance
    schedule, shift = _schedule(6), 0.3
    x_0 = DATA.sample(jax.random.key(3), (100_000, 1))
    bound = elbo.bound(denoiser(DATA, shift=shift), jax.random.key(1), x_0, schedule, _gaussian_decoder)
    abar = np.cumprod(1 - np.linspace(0.1 / 6, 0.9, 6))
    snr = abar / (1 - abar)
    error = 1 / (1 / DATA.var + snr) + shift**2  # precisions of x_0 given x_t add up
    assert_mean(bound.diffusion, 0.5 * np.sum((snr[:-1] - snr[1:]) * error[1:]))


# ELBO-7 .. 9: the weight by sympy, from the difference of the two posterior means

value, other = sp.symbols("value other", real=True)
VAR_Q = g_s**2 * ADDED / g_t**2  # POST-3
TO_X_0 = {  # from the definitions of eps, score and v
    "x_0": value,
    "eps": (x_t - g_t * value) / a_t,
    "score": (x_t + g_t**2 * value) / a_t,
    "v": (a_t * x_t - g_t * value) / (a_t**2 + g_t**2),
}
SIGMA_Q2 = beta * (1 - abar_s) / (1 - ABAR_T)
PRINTED = {
    "x_0": abar_s * beta**2 / ((1 - ABAR_T) ** 2 * 2 * SIGMA_Q2),
    "eps": beta**2 / (2 * SIGMA_Q2 * (1 - beta) * (1 - ABAR_T)),
    "score": beta**2 / (2 * SIGMA_Q2 * (1 - beta)),
}


def _weight(prediction_type):
    """||mu(value) - mu(other)||^2 / (2 sigma_q^2) over (value - other)^2, mu by Bayes' rule for Gaussians."""
    mean = VAR_Q * (KEEP * x_t / ADDED + a_s * TO_X_0[prediction_type] / g_s**2)
    return sp.simplify((mean - mean.subs(value, other)) ** 2 / (2 * VAR_Q) / (value - other) ** 2)


def _check_weight(prediction_type):
    weight = _weight(prediction_type)
    with jax.enable_x64(True):
        for levels in LEVELS:
            assert_close(
                elbo.diffusion_weight(exact_step(*levels), prediction_type), at_levels(weight, levels), rtol=1e-13
            )
        if prediction_type in PRINTED:
            assert_proved(weight.subs(IN_BETAS), PRINTED[prediction_type])
            ours = elbo.diffusion_weight(from_betas(np.array([0.1, 0.2])).step(1, 2), prediction_type)
            assert_close(ours, PRINTED[prediction_type].subs({abar_s: R(9, 10), beta: R(1, 5)}), rtol=1e-12)


def test_ELBO_7_weight_by_x_hat():
    _check_weight("x_0")
    assert_proved(_weight("x_0"), ((a_s / g_s) ** 2 - (a_t / g_t) ** 2) / 2)  # (SNR(s) - SNR(t)) / 2


def test_ELBO_8_weight_by_eps():
    _check_weight("eps")
    assert_proved(_weight("eps"), ((a_s / g_s) ** 2 / (a_t / g_t) ** 2 - 1) / 2)  # (1/r - 1) / 2


def test_ELBO_9_weight_by_score_and_v():
    _check_weight("score")
    _check_weight("v")
    assert_proved(_weight("score"), g_t**2 * _weight("eps"))
    assert_proved(_weight("v").subs(IN_BETAS), (a_t**2 * _weight("eps")).subs(IN_BETAS))


def test_ELBO_9_all_weights_give_one_kl():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        clean, eps, x_hat = (jnp.asarray(x) for x in rng.normal(size=(3, 4)))
        for levels in LEVELS:
            step = exact_step(*levels)
            noisy = step.t.alpha * clean + step.t.sigma * eps
            truth = kl(forward.posterior(noisy, clean, step), forward.posterior(noisy, x_hat, step))
            for prediction_type in PREDICTION_TYPES:
                prediction = convert(x_hat, noisy, step.t, "x_0", prediction_type)
                ours = elbo.diffusion_kl(
                    prediction_target(clean, eps, step.t, prediction_type), prediction, step, prediction_type
                )
                assert_close(ours, truth, rtol=1e-9)


def test_ELBO_10_one_random_term_for_the_sum():
    # T E_t is the sum: the one-term bound against the closed form and all terms; low-discrepancy t lowers the variance
    schedule = _schedule(6)
    x_0 = jnp.full((100_000, 1), 0.9)
    wrong = denoiser(DATA, shift=0.3)
    every, one = (
        np.asarray(
            elbo.bound(wrong, jax.random.key(n), x_0, schedule, _gaussian_decoder, terms=k).diffusion, np.float64
        )
        for n, k in enumerate((None, 1))
    )
    ddpm = losses.ddpm_loss(wrong, jax.random.key(9), x_0, schedule, _gaussian_decoder).diffusion
    for estimate in (one, np.asarray(ddpm, np.float64)):
        assert_mean(estimate - every, 0.0)
    assert every.var() < one.var()


def test_ELBO_11_excess_loss_is_the_squared_deviation():
    # Given x_t, a target with two values: E (target - f)^2 = Var + (f - E)^2. A weight scales all of it, so that every
    # weighted loss has this optimum.
    w, first, second, f = sp.symbols("w first second f", real=True)
    mean = w * first + (1 - w) * second
    variance = w * first**2 + (1 - w) * second**2 - mean**2
    loss = w * (first - f) ** 2 + (1 - w) * (second - f) ** 2
    assert_proved(loss, variance + (f - mean) ** 2)


@pytest.mark.slow
def test_ELBO_11_the_weighted_loss_is_the_bound():
    # T E_t w_t ||.||^2 with the bound's weight (0 at t = 1, the decoder's step) is the diffusion term
    schedule, x_0 = _schedule(6), jnp.full((100_000, 1), 0.9)

    for prediction_type in PREDICTION_TYPES:
        wrong = denoiser(DATA, prediction_type, shift=0.3)

        def weight(step, prediction_type=prediction_type):
            return jnp.where(step.s.sigma > 0, elbo.diffusion_weight(step, prediction_type), 0.0)

        loss = losses.denoising_loss(
            wrong, jax.random.key(0), x_0, schedule, prediction_type=prediction_type, weight=weight
        ).loss
        diffusion = elbo.bound(
            wrong, jax.random.key(1), x_0, schedule, _gaussian_decoder, prediction_type=prediction_type
        ).diffusion
        assert_mean(6 * np.asarray(loss, np.float64) - np.asarray(diffusion, np.float64), 0.0)


@pytest.mark.slow
def test_ELBO_11_the_optimum_is_the_conditional_expectation():
    # L of the exact denoiser is E Var[target | x_t], and any deviation from it adds its square
    schedule, x_0 = _schedule(6), DATA.sample(jax.random.key(3), (100_000, 1))
    for prediction_type in ("x_0", "eps"):
        exact, worse, better = (
            losses.denoising_loss(
                denoiser(DATA, prediction_type, shift),
                jax.random.key(4),
                x_0,
                schedule,
                prediction_type=prediction_type,
            )
            for shift in (0.0, 0.2, -0.2)
        )
        level = schedule(exact.t)
        scale = 1.0 if prediction_type == "x_0" else level.snr
        assert_mean(exact.squared_error - scale * DATA.var_x_0(level), 0.0)
        for other in (worse, better):
            assert_mean(other.squared_error - exact.squared_error - scale * 0.04, 0.0)
            assert other.squared_error.mean() > exact.squared_error.mean()


@pytest.mark.slow
def test_ELBO_11_bound_and_exact_entropy_gaussian():
    # E bound >= E[-log p]; the gap is due to discretization and falls towards 0 as T grows
    entropy = stats.norm(DATA.mean, np.sqrt(DATA.var)).entropy()
    x_0 = DATA.sample(jax.random.key(5), (20_000, 1))
    surprise = -np.asarray(DATA.log_prob(x_0), np.float64)  # paired with the bound, to reduce the variance
    assert_mean(surprise, entropy)
    gaps, errors = [], []
    for num_steps in (5, 20, 80, 320):  # between fixed end points
        schedule = discretize(LinearLogSNR(5.0, -10.0), num_steps)
        bound = elbo.bound(denoiser(DATA), jax.random.key(6), x_0, schedule, _gaussian_decoder).total
        gap = np.asarray(bound, np.float64) - surprise
        gaps.append(gap.mean())
        errors.append(gap.std() / np.sqrt(gap.size))
    gaps, errors = np.array(gaps), np.array(errors)
    assert np.all(gaps > -3 * errors)
    assert gaps[0] > 20 * errors[0]
    assert np.all(np.diff(gaps) < 0)
    assert gaps[-1] < 0.05 * gaps[0]


# Exact distributions: the bound of the optimal model, and the entropy of the data


def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])


def _spoiled(distribution, shift):
    """The exact denoiser of x_0, shifted: the identities hold for any model."""
    return jax.vmap(lambda x_t, level: closed_form.optimal_prediction(distribution, x_t, level, "x_0") + shift)


def test_ELBO_2_bridge_by_completing_the_square():
    # -log q(x_s|x_r) q(x_t|x_s) in x_s, with q(x_s|x_r) = N(c x_r, v) and q(x_t|x_s) = N(a x_s, w)
    x_r, x_s, x_t = sp.symbols("x_r x_s x_t", real=True)
    a, c, v, w = sp.symbols("a c v w", positive=True)
    poly = sp.Poly(sp.expand((x_s - c * x_r) ** 2 / (2 * v) + (x_t - a * x_s) ** 2 / (2 * w)), x_s)
    var = 1 / (2 * poly.coeff_monomial(x_s**2))
    mean = -poly.coeff_monomial(x_s) * var
    with jax.enable_x64(True):
        schedule = linear_betas(10, 0.1, 0.5)
        for r, s, t in ((0, 1, 2), (2, 3, 4), (1, 4, 9)):
            first, second = schedule.step(r, s), schedule.step(s, t)
            abar = [sp.prod([1 - sp.Rational(1, 10) - sp.Rational(4, 90) * k for k in range(n)]) for n in range(11)]
            values = {
                c: sp.sqrt(abar[s] / abar[r]), a: sp.sqrt(abar[t] / abar[s]), v: 1 - abar[s] / abar[r],
                w: 1 - abar[t] / abar[s], x_r: sp.Rational(7, 10), x_t: sp.Rational(-3, 2),
            }  # fmt: skip
            distribution = forward.bridge(jnp.asarray([0.7]), jnp.asarray([-1.5]), first, second)
            assert_close(distribution.mean[0], float(mean.subs(values)), rtol=1e-12)
            assert_close(distribution.var, float(var.subs(values)), rtol=1e-12)


def test_ELBO_2_a_consistency_term_by_its_definition():
    # C = E log q(x_s|x_r) / p(x_s|x_t) over the bridge: KL(b||p) - KL(b||q), since both share E log b
    x, m, n, k = sp.symbols("x m n k", real=True)
    u, v, w = sp.symbols("u v w", positive=True)  # variances of b, q, p; means m, n, k

    def log_normal(mean, var):
        return -((x - mean) ** 2) / (2 * var) - sp.log(2 * sp.pi * var) / 2

    def expected(polynomial):  # E x = m, E x^2 = m^2 + u
        return sp.expand(polynomial).subs(x**2, m**2 + u).subs(x, m)

    def divergence(mean, var):
        return (m - mean) ** 2 / (2 * var) + (u / var - 1 - sp.log(u / var)) / 2

    ratio = expected(log_normal(n, v) - log_normal(k, w))
    assert_proved(sp.expand_log(ratio, force=True), sp.expand_log(divergence(k, w) - divergence(n, v), force=True))


def test_ELBO_2_and_3_have_one_expectation():
    distribution, schedule = _mixture(), discretize(LinearLogSNR(3.0, -6.0), 6)
    x_0 = draws(distribution, jax.random.key(0), 40_000)
    arguments = x_0, schedule, closed_form.OptimalDecoder(distribution)

    @jax.jit
    def totals():
        net = _spoiled(distribution, 0.2)
        first = path_bounds.consistency_bound(net, jax.random.key(1), *arguments, prediction_type="x_0").total
        return first, elbo.bound(net, jax.random.key(2), *arguments, prediction_type="x_0").total

    first, second = totals()
    assert_mean(np.asarray(first, np.float64) - np.asarray(second, np.float64), 0.0, resolution=0.06)


@pytest.mark.slow
def test_ELBO_2_varies_more_the_more_steps():
    # One-sample variances at fixed x_0, exact denoiser. ELBO-3's falls with T, as its sum averages over more steps.
    # ELBO-2's does not: each of its terms depends on two states whose noise is not averaged out.
    distribution, x_0 = closed_form.gaussian([0.4], [[0.5]]), jnp.full((20_000, 1), 0.9)
    best, decoder, ratios = closed_form.OptimalDenoiser(distribution), closed_form.OptimalDecoder(distribution), []
    for num_steps in (10, 160):
        schedule = discretize(LinearLogSNR(3.0, -6.0), num_steps)
        first = path_bounds.consistency_bound(best, jax.random.key(1), x_0, schedule, decoder)
        second = elbo.bound(best, jax.random.key(2), x_0, schedule, decoder)
        ratios.append(float(np.var(first.diffusion + first.prior) / np.var(second.diffusion + second.prior)))
    assert np.all(np.diff(ratios) > 0)
    assert ratios[-1] > 10


def test_erratum_consistency_term_averages_over_the_bridge():
    # Printed: E KL(q(x_t|x_{t-1}) || p(x_t|x_{t+1})) over the pair, as if x_t did not depend on x_{t+1}. In expectation
    # over the data, exactly: Gaussian data, T = 2, the exact denoiser. The one term is over (x_0, x_2).
    with jax.enable_x64(True):
        m, v, schedule = 0.4, 0.5, linear_betas(2, 0.3, 0.6)
        distribution = closed_form.gaussian([m], [[v]])
        first, second = schedule.step(0, 1), schedule.step(1, 2)
        z, weights = np.polynomial.hermite_e.hermegauss(40)
        weights = weights / weights.sum()

        def pair(f):
            """E f(x_0, x_2), by Gauss-Hermite quadrature: exact for polynomials."""
            x_0 = jnp.asarray(m + v**0.5 * z)
            x_2 = schedule(2).alpha * x_0[:, None] + schedule(2).sigma * jnp.asarray(z)[None, :]
            values = jax.jit(jax.vmap(lambda a, row: jax.vmap(lambda b: f(a[None], b[None]))(row)))(x_0, x_2)
            return float(weights @ values @ weights)

        def model(x_2):
            return forward.posterior(x_2, closed_form.optimal_prediction(distribution, x_2, schedule(2), "x_0"), second)

        def consistency(x_0, x_2):
            bridge = forward.bridge(x_0, x_2, first, second)
            return kl(bridge, model(x_2)) - kl(bridge, forward.transition(x_0, first))

        def printed(x_0, x_2):
            return kl(forward.transition(x_0, first), model(x_2))

        # ELBO-3 without its reconstruction, which both have in common
        truth = information.optimal_bound(distribution, schedule)
        x_1 = information.quadrature(
            lambda x: kl(forward.transition(x, second), Normal(jnp.zeros(1), var=jnp.asarray(1.0))),
            closed_form.marginal(distribution, schedule(1)),
        ).value
        bound = float(truth.prior.value + truth.diffusion.value - x_1)
        correct, wrong = pair(consistency), pair(printed)
        assert_close(correct, bound, rtol=1e-10)
        with refuted():
            assert_close(wrong, bound, rtol=0.1)
        # the library computes the first
        x_0 = jnp.asarray(m + v**0.5 * np.random.RandomState(0).randn(100_000, 1))
        denoiser, decoder = closed_form.OptimalDenoiser(distribution), closed_form.OptimalDecoder(distribution)
        ours = path_bounds.consistency_bound(denoiser, jax.random.key(0), x_0, schedule, decoder).diffusion
        assert_mean(ours, correct)
        with refuted():
            assert_mean(ours, wrong)


def _reverse_divergence(distribution, step):
    """E over x_t of KL(q(x_s|x_t) || p(x_s|x_t)): the loss of a normal step, by quadrature in x_t and x_s."""

    def at(x_t):
        kernel = closed_form.reverse_transition(distribution, x_t, step)
        model = forward.posterior(x_t, closed_form.optimal_prediction(distribution, x_t, step.t, "x_0"), step)
        return information.quadrature(lambda x: kernel.log_prob(x) - model.log_prob(x), kernel).value

    return information.quadrature(at, closed_form.marginal(distribution, step.t)).value


@pytest.mark.slow
def test_ELBO_3_gap_is_the_sum_of_its_divergences():
    # E log p - ELBO_T = KL(q(x_T) || p(x_T)) + sum_t E KL(q(x_{t-1}|x_t) || p(x_{t-1}|x_t)): the chain rule of
    # KL(q(x_0:T) || p(x_0:T)). The left by MMSEs and entropies, the right by integrals over reverse kernels.
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), discretize(LinearLogSNR(5.0, -2.0), 5)
        gap = information.optimal_bound(distribution, schedule).total.value - information.entropy(distribution).value
        end, prior = closed_form.marginal(distribution, schedule(5)), Normal(jnp.zeros(1), var=jnp.asarray(1.0))
        divergences = information.quadrature(lambda x: end.log_prob(x) - prior.log_prob(x), end).value
        divergences += sum(_reverse_divergence(distribution, schedule.step(t - 1, t)) for t in range(2, 6))
        assert_close(gap, divergences, rtol=1e-8)
        assert gap > 0.1


@pytest.mark.slow
def test_ELBO_3_gap_shrinks_as_one_over_T():
    with jax.enable_x64(True):
        distribution = _mixture()
        entropy = information.entropy(distribution).value
        steps, gaps = np.array([64, 128, 512]), []
        for num_steps in steps:
            schedule = discretize(LinearLogSNR(9.0, -15.0), int(num_steps))
            gaps.append(float(information.optimal_bound(distribution, schedule).total.value - entropy))
        slope = np.polyfit(np.log(steps[1:]), np.log(gaps[1:]), 1)[0]
        assert np.all(np.array(gaps) > 0)
        assert -1.05 < slope < -0.95
        # for one point, whose reverse kernel *is* the posterior, the gap at any T is the prior's alone, which vanishes
        # with the signal
        for low, left in ((-2.0, 1e-2), (-12.0, 1e-5)):
            bound = information.optimal_bound(closed_form.empirical([[0.3]]), discretize(LinearLogSNR(9.0, low), 8))
            assert_close(bound.diffusion.value + bound.reconstruction.value, 0.0, atol=1e-12)
            assert 0 < bound.prior.value < left


# ELBO-12


@jax.tree_util.register_static
@dataclass(frozen=True)
class Bent(LinearLogSNR):
    """LinearLogSNR in another time, t + bend t (1 - t): the same end points, another shape."""

    bend: float = 0.0

    def __call__(self, t):
        return super().__call__(self._time(t))

    def step(self, s, t):
        return super().step(self._time(s), self._time(t))

    def _time(self, t):
        return t + self.bend * t * (1 - t)


SHAPES = [Bent(5.0, -6.0, bend) for bend in (-0.9, 0.0, 0.9)]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ELBO_12_rate_is_the_limit_of_the_weight(prediction_type):
    # the weight of a step whose log-SNR falls by -lambda' dt, to first order in dt
    lam, slope, dt = sp.symbols("lambda slope dt", real=True)
    ahead = lam - slope * dt  # lambda_s, where s = t - dt
    alpha2, sigma2 = 1 / (1 + sp.exp(-lam)), 1 / (1 + sp.exp(lam))
    by_x_0 = (sp.exp(ahead) - sp.exp(lam)) / 2
    factor = {"x_0": 1, "eps": sigma2 / alpha2, "v": sigma2, "score": sigma2**2 / alpha2}[
        prediction_type
    ]  # error(x_0) / error(prediction type)
    rate = sp.limit(by_x_0 * factor / dt, dt, 0)
    assert_proved(rate, -slope / 2 * sp.exp(lam) * factor)
    with jax.enable_x64(True):
        for value in (-3, 2):
            truth = float(rate.subs({lam: value, slope: -7}))
            ours = elbo.continuous_diffusion_weight(
                level_from_log_snr(jnp.asarray(float(value))), jnp.asarray(-7.0), prediction_type
            )
            assert_close(ours, truth, rtol=1e-12)


@pytest.mark.slow
def test_ELBO_12_the_sum_tends_to_the_integral():
    # larger T tightens the bound, down to the limit, for every shape: exactly
    with jax.enable_x64(True):
        distribution = _mixture()
        limit = information.optimal_bound_limit(distribution, SHAPES[0](0.0), SHAPES[0](1.0)).total.value
        for schedule in SHAPES:
            gaps = []
            for num_steps in (50, 200, 400):
                bound = information.optimal_bound(distribution, discretize(schedule, num_steps)).total.value
                gaps.append(float(bound - limit))
            assert np.all(np.diff(gaps) < 0)
            assert gaps[-1] > 0
            assert gaps[-2] / gaps[-1] == pytest.approx(2.0, rel=0.06)  # O(1 / T)


@pytest.mark.slow
def test_ELBO_12_invariant_to_the_shape_of_the_schedule():
    # the integral over time, for three shapes and any prediction type, is the integral over the SNR
    distribution = _mixture()
    x_0 = draws(distribution, jax.random.key(0), 40_000)
    truth = information.optimal_bound_limit(distribution, SHAPES[0](0.0), SHAPES[0](1.0))
    variances = []
    for schedule, prediction_type in zip(SHAPES, ("eps", "x_0", "v"), strict=True):
        denoiser = closed_form.OptimalDenoiser(distribution, prediction_type)
        ours = elbo.continuous_bound(
            denoiser,
            jax.random.key(1),
            x_0,
            schedule,
            closed_form.OptimalDecoder(distribution),
            prediction_type=prediction_type,
        )
        assert_mean(ours.diffusion, truth.diffusion.value, resolution=0.05)
        assert_mean(ours.total, truth.total.value)
        variances.append(np.var(ours.diffusion))
    assert max(variances) > 1.5 * min(variances)  # the variance does depend on the shape: a learned schedule reduces it


@pytest.mark.slow
def test_ELBO_12_more_times_an_example_and_a_later_start():
    distribution, schedule = _mixture(), SHAPES[1]
    x_0 = draws(distribution, jax.random.key(0), 20_000)
    denoiser, decoder = closed_form.OptimalDenoiser(distribution), closed_form.OptimalDecoder(distribution)
    truth = information.optimal_bound_limit(distribution, schedule(0.3), schedule(1.0))
    one, many = (
        elbo.continuous_bound(denoiser, jax.random.key(1), x_0, schedule, decoder, terms=terms, t_0=0.3)
        for terms in (1, 8)
    )
    for ours in (one, many):
        for term, estimate in zip(ours, truth, strict=True):
            assert_mean(np.asarray(term) + 1e-12 * np.random.RandomState(0).randn(len(term)), estimate.value)
    assert np.var(many.diffusion) < np.var(one.diffusion) / 4


def test_ELBO_13_bits_per_dimension():
    # P of a bin of width w in D dimensions is the density times w^D: -log2 P / D, in nats of the density
    nats, width, dims = sp.symbols("nats w D", positive=True)
    mass = sp.exp(-nats) * width**dims
    bits = nats / (dims * sp.log(2)) - sp.log(width, 2)
    assert_proved(-sp.expand_log(sp.log(mass), force=True) / (dims * sp.log(2)), bits)
    with jax.enable_x64(True):
        assert_close(
            elbo.bits_per_dim(jnp.asarray(7.0), 3, bin_width=0.25), bits.subs({nats: 7, dims: 3, width: R(1, 4)})
        )
        # uniform 8-bit data: 8 bits, from the probability and from the density on [-1 - 1/255, 1 + 1/255]
        assert_close(elbo.bits_per_dim(jnp.asarray(12 * np.log(256)), 12), 8.0, rtol=1e-14)
        density = -12 * np.log(255 / 512)
        assert_close(elbo.bits_per_dim(jnp.asarray(density), 12, bin_width=2 / 255), 8.0, rtol=1e-14)


def test_erratum_the_half_belongs_to_the_whole_kl():
    # KL = (||mu||^2 + tr Sigma - k - log|Sigma|) / 2; printed with the half on ||mu||^2 alone. In one dimension:
    x, m = sp.symbols("x m", real=True)
    v = sp.Symbol("v", positive=True)
    integral = expected(log_normal(x, m, v) - log_normal(x, 0, 1), x, m, v)
    assert_proved(integral, (m**2 + v - 1 - sp.log(v)) / 2)
    assert_disproved(integral, m**2 / 2 + v - 1 - sp.log(v))
    with jax.enable_x64(True):
        mean, var = np.array([0.5, -1.0]), np.array([0.3, 2.0])
        q, p = Normal(jnp.asarray(mean), var=jnp.asarray(var)), Normal(jnp.zeros(2), var=jnp.asarray(1.0))
        rest = var.sum() - 2 - np.log(var).sum()
        assert_close(kl(q, p), (mean @ mean + rest) / 2, rtol=1e-12)
        with refuted():
            assert_close(kl(q, p), mean @ mean / 2 + rest, rtol=0.1)
