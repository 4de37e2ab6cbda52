"""LIK: the likelihood by the probability-flow ODE and from density to probability, where log p is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.algebra import log_normal
from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form, dequantization, elbo, path_bounds, probability_flow
from vdm_jax.dequantization import TruncatedNormal, Uniform
from vdm_jax.discrete_schedules import DiscretizedSchedule, InterpolatedSchedule, linear_betas
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import Categorical
from vdm_jax.schedules import Cosine, LearnedSchedule, LinearBeta, LinearLogSNR, VarianceExploding

DEEP = LinearLogSNR(6.0, -14.0)
KINDS = ("x_0", "eps", "v", "score")


def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])


def _off(ours, distribution, schedule, x, t_0=0.0, log_var=0.0):
    """The log-density minus the exact one, and minus the effect of a prior that differs from q(x_1)."""
    first, last = (closed_form.marginal(distribution, schedule(jnp.asarray(t, x.dtype))) for t in (t_0, 1.0))
    prior = stats.norm(scale=np.exp(0.5 * log_var)).logpdf(ours.x_1).sum(-1)
    end = prior - np.asarray(jax.vmap(last.log_prob)(ours.x_1))
    return np.asarray(ours.log_prob) - end - np.asarray(jax.vmap(first.log_prob)(x))


def test_LIK_2_drift_moves_the_marginals():
    t, x, m = sp.symbols("t x m", real=True)
    v = sp.Symbol("v", positive=True)
    alpha, sigma = (sp.Function(name, positive=True)(t) for name in ("alpha", "sigma"))
    slope = sp.diff(2 * sp.log(alpha / sigma), t)  # lambda'
    f, g2 = sp.diff(sp.log(alpha), t), -(sigma**2) * slope
    # f and g^2 are the SDE's: the variance of x_t given x_0 obeys d sigma^2 / dt = 2 f sigma^2 + g^2
    assert_proved(sp.diff(sigma**2, t), 2 * f * sigma**2 + g2)
    # the three forms of the drift are one
    eps = sp.Symbol("eps", real=True)
    ours = sp.diff(alpha, t) * (x - sigma * eps) / alpha + sp.diff(sigma, t) * eps
    assert_proved(ours, f * x - slope * sigma * eps / 2)
    assert_proved(ours, f * x - g2 * (-eps / sigma) / 2)
    # and with the marginal's score, for data N(m, v), they obey the continuity equation; with twice the score term not
    log_q = log_normal(x, alpha * m, alpha**2 * v + sigma**2)

    def residual(share):
        move = f * x - share * g2 * sp.diff(log_q, x)
        return sp.simplify(sp.diff(log_q, t) + sp.diff(move, x) + move * sp.diff(log_q, x))

    assert_proved(residual(sp.Rational(1, 2)))
    assert residual(1) != 0


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("schedule", [LinearBeta(), VarianceExploding(0.1, 100.0)], ids=["preserving", "exploding"])
def test_LIK_2_drift_by_its_definition(schedule, prediction_type):
    # in float64, (log alpha)' and lambda' by differences
    with jax.enable_x64(True):
        distribution, t, h = _mixture(), jnp.asarray(0.3), 1e-5
        level, rate = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        log_alpha, log_snr = ((get(schedule(t + h)) - get(schedule(t - h))) / (2 * h) for get in (
            lambda level: level.log_alpha, lambda level: level.log_snr))  # fmt: skip
        x = jnp.asarray([0.3, -0.8])
        ours = probability_flow.drift(
            closed_form.optimal_prediction(distribution, x, level, prediction_type), x, level, rate, prediction_type
        )
        score = closed_form.optimal_prediction(distribution, x, level, "score")
        assert_close(ours, log_alpha * x + 0.5 * level.sigma**2 * log_snr * score, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["eps", "x_0"])
def test_LIK_2_density_of_a_mixture(prediction_type):
    with jax.enable_x64(True):
        distribution = _mixture()
        x = draws(closed_form.marginal(distribution, DEEP(jnp.asarray(0.0))), jax.random.key(0), 32)
        denoiser = closed_form.OptimalDenoiser(distribution, prediction_type)
        evaluate = partial(
            probability_flow.log_likelihood,
            key=jax.random.key(1),
            x=x,
            schedule=DEEP,
            prediction_type=prediction_type,
            trace="exact",
        )
        ours = evaluate(denoiser, tolerance=1e-8)
        assert_close(_off(ours, distribution, DEEP, x), np.zeros(32), atol=1e-7)
        # DEEP ends so near N(0, I) that the standard prior would suffice, up to the remaining signal e^-14
        truth = jax.vmap(closed_form.marginal(distribution, DEEP(jnp.asarray(0.0))).log_prob)(x)
        assert_close(ours.log_prob, truth, rtol=0, atol=5e-3)
        if prediction_type == "eps":
            with refuted():  # with the full score, as in the SDE, and not half of it
                whole = evaluate(lambda x_t, level: 2 * denoiser(x_t, level), tolerance=1e-6)
                assert_close(_off(whole, distribution, DEEP, x), np.zeros(32), atol=1e-2)


# name -> schedule, to be made with x64 enabled, t_0, log-variance of the prior, prediction type
SCHEDULES = {
    "Cosine, to where no signal is left": (Cosine, 1e-3, 0.0, "v"),
    "VarianceExploding": (lambda: VarianceExploding(0.1, 100.0), 0.0, 2 * float(np.log(100.0)), "x_0"),
    "Ho et al.": (lambda: InterpolatedSchedule(linear_betas(30, 0.003, 0.6)), 0.0, 0.0, "eps"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_LIK_2_density_under_every_schedule(name):
    with jax.enable_x64(True):
        make, t_0, log_var, prediction_type = SCHEDULES[name]
        distribution, schedule = _mixture(), make()
        x = draws(closed_form.marginal(distribution, schedule(jnp.asarray(t_0))), jax.random.key(0), 16)
        options = {
            "trace": "exact",
            "t_0": t_0,
            "prior": Normal(0.0, var=float(np.exp(log_var))),
            "tolerance": 1e-8,
            "prediction_type": prediction_type,
        }
        ours = probability_flow.log_likelihood(
            closed_form.OptimalDenoiser(distribution, prediction_type), jax.random.key(1), x, schedule, **options
        )
        corners = isinstance(schedule, InterpolatedSchedule)  # where a fifth-order solver loses its order
        assert_close(_off(ours, distribution, schedule, x, t_0, log_var), np.zeros(16), atol=2e-5 if corners else 1e-7)


@pytest.mark.slow
def test_LIK_2_only_the_ends_of_the_schedule_matter():
    # for any denoiser of (x, lambda), an inexact one too: a time change leaves the path unchanged
    with jax.enable_x64(True):
        best = closed_form.OptimalDenoiser(_mixture())
        x = jax.random.normal(jax.random.key(0), (16, 2))
        evaluate = partial(
            probability_flow.log_likelihood,
            lambda x_t, level: 0.8 * best(x_t, level),
            jax.random.key(1),
            trace="exact",
            tolerance=1e-9,
        )
        even = evaluate(x, LinearLogSNR(5.0, -8.0))
        other = evaluate(x, LearnedSchedule(-5.0, 8.0, Partial(lambda s, t: t**3 - s**3 + (t - s) / 4)))
        assert_close(other.log_prob, even.log_prob, rtol=0, atol=1e-7)
        assert_close(other.x_1, even.x_1, rtol=0, atol=1e-7)
        # and preserving the variance is a choice of units, u = x / alpha: log p(u) = log p(x) + D log alpha
        first, last = (LinearLogSNR(5.0, -8.0)(jnp.asarray(t)) for t in (0.0, 1.0))
        exploding = VarianceExploding(float(np.exp(-2.5)), float(np.exp(4.0)))
        units = evaluate(x / first.alpha, exploding, prior=Normal(0.0, var=float(last.alpha**-2)))
        assert_close(units.log_prob, even.log_prob + 2 * first.log_alpha, rtol=0, atol=1e-7)
        assert_close(last.alpha * units.x_1, even.x_1, rtol=0, atol=1e-7)


def test_LIK_2_normal_data_are_mapped_linearly():
    # x_1 = alpha_1 mean + sd_1 / sd_0 (x - alpha_0 mean), sd in every direction of the covariance: a linear map
    with jax.enable_x64(True):
        schedule, mean = LinearLogSNR(5.0, -6.0), np.array([0.4, -0.3, 0.1, 0.0])
        factor = np.random.RandomState(0).normal(size=(4, 4)) / 2
        distribution = closed_form.gaussian(mean, factor @ factor.T)
        denoiser = closed_form.OptimalDenoiser(distribution)
        first, last = (schedule(jnp.asarray(t)) for t in (0.0, 1.0))
        x = draws(closed_form.marginal(distribution, first), jax.random.key(0), 16)
        options = {"trace": "exact", "tolerance": 1e-9, "prior": Normal(0.0, var=2.0)}
        ours = probability_flow.log_likelihood(denoiser, jax.random.key(1), x, schedule, **options)
        values, vectors = np.linalg.eigh(factor @ factor.T)
        sd_1, sd_0 = (np.sqrt(level.alpha**2 * values + level.sigma**2) for level in (last, first))
        white = (np.asarray(x) - float(first.alpha) * mean) @ vectors / sd_0
        assert_close(ours.x_1, float(last.alpha) * mean + (white * sd_1) @ vectors.T, rtol=0, atol=1e-8)
        truth = stats.norm.logpdf(ours.x_1, scale=2.0**0.5).sum(-1) + np.log(sd_1 / sd_0).sum()
        assert_close(ours.log_prob, truth, rtol=0, atol=1e-7)
        assert_close(probability_flow.sample(denoiser, ours.x_1, schedule, tolerance=1e-9), x, rtol=0, atol=1e-7)


def test_LIK_2_samples_with_their_density():
    # log p(x) = log p_1(x_1) - int div, and p = q_0 if p_1 = q_1; here p_1 = N(0, 2), so the difference is known
    with jax.enable_x64(True):
        distribution, schedule, prior = _mixture(), LinearLogSNR(5.0, -4.0), Normal(0.0, var=2.0)
        x_1 = 2.0**0.5 * jax.random.normal(jax.random.key(0), (16, 2))
        ours = probability_flow.sample_with_log_prob(
            closed_form.OptimalDenoiser(distribution), None, x_1, schedule, trace="exact", prior=prior, tolerance=1e-9
        )
        there = probability_flow.FlowLogLikelihood(ours.log_prob, x_1, ours.evaluations)
        off = _off(there, distribution, schedule, ours.x, log_var=float(np.log(2.0)))
        assert_close(off, np.zeros(16), atol=1e-7)
        first = closed_form.marginal(distribution, schedule(jnp.asarray(0.0)))
        with refuted():  # the prior's density alone, without the change of volume
            assert_close(jax.vmap(first.log_prob)(ours.x), jax.vmap(prior.log_prob)(x_1), atol=1e-2)


@pytest.mark.slow
def test_LIK_2_interpolation_through_the_latents():
    # data N(m, v I): the ODE scales about the mean, so latents and the arc between them are known
    with jax.enable_x64(True):
        schedule, mean, v = LinearLogSNR(5.0, -6.0), np.array([0.4, -0.3, 0.1]), 0.3
        denoiser = closed_form.OptimalDenoiser(closed_form.gaussian(mean, v * np.eye(3)))
        first, last = (schedule(jnp.asarray(t)) for t in (0.0, 1.0))
        scale = float(jnp.sqrt((last.alpha**2 * v + last.sigma**2) / (first.alpha**2 * v + first.sigma**2)))
        a, b = np.random.RandomState(0).normal(size=(2, 5, 3))
        latents = [float(last.alpha) * mean + scale * (x - float(first.alpha) * mean) for x in (a, b)]
        assert_close(probability_flow.encode(denoiser, jnp.asarray(a), schedule, tolerance=1e-9), latents[0], atol=1e-7)
        weights = jnp.asarray([0.0, 0.25, 0.5, 1.0])
        arc = np.asarray(probability_flow.spherical_interpolation(*map(jnp.asarray, latents), weights))
        ours = probability_flow.interpolate(denoiser, jnp.asarray(a), jnp.asarray(b), schedule, weights, tolerance=1e-9)
        assert_close(ours, float(first.alpha) * mean + (arc - float(last.alpha) * mean) / scale, rtol=0, atol=1e-7)
        assert_close(ours[0], a, rtol=0, atol=1e-7)
        assert_close(ours[-1], b, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_LIK_2_the_density_of_a_sample_is_that_which_the_way_back_computes():
    with jax.enable_x64(True):
        denoiser, schedule, how = closed_form.OptimalDenoiser(_mixture()), LinearLogSNR(5.0, -4.0), {"tolerance": 1e-9}
        x_1 = jax.random.normal(jax.random.key(0), (16, 2))
        ours = probability_flow.sample_with_log_prob(denoiser, None, x_1, schedule, trace="exact", t_0=0.1, **how)
        back = probability_flow.log_likelihood(denoiser, None, ours.x, schedule, trace="exact", t_0=0.1, **how)
        assert_close(ours.log_prob, back.log_prob, rtol=0, atol=1e-7)
        assert_close(back.x_1, x_1, rtol=0, atol=1e-7)
        assert_close(ours.x, probability_flow.sample(denoiser, x_1, schedule, t_0=0.1, **how), rtol=0, atol=1e-7)
        short = probability_flow.sample_with_log_prob(denoiser, None, x_1, schedule, trace="exact", max_steps=3)
        assert np.all(np.isnan(short.x))
        assert np.all(np.isnan(short.log_prob))
        # random probes: unbiased, for the same sample
        many, where = jnp.broadcast_to(x_1[:1], (2000, 2)), jax.random.key(1)
        random = probability_flow.sample_with_log_prob(denoiser, where, many, schedule, t_0=0.1, tolerance=1e-6)
        assert_close(random.x, jnp.broadcast_to(ours.x[:1], (2000, 2)), rtol=0, atol=1e-4)
        assert_mean(random.log_prob, ours.log_prob[0], resolution=0.1)


@pytest.mark.slow
def test_LIK_2_samples_have_the_moments_of_the_data():
    with jax.enable_x64(True):
        distribution = _mixture()
        denoiser = closed_form.OptimalDenoiser(distribution)
        # samples of the prior are mapped to samples of q(x_{t_0}): moments of the mixture
        prior = jax.random.normal(jax.random.key(2), (10_000, 2))
        x = np.asarray(probability_flow.sample(denoiser, prior, DEEP, tolerance=1e-4))
        noisy = closed_form.marginal(distribution, DEEP(jnp.asarray(0.0)))
        assert_mean(x, noisy.mean, resolution=0.01)
        assert_mean((x - np.asarray(noisy.mean)) ** 2, noisy.variance, resolution=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_LIK_2_random_probes_have_no_bias(trace):
    with jax.enable_x64(True):
        covariance = [[0.6, 0.35, 0.1], [0.35, 0.4, -0.1], [0.1, -0.1, 0.3]]
        distribution = closed_form.gaussian([0.0, 0.5, 0.2], covariance)
        x = jnp.broadcast_to(draws(distribution, jax.random.key(0), 1), (2000, 3))
        schedule, denoiser = LinearLogSNR(4.0, -6.0), closed_form.OptimalDenoiser(distribution)
        estimate = partial(
            probability_flow.log_likelihood, denoiser, jax.random.key(1), schedule=schedule, tolerance=1e-5
        )
        truth = estimate(x[:1], trace="exact").log_prob[0]
        # v^T A v, A the Jacobian integrated along the path: symmetric, since the axes of normal data do not rotate
        values, vectors = np.linalg.eigh(np.array(covariance))
        sd_0, sd_1 = (np.sqrt(level.alpha**2 * values + level.sigma**2) for level in map(schedule, (0.0, 1.0)))
        squares = ((vectors * np.log(sd_1 / sd_0)) @ vectors.T) ** 2
        # Rademacher: 2 sum of A_ij^2 over i != j; normal v: over all i, j
        var = 2 * (squares.sum() - (trace == "rademacher") * np.trace(squares))
        for probes in (1, 4):
            ours = estimate(x, trace=trace, probes=probes).log_prob
            assert_mean(ours, truth, resolution=0.1)
            assert_mean((ours - truth) ** 2, var / probes)


class _QuantizedGaussian:
    """A scalar quantized value, with a density whose integrals over bins are known."""

    levels, x = 5, 0.5

    def __init__(self, sd):
        self.sd = sd

    def log_prob(self, y):
        return -0.5 * jnp.square(y[:, 0] / self.sd) - 0.5 * np.log(2 * np.pi * self.sd**2)

    @property
    def truth(self):
        """-log P(x)."""
        y, width = self._nodes()
        return float(-jnp.log(width @ jnp.exp(self.log_prob(y))))

    def loss(self, distribution):
        """KL(q || p restricted to the bin), by quadrature."""
        y, width = self._nodes()
        log_q = jax.vmap(distribution.log_prob)(y)
        return float(width @ (jnp.exp(log_q) * (log_q - self.log_prob(y) - self.truth)))

    def batch(self, count):
        return jnp.full((count, 1), self.x)

    def _nodes(self):
        nodes, weights = np.polynomial.legendre.leggauss(200)
        half = 1 / (self.levels - 1)
        return jnp.asarray(self.x + half * nodes)[:, None], jnp.asarray(half * weights)


def test_LIK_3_uniform_dequantization_loses_the_kl():
    with jax.enable_x64(True):
        data = _QuantizedGaussian(0.25)
        distribution = partial(Uniform, levels=data.levels)

        @partial(jax.jit, static_argnums=1)
        def bound(key, samples):
            return dequantization.dequantized_bound(
                data.log_prob, key, data.batch(20_000), distribution, samples=samples
            )

        loss = data.loss(distribution(jnp.asarray([data.x])))
        assert loss > 0.3
        ours = [bound(jax.random.key(k), k) for k in (1, 8)]
        assert_mean(ours[0], data.truth + loss, resolution=0.01)
        with refuted():  # the density at the data, without the width of the bin
            assert_mean(ours[0] + np.log(2 / (data.levels - 1)), data.truth + loss)
        for samples, each in zip((1, 8), ours, strict=True):
            # E e^-bound = P(x) for any number of samples, and the gap falls about as 1/K
            assert_mean(np.exp(-np.asarray(each)), np.exp(-data.truth), resolution=0.001)
            assert data.truth < each.mean() < data.truth + 1.5 * loss / samples
        with refuted():  # a sum and not a mean over the samples
            assert_mean(np.exp(-np.asarray(ours[1] - np.log(8))), np.exp(-data.truth))


@jax.jit
def _density_and_samples(distribution, grid, key):
    return jax.vmap(distribution.log_prob)(grid), jax.vmap(distribution.sample)(jax.random.split(key, 20_000))


@pytest.mark.parametrize(
    ("mean", "scale"),
    [(0.1, 0.3), (-0.5, 0.12), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((-0.2, 3.0), (0.4, 0.03)))],
)
def test_LIK_4_truncated_normal_is_a_distribution_on_its_bin(mean, scale):
    with jax.enable_x64(True):
        distribution = TruncatedNormal(jnp.asarray([0.5]), levels=5, mean=jnp.asarray(mean), scale=jnp.asarray(scale))
        grid = np.linspace(0.251, 0.749, 99)[:, None]
        log_prob, y = map(np.asarray, _density_and_samples(distribution, grid, jax.random.key(0)))
        truth = stats.truncnorm((-0.25 - mean) / scale, (0.25 - mean) / scale, 0.5 + mean, scale)
        assert_close(log_prob, truth.logpdf(grid)[:, 0], rtol=1e-11, atol=1e-11)
        assert np.all((y >= 0.25) & (y <= 0.75))
        assert_mean(y[:, 0], truth.mean())
        assert_mean((y[:, 0] - truth.mean()) ** 2, truth.var())


@pytest.mark.slow
def test_LIK_4_learned_dequantization_closes_the_gap():
    # The best normal is the density itself: mean -x, scale sd, and then no gap is left.
    with jax.enable_x64(True):
        data = _QuantizedGaussian(0.25)

        def distribution(params, x):
            return TruncatedNormal(x, levels=data.levels, mean=params[0], scale=jnp.exp(params[1]))

        def bound(params, key, count=256):
            return dequantization.dequantized_bound(
                data.log_prob, key, data.batch(count), Partial(distribution, params)
            )

        @jax.jit
        def descend(params):
            step = lambda p, key: (p - jnp.asarray([0.03, 0.5]) * jax.grad(lambda q: bound(q, key).mean())(p), None)  # noqa: E731
            return jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 50))[0]

        params, losses = jnp.asarray([0.0, np.log(0.5)]), []
        for _ in range(5):
            losses.append(data.loss(distribution(params, jnp.asarray([data.x]))))
            params = descend(params)
        plain = data.loss(Uniform(jnp.asarray([data.x]), data.levels))
        assert plain > losses[0]  # wide at first, so hardly better than uniform
        assert np.all(np.diff(losses) < 0)
        assert losses[-1] < 0.02 * plain
        assert_mean(
            bound(params, jax.random.key(9), 20_000), data.truth + data.loss(distribution(params, jnp.asarray([0.5])))
        )
        # at the optimum itself the bound is -log P for every sample
        best = jnp.asarray([-data.x, np.log(data.sd)])
        assert_close(bound(best, jax.random.key(1)), np.full(256, data.truth), rtol=1e-9)


def _pixels():
    return closed_form.independent_pixels([[0.1, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]])


def _flow(denoiser, schedule, tolerance=1e-5):
    """log p(z_0) of a batch; the Jacobian is diagonal, so one probe of signs is exact."""
    evaluate = partial(
        probability_flow.log_likelihood, denoiser, jax.random.key(5), schedule=schedule, tolerance=tolerance
    )
    return lambda z_0: evaluate(z_0).log_prob


def test_LIK_5_is_the_surprise_for_every_latent_where_decoder_and_density_are_exact():
    # P(x|z) p(z) / q(z|x) is P(x), by Bayes' rule: for every sample of z
    with jax.enable_x64(True):
        distribution, level = _pixels(), LinearLogSNR(2.0, -9.0)(jnp.asarray(0.0))
        x_0 = draws(distribution, jax.random.key(0), 500)

        @jax.jit
        def claims(x_0):
            log_prob = jax.vmap(closed_form.marginal(distribution, level).log_prob)
            given = log_prob, closed_form.OptimalDenoiser(distribution), jax.random.key(1), x_0, level
            exact = dequantization.latent_dequantization_bound(*given, closed_form.OptimalDecoder(distribution))
            plain = dequantization.latent_dequantization_bound(*given, lambda h, z, lv: Categorical(z, lv, 4))
            return exact, plain, -jax.vmap(distribution.log_prob)(x_0)

        exact, plain, truth = claims(x_0)
        assert_close(exact, truth, rtol=1e-10)
        with refuted():  # a decoder that ignores the data distribution
            assert_close(plain, truth, rtol=1e-2)


@pytest.mark.slow
def test_LIK_5_every_row_of_the_likelihood_report_matches_its_exact_value():
    # quantized data with the exact denoiser and decoder: -log P(x) is known, and every row bounds it
    with jax.enable_x64(True):
        distribution, schedule = _pixels(), LinearLogSNR(9.0, -9.0)
        denoiser, decoder = closed_form.OptimalDenoiser(distribution), closed_form.OptimalDecoder(distribution)
        x_0 = draws(distribution, jax.random.key(0), 2000)
        truth, level = -jax.vmap(distribution.log_prob)(x_0), schedule(jnp.asarray(0.0))
        given = (_flow(denoiser, schedule), denoiser, jax.random.key(1), x_0, level)
        # with the exact decoder P(x|z) p(z) / q(z|x) is P(x), for every sample, up to the prior's e^-9 of signal
        encoder = dequantization.latent_dequantization_bound(*given, decoder)
        assert_close(encoder, truth, rtol=0, atol=0.2)
        assert_mean(encoder - truth, 0.0, resolution=1e-3)
        limit = elbo.continuous_bound(denoiser, jax.random.key(2), x_0, schedule, decoder, terms=50).total
        assert_mean(limit - truth, 0.0, resolution=0.03)
        # finite T has a gap, which falls with more steps and more paths
        gaps = [
            elbo.bound(denoiser, jax.random.key(3), x_0, DiscretizedSchedule(schedule, num_steps + 1), decoder).total
            - truth
            for num_steps in (4, 16)
        ]
        evaluate = partial(
            path_bounds.importance_weighted_bound,
            denoiser,
            jax.random.key(4),
            x_0,
            DiscretizedSchedule(schedule, 17),
            decoder,
        )
        gaps = [float(np.mean(gap)) for gap in (*gaps, evaluate(samples=16) - truth)]
        assert gaps[0] > gaps[1] > gaps[2] > -0.05


@pytest.mark.slow
def test_LIK_5_a_wrong_decoder_loses_its_divergence():
    # at so much noise that the decoder matters: P(x|z) of uniform pixels in the place of the exact one
    with jax.enable_x64(True):
        distribution, schedule = _pixels(), LinearLogSNR(1.0, -14.0)
        denoiser, level = closed_form.OptimalDenoiser(distribution), schedule(jnp.asarray(0.0))
        x_0 = jnp.broadcast_to(draws(distribution, jax.random.key(0), 1), (4000, 2))
        truth = -distribution.log_prob(x_0[0])
        given = (_flow(denoiser, schedule), denoiser, jax.random.key(1), x_0, level)
        ours = dequantization.latent_dequantization_bound(*given, lambda h, z, lv: Categorical(z, lv, 4))

        def lost(z):  # log of the exact decoder over the one used, of pixel number i
            posterior = [distribution.posterior(z, level).log_prob(x_0[0]), Categorical(z, level, 4).log_prob(x_0[0])]
            return posterior[0] - posterior[1]

        # E_q(z|x) of it, by quadrature over z
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        noise = jnp.stack([axis.ravel() for axis in np.meshgrid(nodes, nodes)], -1)
        z = jax.vmap(lambda e: level.alpha * x_0[0] + level.sigma * e)(noise)
        gap = np.outer(weights, weights).ravel() @ np.asarray(jax.vmap(lost)(z)) / (2 * np.pi)
        assert abs(gap) > 0.002
        assert_mean(ours, truth + gap, resolution=0.02)


@pytest.mark.slow
def test_LIK_4_noise_kept_within_its_bin_is_nearly_the_encoder():
    # truncated normal noise of the first level's scale: the flow's density of x + noise, against the exact value
    with jax.enable_x64(True):
        distribution, schedule = _pixels(), LinearLogSNR(6.0, -14.0)
        denoiser, level = closed_form.OptimalDenoiser(distribution), schedule(jnp.asarray(0.0))
        x_0 = draws(distribution, jax.random.key(0), 2000)
        truth, log_prob = -jax.vmap(distribution.log_prob)(x_0), _flow(denoiser, schedule)
        scale = level.sigma / level.alpha
        truncated, uniform = (
            dequantization.dequantized_bound(
                lambda y: log_prob(level.alpha * y) + 2 * level.log_alpha, jax.random.key(1), x_0, dequantizer
            )
            - truth
            for dequantizer in (
                lambda x: TruncatedNormal(x, levels=4, mean=jnp.zeros(()), scale=scale),
                partial(Uniform, levels=4),
            )
        )
        # P(x) of the model is the mixture's mass within the bin: the loss is the mass outside
        inside = stats.norm.cdf(1 / 3 / float(scale)) - stats.norm.cdf(-1 / 3 / float(scale))
        assert_mean(truncated, -2 * np.log(inside), resolution=1e-3)
        assert uniform.mean() > 100 * abs(truncated.mean())
