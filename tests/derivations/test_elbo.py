"""ELBO: the bound, its two forms, its weights and its optimum, in worlds where log p is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from scipy import stats

from tests.derivations.worlds import GaussianWorld, PointWorld, assert_mean, denoiser, exact_step
from vdm_jax import elbo, forward, losses
from vdm_jax.gaussian import Normal, kl
from vdm_jax.likelihoods import Categorical, DiscretizedGaussian, to_unit
from vdm_jax.parameterization import convert, target
from vdm_jax.schedules import LinearLogSNR
from vdm_jax.tables import from_betas, linear_betas, tabulate

WORLD = GaussianWorld(0.4, 0.5)
KINDS = ("x_0", "eps", "v", "score")
R = sp.Rational
LEVELS = [(R(12, 13), R(5, 13), R(3, 5), R(4, 5)), (R(2), R(1, 3), R(3, 2), R(4)), (R(1), R(1, 10), R(1), R(7))]


def _table(num_steps):
    return linear_betas(num_steps, 0.1 / num_steps, min(20 / num_steps, 0.9))


def _gaussian_decoder(x_hat, x_1, level):
    """p(x_0|x_1) with the exact posterior variance of WORLD."""
    return Normal(x_hat, WORLD.var_x_0(level))


def _discretized(x_hat, x_1, level):
    return DiscretizedGaussian(x_hat, level.sigma, 17)


def _finite_world():
    return PointWorld(to_unit(jnp.asarray([[0, 3], [8, 8], [16, 2]]), 17), jnp.asarray([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_ELBO_1_and_3_have_one_expectation(shift):
    # path by path over fixed data; a spoiled denoiser too, since the identity holds for any model
    table, x_0 = _table(6), jnp.full((100_000, 1), 0.9)
    wrong = denoiser(WORLD, shift=shift)
    joint = np.asarray(elbo.joint_log_ratio(wrong, jax.random.key(0), x_0, table, _gaussian_decoder), np.float64)
    bound = np.asarray(elbo.bound(wrong, jax.random.key(1), x_0, table, _gaussian_decoder).total, np.float64)
    assert_mean(-joint - bound, 0.0, resolution=0.03)


def test_ELBO_3_has_less_variance_for_a_blunt_denoiser():
    # One-sample variances at fixed x_0, of a model that hardly looks at x_t: it believes in far narrower data.
    blunt = denoiser(GaussianWorld(WORLD.mean, WORLD.var / 50))
    table, x_0 = linear_betas(10, 0.1, 0.5), jnp.full((20_000, 4), 0.9)
    joint = elbo.joint_log_ratio(blunt, jax.random.key(0), x_0, table, _gaussian_decoder)
    bound = elbo.bound(blunt, jax.random.key(1), x_0, table, _gaussian_decoder).total
    assert np.var(bound) > 0
    assert np.var(joint) > 20 * np.var(bound)


def test_ELBO_3_has_more_variance_at_the_optimum():
    # Not "strictly": p(x_0:T) / q(x_1:T|x_0) of the *true* reverse process is p(x_0) on every path. With the exact
    # denoiser and many steps ELBO-1 is nearly that, while ELBO-3 keeps the spread of log p(x_0|x_1).
    table, x_0 = tabulate(LinearLogSNR(5.0, -10.0), 400), jnp.full((5000, 1), 0.9)
    joint = elbo.joint_log_ratio(denoiser(WORLD), jax.random.key(0), x_0, table, _gaussian_decoder)
    bound = elbo.bound(denoiser(WORLD), jax.random.key(1), x_0, table, _gaussian_decoder).total
    assert np.var(joint) < np.var(bound) / 2


def test_ELBO_4_prior_vanishes_with_the_signal():
    x_0 = jnp.asarray([1.0, -0.5])
    with jax.enable_x64(True):
        x_0 = jnp.asarray([1.0, -0.5])
        values = [float(elbo.prior_kl(x_0, from_betas(np.full(n, 0.02))(n))) for n in (10, 100, 300, 600)]
        assert np.all(np.diff(values) < 0)
        assert values[-1] < 1e-5
        # against log q / p along draws of q
        level = from_betas(np.full(10, 0.02))(10)
        q, p = forward.marginal(x_0, level), Normal(jnp.zeros(2), jnp.asarray(1.0))
        draws = jax.vmap(q.sample)(jax.random.split(jax.random.key(0), 20_000))
        assert_mean(jax.vmap(q.log_prob)(draws) - jax.vmap(p.log_prob)(draws), elbo.prior_kl(x_0, level))


@pytest.mark.parametrize("decoder", ["gaussian", "discretized", "categorical"])
def test_ELBO_5_decoders_are_laws_of_the_data(decoder):
    with jax.enable_x64(True):
        level = linear_betas(10, 0.1, 0.5)(3)
        centre = jnp.asarray([0.3])
        if decoder == "gaussian":
            grid = jnp.linspace(-8.0, 8.0, 4001)
            log_p = jax.vmap(lambda x: Normal(centre, level.sigma**2).log_prob(x[None]))(grid)
            assert np.trapezoid(np.exp(log_p), grid) == pytest.approx(1.0, rel=1e-10)
            return
        law = (
            DiscretizedGaussian(centre, level.sigma, 17) if decoder == "discretized" else Categorical(centre, level, 17)
        )
        grid = to_unit(jnp.arange(17), 17)
        masses = np.exp(jax.vmap(lambda x: law.log_prob(x[None]))(grid))
        assert masses.sum() == pytest.approx(1.0, rel=1e-12)
        if decoder == "discretized":  # open edges: bins by a difference of scipy's normal CDF
            edges = np.r_[-np.inf, (np.asarray(grid)[1:] + np.asarray(grid)[:-1]) / 2, np.inf]
            truth = np.diff(stats.norm(0.3, float(level.sigma)).cdf(edges))
        else:  # Bayes' rule under a uniform prior
            likelihood = stats.norm(float(level.alpha) * np.asarray(grid), float(level.sigma)).pdf(0.3)
            truth = likelihood / likelihood.sum()
        np.testing.assert_allclose(masses, truth, rtol=1e-10)


def test_ELBO_6_kl_of_equal_variances():
    with jax.enable_x64(True):
        x_t, x_0, x_hat = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(3, 4)))
        for levels in LEVELS:
            step = exact_step(*levels)
            q, p = forward.posterior(x_t, x_0, step), forward.posterior(x_t, x_hat, step)
            ours = elbo.diffusion_kl(x_0, x_hat, step, "x_0")
            assert float(ours) == pytest.approx(float(kl(q, p)), rel=1e-11)
            draws = jax.vmap(q.sample)(jax.random.split(jax.random.key(0), 5000))
            assert_mean(jax.vmap(q.log_prob)(draws) - jax.vmap(p.log_prob)(draws), ours)


def test_ELBO_6_l_ddpm_is_the_sum_over_t():
    # against the closed form of each term, Gaussian data: the error of a shifted x_hat is the shift and the variance
    table, shift = _table(6), 0.3
    x_0 = WORLD.sample(jax.random.key(3), (100_000, 1))
    bound = elbo.bound(denoiser(WORLD, shift=shift), jax.random.key(1), x_0, table, _gaussian_decoder)
    abar = np.cumprod(1 - np.linspace(0.1 / 6, 0.9, 6))
    snr = abar / (1 - abar)
    error = 1 / (1 / WORLD.var + snr) + shift**2  # precision of x_0 given x_t adds up
    assert_mean(bound.diffusion, 0.5 * np.sum((snr[:-1] - snr[1:]) * error[1:]))


# ELBO-7 .. 9: the weight by sympy, from the difference of the two posterior means

a_s, g_s, a_t, g_t = sp.symbols("alpha_s sigma_s alpha_t sigma_t", positive=True)
abar_s, beta, x_t, value, other = sp.symbols("abar_s beta x_t value other", positive=True)
ABAR_T = abar_s * (1 - beta)
IN_BETAS = {a_s: sp.sqrt(abar_s), g_s: sp.sqrt(1 - abar_s), a_t: sp.sqrt(ABAR_T), g_t: sp.sqrt(1 - ABAR_T)}
VAR_Q = g_s**2 * (g_t**2 - (a_t / a_s) ** 2 * g_s**2) / g_t**2  # POST-3
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


def _weight(kind):
    """||mu(value) - mu(other)||^2 / (2 sigma_q^2) over (value - other)^2, mu by Bayes' rule for Gaussians."""
    precision_mean = (a_t / a_s) * x_t / (g_t**2 - (a_t / a_s) ** 2 * g_s**2) + a_s * TO_X_0[kind] / g_s**2
    mean = VAR_Q * precision_mean
    return sp.simplify((mean - mean.subs(value, other)) ** 2 / (2 * VAR_Q) / (value - other) ** 2)


def _check_weight(kind):
    weight = _weight(kind)
    if kind in PRINTED:
        assert sp.simplify(weight.subs(IN_BETAS) - PRINTED[kind]) == 0
    with jax.enable_x64(True):
        for levels in LEVELS:
            truth = float(weight.subs(dict(zip((a_s, g_s, a_t, g_t), levels, strict=True))))
            assert float(elbo.diffusion_weight(exact_step(*levels), kind)) == pytest.approx(truth, rel=1e-13)
        if kind in PRINTED:
            table = from_betas(np.array([0.1, 0.2]))
            truth = float(PRINTED[kind].subs({abar_s: R(9, 10), beta: R(1, 5)}))
            assert float(elbo.diffusion_weight(table.step(1, 2), kind)) == pytest.approx(truth, rel=1e-12)


def test_ELBO_7_weight_by_x_hat():
    _check_weight("x_0")
    difference = ((a_s / g_s) ** 2 - (a_t / g_t) ** 2) / 2  # (SNR(s) - SNR(t)) / 2
    assert sp.simplify(_weight("x_0") - difference) == 0


def test_ELBO_8_weight_by_eps():
    _check_weight("eps")


def test_ELBO_9_weight_by_score_and_v():
    _check_weight("score")
    _check_weight("v")


def test_ELBO_9_all_weights_give_one_kl():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        x_0, eps, x_hat = (jnp.asarray(x) for x in rng.normal(size=(3, 4)))
        for levels in LEVELS:
            step = exact_step(*levels)
            x_t = step.t.alpha * x_0 + step.t.sigma * eps
            truth = kl(forward.posterior(x_t, x_0, step), forward.posterior(x_t, x_hat, step))
            for kind in KINDS:
                prediction = convert(x_hat, x_t, step.t, "x_0", kind)
                ours = elbo.diffusion_kl(target(x_0, eps, step.t, kind), prediction, step, kind)
                assert float(ours) == pytest.approx(float(truth), rel=1e-9), kind


def test_ELBO_10_one_random_term_for_the_sum():
    # T E_t is the sum: the one-term bound against the closed form, and against all terms; spreading terms cuts variance
    table = _table(6)
    x_0 = jnp.full((100_000, 1), 0.9)
    wrong = denoiser(WORLD, shift=0.3)
    every, one, three = (
        np.asarray(elbo.bound(wrong, jax.random.key(n), x_0, table, _gaussian_decoder, terms=k).diffusion, np.float64)
        for n, k in enumerate((None, 1, 3))
    )
    ddpm = losses.ddpm_loss(wrong, jax.random.key(9), x_0, table, _gaussian_decoder).diffusion
    for estimate in (one, three, np.asarray(ddpm, np.float64)):
        assert_mean(estimate - every, 0.0)
    assert every.var() < three.var() < one.var()


def test_ELBO_11_the_weighted_loss_is_the_bound():
    # T E_t w_t ||.||^2 with the bound's weight (none at t = 1, the decoder's step) is the diffusion term
    table, x_0 = _table(6), jnp.full((100_000, 1), 0.9)

    for kind in KINDS:
        wrong = denoiser(WORLD, kind, shift=0.3)

        def weight(step, kind=kind):
            return jnp.where(step.s.sigma > 0, elbo.diffusion_weight(step, kind), 0.0)

        loss = losses.denoising_loss(wrong, jax.random.key(0), x_0, table, kind=kind, weight=weight).loss
        diffusion = elbo.bound(wrong, jax.random.key(1), x_0, table, _gaussian_decoder, kind=kind).diffusion
        assert_mean(6 * np.asarray(loss, np.float64) - np.asarray(diffusion, np.float64), 0.0)


def test_ELBO_11_the_optimum_is_the_conditional_expectation():
    # L of the exact denoiser is E Var[target | x_t], and any change of it costs its square
    table, x_0 = _table(6), WORLD.sample(jax.random.key(3), (100_000, 1))
    for kind in ("x_0", "eps"):
        exact, worse, better = (
            losses.denoising_loss(denoiser(WORLD, kind, shift), jax.random.key(4), x_0, table, kind=kind)
            for shift in (0.0, 0.2, -0.2)
        )
        level = table(exact.t)
        scale = 1.0 if kind == "x_0" else level.snr
        assert_mean(exact.squared_error - scale * WORLD.var_x_0(level), 0.0)
        for other in (worse, better):
            assert_mean(other.squared_error - exact.squared_error - scale * 0.04, 0.0)
            assert other.squared_error.mean() > exact.squared_error.mean()


def test_ELBO_11_bound_and_truth_gaussian():
    # E bound >= E[-log p]; the gap is the discretisation's, it falls towards 0 as T grows
    entropy = stats.norm(WORLD.mean, np.sqrt(WORLD.var)).entropy()
    x_0 = WORLD.sample(jax.random.key(5), (20_000, 1))
    surprise = -np.asarray(WORLD.log_prob(x_0), np.float64)  # pairs with the bound, to take its spread out
    assert_mean(surprise, entropy)
    gaps, errors = [], []
    for num_steps in (5, 20, 80, 320):  # between fixed end points
        table = tabulate(LinearLogSNR(5.0, -10.0), num_steps)
        bound = elbo.bound(denoiser(WORLD), jax.random.key(6), x_0, table, _gaussian_decoder).total
        gap = np.asarray(bound, np.float64) - surprise
        gaps.append(gap.mean())
        errors.append(gap.std() / np.sqrt(gap.size))
    gaps, errors = np.array(gaps), np.array(errors)
    assert np.all(gaps > -3 * errors)
    assert gaps[0] > 20 * errors[0]
    assert np.all(np.diff(gaps) < 0)
    assert gaps[-1] < 0.05 * gaps[0]


def _categorical(x_hat, x_1, level):
    return Categorical(x_1, level, 17)


@pytest.mark.parametrize("decoder", [_discretized, _categorical])
def test_ELBO_11_bound_and_truth_finite_data(decoder):
    world = _finite_world()
    entropy = stats.entropy(world.weights)
    x_0 = world.sample(jax.random.key(7), 5000)
    means = []
    for num_steps in (10, 400):
        table = tabulate(LinearLogSNR(9.0, -9.0), num_steps)
        bound = np.asarray(elbo.bound(denoiser(world), jax.random.key(8), x_0, table, decoder).total, np.float64)
        assert bound.mean() > entropy - 4 * bound.std() / np.sqrt(bound.size)
        means.append(bound.mean())
    assert means[1] - entropy < 0.5 * (means[0] - entropy)


def test_ELBO_13_bits_per_dimension():
    with jax.enable_x64(True):
        # uniform 8-bit data: 8 bits, from the probability and from the density on [-1 - 1/255, 1 + 1/255]
        dims = 12
        assert float(elbo.bits_per_dim(jnp.asarray(dims * np.log(256)), dims)) == pytest.approx(8.0, rel=1e-14)
        density = -dims * np.log(255 / 512)
        assert float(elbo.bits_per_dim(jnp.asarray(density), dims, bin_width=2 / 255)) == pytest.approx(8.0, rel=1e-14)
        # a smooth law: density times bin is the probability of the bin
        x, mean, scale = to_unit(jnp.asarray([100, 140]), 256), jnp.zeros(2), jnp.asarray(0.5)
        discrete = elbo.bits_per_dim(-DiscretizedGaussian(mean, scale, 256).log_prob(x), 2)
        smooth = elbo.bits_per_dim(-Normal(mean, scale**2).log_prob(x), 2, bin_width=2 / 255)
        assert float(discrete) == pytest.approx(float(smooth), rel=1e-5)


def test_erratum_the_half_belongs_to_the_whole_kl():
    # KL = (||mu||^2 + tr Sigma - k - log|Sigma|) / 2; printed with the half on ||mu||^2 alone
    with jax.enable_x64(True):
        mean, var = np.array([0.5, -1.0]), np.array([0.3, 2.0])
        ours = float(kl(Normal(jnp.asarray(mean), jnp.asarray(var)), Normal(jnp.zeros(2), jnp.asarray(1.0))))
        rest = var.sum() - 2 - np.log(var).sum()
        q = Normal(jnp.asarray(mean), jnp.asarray(var))
        draws = jax.vmap(q.sample)(jax.random.split(jax.random.key(0), 20_000))
        log_ratio = jax.vmap(q.log_prob)(draws) - jax.vmap(Normal(jnp.zeros(2), jnp.asarray(1.0)).log_prob)(draws)
        assert_mean(log_ratio, ours)
        assert ours == pytest.approx((mean @ mean + rest) / 2, rel=1e-12)
        with pytest.raises(AssertionError):
            assert_mean(log_ratio, mean @ mean / 2 + rest)
