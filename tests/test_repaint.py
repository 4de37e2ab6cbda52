"""Inpainting by replacement: the known part kept, the bias without rounds known, and how rounds lessen it."""

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


def _table(steps):
    return discretize(LinearLogSNR(10.0, -8.0), steps)


def _draw(count, steps, rounds):
    best = closed_form.OptimalDenoiser(closed_form.gaussian([0.0, 0.0], COVARIANCE))
    x_T = jax.random.normal(jax.random.key(1), (count, 2))
    mask = jnp.broadcast_to(jnp.array([1.0, 0.0]), x_T.shape)
    return repaint(best, KEY, x_T, _table(steps), jnp.full_like(x_T, KNOWN), mask, rounds=rounds).x_0


def _law(steps, rounds):
    """Mean and variance of the unknown number, every step a linear map of a normal law, in y = x/alpha."""
    n = np.exp(-0.5 * np.asarray(_table(steps).log_snr))
    alpha_T = float(_table(steps)(steps).alpha)
    mean, cov = np.array([KNOWN, 0.0]), np.diag([n[-1] ** 2, 1 / alpha_T**2])
    for k, m in zip(n[::-1], n[-2::-1], strict=False):
        gain = COVARIANCE @ np.linalg.inv(COVARIANCE + k**2 * np.eye(2))
        move = (m / k) ** 2 * np.eye(2) + (1 - (m / k) ** 2) * gain
        for turn in range(rounds):
            if turn:  # back up
                cov = cov + (k**2 - m**2) * np.eye(2)
            mean, cov = move @ mean, move @ cov @ move.T + m**2 * (1 - (m / k) ** 2) * np.eye(2)
            mean, cov = np.array([KNOWN, mean[1]]), np.diag([m**2, cov[1, 1]])  # the known drawn anew, of nothing else
    return mean[1], cov[1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_law_it_has_is_the_recursion_s(rounds):
    x_0 = _draw(40_000, 12, rounds)
    mean, var = _law(12, rounds)
    np.testing.assert_array_equal(x_0[:, 0], np.full(40_000, KNOWN))  # to the bit
    assert_mean(x_0[:, 1], mean, resolution=0.005)
    assert_mean(np.square(x_0[:, 1] - mean), var, resolution=0.01)
    with refuted():
        assert_mean(x_0[:, 1], 1.2)


@pytest.mark.slow
def test_rounds_lessen_the_bias_and_steps_do_not():
    # by the recursion, which the chain obeys; the truth is the conditional law's 1.2 and 0.36
    bias = {(steps, rounds): _law(steps, rounds)[0] - 1.2 for steps in (50, 200, 800) for rounds in (1, 4, 16, 64)}
    print("mean of the unknown less the truth, (steps, rounds):", {k: round(float(b), 4) for k, b in bias.items()})
    for steps in (50, 200, 800):
        sizes = [abs(bias[steps, rounds]) for rounds in (1, 4, 16, 64)]
        assert np.all(np.diff(sizes) < 0)
        assert sizes[0] > 0.05
    assert abs(bias[50, 64]) < 0.02
    assert abs(bias[800, 1]) > 0.8 * abs(bias[50, 1])


@pytest.mark.slow
def test_nothing_known_is_the_ancestral_chain_and_all_known_comes_back():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    best, schedule = closed_form.OptimalDenoiser(distribution), _table(100)
    x_T, known = jax.random.normal(jax.random.key(2), (6_000, 2)), jnp.full((6_000, 2), 0.3)
    for rounds in (1, 3):
        free = repaint(best, KEY, x_T, schedule, known, jnp.zeros_like(x_T), rounds=rounds).x_0
        assert_mean(free, distribution.mean, resolution=0.015)
        apart = np.asarray(free - distribution.mean[None])
        # as near as an ancestral chain of a hundred steps is
        same = ancestral(best, KEY, x_T, schedule).x_0
        assert_close(np.cov(apart.T), np.cov(same.T), rtol=0.1, atol=0.02)
    np.testing.assert_array_equal(repaint(best, KEY, x_T, schedule, known, jnp.ones_like(x_T)).x_0, known)


@pytest.mark.slow
def test_it_asks_once_a_round_and_its_snapshots_hold_the_known_part():
    told, schedule = [], _table(5)

    def spy(x_t, level):
        jax.debug.callback(lambda t: told.append(int(t[0])), level.t)
        return 0.1 * x_t

    x_T = jnp.zeros((50_000, 2))
    known, mask = jnp.full_like(x_T, 2.0), jnp.zeros_like(x_T).at[:, 0].set(1.0)
    chain = repaint(spy, KEY, x_T, schedule, known, mask, rounds=3, snapshots=5).trajectory
    jax.block_until_ready(chain)
    jax.effects_barrier()
    assert sorted(told) == sorted(3 * [0, 0.25, 0.5, 0.75, 1]) or sorted(told) == sorted(3 * [1, 2, 3, 4, 5])
    for t, x_t in zip(chain.t, chain.x_t, strict=True):
        level = schedule(t)
        assert_mean(x_t[:, 0], level.alpha * 2.0)
        assert_mean(np.square(x_t[:, 0] - level.alpha * 2.0), level.sigma**2)
    noises = np.asarray((chain.x_t[..., 0] - schedule(chain.t).alpha[:, None] * 2.0) / schedule(chain.t).sigma[:, None])
    assert_close(np.corrcoef(noises), np.eye(5), rtol=0.0, atol=0.02)  # drawn anew at every level
    clipped = repaint(spy, KEY, x_T[:5], schedule, known[:5], mask[:5], clip=0.3, snapshots=5)
    assert np.max(np.abs(clipped.trajectory.x_hat)) <= 0.3
    np.testing.assert_array_equal(clipped.x_0[:, 0], np.full(5, 2.0))


def test_errors():
    x_T, schedule = jnp.zeros((3, 2)), _table(4)
    with pytest.raises(ValueError, match="rounds is 0: every step is taken at least once"):
        repaint(lambda x, _: x, KEY, x_T, schedule, x_T, x_T, rounds=0)
    for known, mask in ((x_T[:1], x_T), (x_T, x_T[:, :1])):
        with pytest.raises(ValueError, match="must be of one shape"):
            inspect.unwrap(repaint)(lambda x, _: x, KEY, x_T, schedule, known, mask)
    with pytest.raises(ValueError, match="snapshots is 5: this chain has 4 states to return"):
        repaint(lambda x, _: x, KEY, x_T, schedule, x_T, x_T, snapshots=5)
