"""Churn: the amount, scale and interval of the added noise, and the level the network is conditioned on."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_close, assert_mean, refuted
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize, from_gammas, linear_betas, log_snr_uniform_steps, uniform_steps
from vdm_jax.samplers import euler, heun
from vdm_jax.schedules import LinearLogSNR, VarianceExploding

KEY = jax.random.key(0)
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _evaluations(x_T, schedule, **options):
    """The states and levels that Euler's method evaluates the network at, noisiest first; float32, as callbacks are."""
    calls = [next(NUMBERS)]  # of this call: spies of equal closures share a program, and so a list

    def spy(x_t, level):
        jax.debug.callback(lambda x, level: calls.append((x, jax.tree.map(lambda f: float(f[0]), level))), x_t, level)
        return jnp.zeros_like(x_t)

    jax.block_until_ready(euler(spy, KEY, x_T, schedule, prediction_type="x_0", **options))
    jax.effects_barrier()
    return sorted(calls[1:], key=lambda call: -call[1].log_sigma + call[1].log_alpha)


def test_the_level_after_churn_is_the_level_of_x_t():
    # data 0: x_t = sigma_t eps at every step, so its standard deviation over sigma checks the level
    schedule = discretize(LinearLogSNR(8.0, -6.0), 30)
    x_T = schedule(30).sigma * jax.random.normal(jax.random.key(1), (60_000, 1))
    calls = _evaluations(x_T, schedule, s_churn=6.0)
    assert len(calls) == 30
    for t, (x, level) in zip(range(30, 0, -1), calls, strict=True):
        n = schedule(t).sigma / schedule(t).alpha * 1.2
        assert_close(level.sigma / level.alpha, n, rtol=1e-6)
        assert_close(level.log_alpha - level.log_sigma, -np.log(n), rtol=1e-6, atol=1e-6)
        assert_close(level.alpha**2 + level.sigma**2, 1.0, rtol=1e-6)
        assert_close(level.t, min(t + np.log(1.2) / (0.5 * 14.0 / 29), 30), rtol=1e-6)  # even in log n
        assert_mean(np.square(x / level.sigma), 1.0, resolution=0.006)
    with refuted():
        assert_mean(np.square(calls[25][0] / float(schedule(5).sigma)), 1.0)


@pytest.mark.parametrize("low", [0.001, pytest.param(0.05, marks=pytest.mark.slow)])
def test_an_exploding_schedule_keeps_its_signal(low):
    # also where there is so little noise that alpha^2 + sigma^2 is nearly one
    for _, level in _evaluations(jnp.ones((2, 1)), discretize(VarianceExploding(low, 20.0), 6), s_churn=2.0):
        assert level.alpha == 1.0
        assert_close(level.log_sigma, np.log(level.sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_t_between_levels_of_a_subsequence_is_interpolated_in_the_full_schedule():
    full = linear_betas(1000)
    for index in (uniform_steps(1000, 10), log_snr_uniform_steps(full, 10)):
        few, errors = full.subsequence(index), []
        for given in (None, full):
            calls = _evaluations(jnp.ones((1, 1)), few, s_churn=3.0, full_schedule=given)
            n = np.array([level.sigma / level.alpha for _, level in calls])
            t = np.array([level.t for _, level in calls])
            at = np.interp(np.log(n), -0.5 * full.log_snr[1:], np.arange(1, 1001))
            errors.append(np.max(np.abs(t - at)))
        print(f"t after churn, {index.tolist()}: off by {errors[0]:.1f} steps of 1000, in the full one {errors[1]:.1e}")
        assert errors[1] < 1e-3
        assert errors[0] > 1.0


@pytest.mark.slow
def test_no_noise_is_added_outside_of_the_interval():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    best, x_T = closed_form.OptimalDenoiser(distribution), jax.random.normal(jax.random.key(5), (8, 2))
    schedule = discretize(LinearLogSNR(8.0, -6.0), 12)
    plain = heun(best, KEY, x_T, schedule, snapshots=12).trajectory.x_t
    n = np.asarray(schedule.levels.sigma / schedule.levels.alpha)
    assert_close(
        heun(best, KEY, x_T, schedule, s_churn=4.0, s_tmin=100.0, s_tmax=200.0, snapshots=12).trajectory.x_t, plain
    )
    for low, high in ((0.0, n[5]), (n[8], np.inf), (n[4], n[6])):
        span = (float(low) * 0.999, float(high) * 1.001)
        ours = heun(best, KEY, x_T, schedule, s_churn=4.0, s_tmin=span[0], s_tmax=span[1], snapshots=12).trajectory.x_t
        first = max(t for t in range(1, 13) if span[0] <= n[t] <= span[1])  # before this step the states are equal
        assert_close(ours[: 13 - first], plain[: 13 - first], atol=1e-12)
        assert first == 1 or np.all(np.abs(ours[13 - first] - plain[13 - first]) > 1e-6)


def test_variance_of_the_added_noise():
    # one step of a schedule of two, from n_2 to n_1, with data 0: only the added noise remains
    schedule = discretize(LinearLogSNR(8.0, -6.0), 12)
    n = np.asarray(schedule.levels.sigma / schedule.levels.alpha)
    pair, zeros = schedule.subsequence([0, 4, 9]), jnp.zeros((40_000, 1))
    for size in (1.0, 1.5):
        options = {"prediction_type": "x_0", "s_churn": 0.5, "s_noise": size, "snapshots": 2}
        x_t = euler(lambda x, _: 0.0 * x, KEY, zeros, pair, **options).trajectory.x_t[1]
        added = size**2 * n[9] ** 2 * (1.25**2 - 1)  # to n_9 (1 + 0.5 / 2)
        assert_mean(np.square(x_t), float(pair(1).alpha) ** 2 * added * (n[4] / (1.25 * n[9])) ** 2)
    # and never above sqrt 2
    (_, level), *_ = _evaluations(zeros[:2], pair, s_churn=100.0)
    assert_close(level.sigma / level.alpha, np.sqrt(2) * n[9], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.5, None])
def test_heun_by_hand(clip):
    # in y = x / alpha and n = sigma / alpha, from n to m: y = x_hat + n eps, and Euler's next y is x_hat + m eps
    gammas = np.array([-9.0, -8.0, 0.0, 4.0])
    n, alpha = np.append(0.0, np.exp(gammas / 2)), np.append(1.0, np.sqrt(1 / (1 + np.exp(gammas))))
    limit, x_T, clipped = clip or np.inf, np.array([[2.0], [-0.5], [0.1]]), []
    y = x_T / alpha[-1]
    for t in range(4, 0, -1):
        k, m = n[t], n[t - 1]
        x_hat = np.clip(0.8 * alpha[t] * y, -limit, limit)
        eps = (y - x_hat) / k
        euler = x_hat + m * eps
        if t == 1:
            y = euler
            continue
        eps_there = (euler - np.clip(0.8 * alpha[t - 1] * euler, -limit, limit)) / m
        x_hat = y + (m - k) * 0.5 * (eps + eps_there) - m * eps  # for which Euler's step is Heun's
        clipped.append(np.abs(x_hat) > limit)
        y = np.clip(x_hat, -limit, limit) + m * eps
    assert np.any(clipped) == (clip is not None)
    ours = heun(lambda x, _: 0.8 * x, None, jnp.asarray(x_T), from_gammas(gammas), prediction_type="x_0", clip=clip)
    assert_close(ours.x_0, y)


def test_errors():
    x_T, schedule = jnp.ones((2, 1)), discretize(LinearLogSNR(), 5)
    for sampler in (inspect.unwrap(euler), inspect.unwrap(heun)):
        for s_churn in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="s_churn must be at least 0, got"):
                sampler(lambda x, _: x, KEY, x_T, schedule, s_churn=s_churn)
        with pytest.raises(ValueError, match=r"key must not be None when s_churn > 0: pass a key"):
            sampler(lambda x, _: x, None, x_T, schedule, s_churn=1.0)
