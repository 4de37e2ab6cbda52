"""Predictor-corrector sampling: how much the corrector improves long steps.

`test_samplers.py` checks its variance for normal data, its evaluations and its distribution, as for all samplers.
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


def _variance(steps, corrector_steps, snr, var=0.3):
    """The variance of x_0 for normal data: predictor and Langevin steps by hand, in y = x / alpha."""
    n = np.exp(-0.5 * np.asarray(discretize(LinearLogSNR(10.0, -6.0), steps).log_snr))
    v = var + n[-1] ** 2
    for k, m in zip(n[:0:-1], n[-2::-1], strict=True):
        r = (m / k) ** 2
        v = (r + (1 - r) * var / (var + k**2)) ** 2 * v + m**2 * (1 - r)
        for _ in range(corrector_steps if m > 0 else 0):
            eta = 2 * (snr * m) ** 2
            v = (1 - eta / (var + m**2)) ** 2 * v + 2 * eta
    return v


@pytest.mark.slow
def test_the_corrector_improves_long_steps():
    # with twelve steps the variance of ancestral samples is well below that of the data, and Langevin steps increase it
    var, schedule = 0.3, discretize(LinearLogSNR(10.0, -6.0), 12)
    best = closed_form.OptimalDenoiser(closed_form.gaussian([0.0], [[var]]))
    x_T = jnp.sqrt(schedule(12).alpha ** 2 * var + schedule(12).sigma ** 2) * jax.random.normal(KEY, (50_000, 1))
    bare = _variance(12, 0, 0.0)
    assert_mean(ancestral(best, KEY, x_T, schedule).x_0 ** 2, bare, resolution=0.003)
    corrected = [_variance(12, count, 0.4) for count in (1, 4)]
    print(
        f"variance {var} of normal data 12 steps: ancestral {bare:.4f}, 1, 4 corrector steps {np.round(corrected, 4)}"
    )
    assert abs(corrected[1] - var) < abs(corrected[0] - var) < abs(bare - var)
    ours = predictor_corrector(best, KEY, x_T, schedule, snr=0.4, corrector_steps=4).x_0
    assert_mean(ours**2, corrected[1], resolution=0.003)
    with refuted():
        assert_mean(ours**2, bare)


def test_corrector_and_predictor_noise_are_independent():
    # for data 0 the state at level s is the sum of both noises, each with its own variance
    schedule = discretize(LinearLogSNR(4.0, -4.0), 3)
    options = {"prediction_type": "x_0", "snapshots": 3, "snr": 0.5}
    chain = predictor_corrector(lambda x, _: 0.0 * x, KEY, jnp.zeros((30_000, 1)), schedule, **options).trajectory
    n = np.asarray(schedule.levels.sigma / schedule.levels.alpha)
    ratio, sigma = (n[2] / n[3]) ** 2, float(schedule.levels.sigma[2])
    eta = 2 * (0.5 * sigma) ** 2
    expected = (1 - eta / sigma**2) ** 2 * sigma**2 * (1 - ratio) + 2 * eta
    assert_mean(chain.x_t[1] ** 2, expected)
    alpha = np.asarray(schedule.levels.alpha)
    kept = alpha[1] / alpha[2] * (n[1] / n[2]) ** 2 * (1 - 2 * 0.5**2)  # of the state at level 2 in that at level 1
    assert_mean(chain.x_t[1] * chain.x_t[2], expected * kept)


def test_errors():
    sampler, x_T, schedule = inspect.unwrap(predictor_corrector), jnp.ones((2, 1)), discretize(LinearLogSNR(), 5)
    for snr in (0.0, -1.0, float("nan")):
        for each in (sampler, predictor_corrector):  # the latter checks before it compiles
            with pytest.raises(ValueError, match=r"snr .*positive"):
                each(lambda x, _: x, KEY, x_T, schedule, snr=snr)
    with pytest.raises(ValueError, match=r"corrector_steps must be at least 1, got 0.*`ancestral`"):
        sampler(lambda x, _: x, KEY, x_T, schedule, corrector_steps=0)
