"""Weights of the log-SNR: exact in float32, without overflow, and the estimate that uses them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.derivations.check import assert_close, assert_mean
from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, weightings
from vdm_jax.discrete_schedules import discretize
from vdm_jax.schedules import Cosine, LearnedSchedule, LinearBeta, LinearLogSNR, Sigmoid, VarianceExploding

# name -> (ours, by mpmath)
WEIGHTS = {
    "likelihood": (weightings.likelihood, lambda x: 1),
    "cosine": (weightings.cosine, lambda x: mp.sech(x / 2)),
    "v_prediction": (weightings.v_prediction, lambda x: mp.e ** (-x / 2)),
    "edm": (weightings.edm, lambda x: mp.npdf(x, mp.mpf("2.4"), mp.mpf("2.4")) * (mp.e**-x + mp.mpf("0.25"))),
    "edm of others": (
        partial(weightings.edm, mean=-0.4, std=1.0, sigma_data=1.0),
        lambda x: mp.npdf(x, mp.mpf("0.8"), 2) * (mp.e**-x + 1),
    ),
    "p2": (weightings.p2, lambda x: mp.sech(x / 2) / (1 + mp.e**x)),
    "p2 of a half": (partial(weightings.p2, gamma=0.5), lambda x: mp.sech(x / 2) / mp.sqrt(1 + mp.e**x)),
    "min_snr": (weightings.min_snr, lambda x: mp.sech(x / 2) * min(1, 5 * mp.e**-x)),
    "sigmoid": (weightings.sigmoid, lambda x: 1 / (1 + mp.e ** (x - 2))),
    "sigmoid of -3": (partial(weightings.sigmoid, bias=-3.0), lambda x: 1 / (1 + mp.e ** (x + 3))),
}
LINE, RANDOM = np.linspace(-20, 20, 161), np.random.RandomState(0).uniform(-20, 20, 400)
FAR, SMOOTH = np.array([-80.0, -40.0, -1e-30, 0.0, 40.0, 80.0]), np.array([-7.3, -1.1, 0.4, 6.2])
LOG_SNR = np.r_[LINE, RANDOM, FAR, SMOOTH].astype(np.float32)
H = 1e-5


@jax.jit
@jax.vmap
def _values_and_slopes(log_snr):
    return {name: jax.value_and_grad(ours)(log_snr) for name, (ours, _) in WEIGHTS.items()}


@cache
def _at_log_snr(dtype, offset=0.0):
    """name -> values and slopes at LOG_SNR + offset, by one program for each dtype."""
    with jax.enable_x64(dtype == np.float64):
        return jax.tree.map(np.asarray, _values_and_slopes(LOG_SNR.astype(dtype) + dtype(offset)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_exact_in_float32(name):
    with mp.workdps(50):
        expected = np.array([float(WEIGHTS[name][1](mp.mpf(float(x)))) for x in LOG_SNR[:561]])
    error = np.abs(_at_log_snr(np.float32)[name][0][:561].astype(np.float64) / expected - 1)
    print(f"{name}: {error.max():.1e}")
    assert error.max() < 5e-7
    assert_close(_at_log_snr(np.float64)[name][0][:561], expected, rtol=2e-14)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_and_slopes_are_finite_far_out(name):
    assert np.all(np.isfinite(_at_log_snr(np.float32)[name]))
    # where the weight is smooth, its slope equals central differences
    (_, slope), (above, _), (below, _) = (_at_log_snr(np.float64, offset)[name] for offset in (0.0, H, -H))
    np.testing.assert_allclose(slope[-4:], (above - below)[-4:] / (2 * H), rtol=1e-6, atol=1e-14)


def test_the_slopes_at_zero():
    # |lambda| and min meet there: d sigmoid(b - x) = -s (1 - s), d sech = 0
    s, zero = 1 / (1 + np.exp(-2.0)), int(np.flatnonzero(LOG_SNR == 0.0)[-1])
    assert _at_log_snr(np.float32)["sigmoid"][1][zero] == pytest.approx(-s * (1 - s), rel=1e-6)
    assert _at_log_snr(np.float32)["cosine"][1][zero] == 0.0


@pytest.mark.parametrize("name", WEIGHTS)
def test_which_weights_fall(name):
    # as in the module's table: only likelihood, v_prediction and sigmoid never increase with the log-SNR
    rises = np.diff(_at_log_snr(np.float64)[name][0][: len(LINE)])
    falls = name.split()[0] in ("likelihood", "v_prediction", "sigmoid")
    assert np.all(rises <= 0) == falls


@pytest.mark.parametrize(
    "schedule",
    [LinearBeta(), *(pytest.param(s, marks=pytest.mark.slow) for s in (Cosine(), Sigmoid(), LinearLogSNR(9.0, -7.0)))],
    ids=repr,
)
def test_uniform_time_is_the_density_of_a_uniform_time(schedule):
    @jax.jit
    def at(t):
        slope, curve = (jax.vmap(derivative)(t) for derivative in (jax.grad(log_snr), jax.grad(jax.grad(log_snr))))
        x = jnp.concatenate([log_snr(t), jnp.full_like(t, beyond)])
        return slope, curve, *jax.vmap(jax.value_and_grad(lambda x: weightings.uniform_in_time(x, schedule)))(x)

    log_snr, last = schedule.log_snr, float(schedule.log_snr(1.0))
    beyond = last - 0.1 if np.isfinite(last) else -200.0
    with jax.enable_x64(True):
        slope, curve, density, rise = at(np.linspace(0.001, 0.999, 201))
        assert_close(density[:201] * -slope, np.ones(201), rtol=1e-9)
        # its slope, by the inverse function: dp/dlambda = lambda'' / lambda'^3
        np.testing.assert_allclose(rise[:201], np.asarray(curve) / np.asarray(slope) ** 3, rtol=1e-6, atol=1e-12)
        # the density is 0 beyond the end
        assert not np.any(density[201:])
        assert not np.any(rise[201:])
    slope, _, density, _ = at(np.linspace(0.1, 0.9, 201, dtype=np.float32))
    np.testing.assert_allclose(density[:201], -1 / np.asarray(slope), rtol=2e-5)


def test_uniform_time_of_a_schedule_without_offset_is_the_closed_form():
    density = jax.jit(lambda x: [weightings.uniform_in_time(x, s) for s in (Cosine(0.0), LinearLogSNR(9.0, -7.0))])
    with jax.enable_x64(True):
        log_snr = np.linspace(-20.0, 20.0, 101)
        cosine, flat = density(log_snr)
        assert_close(cosine, 1 / np.cosh(0.5 * log_snr) / (2 * np.pi), rtol=1e-9)
        assert_close(flat, np.where((log_snr > -7.0) & (log_snr < 9.0), 1 / 16, 0.0), rtol=1e-12)


def test_uniform_time_has_the_gradient_of_the_schedule():
    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def total(ends):
        rise = Partial(lambda s, t: t - s + 0.5 * (t**3 - s**3))
        return weightings.uniform_in_time(jnp.asarray([1.3, -2.0]), LearnedSchedule(ends[0], ends[1], rise)).sum()

    with jax.enable_x64(True):
        steps = H * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        value, slope = total(np.array([-6.0, 5.0]) + steps)
        np.testing.assert_allclose(slope[0], (value[1:3] - value[3:]) / (2 * H), rtol=1e-6)


GAUSSIAN, WRONG = GaussianWorld(0.2, 0.6), GaussianWorld(-0.1, 0.9)
X_0 = GAUSSIAN.sample(jax.random.key(3), (20_000, 2))
NETS = {prediction_type: denoiser(WRONG, prediction_type) for prediction_type in ("eps", "v", "x_0")}


def _error(log_snr):
    """E ||eps - eps_hat||^2 over GAUSSIAN's data of WRONG's exact denoiser, 2 dimensions, derived on paper.

    eps_hat = sigma (x_t - alpha m') / (alpha^2 c' + sigma^2), so that with s = SNR
    eps - eps_hat = (s c' eps - sqrt(s) (x_0 - m')) / (s c' + 1), and E (x_0 - m')^2 = c + (m - m')^2.
    """
    s = np.exp(np.asarray(log_snr, np.float64))
    return (
        2 * ((s * WRONG.var) ** 2 + s * (GAUSSIAN.var + (GAUSSIAN.mean - WRONG.mean) ** 2)) / (s * WRONG.var + 1) ** 2
    )


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [(LinearLogSNR(6.0, -6.0), "eps"), (VarianceExploding(0.05, 20.0), "x_0"), (Cosine(), "v")],
)
def test_the_estimate_is_the_integral_over_the_log_snr(schedule, prediction_type):
    # for every schedule and prediction type: 1/2 int w E ||eps - eps_hat||^2 dlambda by the trapezoidal rule
    start = 0.05 if isinstance(schedule, Cosine) else 0.0
    high, low = float(schedule.log_snr(start)), max(float(schedule.log_snr(1.0)), -40.0)
    grid = np.linspace(low, high, len(LOG_SNR))
    with jax.enable_x64(True):
        weights = _values_and_slopes(grid)

    @partial(jax.jit, static_argnames="terms")
    def estimates(key, x_0, terms):
        estimate = partial(weightings.weighted_bound, NETS[prediction_type], key, x_0, schedule)
        options = {"prediction_type": prediction_type, "terms": terms, "t_0": start}
        return {name: estimate(WEIGHTS[name][0], **options) for name in ("likelihood", "cosine", "edm", "sigmoid")}

    many = estimates(jax.random.key(1), X_0[:5000], 8)
    one = estimates(jax.random.key(1), X_0, 1) if prediction_type == "eps" else {}
    for name, ours in many.items():
        expected = np.trapezoid(0.5 * np.asarray(weights[name][0]) * _error(grid), grid)
        assert_mean(ours, expected, resolution=0.02 * expected)
        if name in one:
            assert_mean(one[name], expected, resolution=0.03 * expected)
            assert np.var(ours) < np.var(one[name]) / 4


def test_the_estimate_of_a_discrete_schedule_weights_its_terms():
    # sum_t w(lambda_t) KL_t, every term visited: with w = 1 the bound's diffusion term
    schedule, weights = discretize(LinearLogSNR(6.0, -6.0), 12), (weightings.likelihood, weightings.min_snr)

    @jax.jit
    def estimates(key, x_0):
        step = schedule.step(jnp.arange(1, 12), jnp.arange(2, 13))
        kl = jax.vmap(partial(elbo.diffusion_weight, prediction_type="eps"))(step)
        bound = partial(weightings.weighted_bound, NETS["eps"], key, x_0, schedule, terms=11)
        factors = [weight(step.t.log_snr) * kl for weight in weights]
        return [bound(weight) for weight in weights], factors, step.t.log_snr

    ours, factors, log_snr = estimates(jax.random.key(1), X_0)
    for bound, factor in zip(ours, factors, strict=True):
        assert_mean(bound, np.sum(np.asarray(factor) * _error(log_snr)), resolution=0.04)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (LinearLogSNR(), {"terms": 0}, "terms is 0"),
        (LinearBeta(), {}, "LinearBeta.* has no noise at t = 0.0"),
        (discretize(Cosine(), 5), {"terms": 5}, "terms is 5.*choose 1..4"),
    ],
)
def test_invalid_arguments_of_the_estimate_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        weightings.weighted_bound(NETS["eps"], jax.random.key(0), X_0, schedule, weightings.cosine, **options)


def test_an_estimate_has_gradients():
    # L_w(a) of a * (exact eps) is a parabola with its least at a = 1
    @jax.jit
    @jax.grad
    def slope(a, x_0):
        net = Partial(lambda a, x, level: a * denoiser(GAUSSIAN)(x, level), a)
        schedule = LinearLogSNR(6.0, -6.0)
        return weightings.weighted_bound(net, jax.random.key(0), x_0, schedule, weightings.sigmoid).mean()

    assert slope(0.7, X_0) < 0 < slope(1.3, X_0)
