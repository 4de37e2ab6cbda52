"""RePaint: the known part is exact, and resampling reduces the bias of the unknown part, which is known."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_close, assert_mean, refuted
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize
from vdm_jax.samplers import ancestral, repaint
from vdm_jax.schedules import LinearLogSNR

KEY = jax.random.key(0)
COVARIANCE, KNOWN = np.array([[1.0, 0.8], [0.8, 1.0]]), 1.5  # of x_2 given x_1 = 1.5: N(1.2, 0.36)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _schedule(steps):
    return discretize(LinearLogSNR(10.0, -8.0), steps)


def _sample(count, steps, resamplings):
    best = closed_form.OptimalDenoiser(closed_form.gaussian([0.0, 0.0], COVARIANCE))
    x_T = jax.random.normal(jax.random.key(1), (count, 2))
    mask = jnp.broadcast_to(jnp.array([1.0, 0.0]), x_T.shape)
    return repaint(best, KEY, x_T, _schedule(steps), jnp.full_like(x_T, KNOWN), mask, resamplings=resamplings).x_0


def _moments(steps, resamplings):
    """Mean and variance of the unknown entry: every step is a linear map of a normal distribution, in y = x/alpha."""
    n = np.exp(-0.5 * np.asarray(_schedule(steps).log_snr))
    alpha_T = float(_schedule(steps)(steps).alpha)
    mean, cov = np.array([KNOWN, 0.0]), np.diag([n[-1] ** 2, 1 / alpha_T**2])
    for k, m in zip(n[::-1], n[-2::-1], strict=False):
        gain = COVARIANCE @ np.linalg.inv(COVARIANCE + k**2 * np.eye(2))
        move = (m / k) ** 2 * np.eye(2) + (1 - (m / k) ** 2) * gain
        for turn in range(resamplings):
            if turn:  # add noise back
                cov = cov + (k**2 - m**2) * np.eye(2)
            mean, cov = move @ mean, move @ cov @ move.T + m**2 * (1 - (m / k) ** 2) * np.eye(2)
            mean, cov = np.array([KNOWN, mean[1]]), np.diag([m**2, cov[1, 1]])  # the known part sampled independently
    return mean[1], cov[1, 1]


def _optimal_eps(x_t, level):
    """Of normal data with this covariance, by its eigenvectors."""
    values, vectors = np.linalg.eigh(COVARIANCE)
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    return (x_t @ vectors * (sigma / (alpha**2 * values[None] + sigma**2))) @ vectors.T


def test_a_few_steps_have_the_moments_of_the_recursion():
    schedule, x_T = _schedule(4), jnp.asarray(np.random.RandomState(1).normal(size=(20_000, 2)))
    known, mask = np.full((20_000, 2), KNOWN), np.tile([1.0, 0.0], (20_000, 1))
    samples = repaint(
        _optimal_eps, KEY, x_T, schedule, jnp.asarray(known), jnp.asarray(mask), resamplings=3, snapshots=4
    )
    mean, var = _moments(4, 3)
    np.testing.assert_array_equal(samples.x_0[:, 0], known[:, 0])
    assert_mean(samples.x_0[:, 1], mean, resolution=0.01)
    assert_mean(np.square(samples.x_0[:, 1] - mean), var, resolution=0.02)
    chain = jax.tree.map(np.asarray, samples.trajectory)
    noises = []
    for t, x_t in zip(chain.t, chain.x_t, strict=True):  # the known part of every level is a sample of q(x_t | x_0)
        noises.append((x_t[:, 0] - schedule.levels.alpha[t] * KNOWN) / schedule.levels.sigma[t])
        assert_mean(noises[-1], 0.0)
        assert_mean(np.square(noises[-1]), 1.0)
    assert_close(np.corrcoef(noises), np.eye(4), rtol=0.0, atol=0.04)
    np.testing.assert_array_equal(chain.x_hat[-1, :, 1], samples.x_0[:, 1])  # that of the last resampling


def test_an_empty_mask_leaves_ancestral_sampling_and_x_hat_is_clipped():
    x_T, schedule, options = jnp.asarray([[0.4, -2.0]]), _schedule(3), {"prediction_type": "x_0", "clip": 0.3}
    ours = repaint(lambda x, _: x, KEY, x_T, schedule, jnp.full((1, 2), 9.0), jnp.zeros((1, 2)), snapshots=3, **options)
    assert np.array_equal(ours.trajectory.x_t[0], x_T)
    assert_close(ours.trajectory.x_hat, np.clip(ours.trajectory.x_t, -0.3, 0.3))
    assert np.array_equal(ours.x_0, ours.trajectory.x_hat[-1])


@pytest.mark.slow
@pytest.mark.parametrize("resamplings", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_samples_have_the_moments_of_the_recursion(resamplings):
    x_0 = _sample(40_000, 12, resamplings)
    mean, var = _moments(12, resamplings)
    np.testing.assert_array_equal(x_0[:, 0], np.full(40_000, KNOWN))  # to the bit
    assert_mean(x_0[:, 1], mean, resolution=0.005)
    assert_mean(np.square(x_0[:, 1] - mean), var, resolution=0.01)
    with refuted():
        assert_mean(x_0[:, 1], 1.2)


@pytest.mark.slow
def test_resampling_reduces_the_bias_and_more_steps_do_not():
    # by the recursion, which the chain follows; the conditional distribution has mean 1.2 and variance 0.36
    bias = {(steps, count): _moments(steps, count)[0] - 1.2 for steps in (50, 200, 800) for count in (1, 4, 16, 64)}
    print("error of the mean, (steps, resamplings):", {k: round(float(b), 4) for k, b in bias.items()})
    for steps in (50, 200, 800):
        sizes = [abs(bias[steps, resamplings]) for resamplings in (1, 4, 16, 64)]
        assert np.all(np.diff(sizes) < 0)
        assert sizes[0] > 0.05
    assert abs(bias[50, 64]) < 0.02
    assert abs(bias[800, 1]) > 0.8 * abs(bias[50, 1])


@pytest.mark.slow
def test_an_empty_mask_is_ancestral_sampling_and_a_full_mask_returns_the_known_data():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    best, schedule = closed_form.OptimalDenoiser(distribution), _schedule(100)
    x_T, known = jax.random.normal(jax.random.key(2), (6_000, 2)), jnp.full((6_000, 2), 0.3)
    for resamplings in (1, 3):
        free = repaint(best, KEY, x_T, schedule, known, jnp.zeros_like(x_T), resamplings=resamplings).x_0
        assert_mean(free, distribution.mean, resolution=0.015)
        apart = np.asarray(free - distribution.mean[None])
        # as close as ancestral sampling with a hundred steps
        same = ancestral(best, KEY, x_T, schedule).x_0
        assert_close(np.cov(apart.T), np.cov(same.T), rtol=0.1, atol=0.02)
    np.testing.assert_array_equal(repaint(best, KEY, x_T, schedule, known, jnp.ones_like(x_T)).x_0, known)


@pytest.mark.slow
def test_one_evaluation_per_resampling_and_snapshots_contain_the_known_part():
    times, schedule = [], _schedule(5)

    def spy(x_t, level):
        jax.debug.callback(lambda t: times.append(int(t[0])), level.t)
        return 0.1 * x_t

    x_T = jnp.zeros((50_000, 2))
    known, mask = jnp.full_like(x_T, 2.0), jnp.zeros_like(x_T).at[:, 0].set(1.0)
    chain = repaint(spy, KEY, x_T, schedule, known, mask, resamplings=3, snapshots=5).trajectory
    jax.block_until_ready(chain)
    jax.effects_barrier()
    assert sorted(times) == sorted(3 * [0, 0.25, 0.5, 0.75, 1]) or sorted(times) == sorted(3 * [1, 2, 3, 4, 5])
    for t, x_t in zip(chain.t, chain.x_t, strict=True):
        level = schedule(t)
        assert_mean(x_t[:, 0], level.alpha * 2.0)
        assert_mean(np.square(x_t[:, 0] - level.alpha * 2.0), level.sigma**2)
    noises = np.asarray((chain.x_t[..., 0] - schedule(chain.t).alpha[:, None] * 2.0) / schedule(chain.t).sigma[:, None])
    assert_close(np.corrcoef(noises), np.eye(5), rtol=0.0, atol=0.02)  # independent at every level
    clipped = repaint(spy, KEY, x_T[:5], schedule, known[:5], mask[:5], clip=0.3, snapshots=5)
    assert np.max(np.abs(clipped.trajectory.x_hat)) <= 0.3
    np.testing.assert_array_equal(clipped.x_0[:, 0], np.full(5, 2.0))


def test_errors():
    x_T, schedule = jnp.zeros((3, 2)), _schedule(4)
    with pytest.raises(ValueError, match="resamplings must be at least 1, got 0"):
        repaint(lambda x, _: x, KEY, x_T, schedule, x_T, x_T, resamplings=0)
    for known, mask in ((x_T[:1], x_T), (x_T, x_T[:, :1])):
        with pytest.raises(ValueError, match="must have the same shape"):
            inspect.unwrap(repaint)(lambda x, _: x, KEY, x_T, schedule, known, mask)
    with pytest.raises(ValueError, match=r"snapshots must be in 0\.\.4.* got 5"):
        repaint(lambda x, _: x, KEY, x_T, schedule, x_T, x_T, snapshots=5)
