"""FWD: the forward process. Noises are folded symbolically, kernels composed by numerical integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from scipy import integrate, stats

from tests.derivations.worlds import exact_step, number
from vdm_jax import elbo, forward
from vdm_jax.gaussian import Normal, kl
from vdm_jax.schedules import Cosine, LinearBeta, LinearLogSNR, Sigmoid, VarianceExploding
from vdm_jax.tables import from_betas, from_gammas, from_standard_deviations, linear_betas, tabulate, to_betas

BETAS = [sp.Rational(1, 10), sp.Rational(1, 5), sp.Rational(1, 3), sp.Rational(1, 2)]
SCHEDULES = [LinearBeta(), Cosine(), Sigmoid(), LinearLogSNR(), VarianceExploding(0.1, 5.0)]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _table():
    return from_betas(np.array([float(b) for b in BETAS]))


def _fold(betas):
    """x_t as a sum: the coefficient of x_0 and the total variance of all noises, from x_k = sqrt(1-b) x + sqrt(b) e."""
    x = x_0 = sp.Symbol("x_0")
    noises = sp.symbols(f"eps_1:{len(betas) + 1}")
    for beta, eps in zip(betas, noises, strict=True):
        x = sp.sqrt(1 - beta) * x + sp.sqrt(beta) * eps
    x = sp.expand(x)
    return x.coeff(x_0), sp.simplify(sum(x.coeff(eps) ** 2 for eps in noises))


def test_FWD_1_one_step_has_variance_beta():
    x = jnp.asarray([1.7, -0.4])
    for t, beta in enumerate(BETAS, start=1):
        law = forward.transition(x, _table().step(t - 1, t))
        np.testing.assert_allclose(law.mean, x * float(sp.sqrt(1 - beta)), rtol=1e-14)
        assert float(law.var) == pytest.approx(float(beta), rel=1e-13)


def test_FWD_2_marginal_folds_the_noises():
    # symbolically, for any betas
    b = sp.symbols("b_1:4", positive=True)
    signal, noise = _fold(b)
    keep = sp.prod(1 - k for k in b)
    assert sp.simplify(signal**2 - keep) == 0
    assert sp.expand(noise - (1 - keep)) == 0
    # and the library, at rational betas
    for t in range(1, 5):
        signal, noise = _fold(BETAS[:t])
        law = forward.marginal(jnp.asarray([2.0]), _table()(t))
        assert float(law.mean[0]) == pytest.approx(float(2 * signal), rel=1e-14)
        assert float(law.var) == pytest.approx(float(noise), rel=1e-14)


def test_FWD_3_any_pair_folds_the_noises_between():
    for s in range(4):
        for t in range(s + 1, 5):
            signal, noise = _fold(BETAS[s:t])
            law = forward.transition(jnp.asarray([2.0]), _table().step(s, t))
            assert float(law.mean[0]) == pytest.approx(float(2 * signal), rel=1e-14)
            assert float(law.var) == pytest.approx(float(noise), rel=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_FWD_3_variance_makes_up_the_marginal(schedule):
    # Var[x_t] = (alpha_t / alpha_s)^2 Var[x_s] + added noise; also where variance is not preserved
    for s, t in [(0.1, 0.9), (0.4, 0.5), (0.01, 0.99)]:
        step = schedule.step(s, t)
        x_0 = jnp.asarray([0.7])
        before, after = forward.marginal(x_0, step.s), forward.marginal(x_0, step.t)
        law = forward.transition(before.mean, step)
        scale = forward.transition(jnp.asarray([1.0]), step).mean[0]
        assert float(law.mean[0]) == pytest.approx(float(after.mean[0]), rel=1e-12)
        assert float(scale**2 * before.var + law.var) == pytest.approx(float(after.var), rel=1e-10)


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
        assert integrate.trapezoid(density, grid) == pytest.approx(float(truth), rel=1e-10)


def test_FWD_4_the_last_marginal_becomes_the_prior():
    x_0 = jnp.asarray([1.0, -1.0, 0.3])
    prior = Normal(jnp.zeros(3), jnp.asarray(1.0))
    divergence = [float(kl(forward.marginal(x_0, linear_betas()(t)), prior)) for t in (1, 10, 100, 400, 700, 1000)]
    assert np.all(np.diff(divergence) < 0)
    assert divergence[0] > 10
    assert divergence[-1] < 1e-4
    # with beta fixed, each further step multiplies the leading term, alpha^2 ||x_0||^2 / 2, by 1 - beta
    table = from_betas(np.full(400, 0.05))
    late = [float(elbo.prior_kl(x_0, table(t))) for t in (300, 301)]
    assert late[1] / late[0] == pytest.approx(0.95, rel=1e-5)


def test_FWD_5_markov():
    # Bayes, with the posterior: q(x_t|x_s,x_0) = q(x_s|x_t,x_0) q(x_t|x_0) / q(x_s|x_0) must not depend on x_0
    step = _table().step(1, 3)

    def log_conditional(x_0, x_s, x_t):
        posterior = forward.posterior(x_t, x_0, step).log_prob(x_s)
        return posterior + forward.marginal(x_0, step.t).log_prob(x_t) - forward.marginal(x_0, step.s).log_prob(x_s)

    for x_0, x_s, x_t in np.random.default_rng(0).normal(size=(5, 3, 1)):
        x_0, x_s, x_t = jnp.asarray(x_0), jnp.asarray(x_s), jnp.asarray(x_t)
        value, slope = jax.value_and_grad(log_conditional)(x_0, x_s, x_t)
        assert float(slope[0]) == pytest.approx(0.0, abs=1e-12)
        assert float(value) == pytest.approx(float(forward.transition(x_s, step).log_prob(x_t)), rel=1e-11)


def test_FWD_6_three_conventions_give_the_same_kernels():
    variances = np.array([float(b) for b in BETAS])
    abar = [sp.prod(1 - b for b in BETAS[:t]) for t in range(1, 5)]
    tables = [
        from_betas(variances),
        from_standard_deviations(np.array([float(sp.sqrt(b)) for b in BETAS])),
        from_gammas(np.array([float(sp.log((1 - a) / a)) for a in abar])),
    ]
    x, x_0 = jnp.asarray([0.3]), jnp.asarray([-1.0])
    for s, t in [(1, 2), (1, 4), (2, 3)]:
        for kernel in (forward.transition, lambda x, step: forward.posterior(x, x_0, step)):
            truth, *others = (kernel(x, table.step(s, t)) for table in tables)
            for law in others:
                np.testing.assert_allclose(law.mean, truth.mean, rtol=1e-12)
                np.testing.assert_allclose(law.var, truth.var, rtol=1e-11)


def test_FWD_7_schedules():
    # The formulas of each are in tests/test_schedules.py. Here: each is a forward process, whose one-step kernels,
    # chained, reach its marginals.
    for schedule in SCHEDULES:
        table = tabulate(schedule, 10)
        mean, var = jnp.asarray([0.8]), 0.0
        for t in range(1, 11):
            step = table.step(t - 1, t)
            scale = forward.transition(jnp.asarray([1.0]), step).mean[0]
            law = forward.transition(mean, step)
            mean, var = law.mean, scale**2 * var + law.var
            truth = forward.marginal(jnp.asarray([0.8]), step.t)
            assert float(mean[0]) == pytest.approx(float(truth.mean[0]), rel=1e-11)
            assert float(var) == pytest.approx(float(truth.var), rel=1e-10)


def test_exact_step_is_exact():
    # the tool of the other chapters: 3-4-5 and 5-12-13 levels
    step = exact_step(sp.Rational(12, 13), sp.Rational(5, 13), sp.Rational(3, 5), sp.Rational(4, 5))
    assert float(step.snr_ratio) == pytest.approx((9 / 16) / (144 / 25), rel=1e-15)
    assert float(step.one_minus_ratio) == pytest.approx(1 - (9 / 16) / (144 / 25), rel=1e-15)
    assert float(number(sp.Rational(1, 3))) == 1 / 3


# Misprints: the printed form fails the check that the correct one passes.


def test_erratum_alpha_of_a_standard_deviation():
    # beta a standard deviation: alpha = sqrt(1 - beta^2) keeps the variance of unit-variance data, 1 - beta^2 does not
    beta = sp.Rational(3, 5)
    correct, printed = sp.sqrt(1 - beta**2), 1 - beta**2
    assert correct**2 + beta**2 == 1
    assert printed**2 + beta**2 != 1
    table = from_standard_deviations(np.array([float(beta)]))
    assert float(table(1).alpha) == pytest.approx(float(correct), rel=1e-14)
    assert float(table(1).alpha) != pytest.approx(float(printed), rel=0.1)


def test_erratum_product_to_i():
    # abar_i = prod_{k=1..i}; the printed prod_{k=1..k} binds k twice: as one factor it is no marginal from i = 2 on
    for i in range(2, 5):
        signal, _ = _fold(BETAS[:i])
        abar = to_betas(_table()).abar[i - 1]
        assert float(abar) == pytest.approx(float(signal**2), rel=1e-13)
        assert float(1 - BETAS[i - 1]) != pytest.approx(float(signal**2), rel=0.01)


def test_erratum_noise_scale_of_one_step():
    # beta a variance: sqrt(beta) eps keeps unit variance, the printed beta eps does not
    beta = BETAS[0]
    variance = forward.transition(jnp.asarray([1.0]), _table().step(0, 1)).var
    assert (1 - beta) + sp.sqrt(beta) ** 2 == 1
    assert (1 - beta) + beta**2 != 1
    assert float(variance) == pytest.approx(float(beta), rel=1e-13)
    assert float(variance) != pytest.approx(float(beta**2), rel=0.1)
