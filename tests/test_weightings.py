"""Weights of the log-SNR: exact in float32, without overflow, and the estimate that uses them."""

from functools import partial

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
LOG_SNR = np.r_[np.linspace(-20, 20, 161), np.random.RandomState(0).uniform(-20, 20, 400)].astype(np.float32)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_exact_in_float32(name):
    ours, expected = WEIGHTS[name]
    with mp.workdps(50):
        expected = np.array([float(expected(mp.mpf(float(x)))) for x in LOG_SNR])
    error = np.abs(np.asarray(jax.jit(ours)(jnp.asarray(LOG_SNR)), np.float64) / expected - 1)
    print(f"{name}: {error.max():.1e}")
    assert error.max() < 5e-7
    with jax.enable_x64(True):
        assert_close(ours(jnp.asarray(LOG_SNR, jnp.float64)), expected, rtol=2e-14)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_and_slopes_are_finite_far_out(name):
    far = jnp.asarray([-80.0, -40.0, -1e-30, 0.0, 40.0, 80.0])
    slope = jax.vmap(jax.grad(WEIGHTS[name][0]))(far)
    assert np.all(np.isfinite(WEIGHTS[name][0](far)))
    assert np.all(np.isfinite(slope))
    # where the weight is smooth, its slope equals central differences
    with jax.enable_x64(True):
        x, h = jnp.asarray([-7.3, -1.1, 0.4, 6.2]), 1e-5
        secant = (WEIGHTS[name][0](x + h) - WEIGHTS[name][0](x - h)) / (2 * h)
        np.testing.assert_allclose(jax.vmap(jax.grad(WEIGHTS[name][0]))(x), secant, rtol=1e-6, atol=1e-14)


def test_the_slopes_at_zero():
    # |lambda| and min meet there: d sigmoid(b - x) = -s (1 - s), d sech = 0
    s = 1 / (1 + np.exp(-2.0))
    assert float(jax.grad(weightings.sigmoid)(0.0)) == pytest.approx(-s * (1 - s), rel=1e-6)
    assert float(jax.grad(weightings.cosine)(0.0)) == 0.0


@pytest.mark.parametrize("name", WEIGHTS)
def test_which_weights_fall(name):
    # as in the module's table: only likelihood, v_prediction and sigmoid never increase with the log-SNR
    with jax.enable_x64(True):
        rises = np.diff(WEIGHTS[name][0](jnp.linspace(-20.0, 20.0, 4001)))
    falls = name.split()[0] in ("likelihood", "v_prediction", "sigmoid")
    assert np.all(rises <= 0) == falls


@pytest.mark.parametrize(
    "schedule",
    [LinearBeta(), Cosine(), pytest.param(Sigmoid(), marks=pytest.mark.slow), LinearLogSNR(9.0, -7.0)],
    ids=repr,
)
def test_uniform_time_is_the_density_of_a_uniform_time(schedule):
    log_snr = jax.jit(schedule.log_snr)
    slope, curve = jax.jit(jax.vmap(jax.grad(log_snr))), jax.jit(jax.vmap(jax.grad(jax.grad(log_snr))))
    rise = jax.jit(jax.vmap(jax.grad(lambda x: weightings.uniform_in_time(x, schedule))))
    with jax.enable_x64(True):
        t = jnp.linspace(0.001, 0.999, 201)
        assert_close(weightings.uniform_in_time(log_snr(t), schedule) * -slope(t), np.ones(201), rtol=1e-9)
        # its slope, by the inverse function: dp/dlambda = lambda'' / lambda'^3
        np.testing.assert_allclose(rise(log_snr(t)), curve(t) / slope(t) ** 3, rtol=1e-6, atol=1e-12)
        # the density is 0 beyond the ends
        last = float(log_snr(jnp.asarray(1.0)))
        beyond = jnp.full(201, last - 0.1 if np.isfinite(last) else -200.0)
        assert not np.any(weightings.uniform_in_time(beyond, schedule))
        assert not np.any(rise(beyond))
    t = jnp.linspace(0.1, 0.9, 81)
    np.testing.assert_allclose(weightings.uniform_in_time(log_snr(t), schedule), -1 / slope(t), rtol=2e-5)  # float32


def test_uniform_time_of_a_schedule_without_offset_is_the_closed_form():
    with jax.enable_x64(True):
        log_snr = jnp.linspace(-20.0, 20.0, 101)
        assert_close(
            weightings.uniform_in_time(log_snr, Cosine(0.0)), weightings.cosine(log_snr) / (2 * np.pi), rtol=1e-9
        )
        flat = weightings.uniform_in_time(jnp.linspace(-6.9, 8.9, 50), LinearLogSNR(9.0, -7.0))
        assert_close(flat, np.full(50, 1 / 16), rtol=1e-12)


def test_uniform_time_has_the_gradient_of_the_schedule():
    with jax.enable_x64(True):
        log_snr, ends, h = jnp.asarray([1.3, -2.0]), jnp.asarray([-6.0, 5.0]), 1e-5

        def total(ends):
            rise = Partial(lambda s, t: t - s + 0.5 * (t**3 - s**3))
            return weightings.uniform_in_time(log_snr, LearnedSchedule(ends[0], ends[1], rise)).sum()

        secants = [(total(ends.at[i].add(h)) - total(ends.at[i].add(-h))) / (2 * h) for i in range(2)]
        np.testing.assert_allclose(jax.grad(total)(ends), secants, rtol=1e-6)


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
    grid = np.linspace(low, high, 20_001)
    for name in ("likelihood", "cosine", "edm", "sigmoid"):
        weight = WEIGHTS[name][0]
        with jax.enable_x64(True):
            expected = np.trapezoid(0.5 * np.asarray(weight(jnp.asarray(grid))) * _error(grid), grid)
        estimate = partial(
            weightings.weighted_bound,
            NETS[prediction_type],
            schedule=schedule,
            weight=weight,
            prediction_type=prediction_type,
            t_0=start,
        )
        ours, many = estimate(jax.random.key(1), X_0), estimate(jax.random.key(1), X_0[:5000], terms=8)
        assert_mean(ours, expected, resolution=0.03 * expected)
        assert_mean(many, expected, resolution=0.02 * expected)
        assert np.var(many) < np.var(ours) / 4


def test_the_estimate_of_a_discrete_schedule_weights_its_terms():
    # sum_t w(lambda_t) KL_t, every term visited: with w = 1 the bound's diffusion term
    schedule = discretize(LinearLogSNR(6.0, -6.0), 12)
    step = schedule.step(jnp.arange(1, 12), jnp.arange(2, 13))
    kl = np.asarray(jax.vmap(partial(elbo.diffusion_weight, prediction_type="eps"))(step)) * _error(step.t.log_snr)
    for name in ("likelihood", "min_snr"):
        weight = WEIGHTS[name][0]
        ours = weightings.weighted_bound(NETS["eps"], jax.random.key(1), X_0, schedule, weight, terms=11)
        assert_mean(ours, np.sum(np.asarray(weight(step.t.log_snr)) * kl), resolution=0.04)


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
    def loss(a):
        net = jax.tree_util.Partial(lambda a, x, level: a * denoiser(GAUSSIAN)(x, level), a)
        return weightings.weighted_bound(
            net, jax.random.key(0), X_0, LinearLogSNR(6.0, -6.0), weightings.sigmoid
        ).mean()

    assert jax.grad(loss)(0.7) < 0 < jax.grad(loss)(1.3)
