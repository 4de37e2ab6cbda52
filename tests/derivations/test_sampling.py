"""SAM: in worlds with exact denoisers the training minimum and the sampler's law are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.worlds import GaussianWorld, PointWorld, assert_mean, assert_moments, denoiser
from vdm_jax import losses
from vdm_jax.samplers import ancestral
from vdm_jax.tables import even_steps, linear_betas

WORLD = GaussianWorld(0.7, 0.25)


def _table(num_steps):
    return linear_betas(num_steps, 0.1 / num_steps, min(20 / num_steps, 0.9))


def _abar(num_steps):
    return np.concatenate([[1.0], np.cumprod(1 - np.linspace(0.1 / num_steps, min(20 / num_steps, 0.9), num_steps))])


def _chain_law(abar, world, upper):
    """Mean and variance of x_0: x_T ~ N(0, 1) through the linear-Gaussian chain, float64, in Ho et al.'s symbols."""
    mean, var = 0.0, 1.0
    for t in range(len(abar) - 1, 0, -1):
        before, after = abar[t - 1], abar[t]
        beta = 1 - after / before
        gain = np.sqrt(after) * world.var / (after * world.var + 1 - after)  # of E[x_0 | x_t] on x_t
        to_x_0 = np.sqrt(before) * beta / (1 - after)
        scale = np.sqrt(1 - beta) * (1 - before) / (1 - after) + to_x_0 * gain
        noise = 0.0 if t == 1 else beta if upper else beta * (1 - before) / (1 - after)
        mean = scale * mean + to_x_0 * (1 - gain * np.sqrt(after)) * world.mean
        var = scale**2 * var + noise
    return mean, var


def test_SAM_1_training_draws_pairs_of_the_forward_process():
    # A denoiser that answers 0 has loss ||eps||^2; one that answers x_t, ||eps - x_t||^2: both known at every t.
    table, x_0 = _table(5), jnp.full((200_000, 1), 1.3)
    zero = losses.denoising_loss(lambda x, _: jnp.zeros_like(x), jax.random.key(0), x_0, table)
    assert_mean(zero.squared_error, 1.0)
    same = losses.denoising_loss(lambda x, _: x, jax.random.key(0), x_0, table)
    for t in range(1, 6):
        abar = _abar(5)[t]
        # eps (1 - sigma) - alpha x_0
        truth = (1 - np.sqrt(1 - abar)) ** 2 + abar * 1.3**2
        assert_mean(np.asarray(same.squared_error)[np.asarray(same.t) == t], truth)


def test_SAM_1_descent_finds_the_conditional_expectation():
    # Linear regression of eps on x_t at T = 1, by the loss's own gradient: the slope tends to Cov(eps, x_t) / Var(x_t).
    table, world = linear_betas(1, 0.5, 0.5), GaussianWorld(0.0, 0.25)

    def loss(w, key):
        scaled = jax.tree_util.Partial(lambda w, x, _: w * x, w)
        key_x, key_loss = jax.random.split(key)
        return losses.simple_loss(scaled, key_loss, world.sample(key_x, (1000, 1)), table).mean()

    def descend(w, key):
        w = w - 0.5 * jax.grad(loss)(w, key)
        return w, w

    _, path = jax.lax.scan(descend, jnp.asarray(0.0), jax.random.split(jax.random.key(0), 200))
    truth = np.sqrt(0.5) / (0.5 * 0.25 + 0.5)
    assert float(path[50:].mean()) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("variance", ["lower", "upper"])
def test_SAM_2_law_of_the_chain(variance):
    for num_steps, table, abar in [
        (4, _table(4), _abar(4)),
        (30, _table(30), _abar(30)),
        (6, _table(60).strided(even_steps(60, 6)), _abar(60)[::10]),
    ]:
        assert table.num_steps == num_steps
        x_T = jax.random.normal(jax.random.key(1), (100_000, 1))
        x_0 = ancestral(denoiser(WORLD), jax.random.key(2), x_T, table, variance=variance).x_0
        assert_moments(x_0, *_chain_law(abar, WORLD, variance == "upper"))


def test_SAM_2_sensitivity_to_x_T_is_exact():
    # the chain is affine in x_T: its slope is the product of the steps' gains, without any sampling error
    with jax.enable_x64(True):
        table, abar = _table(30), _abar(30)

        def end(x_T):
            return ancestral(denoiser(WORLD), jax.random.key(0), x_T[None, None], table).x_0[0, 0]

        slope, other = jax.grad(end)(jnp.asarray(0.3)), jax.grad(end)(jnp.asarray(-5.0))
        gains = []
        for t in range(30, 0, -1):
            beta = 1 - abar[t] / abar[t - 1]
            # a unit of x_t moves E[x_0|x_t] by cov / var, and x_{t-1} by Ho et al.'s two coefficients
            x_hat = np.sqrt(abar[t]) * 0.25 / (0.25 * abar[t] + 1 - abar[t])
            both = np.sqrt(1 - beta) * (1 - abar[t - 1]) + np.sqrt(abar[t - 1]) * beta * x_hat
            gains.append(both / (1 - abar[t]))
        assert float(slope) == pytest.approx(np.prod(gains), rel=1e-9)
        assert float(other) == pytest.approx(np.prod(gains), rel=1e-9)


def test_SAM_2_law_tends_to_the_data():
    laws = np.array([_chain_law(_abar(n), WORLD, False) for n in (30, 100, 300, 1000, 3000)])
    errors = np.abs(laws - [WORLD.mean, WORLD.var])[:, 1]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < errors[0] / 50
    # and the sampler is at that law, thus at the data to its error bar
    x_0 = ancestral(
        denoiser(WORLD), jax.random.key(5), jax.random.normal(jax.random.key(6), (20_000, 1)), _table(1000)
    ).x_0
    assert_moments(x_0, *laws[3])
    assert_mean(x_0, WORLD.mean)


@pytest.mark.parametrize("kind", ["x_0", "v", "score"])
def test_SAM_2_law_in_every_kind(kind):
    x_T = jax.random.normal(jax.random.key(7), (50_000, 1))
    x_0 = ancestral(denoiser(WORLD, kind), jax.random.key(8), x_T, _table(5), kind=kind).x_0
    assert_moments(x_0, *_chain_law(_abar(5), WORLD, False))


def test_SAM_2_upper_variance_is_exact_for_standard_normal_data():
    # each state but x_0 (whose step has no noise) is N(0, 1); lower variance is too narrow
    world, x_T = GaussianWorld(0.0, 1.0), jax.random.normal(jax.random.key(0), (100_000, 1))
    chain = ancestral(denoiser(world), jax.random.key(1), x_T, _table(4), variance="upper", snapshots=4).trajectory
    assert_moments(chain.x_t[-1], 0.0, 1.0)
    low = ancestral(denoiser(world), jax.random.key(1), x_T, _table(4), variance="lower", snapshots=4).trajectory
    assert np.var(low.x_t[-1]) < 0.9


def test_SAM_2_lower_variance_is_exact_for_one_point():
    # x_t of the chain has the forward marginal N(alpha_t c, sigma_t^2), if it begins there; x_0 is the point
    point, table = PointWorld(jnp.asarray([[0.6]]), jnp.asarray([1.0])), _table(5)
    x_T = table(5).alpha * 0.6 + table(5).sigma * jax.random.normal(jax.random.key(0), (100_000, 1))
    samples = ancestral(denoiser(point), jax.random.key(1), x_T, table, variance="lower", snapshots=5)
    for t, x_t in zip(samples.trajectory.t, samples.trajectory.x_t, strict=True):
        level = table(int(t))
        assert_moments(x_t, level.alpha * 0.6, level.sigma**2)
    np.testing.assert_allclose(samples.x_0, 0.6, rtol=1e-4)
    wide = ancestral(denoiser(point), jax.random.key(1), x_T, table, variance="upper", snapshots=5).trajectory
    assert np.var(wide.x_t[-1]) > 1.1 * float(table(1).sigma) ** 2


def test_SAM_2_finite_data_come_back_with_their_weights():
    world = PointWorld(jnp.asarray([[-1.0], [0.0], [1.0]]), jnp.asarray([0.6, 0.1, 0.3]))
    x_T = jax.random.normal(jax.random.key(3), (20_000, 1))
    x_0 = ancestral(denoiser(world), jax.random.key(4), x_T, _table(400), snapshots=1).x_0
    nearest = np.round(np.asarray(x_0))
    assert np.mean(np.abs(x_0 - nearest) < 0.05) > 0.99
    counts = np.array([(nearest == v).mean() for v in (-1, 0, 1)])
    np.testing.assert_allclose(counts, world.weights, atol=0.02)


def test_erratum_algorithms_need_the_cumulative_product():
    # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; printed with alpha_t = 1 - beta_t of one step. From t = 2 on the
    # printed pair is no draw of the chain: what the loss shows its denoiser tells, here by ||eps + x_t||^2.
    abar, one_step, t = _abar(5), 1 - np.linspace(0.02, 0.9, 5), 3
    loss = losses.denoising_loss(lambda x, _: -x, jax.random.key(0), jnp.full((100_000, 1), 10.0), _table(5))
    seen = np.asarray(loss.squared_error, np.float64)[np.asarray(loss.t) == t]

    def truth(signal):
        return (1 + np.sqrt(1 - signal)) ** 2 + signal * 10.0**2

    assert_mean(seen, truth(abar[t]))
    with pytest.raises(AssertionError):
        assert_mean(seen, truth(one_step[t - 1]))


def test_erratum_reverse_step_goes_to_the_next_state():
    # p(x_{t-1} | x_t), not the printed p(x_t | x_t): the level of the state falls by one with each step
    point, table = PointWorld(jnp.asarray([[0.6]]), jnp.asarray([1.0])), _table(5)
    x_T = table(5).alpha * 0.6 + table(5).sigma * jax.random.normal(jax.random.key(0), (50_000, 1))
    chain = ancestral(denoiser(point), jax.random.key(1), x_T, table, snapshots=5).trajectory
    assert_moments(chain.x_t[1], table(4).alpha * 0.6, table(4).sigma ** 2)
    with pytest.raises(AssertionError):
        assert_moments(chain.x_t[1], table(5).alpha * 0.6, table(5).sigma ** 2)
