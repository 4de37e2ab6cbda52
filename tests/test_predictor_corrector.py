"""Predictor-corrector: what the corrector mends, and what a step of finite size costs.

Its variance for normal data, its questions and its law are in `test_samplers.py`, with those of the other samplers.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_mean, refuted
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize
from vdm_jax.samplers import ancestral, predictor_corrector
from vdm_jax.schedules import LinearLogSNR

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _variance(steps, corrections, ratio, var=0.3):
    """Of x_0 of normal data: at every level the step down, then Langevin steps, by hand in y = x / alpha."""
    n = np.exp(-0.5 * np.asarray(discretize(LinearLogSNR(10.0, -6.0), steps).log_snr))
    v = var + n[-1] ** 2
    for k, m in zip(n[:0:-1], n[-2::-1], strict=True):
        r = (m / k) ** 2
        v = (r + (1 - r) * var / (var + k**2)) ** 2 * v + m**2 * (1 - r)
        for _ in range(corrections if m > 0 else 0):
            eta = 2 * (ratio * m) ** 2
            v = (1 - eta / (var + m**2)) ** 2 * v + 2 * eta
    return v


@pytest.mark.slow
def test_a_corrector_mends_a_long_step():
    # twelve levels are few: the ancestral chain's variance is well below the data's, and Langevin steps bring it up
    var, schedule = 0.3, discretize(LinearLogSNR(10.0, -6.0), 12)
    best = closed_form.OptimalDenoiser(closed_form.gaussian([0.0], [[var]]))
    x_T = jnp.sqrt(schedule(12).alpha ** 2 * var + schedule(12).sigma ** 2) * jax.random.normal(KEY, (50_000, 1))
    bare = _variance(12, 0, 0.0)
    assert_mean(ancestral(best, KEY, x_T, schedule).x_0 ** 2, bare, resolution=0.003)
    mended = [_variance(12, corrections, 0.4) for corrections in (1, 4)]
    print(f"variance {var} of normal data by 12 steps: ancestral {bare:.4f}, 1 and 4 corrections {np.round(mended, 4)}")
    assert abs(mended[1] - var) < abs(mended[0] - var) < abs(bare - var)
    ours = predictor_corrector(best, KEY, x_T, schedule, ratio=0.4, corrections=4).x_0
    assert_mean(ours**2, mended[1], resolution=0.003)
    with refuted():
        assert_mean(ours**2, bare)


@pytest.mark.slow
def test_the_corrector_s_noise_is_not_the_predictor_s():
    # asked of data 0, the state at level s is the sum of both noises, each with its own variance
    schedule = discretize(LinearLogSNR(4.0, -4.0), 3)
    options = {"prediction_type": "x_0", "snapshots": 3, "ratio": 0.5}
    chain = predictor_corrector(lambda x, _: 0.0 * x, KEY, jnp.zeros((60_000, 1)), schedule, **options).trajectory
    ratio = float((schedule(2).sigma / schedule(2).alpha * schedule(3).alpha / schedule(3).sigma) ** 2)
    sigma, eta = float(schedule(2).sigma), 2 * (0.5 * float(schedule(2).sigma)) ** 2
    truth = (1 - eta / sigma**2) ** 2 * sigma**2 * (1 - ratio) + 2 * eta
    assert_mean(chain.x_t[1] ** 2, truth)
    assert_mean(chain.x_t[1] * chain.x_t[2], truth * float(_kept(schedule)))


def _kept(schedule):
    """How much of the state at level 2 is left at level 1."""
    ratio = (schedule(1).sigma / schedule(1).alpha * schedule(2).alpha / schedule(2).sigma) ** 2
    return schedule(1).alpha / schedule(2).alpha * ratio * (1 - 2 * 0.5**2)


def test_errors():
    ask, x_T, schedule = inspect.unwrap(predictor_corrector), jnp.ones((2, 1)), discretize(LinearLogSNR(), 5)
    for ratio in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"ratio is .*: it must be positive"):
            ask(lambda x, _: x, KEY, x_T, schedule, ratio=ratio)
    with pytest.raises(ValueError, match="corrections is 0: at least one, or take `ancestral`"):
        ask(lambda x, _: x, KEY, x_T, schedule, corrections=0)
