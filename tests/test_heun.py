"""Churn: how much noise, of which size, where, and the level that the network is told."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_close, assert_mean, refuted
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize, linear_betas, log_snr_uniform_steps, uniform_steps
from vdm_jax.samplers import heun
from vdm_jax.schedules import LinearLogSNR, VarianceExploding

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _told(x_T, schedule, **options):
    """What a network is told and given, call by call, from the noisiest on; in float32, as callbacks hand it over."""
    told = []

    def spy(x_t, level):
        jax.debug.callback(lambda x, level: told.append((x, jax.tree.map(lambda f: float(f[0]), level))), x_t, level)
        return jnp.zeros_like(x_t)

    jax.block_until_ready(heun(spy, KEY, x_T, schedule, prediction_type="x_0", **options))
    jax.effects_barrier()
    return sorted(told, key=lambda call: -call[1].log_sigma + call[1].log_alpha)


def test_the_level_after_churn_is_the_one_that_x_t_has():
    # data 0: x_t = sigma_t eps all along, so its deviation over sigma tells whether the level told is its own
    schedule = discretize(LinearLogSNR(8.0, -6.0), 30)
    x_T = schedule(30).sigma * jax.random.normal(jax.random.key(1), (60_000, 1))
    calls = _told(x_T, schedule, order=1, churn=6.0)
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
    for _, level in _told(jnp.ones((2, 1)), discretize(VarianceExploding(low, 20.0), 6), order=1, churn=2.0):
        assert level.alpha == 1.0
        assert_close(level.log_sigma, np.log(level.sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_between_the_levels_of_a_stride_the_whole_table_is_asked():
    whole = linear_betas(1000)
    for index in (uniform_steps(1000, 10), log_snr_uniform_steps(whole, 10)):
        few, errors = whole.subsequence(index), []
        for given in (None, whole):
            calls = _told(jnp.ones((1, 1)), few, order=1, churn=3.0, whole=given)
            n = np.array([level.sigma / level.alpha for _, level in calls])
            t = np.array([level.t for _, level in calls])
            at = np.interp(np.log(n), -0.5 * whole.log_snr[1:], np.arange(1, 1001))
            errors.append(np.max(np.abs(t - at)))
        print(
            f"t told after churn, {index.tolist()}: off by {errors[0]:.1f} steps of 1000, with `whole` {errors[1]:.1e}"
        )
        assert errors[1] < 1e-3
        assert errors[0] > 1.0


@pytest.mark.slow
def test_churn_outside_of_its_range_is_none():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    best, x_T = closed_form.OptimalDenoiser(distribution), jax.random.normal(jax.random.key(5), (8, 2))
    schedule = discretize(LinearLogSNR(8.0, -6.0), 12)
    still = heun(best, KEY, x_T, schedule, snapshots=12).trajectory.x_t
    n = np.asarray(schedule.levels.sigma / schedule.levels.alpha)
    assert_close(
        heun(best, KEY, x_T, schedule, churn=4.0, churn_range=(100.0, 200.0), snapshots=12).trajectory.x_t, still
    )
    for low, high in ((0.0, n[5]), (n[8], np.inf), (n[4], n[6])):
        span = (float(low) * 0.999, float(high) * 1.001)
        ours = heun(best, KEY, x_T, schedule, churn=4.0, churn_range=span, snapshots=12).trajectory.x_t
        first = max(t for t in range(1, 13) if span[0] <= n[t] <= span[1])  # up to its step nothing has changed
        assert_close(ours[: 13 - first], still[: 13 - first], atol=1e-12)
        assert first == 1 or np.all(np.abs(ours[13 - first] - still[13 - first]) > 1e-6)
    # one step of a table of two, from n_2 to n_1, with data 0: all that is left is what was stirred in
    pair, zeros = schedule.subsequence([0, 4, 9]), jnp.zeros((40_000, 1))
    for size in (1.0, 1.5):
        options = {"order": 1, "prediction_type": "x_0", "churn": 0.5, "churn_noise": size, "snapshots": 2}
        x_t = heun(lambda x, _: 0.0 * x, KEY, zeros, pair, **options).trajectory.x_t[1]
        stirred = size**2 * n[9] ** 2 * (1.25**2 - 1)  # to n_9 (1 + 0.5 / 2)
        assert_mean(np.square(x_t), float(pair(1).alpha) ** 2 * stirred * (n[4] / (1.25 * n[9])) ** 2)
    # and never above sqrt 2
    (_, level), *_ = _told(zeros[:2], pair, order=1, churn=100.0)
    assert_close(level.sigma / level.alpha, np.sqrt(2) * n[9], rtol=1e-6)


def test_errors():
    x_T, schedule = jnp.ones((2, 1)), discretize(LinearLogSNR(), 5)
    ask = inspect.unwrap(heun)
    with pytest.raises(ValueError, match="order is 3: choose 1, Euler's rule, or 2, Heun's"):
        ask(lambda x, _: x, KEY, x_T, schedule, order=3)
    for churn in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"churn is .*: it must be at least 0"):
            ask(lambda x, _: x, KEY, x_T, schedule, churn=churn)
