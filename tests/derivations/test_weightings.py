"""Weights of the log-SNR: each published loss, in its own notation and variable, is one weighted bound.

The data are N(m, c) in each of two dimensions, the network is the exact denoiser of N(m', c'), so that every
expectation over data and noise has a closed form; the remaining integral is computed by two rules in two variables.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial

from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from tests.derivations.worlds import GaussianWorld, denoiser, draws
from vdm_jax import closed_form, elbo, information, weightings
from vdm_jax.gaussian import Normal
from vdm_jax.schedules import Cosine, LearnedSchedule, LinearBeta, LinearLogSNR, Sigmoid

DIMS = 2
DATA, WRONG = GaussianWorld(0.2, 0.6), GaussianWorld(-0.1, 0.9)
SPREAD = DATA.var + (DATA.mean - WRONG.mean) ** 2  # E (x_0 - m')^2


def _x_hat_error(alpha, sigma):
    """E ||x_0 - x_hat||^2: x_hat = m' + g (x_t - alpha m'), x_0 - x_hat = (1 - g alpha)(x_0 - m') - g sigma eps."""
    gain = alpha * WRONG.var / (alpha**2 * WRONG.var + sigma**2)
    return DIMS * ((1 - gain * alpha) ** 2 * SPREAD + (gain * sigma) ** 2)


def _weighted(weight):
    """1/2 int w E ||eps - eps_hat||^2 dlambda over all log-SNRs, by the trapezoidal rule (exponentially exact here)."""
    grid = np.linspace(-90.0, 90.0, 7201)
    error = np.exp(grid) * _x_hat_error(1.0, np.exp(-grid / 2))  # ||eps - eps_hat||^2 = SNR ||x_0 - x_hat||^2
    return 0.5 * np.sum(np.asarray(weight(jnp.asarray(grid))) * error) * (grid[1] - grid[0])


def _uniform_t(function):
    """E_t function(t) for t uniform on [0, 1], by the tanh-sinh rule, which tolerates singularities at the ends.

    function takes t and 1 - t, each right to the last digit.
    """
    y = np.linspace(-4.2, 4.2, 2001)
    part = 1 / (1 + np.exp(np.pi * np.sinh(-y)))
    rest = 1 / (1 + np.exp(np.pi * np.sinh(y)))
    return np.sum(function(part, rest) * part * rest * np.pi * np.cosh(y)) * (y[1] - y[0])


def _cosine_t(loss):
    """E_t loss(alpha, sigma) of the cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    return _uniform_t(lambda t, rest: loss(np.sin(0.5 * np.pi * rest), np.sin(0.5 * np.pi * t)))


def _snr(alpha, sigma):
    return (alpha / sigma) ** 2


def _eps_error(alpha, sigma):
    return _snr(alpha, sigma) * _x_hat_error(alpha, sigma)


def _v_error(alpha, sigma):
    """v = alpha eps - sigma x_0 = (alpha x_t - x_0) / sigma, so that an error in x_0 is one over sigma in v."""
    return _x_hat_error(alpha, sigma) / sigma**2


def test_WEIGHT_1_simple_loss_of_the_cosine_schedule():
    with jax.enable_x64(True):
        simple = _cosine_t(_eps_error)
        assert_close(simple, _weighted(weightings.cosine) / np.pi, rtol=1e-12)
        assert_close(simple, _weighted(lambda x: 2 * weightings.uniform_in_time(x, Cosine(0.0))), rtol=1e-7)
        with refuted():
            assert_close(simple, _weighted(weightings.v_prediction) / np.pi, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Cosine(), Sigmoid(), LinearBeta(), LinearLogSNR(12.0, -9.0)], ids=repr)
def test_WEIGHT_1_simple_loss_of_any_schedule(schedule):
    # E_t ||eps - eps_hat||^2 by Gauss and Legendre, and by 2 p(lambda) between the schedule's ends
    with jax.enable_x64(True):
        nodes, weights = np.polynomial.legendre.leggauss(400)
        level = schedule(jnp.asarray(0.5 + 0.5 * nodes))
        simple = 0.5 * weights @ _eps_error(np.asarray(level.alpha), np.asarray(level.sigma))
        high, low = (min(max(float(schedule(jnp.asarray(t)).log_snr), -50.0), 50.0) for t in (0.0, 1.0))
        grid, weights = _panels(*np.linspace(low, high, 31), count=50)
        density = np.asarray(weightings.uniform_in_time(jnp.asarray(grid), schedule))
        error = np.exp(grid) * _x_hat_error(1.0, np.exp(-grid / 2))
        ours = 0.5 * weights @ (2 * density * error)
        assert_close(ours, simple, rtol=1e-6)


def test_WEIGHT_1_v_prediction_and_flow_matching():
    with jax.enable_x64(True):
        assert_close(_cosine_t(_v_error), 2 / np.pi * _weighted(weightings.v_prediction), rtol=1e-12)

        # x_t = (1 - t) x_0 + t eps, u = eps - x_0 = (x_t - x_0) / t, so that an error in x_0 is one over t in u
        flow = _uniform_t(lambda t, rest: _x_hat_error(rest, t) / t**2)
        assert_close(flow, _weighted(weightings.v_prediction), rtol=1e-12)


@pytest.mark.parametrize(("mean", "std", "data"), [(-1.2, 1.2, 0.5), (-0.4, 1.0, 1.0)])
def test_WEIGHT_1_edm(mean, std, data):
    # E_sigma w(sigma) ||D(y + n; sigma) - y||^2, log sigma ~ N(P_mean, P_std^2), by Gauss and Hermite; alpha = 1
    with jax.enable_x64(True):
        nodes, weights = np.polynomial.hermite_e.hermegauss(120)
        sigma = np.exp(mean + std * nodes)
        scale = (sigma**2 + data**2) / (sigma * data) ** 2
        source = weights @ (scale * _x_hat_error(1.0, sigma)) / np.sqrt(2 * np.pi)
        ours = partial(weightings.edm, mean=mean, std=std, sigma_data=data)
        assert_close(source, 2 / data**2 * _weighted(ours), rtol=1e-10)


@pytest.mark.parametrize(("gamma", "k"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 3.0)])
def test_WEIGHT_1_p2(gamma, k):
    with jax.enable_x64(True):
        source = _cosine_t(lambda a, s: _eps_error(a, s) / (k + _snr(a, s)) ** gamma)
        assert_close(source, _weighted(partial(weightings.p2, gamma=gamma, k=k)) / np.pi, rtol=1e-12)


def _panels(*edges, count):
    """Gauss and Legendre's nodes and weights on the intervals between the edges, where the integrand has no corner."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    middles, halves = np.add(edges[:-1], edges[1:]) / 2, np.diff(edges) / 2
    return (middles[:, None] + halves[:, None] * nodes).ravel(), (halves[:, None] * weights).ravel()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_WEIGHT_1_min_snr_for_three_prediction_types(gamma):
    # one loss, for every prediction type; both integrals are cut where SNR = gamma: tan(pi t / 2) = gamma^(-1/2)
    with jax.enable_x64(True):
        corner = np.log(gamma)
        grid, weights = _panels(*np.linspace(-70.0, corner, 6), *np.linspace(corner, 70.0, 6)[1:], count=60)
        error = np.exp(grid) * _x_hat_error(1.0, np.exp(-grid / 2))
        ours = weights @ (np.asarray(weightings.min_snr(jnp.asarray(grid), gamma)) * error) / (2 * np.pi)
        t, weights = _panels(0.0, 2 / np.pi * np.arctan(gamma**-0.5), 1.0, count=80)
        alpha, sigma = np.sin(0.5 * np.pi * (1 - t)), np.sin(0.5 * np.pi * t)
        least = np.minimum(_snr(alpha, sigma), gamma)
        for source in (
            least * _x_hat_error(alpha, sigma),
            least / _snr(alpha, sigma) * _eps_error(alpha, sigma),
            least / (_snr(alpha, sigma) + 1) * _v_error(alpha, sigma),
        ):
            assert_close(weights @ source, ours, rtol=1e-10)


@pytest.mark.parametrize("bias", [-3.0, 2.0])
def test_WEIGHT_1_sigmoid(bias):
    # at a uniform t of the cosine schedule the same loss is sigmoid(bias - lambda) ||eps - eps_hat||^2 over 2 p(lambda)
    with jax.enable_x64(True):

        def source(alpha, sigma):
            ratio = sigma**2 / (sigma**2 + np.exp(-bias) * alpha**2)  # 1 / (1 + e^(lambda - bias))
            return ratio * _eps_error(alpha, sigma) * 0.5 * np.pi / (alpha * sigma)  # -dlambda/dt = pi / (alpha sigma)

        assert_close(_cosine_t(source), _weighted(partial(weightings.sigmoid, bias=bias)), rtol=1e-12)


@pytest.mark.slow
def test_WEIGHT_1_the_network_is_evaluated_for_the_same_error():
    # the error written here is that of the denoiser, at the level and prediction type it is evaluated for
    for prediction_type, error in (("eps", _eps_error), ("x_0", _x_hat_error), ("v", _v_error)):
        schedule = Cosine()
        t = jnp.full(40_000, 0.4)
        x_0 = DATA.sample(jax.random.key(0), (40_000, DIMS))
        ours = elbo.denoising_error(
            denoiser(WRONG, prediction_type), jax.random.key(1), x_0, schedule(t), prediction_type
        )
        level = schedule(0.4)
        assert_mean(ours, error(float(level.alpha), float(level.sigma)), resolution=0.02)


def test_WEIGHT_1_densities_of_the_two_closed_forms():
    # cosine: lambda = -2 log tan(pi t / 2); flow: lambda = 2 log((1 - t) / t)
    t = sp.Symbol("t", positive=True)
    lam = -2 * sp.log(sp.tan(sp.pi * t / 2))
    assert_proved(-1 / sp.diff(lam, t), (1 / sp.cosh(lam / 2) / (2 * sp.pi)).rewrite(sp.exp))
    lam = 2 * sp.log((1 - t) / t)
    assert_proved(-1 / sp.diff(lam, t) / (1 - t) ** 2, sp.exp(-lam / 2) / 2)


# The theorem: L_w = w(0) L(0) + int w'(t) L(t) dt - w(1) L(1)

SCHEDULE = LinearLogSNR(8.0, -6.0)
FALLING = {"v_prediction": weightings.v_prediction, "sigmoid": weightings.sigmoid}
WEIGHTS = FALLING | {"edm": weightings.edm, "min_snr": weightings.min_snr, "cosine": weightings.cosine}


def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "edm", "min_snr"])
def test_WEIGHT_2_a_weighted_loss_is_a_mixture_of_bounds(name):
    # Two ways to the same number. Left, the MMSE curve: for the exact denoiser E ||eps - eps_hat||^2 = SNR mmse. Right,
    # entropies alone: KL(q(z_t..1|x) || p(z_t..1)), averaged over data, is I(x; z_t) - I(x; z_1) + E KL(q(z_1|x) || p),
    # p being the true reverse process from another prior. No integral over noise levels is in it.
    weight = WEIGHTS[name]
    with jax.enable_x64(True):
        distribution = _mixture()
        t, share = _panels(0.0, (8.0 - np.log(5.0)) / 14.0, 1.0, count=40)  # cut at min_snr's corner
        t = jnp.asarray(t)
        level = SCHEDULE(t)
        mmse = jax.jit(lambda level: jax.lax.map(lambda lv: information.mmse(distribution, lv).value, level))(level)
        loss = share @ np.asarray(0.5 * 14.0 * weight(level.log_snr) * level.snr * mmse)

        @jax.jit
        def shared(lv):
            return information.mutual_information(distribution, lv).value

        first, last = (SCHEDULE(jnp.asarray(end)) for end in (0.0, 1.0))
        prior = information.optimal_bound_limit(distribution, first, last).prior.value
        bound = jax.lax.map(shared, level) - shared(last) + prior
        rate = jax.vmap(lambda time: weightings.as_elbo_mixture(weight, SCHEDULE, time))(t)
        w_0, w_1 = weight(first.log_snr), weight(last.log_snr)
        ours = w_0 * (shared(first) - shared(last) + prior) + share @ np.asarray(rate * bound) - w_1 * prior
        assert_close(ours, loss, rtol=1e-9)
        with refuted():  # with the sign of the mixture reversed
            assert_close(ours - 2 * share @ np.asarray(rate * bound), loss, rtol=1e-2)


@pytest.mark.slow
def test_WEIGHT_2_any_model_and_both_estimators():
    # A wrong model, at one example: L(t) is elbo.continuous_bound of the levels from t on (their shape is free), and
    # the sum over t is weighted_bound's expectation.
    x_0, net = jnp.broadcast_to(jnp.asarray([0.7, -0.4]), (10_000, DIMS)), denoiser(WRONG)
    nodes, share = _panels(0.0, 1.0, count=14)

    def bound(start, key):
        rest = LearnedSchedule(-SCHEDULE.log_snr(start), -SCHEDULE.log_snr(1.0), Partial(_straight))
        ours = elbo.continuous_bound(net, key, x_0, rest, _decoder, terms=8)
        return ours.diffusion + ours.prior

    times = jnp.asarray([*nodes, 0.0], jnp.float32)
    bounds = jax.lax.map(lambda both: bound(*both), (times, jax.random.split(jax.random.key(5), 15)))
    rate = jax.vmap(lambda time: weightings.as_elbo_mixture(weightings.sigmoid, SCHEDULE, time))(times[:-1])
    first, last = (float(weightings.sigmoid(SCHEDULE.log_snr(end))) for end in (0.0, 1.0))
    ours = first * bounds[-1] + (share * np.asarray(rate)) @ np.asarray(bounds[:-1])
    loss = weightings.weighted_bound(net, jax.random.key(6), x_0, SCHEDULE, weightings.sigmoid, terms=8)
    assert_mean(ours - last * elbo.prior_kl(x_0[0], SCHEDULE(1.0)) - loss, 0.0, resolution=0.015)


def _straight(s, t):
    return t - s


def _decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def test_WEIGHT_2_for_a_falling_weight_every_bound_has_positive_weight():
    t, h = np.linspace(0.001, 0.999, 401), 1e-5
    smooth = np.abs(t - (8.0 - np.log(5.0)) / 14.0) > 1e-3  # min_snr has a corner

    @jax.jit
    def claims(t):
        mixtures = {
            name: jax.vmap(lambda time, w=weight: weightings.as_elbo_mixture(w, SCHEDULE, time))(t)
            for name, weight in WEIGHTS.items()
        }
        values = {
            name: [weight(SCHEDULE.log_snr(time)) for time in (t - h, t, t + h)] for name, weight in WEIGHTS.items()
        }
        return mixtures, values

    with jax.enable_x64(True):
        rates, values = jax.tree.map(np.asarray, claims(jnp.asarray(t)))
    for name, rate in rates.items():
        before, value, after = values[name]
        assert_close(rate[smooth], (after - before)[smooth] / (2 * h), rtol=1e-5, atol=1e-7)  # the slope of w over t
        assert np.all(rate >= 0) == (name in FALLING)
        # edm's rises with the log-SNR up to its peak: data more noisy than that count negatively, others positively
        if name == "edm":
            peak = t[np.argmax(value)]
            assert 0.1 < peak < 0.9
            assert np.all(rate[t < peak - 0.01] > 0)
            assert np.all(rate[t > peak + 0.01] < 0)


def test_WEIGHT_2_by_parts():
    # d L(t) / dt is minus the integrand, so that L_w = - int w dL: symbolically, for weights and losses of any shape
    t = sp.Symbol("t", real=True)
    a, b, c = sp.symbols("a b c", positive=True)
    w, rate = sp.exp(a * t) + b * t**2, c * t + sp.cos(t)  # the integrand 1/2 gamma' E ||eps - eps_hat||^2
    u = sp.Symbol("u", real=True)
    bound = sp.integrate(rate.subs(t, u), (u, t, 1)) + c  # and a prior's term
    mixed = (w * bound).subs(t, 0) + sp.integrate(sp.expand(sp.diff(w, t) * bound), (t, 0, 1)) - (w * bound).subs(t, 1)
    assert_proved(sp.integrate(sp.expand(w * rate), (t, 0, 1)), mixed)


@pytest.mark.slow
def test_WEIGHT_2_the_bound_of_noised_data():
    # L(t) is the bound on -log p of data noised to t, minus their entropy given x: for the exact model of the data
    # it exceeds -E log q(z_t) - h(z_t|x) by the prior's KL(q(z_1) || p(z_1)) alone.
    with jax.enable_x64(True):
        distribution, start = _mixture(), 0.4
        net, decoder = closed_form.OptimalDenoiser(distribution), closed_form.OptimalDecoder(distribution)
        x_0 = draws(distribution, jax.random.key(0), 8000)

        @jax.jit
        def bound(x_0):
            return elbo.continuous_bound(net, jax.random.key(1), x_0, SCHEDULE, decoder, terms=8, t_0=start)

        ours = bound(x_0)
        level, last = SCHEDULE(jnp.asarray(start)), SCHEDULE(jnp.asarray(1.0))
        noised = closed_form.marginal(distribution, level)
        surprise = -jax.vmap(noised.log_prob)(draws(noised, jax.random.key(2), 8000))
        given = 0.5 * (1 + np.log(2 * np.pi) + 2 * level.log_sigma)
        prior = information.optimal_bound_limit(distribution, level, last).prior.value
        mismatch = prior - information.mutual_information(distribution, last).value  # KL(q(z_1) || p(z_1))
        assert_mean(ours.diffusion + ours.prior - (surprise - given), mismatch, resolution=0.02)
