"""VAR: reverse variances other than the posterior's, learned and analytic, where the exact reverse kernel is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial

from tests.derivations.check import assert_close, assert_mean, assert_moments, assert_proved, refuted
from tests.derivations.worlds import GaussianWorld, denoiser, draws
from vdm_jax import closed_form, elbo, forward, information, losses, reverse_variance
from vdm_jax.discrete_schedules import discretize, linear_betas
from vdm_jax.gaussian import Normal, kl
from vdm_jax.likelihoods import DiscretizedGaussian
from vdm_jax.parameterization import prediction_target
from vdm_jax.samplers import ancestral
from vdm_jax.schedules import LinearLogSNR, VarianceExploding
from vdm_jax.time_sampling import importance_sample

KINDS = ("x_0", "eps", "v", "score")
SCHEDULES = {  # to be called with x64 enabled
    "preserving": lambda: linear_betas(6, 0.1, 0.6),
    "exploding": lambda: discretize(VarianceExploding(0.2, 5.0), 6),
}


def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])


def _with_fraction(distribution, fractions, prediction_type="eps", shift=0.0):
    """The exact denoiser of a distribution (x_hat shifted by `shift`), with a fraction for each step 0..T."""

    def predict(fractions, x_t, level):
        x_hat = closed_form.OptimalDenoiser(distribution, "x_0")(x_t, level) + shift
        eps = jax.vmap(lambda x, h, lv: (x - lv.alpha * h) / lv.sigma)(x_t, x_hat, level)
        prediction = jax.vmap(lambda h, e, lv: prediction_target(h, e, lv, prediction_type))(x_hat, eps, level)
        fraction = fractions[level.t.astype(int)]
        return prediction, jax.vmap(jnp.full_like)(x_t, fraction)

    return Partial(predict, fractions)


def _normal_decoder(x_hat, fraction, x_1, level):
    """Wider where the fraction is larger."""
    return Normal(x_hat, var=level.sigma**2 * jnp.exp(fraction))


@jax.jit
def _power(distribution, level):
    """E||eps_hat||^2 / D of the exact denoiser, by quadrature."""
    noisy = closed_form.marginal(distribution, level)
    return information.quadrature(lambda x: jnp.mean((level.sigma * noisy.score(x)) ** 2), noisy).value


def _steps(schedule):
    """The values of all steps, stacked."""
    t = jnp.arange(1, schedule.num_steps + 1)
    return schedule.step(t - 1, t)


@jax.jit
def _best_variances(distribution, schedule):
    return jax.lax.map(
        lambda step: reverse_variance.analytic_dpm_variance(_power(distribution, step.t), step), _steps(schedule)
    )


@jax.jit
def _best_fractions(distribution, schedule):
    """One entry for each step 0..T."""
    fractions = jax.vmap(reverse_variance.variance_fraction)(_best_variances(distribution, schedule), _steps(schedule))
    return jnp.concatenate([jnp.zeros(1), fractions])


# VAR-1: any variance


def test_VAR_1_between_the_two_extremes_in_betas():
    betas = np.linspace(0.1, 0.6, 6)
    abar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    with jax.enable_x64(True):
        schedule = linear_betas(6, 0.1, 0.6)
        for t in range(2, 7):
            beta = betas[t - 1]
            posterior = beta * (1 - abar[t - 1]) / (1 - abar[t])
            for f in (-0.5, 0.0, 0.3, 1.0, 1.2):
                var = reverse_variance.interpolated_variance(jnp.asarray(f), schedule.step(t - 1, t))
                assert_close(var, np.exp(f * np.log(beta) + (1 - f) * np.log(posterior)), rtol=1e-12)
                assert_close(
                    reverse_variance.variance_fraction(var, schedule.step(t - 1, t)), f, rtol=1e-11, atol=1e-12
                )


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("continuous", SCHEDULES)
def test_VAR_1_the_divergence_of_any_variance(prediction_type, continuous):
    # from target and prediction alone, without the two means: equal to the divergence of the two distributions
    with jax.enable_x64(True):
        schedule, rng = SCHEDULES[continuous](), np.random.RandomState(0)
        x_0, x_hat, eps, log_ratio = (jnp.asarray(rng.randn(3)) for _ in range(4))
        for t in (2, 4, 6):
            step = schedule.step(t - 1, t)
            x_t = step.t.alpha * x_0 + step.t.sigma * eps
            eps_hat = (x_t - step.t.alpha * x_hat) / step.t.sigma
            for ratio in (log_ratio, log_ratio[0]):
                posterior = forward.posterior(x_t, x_0, step)
                model = Normal(forward.posterior(x_t, x_hat, step).mean, var=posterior.var * jnp.exp(ratio))
                two = (
                    prediction_target(x_0, eps, step.t, prediction_type),
                    prediction_target(x_hat, eps_hat, step.t, prediction_type),
                )
                truth = kl(Normal(posterior.mean, var=jnp.full(3, posterior.var)), model)
                assert_close(reverse_variance.reverse_step_kl(*two, ratio, step, prediction_type), truth, rtol=1e-10)


@pytest.mark.slow
def test_VAR_1_the_divergence_is_a_mean_of_log_ratios():
    schedule = linear_betas(6, 0.1, 0.6)
    step, x_0, x_hat = schedule.step(2, 3), jnp.asarray([0.5, -1.0]), jnp.asarray([0.1, -0.8])
    x_t, f = jnp.asarray([0.2, 0.9]), jnp.asarray([0.3, -0.4])
    q = forward.posterior(x_t, x_0, step)
    p = Normal(forward.posterior(x_t, x_hat, step).mean, var=reverse_variance.interpolated_variance(f, step))
    log_ratio = jnp.log(p.var / q.var)
    x_s = draws(q, jax.random.key(0), 50_000)
    ratios = jax.vmap(q.log_prob)(x_s) - jax.vmap(p.log_prob)(x_s)
    assert_mean(ratios, reverse_variance.reverse_step_kl(x_0, x_hat, log_ratio, step, "x_0"), resolution=0.01)
    with refuted():
        assert_mean(ratios, reverse_variance.reverse_step_kl(x_0, x_hat, -log_ratio, step, "x_0"))


@pytest.mark.slow
@pytest.mark.parametrize(("prediction_type", "terms"), [("score", None), ("v", 2)])
def test_VAR_1_of_the_posterior_s_variance_it_is_the_bound(prediction_type, terms):
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), linear_betas(6, 0.1, 0.6)
        x_0 = draws(distribution, jax.random.key(0), 8)
        ours = reverse_variance.learned_variance_bound(
            _with_fraction(distribution, jnp.zeros(7), prediction_type, 0.1), jax.random.key(1), x_0, schedule,
            lambda h, f, z, lv: Normal(h, var=lv.sigma**2), prediction_type=prediction_type, terms=terms,
        )  # fmt: skip
        spoiled = lambda x_t, level: _with_fraction(distribution, jnp.zeros(7), prediction_type, 0.1)(x_t, level)[0]  # noqa: E731
        truth = elbo.bound(
            spoiled,
            jax.random.key(1),
            x_0,
            schedule,
            lambda h, z, lv: Normal(h, var=lv.sigma**2),
            prediction_type=prediction_type,
            terms=terms,
        )
        for term, other in zip(ours, truth, strict=True):
            assert_close(term, other, rtol=1e-9)


@pytest.mark.slow
def test_VAR_1_the_bound_is_the_mean_over_paths():
    # -log p(x_0:T) / q(x_1:T | x_0) over forward paths, every factor by its definition, for an inexact denoiser
    with jax.enable_x64(True):
        distribution, schedule, count = closed_form.gaussian([0.4], [[0.5]]), linear_betas(4, 0.2, 0.7), 40_000
        fractions = jnp.asarray([0.0, 0.7, 1.3, -0.4, 0.5])
        model = _with_fraction(distribution, fractions, "x_0", 0.2)
        x_0 = jnp.full((count, 1), 0.9)
        chain, cost = x_0, jnp.zeros(count)
        for t in range(1, 5):
            step, before = schedule.step(t - 1, t), chain
            after = jax.vmap(lambda x, st=step: forward.transition(x, st))(before)
            chain = jax.vmap(Normal.sample)(after, jax.random.split(jax.random.key(t), count))
            x_hat, f = model(chain, jax.tree.map(lambda leaf: jnp.full(count, leaf), step.t))
            if t == 1:
                model_kernel = jax.vmap(lambda h, g, st=step: Normal(h, var=st.t.sigma**2 * jnp.exp(g)))(x_hat, f)
            else:
                beta = step.t.sigma**2 * step.one_minus_ratio
                low = beta * (step.s.sigma / step.t.sigma) ** 2
                means = jax.vmap(lambda x, h, st=step: forward.posterior(x, h, st).mean)(chain, x_hat)
                model_kernel = Normal(means, var=beta**f * low ** (1 - f))
            cost += jax.vmap(Normal.log_prob)(after, chain) - jax.vmap(Normal.log_prob)(model_kernel, before)
        cost -= jax.vmap(lambda x: Normal(jnp.zeros(1), var=jnp.asarray(1.0)).log_prob(x))(chain)
        ours = reverse_variance.learned_variance_bound(
            model, jax.random.key(9), x_0, schedule, _normal_decoder, prediction_type="x_0"
        ).total
        assert_mean(cost - ours, 0.0, resolution=0.03)
        # and it bounds the model's own -log p(x_0), which by the same chain backwards is normal
        mean, var = 0.0, 1.0
        for t in range(4, 0, -1):
            step, level = schedule.step(t - 1, t), jax.tree.map(lambda leaf: leaf[None], schedule(t))
            at = [float(model(jnp.full((1, 1), z), level)[0][0, 0]) for z in (0.0, 1.0)]
            c_1, c_2, _ = forward.posterior_coefficients(step)
            slope = c_1 + c_2 * (at[1] - at[0])
            noise = (
                reverse_variance.interpolated_variance(fractions[t], step) if t > 1 else step.t.sigma**2 * np.exp(0.7)
            )
            mean, var = slope * mean + c_2 * at[0], slope**2 * var + noise
        truth = -Normal(jnp.asarray([mean]), var=jnp.asarray(var)).log_prob(jnp.asarray([0.9]))
        assert float(ours.mean() - 4 * ours.std() / count**0.5) > float(truth)


# VAR-2: training the variance


def _trained(a, b, x_t, level):
    return a * x_t, b * jnp.tanh(x_t) + 0.2


def test_VAR_2_hybrid_gradient_of_the_mean_is_that_of_the_simple_loss():
    with jax.enable_x64(True):
        distribution, schedule, decoder = _mixture(), linear_betas(5, 0.1, 0.6), _normal_decoder
        x_0, key, weight = draws(distribution, jax.random.key(0), 64), jax.random.key(1), 0.37
        a, b = jnp.asarray(0.6), jnp.asarray(0.4)

        def hybrid(a, b):
            model = Partial(_trained, a, b)
            return reverse_variance.hybrid_loss(model, key, x_0, schedule, decoder, vlb_weight=weight).loss.sum()

        def simple(a):
            return losses.simple_loss(Partial(lambda a, x, _: a * x, a), key, x_0, schedule).sum()

        def vlb(a, b):
            return reverse_variance.vlb_loss(Partial(_trained, a, b), key, x_0, schedule, decoder).vlb.sum()

        @jax.jit
        def claims(a, b):
            both = (jax.value_and_grad(cost, (0, 1))(a, b) for cost in (hybrid, vlb))
            return *both, jax.value_and_grad(simple)(a)

        (value, (by_a, by_b)), (vlb_value, (vlb_by_a, vlb_by_b)), (simple_value, slope) = claims(a, b)
        assert_close(by_a, slope, rtol=1e-12)
        assert_close(by_b, weight * vlb_by_b, rtol=1e-12)
        assert abs(vlb_by_a) > 1.0
        assert_close(value, simple_value + weight * vlb_value, rtol=1e-13)


@pytest.mark.slow
def test_VAR_2_one_step_estimates_the_bound():
    # its mean is the bound's reconstruction and diffusion, its gradient's mean theirs, for non-uniform t too
    with jax.enable_x64(True):
        distribution, schedule, count = _mixture(), linear_betas(5, 0.1, 0.6), 60_000
        x_0 = draws(distribution, jax.random.key(0), count)

        def each(a, b, x, key):
            model, x = Partial(_trained, a, b), x[None]
            key_u, key_one, key_all = jax.random.split(key, 3)
            sampled = importance_sample(jax.random.uniform(key_u, (1,)), jnp.asarray([3.0, 2.0, 1.0, 1.0, 0.5]))
            options = {"t": sampled.bin + 1, "importance": sampled.weight}
            one = reverse_variance.vlb_loss(model, key_one, x, schedule, _normal_decoder, **options).loss[0]
            bound = reverse_variance.learned_variance_bound(model, key_all, x, schedule, _normal_decoder)
            return one - (bound.reconstruction + bound.diffusion)[0]

        each = jax.jit(jax.vmap(jax.value_and_grad(each, (0, 1)), (None, None, 0, 0)))
        numbers = each(jnp.asarray(0.6), jnp.asarray(0.4), x_0, jax.random.split(jax.random.key(1), count))
        value, (by_a, by_b) = jax.tree.map(np.asarray, numbers)
        for difference, scale in ((value, 0.1), (by_a, 0.6), (by_b, 0.1)):
            assert_mean(difference, 0.0, resolution=scale)


@pytest.mark.slow
def test_VAR_2_descent_finds_the_analytic_variance():
    # a free fraction for each step, trained by L_vlb alone with the exact mean, converges to the closed form
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), discretize(VarianceExploding(0.2, 3.0), 5)
        best = _best_fractions(distribution, schedule)

        def loss(fractions, key):
            key_x, key = jax.random.split(key)
            x_0 = draws(distribution, key_x, 500)
            model = _with_fraction(distribution, fractions)
            return reverse_variance.hybrid_loss(
                model, key, x_0, schedule, _normal_decoder, time_sampling="low_discrepancy"
            ).vlb.mean()

        keys = jax.random.split(jax.random.key(0), 500)
        at_best = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(best, keys[:200])
        assert_mean(at_best[:, 2:], 0.0, resolution=0.02)

        def descend(fractions, key):
            moved = fractions - 0.15 * jax.grad(loss)(fractions, key)
            return moved, moved

        _, path = jax.lax.scan(descend, jnp.ones(6), keys)
        ends = path[200:].mean(0)[2:]
        assert np.all(best[2:] < 0.9)  # the start, 1, is not the optimum
        assert_close(ends, best[2:], atol=0.02)


# VAR-3: the best variance


def test_VAR_3_is_the_variance_of_the_reverse_kernel_in_symbols():
    # data N(m, v): Var[x_s | x_t] by regression, against the formula with E eps_hat^2 = sigma_t^2 / Var x_t
    a_s, a_t, g_s, g_t, v = sp.symbols("a_s a_t g_s g_t v", positive=True)
    r = (a_t * g_s / (g_t * a_s)) ** 2
    var_s, var_t = a_s**2 * v + g_s**2, a_t**2 * v + g_t**2
    truth = var_s - (a_t / a_s * var_s) ** 2 / var_t
    power = g_t**2 / var_t
    assert_proved(g_s**2 * (1 - r) + (a_s * (1 - r)) ** 2 * (g_t / a_t) ** 2 * (1 - power), truth)
    # a dimension's expected divergence u / var - 1 + log(var / w), halved, of error-and-noise u: least at var = u
    u, w, var = sp.symbols("u w var", positive=True)
    term = (u / var - 1 + sp.log(var / w)) / 2
    (least,) = sp.solve(sp.diff(term, var), var)
    assert_proved(least, u)
    assert_proved(term.subs(var, u), sp.log(u / w) / 2)


@pytest.mark.parametrize("continuous", SCHEDULES)
def test_VAR_3_gaussian_data_have_exactly_this_reverse_variance(continuous):
    with jax.enable_x64(True):
        schedule, x_t = SCHEDULES[continuous](), jnp.asarray([0.3, -0.7, 1.1])
        covariance = np.array([[0.5, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.9]])
        distribution, isotropic = (
            closed_form.gaussian(np.zeros(3), covariance),
            closed_form.gaussian(np.full(3, 0.4), 0.5 * np.eye(3)),
        )
        for t in range(1, 7):
            step = schedule.step(t - 1, t)
            a, g = float(step.t.alpha), float(step.t.sigma)

            def kernel(distribution, step=step, t=t):
                return (
                    closed_form.reverse_transition(distribution, x_t, step)
                    if t > 1
                    else distribution.posterior(x_t, step.t)
                )  # s clean: the posterior of the data

            # one number: E||eps_hat||^2 / D = sigma^2 tr M^-1 / D, M the covariance of x_t; and one for each dimension
            inverse = np.linalg.inv(a**2 * covariance + g**2 * np.eye(3))
            each = reverse_variance.analytic_dpm_variance(jnp.asarray(g**2 * np.diag(inverse)), step)
            assert_close(each, kernel(distribution).variance, rtol=1e-12)
            alike = reverse_variance.analytic_dpm_variance(jnp.asarray(g**2 * np.trace(inverse) / 3), step)
            assert_close(alike, kernel(distribution).variance.mean(), rtol=1e-12)
            power = jnp.asarray(g**2 / (a**2 * 0.5 + g**2))
            assert_close(reverse_variance.analytic_dpm_variance(power, step), kernel(isotropic).variance[0], rtol=1e-12)


@pytest.mark.slow
def test_VAR_3_for_a_mixture_it_is_the_mean_over_kernels_and_closest_to_them():
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), discretize(LinearLogSNR(3.0, -3.0), 4)
        for t in (2, 3, 4):
            step = schedule.step(t - 1, t)
            noisy, power = closed_form.marginal(distribution, step.t), _power(distribution, step.t)
            best = reverse_variance.analytic_dpm_variance(power, step)
            spread = information.quadrature(
                lambda x, s=step: closed_form.reverse_transition(distribution, x, s).variance[0], noisy
            ).value
            assert_close(best, spread, rtol=1e-10)
            error = information.mmse(distribution, step.t).value
            assert_close(reverse_variance.optimal_variance(error, step), best, rtol=1e-10)

            @jax.jit
            def apart(var, step=step, noisy=noisy):
                """E over x_t of KL(q(x_s|x_t) || N(mu, var)), by integrals over both."""

                def at(x_t):
                    kernel = closed_form.reverse_transition(distribution, x_t, step)
                    model = Normal(kernel.mean, var=var)
                    return information.quadrature(lambda x: kernel.log_prob(x) - model.log_prob(x), kernel, 101).value

                return information.quadrature(at, noisy, 101).value

            values = [float(apart(best * factor)) for factor in (0.8, 0.98, 1.0, 1.02, 1.25)]
            assert values[0] > values[1] > values[2] < values[3] < values[4]
            slope = float(jax.grad(lambda y, best=best, apart=apart: apart(best * jnp.exp(y)))(jnp.zeros(())))
            assert abs(slope) < 1e-8


@pytest.mark.slow
def test_VAR_3_minimizes_the_bound():
    # its diffusion term is sum_t log(var / sigma_q^2) / 2 per dimension, and any other variance has a larger one
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), discretize(LinearLogSNR(4.0, -4.0), 5)
        x_0, best = draws(distribution, jax.random.key(0), 40_000), _best_fractions(distribution, schedule)

        @jax.jit
        def diffusion(fractions):
            model = _with_fraction(distribution, fractions)
            return reverse_variance.learned_variance_bound(
                model, jax.random.key(1), x_0, schedule, _normal_decoder
            ).diffusion

        bounds = [diffusion(best + moved) for moved in (0.0, 0.3, -0.3)]
        variances = _best_variances(distribution, schedule)
        low = [forward.posterior_variance(schedule.step(t - 1, t)) for t in range(2, 6)]
        assert_mean(bounds[0], 0.5 * np.sum(np.log(variances[1:] / jnp.stack(low))), resolution=0.01)
        for other in bounds[1:]:
            gain = np.asarray(other - bounds[0])
            assert gain.mean() > 5 * gain.std() / np.sqrt(gain.size)
        fixed = elbo.bound(
            closed_form.OptimalDenoiser(distribution),
            jax.random.key(1),
            x_0,
            schedule,
            closed_form.OptimalDecoder(distribution),
        )
        assert np.mean(fixed.diffusion) > 1.3 * np.mean(bounds[0])


@pytest.mark.slow
def test_VAR_3_for_an_inexact_mean_the_measured_error_is_optimal():
    # x_hat off by 0.3 everywhere: E (x_0 - x_hat)^2 = mmse + 0.09. At that variance the bound's slope in f vanishes;
    # at the formula for the best eps_hat it does not.
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), discretize(LinearLogSNR(2.0, -2.0), 3)
        x_0 = draws(distribution, jax.random.key(0), 20_000)

        @jax.jit
        def slope(errors):
            fractions = [jnp.zeros(())] * 2
            for t in (2, 3):
                step = schedule.step(t - 1, t)
                fractions.append(
                    reverse_variance.variance_fraction(reverse_variance.optimal_variance(errors[t - 2], step), step)
                )

            def cost(fractions, x, key):
                model = _with_fraction(distribution, fractions, "x_0", 0.3)
                return reverse_variance.learned_variance_bound(
                    model, key, x[None], schedule, _normal_decoder, prediction_type="x_0"
                ).diffusion[0]

            keys = jax.random.split(jax.random.key(1), len(x_0))
            return jax.vmap(jax.grad(cost), (None, 0, 0))(jnp.stack(fractions), x_0, keys)[:, 2:]

        least = [information.mmse(distribution, schedule(t)).value for t in (2, 3)]
        assert_mean(slope([e + 0.09 for e in least]), 0.0, resolution=0.02)
        with refuted():
            assert_mean(slope(least), 0.0)


@pytest.mark.slow
def test_VAR_3_one_point_and_standard_normal_data_are_the_extremes():
    with jax.enable_x64(True):
        schedule = linear_betas(6, 0.1, 0.6)
        x_0 = jnp.full((8, 2), 0.6)
        point = closed_form.OptimalDenoiser(closed_form.empirical([[0.6, 0.6]]))
        many = jax.vmap(lambda key: reverse_variance.eps_second_moment(point, key, x_0, schedule))(
            jax.random.split(jax.random.key(0), 2000)
        )
        assert_mean(many, 1.0, resolution=0.01)  # it predicts the noise itself
        for t in range(2, 7):
            step = schedule.step(t - 1, t)
            assert_close(
                reverse_variance.analytic_dpm_variance(jnp.asarray(1.0), step),
                forward.posterior_variance(step),
                rtol=1e-14,
            )
            beta = 0.1 + 0.1 * (t - 1)
            assert_close(
                reverse_variance.analytic_dpm_variance(step.t.sigma**2, step), beta, rtol=1e-12
            )  # eps_hat = sigma x_t


def test_VAR_3_eps_second_moment_from_data():
    # of normal data, sigma^2 / Var x_t; in the second dimension half as wide
    data, half, schedule = GaussianWorld(0.4, 0.5), GaussianWorld(0.2, 0.125), linear_betas(4, 0.1, 0.6)

    @jax.jit
    @jax.vmap
    def estimates(key):
        key_x, key = jax.random.split(key)
        x_0 = data.mean + data.var**0.5 * jax.random.normal(key_x, (400, 1))

        def both(x_t, level):
            return jnp.concatenate([denoiser(w, "v")(x_t[:, [i]], level) for i, w in enumerate((data, half))], axis=1)

        two = jnp.concatenate([x_0, 0.5 * x_0], axis=1)
        alone = reverse_variance.eps_second_moment(denoiser(data), key, x_0, schedule)
        return alone, reverse_variance.eps_second_moment(both, key, two, schedule, prediction_type="v", per_dim=True)

    alone, both = estimates(jax.random.split(jax.random.key(0), 300))
    level = schedule(jnp.arange(1, 5))
    truth = np.stack([level.sigma**2 / (level.alpha**2 * w.var + level.sigma**2) for w in (data, half)], -1)
    assert_mean(alone, truth[:, 0], resolution=0.005)
    assert_mean(both, truth, resolution=0.005)


@pytest.mark.slow
def test_VAR_3_sampling_few_steps_of_gaussian_data_without_error():
    # with the exact mean and variance of every reverse kernel each state has the forward marginal, at any T
    with jax.enable_x64(True):
        data, schedule = GaussianWorld(0.7, 0.25), linear_betas(3, 0.3, 0.8)
        distribution = data.distribution((1,))
        x_T = draws(closed_form.marginal(distribution, schedule(3)), jax.random.key(0), 100_000)
        variances = _best_variances(distribution, schedule)
        options = {"snapshots": 3}
        chain = ancestral(
            closed_form.OptimalDenoiser(distribution), jax.random.key(1), x_T, schedule, variance=variances, **options
        ).trajectory
        for t, x_t in zip((2, 1), chain.x_t[1:], strict=True):
            level = schedule(t)
            assert_moments(x_t, level.alpha * 0.7, level.alpha**2 * 0.25 + level.sigma**2)
        for variance in ("fixed_small", "fixed_large"):
            other = ancestral(
                closed_form.OptimalDenoiser(distribution),
                jax.random.key(1),
                x_T,
                schedule,
                variance=variance,
                **options,
            ).trajectory
            with refuted():
                assert_moments(other.x_t[-1], level.alpha * 0.7, level.alpha**2 * 0.25 + level.sigma**2)


# VAR-4: bounds on the optimal variance


@pytest.mark.parametrize("continuous", ["preserving", pytest.param("exploding", marks=pytest.mark.slow)])
def test_VAR_4_bounds_hold_and_are_reached(continuous):
    with jax.enable_x64(True):
        schedule, rng = SCHEDULES[continuous](), np.random.RandomState(0)
        points = closed_form.empirical(rng.uniform(-1, 1, (4, 1)), rng.uniform(0.1, 1, 4))
        distributions = [points, _mixture(), closed_form.gaussian([3.0], [[40.0]])]
        steps = _steps(schedule)
        free, held = (
            jax.vmap(reverse_variance.variance_bounds)(steps),
            jax.vmap(lambda st: reverse_variance.variance_bounds(st, 1.0))(steps),
        )
        assert_close(free.lower, jax.vmap(forward.posterior_variance)(steps), rtol=1e-14)
        assert np.all(held.upper <= free.upper)
        for distribution in distributions:
            var = _best_variances(distribution, schedule)
            assert np.all((free.lower <= var) & (var <= free.upper))
            assert not isinstance(distribution, closed_form.Empirical) or np.all(var <= held.upper)
        # broader and broader data approach the upper bound
        assert_close(_best_variances(closed_form.gaussian([0.0], [[1e12]]), schedule), free.upper, rtol=1e-9)
        # data at the two ends of [-1, 1] with large noise: half the width squared, which is less than sigma / alpha
        noisy = discretize(LinearLogSNR(-9.0, -16.0), 2).step(1, 2)
        ends = reverse_variance.analytic_dpm_variance(_power(closed_form.empirical([[-1.0], [1.0]]), noisy.t), noisy)
        top = reverse_variance.variance_bounds(noisy, 1.0)
        assert_close((ends - top.lower) / (top.upper - top.lower), 1.0, rtol=1e-5)
        assert float(top.upper) < 0.9 * float(reverse_variance.variance_bounds(noisy).upper)


def test_VAR_1_decoder_width_is_between_the_two_variances():
    with jax.enable_x64(True):
        schedule = linear_betas(4, 0.1, 0.6)
        betas = np.linspace(0.1, 0.6, 4)
        second = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))  # beta~_2
        decoder, x_hat = reverse_variance.InterpolatedDecoder(schedule, 17), jnp.asarray([0.2, -0.4])

        @jax.jit
        def log_masses(fraction, scale):
            distribution = decoder(x_hat, fraction, x_hat, schedule(1))
            return distribution.log_masses(), DiscretizedGaussian(x_hat, scale=scale, levels=17).log_masses()

        for f in (0.0, 0.4, 1.0):
            scale = np.sqrt(betas[0] ** f * second ** (1 - f))
            ours, truth = log_masses(jnp.full(2, f), jnp.full(2, scale))
            assert_close(ours, truth, rtol=1e-11)
