"""SAM: with exact denoisers the training minimum and the sampler's distribution are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from scipy import integrate, stats

from tests.derivations.algebra import R
from tests.derivations.check import assert_close, assert_mean, assert_moments, assert_proved, refuted
from tests.derivations.worlds import GaussianWorld, denoiser, draws
from vdm_jax import closed_form, forward, information, losses
from vdm_jax.discrete_schedules import discretize, linear_betas, uniform_steps
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.samplers import ancestral
from vdm_jax.schedules import LinearLogSNR

DATA = GaussianWorld(0.7, 0.25)


def _schedule(num_steps):
    return linear_betas(num_steps, 0.1 / num_steps, min(20 / num_steps, 0.9))


def _abar(num_steps):
    return np.concatenate([[1.0], np.cumprod(1 - np.linspace(0.1 / num_steps, min(20 / num_steps, 0.9), num_steps))])


def _chain_moments(abar, data, upper):
    """Mean and variance of x_0: x_T ~ N(0, 1) through the linear-Gaussian chain, float64, in Ho et al.'s symbols."""
    mean, var = 0.0, 1.0
    for t in range(len(abar) - 1, 0, -1):
        before, after = abar[t - 1], abar[t]
        beta = 1 - after / before
        gain = np.sqrt(after) * data.var / (after * data.var + 1 - after)  # of E[x_0 | x_t] on x_t
        to_x_0 = np.sqrt(before) * beta / (1 - after)
        scale = np.sqrt(1 - beta) * (1 - before) / (1 - after) + to_x_0 * gain
        noise = 0.0 if t == 1 else beta if upper else beta * (1 - before) / (1 - after)
        mean = scale * mean + to_x_0 * (1 - gain * np.sqrt(after)) * data.mean
        var = scale**2 * var + noise
    return mean, var


def test_SAM_1_training_samples_pairs_of_the_forward_process():
    # A denoiser that returns 0 has loss ||eps||^2; one that returns x_t, ||eps - x_t||^2: both known at every t.
    schedule, x_0 = _schedule(5), jnp.full((200_000, 1), 1.3)
    zero = losses.denoising_loss(lambda x, _: jnp.zeros_like(x), jax.random.key(0), x_0, schedule)
    assert_mean(zero.squared_error, 1.0)
    same = losses.denoising_loss(lambda x, _: x, jax.random.key(0), x_0, schedule)
    for t in range(1, 6):
        abar = _abar(5)[t]
        # eps (1 - sigma) - alpha x_0
        truth = (1 - np.sqrt(1 - abar)) ** 2 + abar * 1.3**2
        assert_mean(np.asarray(same.squared_error)[np.asarray(same.t) == t], truth)


def _best_slope():
    """The w of least E (eps - w x_t)^2, in symbols."""
    w, alpha, sigma, v = sp.symbols("w alpha sigma v", positive=True)
    mean_square = (1 - w * sigma) ** 2 + (w * alpha) ** 2 * v  # of eps (1 - w sigma) - w alpha x_0
    (optimum,) = sp.solve(sp.diff(mean_square, w), w)
    return optimum, alpha, sigma, v


def test_SAM_1_the_optimum_is_the_conditional_expectation():
    # Regression of eps on x_t = alpha x_0 + sigma eps, x_0 ~ N(0, v): E (eps - w x_t)^2 is least at Cov / Var, where
    # w x_t is E[eps | x_t].
    optimum, alpha, sigma, v = _best_slope()
    assert_proved(optimum, sigma / (alpha**2 * v + sigma**2))


@pytest.mark.slow
def test_SAM_1_descent_finds_the_conditional_expectation():
    # the gradient of the loss, at T = 1: it vanishes there, and gradient descent converges there
    schedule, data = linear_betas(1, 0.5, 0.5), GaussianWorld(0.0, 0.25)
    optimum, alpha, sigma, v = _best_slope()
    truth = float(optimum.subs({alpha: sp.sqrt(R(1, 2)), sigma: sp.sqrt(R(1, 2)), v: R(1, 4)}))

    def loss(w, key):
        scaled = jax.tree_util.Partial(lambda w, x, _: w * x, w)
        key_x, key_loss = jax.random.split(key)
        return losses.simple_loss(scaled, key_loss, data.sample(key_x, (1000, 1)), schedule).mean()

    def descend(w, key):
        w = w - 0.5 * jax.grad(loss)(w, key)
        return w, w

    keys = jax.random.split(jax.random.key(0), 200)
    assert_mean(jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(truth, jnp.float32), keys), 0.0, resolution=0.01)
    _, path = jax.lax.scan(descend, jnp.asarray(0.0), keys)
    np.testing.assert_allclose(path[50:].mean(), truth, rtol=0.02)


@pytest.mark.parametrize("variance", [pytest.param("fixed_small", marks=pytest.mark.slow), "fixed_large"])
def test_SAM_2_distribution_of_the_chain(variance):
    for num_steps, schedule, abar in [
        (4, _schedule(4), _abar(4)),
        (30, _schedule(30), _abar(30)),
        (6, _schedule(60).subsequence(uniform_steps(60, 6)), _abar(60)[::10]),
    ]:
        assert schedule.num_steps == num_steps
        x_T = jax.random.normal(jax.random.key(1), (100_000, 1))
        x_0 = ancestral(denoiser(DATA), jax.random.key(2), x_T, schedule, variance=variance).x_0
        assert_moments(x_0, *_chain_moments(abar, DATA, variance == "fixed_large"))


def test_SAM_2_sensitivity_to_x_T_is_exact():
    # the chain is affine in x_T: its derivative is the product of the steps' gains, without sampling error
    with jax.enable_x64(True):
        schedule, abar = _schedule(30), _abar(30)

        def end(x_T):
            return ancestral(denoiser(DATA), jax.random.key(0), x_T[None, None], schedule).x_0[0, 0]

        slope, other = jax.grad(end)(jnp.asarray(0.3)), jax.grad(end)(jnp.asarray(-5.0))
        gains = []
        for t in range(30, 0, -1):
            beta = 1 - abar[t] / abar[t - 1]
            # a unit of x_t moves E[x_0|x_t] by cov / var, and x_{t-1} by Ho et al.'s two coefficients
            x_hat = np.sqrt(abar[t]) * 0.25 / (0.25 * abar[t] + 1 - abar[t])
            both = np.sqrt(1 - beta) * (1 - abar[t - 1]) + np.sqrt(abar[t - 1]) * beta * x_hat
            gains.append(both / (1 - abar[t]))
        assert_close(slope, np.prod(gains), rtol=1e-9)
        assert_close(other, np.prod(gains), rtol=1e-9)


@pytest.mark.slow
def test_SAM_2_distribution_tends_to_the_data():
    moments = np.array([_chain_moments(_abar(n), DATA, False) for n in (30, 100, 300, 1000, 3000)])
    errors = np.abs(moments - [DATA.mean, DATA.var])[:, 1]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < errors[0] / 50
    # and the sampler has that distribution, thus that of the data within its error bar
    x_0 = ancestral(
        denoiser(DATA), jax.random.key(5), jax.random.normal(jax.random.key(6), (20_000, 1)), _schedule(1000)
    ).x_0
    assert_moments(x_0, *moments[3])
    assert_mean(x_0, DATA.mean)


@pytest.mark.parametrize("prediction_type", ["v", *(pytest.param(t, marks=pytest.mark.slow) for t in ("x_0", "score"))])
def test_SAM_2_distribution_for_every_prediction_type(prediction_type):
    x_T = jax.random.normal(jax.random.key(7), (50_000, 1))
    x_0 = ancestral(
        denoiser(DATA, prediction_type), jax.random.key(8), x_T, _schedule(5), prediction_type=prediction_type
    ).x_0
    assert_moments(x_0, *_chain_moments(_abar(5), DATA, False))


@pytest.mark.slow
def test_SAM_2_fixed_large_variance_is_exact_for_standard_normal_data():
    # each state but x_0 (whose step has no noise) is N(0, 1); "fixed_small" is too narrow
    data, x_T = GaussianWorld(0.0, 1.0), jax.random.normal(jax.random.key(0), (100_000, 1))
    chain = ancestral(
        denoiser(data), jax.random.key(1), x_T, _schedule(4), variance="fixed_large", snapshots=4
    ).trajectory
    assert_moments(chain.x_t[-1], 0.0, 1.0)
    low = ancestral(
        denoiser(data), jax.random.key(1), x_T, _schedule(4), variance="fixed_small", snapshots=4
    ).trajectory
    assert np.var(low.x_t[-1]) < 0.9


@pytest.mark.slow
def test_SAM_2_fixed_small_variance_is_exact_for_one_point():
    # x_t of the chain has the forward marginal N(alpha_t c, sigma_t^2), if it starts there; x_0 is the point
    point, schedule = closed_form.empirical([[0.6]]), _schedule(5)
    x_T = schedule(5).alpha * 0.6 + schedule(5).sigma * jax.random.normal(jax.random.key(0), (100_000, 1))
    samples = ancestral(denoiser(point), jax.random.key(1), x_T, schedule, variance="fixed_small", snapshots=5)
    for t, x_t in zip(samples.trajectory.t, samples.trajectory.x_t, strict=True):
        level = schedule(int(t))
        assert_moments(x_t, level.alpha * 0.6, level.sigma**2)
    assert_close(samples.x_0, 0.6, rtol=1e-4)
    wide = ancestral(denoiser(point), jax.random.key(1), x_T, schedule, variance="fixed_large", snapshots=5).trajectory
    assert np.var(wide.x_t[-1]) > 1.1 * float(schedule(1).sigma) ** 2


@pytest.mark.slow
def test_SAM_2_finite_data_are_sampled_with_their_weights():
    data = closed_form.empirical([[-1.0], [0.0], [1.0]], [0.6, 0.1, 0.3])
    x_T = jax.random.normal(jax.random.key(3), (20_000, 1))
    x_0 = ancestral(denoiser(data), jax.random.key(4), x_T, _schedule(400), snapshots=1).x_0
    nearest = np.round(np.asarray(x_0))
    assert np.mean(np.abs(x_0 - nearest) < 0.05) > 0.99
    assert_mean(nearest == np.array([-1.0, 0.0, 1.0]), [0.6, 0.1, 0.3], resolution=0.004)


# SAM-3: four points in two pairs; the pair is the coarse feature, the point within the pair the fine one
FAMILY = np.array([[-1.1], [-0.9], [0.9], [1.1]])


def _decided(distribution, x_t, level):
    """Probability that two samples of x_0 given x_t agree on the pair, and that they agree on the point within it."""
    shares = jnp.exp(distribution.posterior(x_t, level).log_weights).reshape(2, 2)
    pair, place = shares.sum(1), shares.sum(0)
    return jnp.sum(pair**2), jnp.sum(place**2)


def _chances(distribution, level):
    """Both, over all x_t."""
    noisy = closed_form.marginal(distribution, level)
    return jnp.stack(
        [information.quadrature(lambda x, i=i: _decided(distribution, x, level)[i], noisy).value for i in (0, 1)]
    )


@pytest.mark.slow
def test_SAM_3_coarse_before_fine():
    # A feature of size d is undecided until the noise falls to d: exactly, the probability that x_t has decided it
    with jax.enable_x64(True):
        distribution = closed_form.empirical(FAMILY)
        log_snr = jnp.linspace(-6.0, 8.0, 29)
        chances = jax.jit(jax.vmap(lambda lam: _chances(distribution, level_from_log_snr(lam))))(log_snr)
        coarse, fine = np.asarray(chances).T
    assert np.all(coarse >= fine - 1e-12)
    crossing = [np.interp(0.9, chance, log_snr) for chance in (coarse, fine)]
    # scales 1 and 0.1: the log-SNRs at which they are decided lie 2 log 10 apart
    assert crossing[1] - crossing[0] == pytest.approx(2 * np.log(10), rel=0.05)


def test_SAM_3_a_tenth_of_the_size_is_decided_two_log_ten_later():
    # x_0 = +-d: only d alpha / sigma matters, so the curve of a smaller feature is the same, shifted
    def decided(size, lam):
        distribution, level = closed_form.empirical([[-size], [size]]), level_from_log_snr(lam)
        chance = lambda x: jnp.sum(jnp.exp(2 * distribution.posterior(x, level).log_weights))  # noqa: E731
        return information.quadrature(chance, closed_form.marginal(distribution, level)).value

    with jax.enable_x64(True):
        lam = jnp.asarray([-3.0, 0.0, 2.0])
        small, large = jax.jit(
            lambda: [jax.vmap(lambda x, d=d: decided(d, x))(lam - 2 * np.log(d)) for d in (0.1, 1.0)]
        )()
        assert_close(small, large, rtol=1e-9)


@pytest.mark.slow
def test_SAM_3_the_sampler_decides_when_the_reverse_process_does():
    # along sampled chains: how far x_t determines the pair, and the place within it, of its x_0
    distribution, schedule = closed_form.empirical(FAMILY), discretize(LinearLogSNR(9.0, -9.0), 600)
    x_T = jax.random.normal(jax.random.key(0), (8000, 1))
    chain = ancestral(
        closed_form.OptimalDenoiser(distribution), jax.random.key(1), x_T, schedule, snapshots=13
    ).trajectory
    chances = jax.jit(lambda level: _chances(distribution, level))
    for t, x_t in zip(chain.t[1:-1], chain.x_t[1:-1], strict=True):
        level = schedule(t)
        ours = jax.vmap(lambda x, lv=level: jnp.stack(_decided(distribution, x, lv)))(x_t)
        truth = chances(level)
        # the chain's own error at T = 600, and the rounding of probabilities near 1, are below this
        error = np.std(ours, axis=0) / np.sqrt(len(ours)) + 2e-3
        assert np.all(np.abs(np.mean(ours, axis=0) - truth) < 4 * error), (t, np.mean(ours, 0), truth)


# SAM-4: the distribution of the sampler with the exact denoiser, against the data's


def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])


def _distance(samples):
    """Wasserstein-1 between samples and the mixture: the area between their distribution functions."""
    grid = np.linspace(-2.5, 2.0, 20_001)
    truth = 0.3 * stats.norm(-1.0, 0.05**0.5).cdf(grid) + 0.7 * stats.norm(0.8, 0.02**0.5).cdf(grid)
    ours = np.searchsorted(np.sort(np.asarray(samples).ravel()), grid, side="right") / len(samples)
    return integrate.trapezoid(np.abs(ours - truth), grid)


@jax.jit
def _chain_means(distribution, schedule):
    """E f(x_0) of the chain from x_T ~ N(0, 1), for each of PROBES; its density carried over a grid of states."""
    grid = jnp.linspace(-5.0, 5.0, 1001)
    density = jnp.exp(-0.5 * grid**2)

    def x_hat(level):
        return jax.vmap(lambda x: closed_form.optimal_prediction(distribution, x[None], level, "x_0")[0])(grid)

    def back(density, t):
        step = schedule.step(t - 1, t)
        reverse = forward.posterior(grid, x_hat(step.t), step)
        density = jnp.exp(-0.5 * (grid[:, None] - reverse.mean[None, :]) ** 2 / reverse.var) @ density
        return density / density.sum(), None

    density, _ = jax.lax.scan(back, density, jnp.arange(schedule.num_steps, 1, -1))
    return jnp.stack([density @ f(x_hat(schedule(1))) for f in PROBES]) / density.sum()


PROBES = (jnp.asarray, jnp.square, lambda x: jnp.tanh(5 * x), lambda x: jnp.cos(6 * x))


def test_SAM_4_samples_have_the_distribution_of_the_chain():
    # few steps, so that the distribution differs from the data's: as an integral over every state, and by sampling
    with jax.enable_x64(True):
        distribution, schedule = _mixture(), discretize(LinearLogSNR(6.0, -6.0), 5)
        x_T = jnp.asarray(np.random.RandomState(1).randn(50_000, 1))
        x_0 = ancestral(closed_form.OptimalDenoiser(distribution), jax.random.key(0), x_T, schedule).x_0
        ours = np.stack([f(x_0[:, 0]) for f in PROBES], -1)
        assert_mean(ours, _chain_means(distribution, schedule), resolution=0.005)
        with refuted():
            assert_mean(ours[:, 1], float(distribution.variance[0] + distribution.mean[0] ** 2))


@pytest.mark.slow
def test_SAM_4_distribution_tends_to_the_data():
    distribution, count = _mixture(), 50_000
    floor = np.mean([_distance(draws(distribution, jax.random.key(i), count)) for i in range(5)])
    steps, distances = np.array([8, 16, 64, 400]), []
    for i, num_steps in enumerate(steps):
        key_T, key = jax.random.split(jax.random.key(100 + i))
        x_T = jax.random.normal(key_T, (count, 1))
        schedule = discretize(LinearLogSNR(9.0, -9.0), int(num_steps))
        distances.append(_distance(ancestral(closed_form.OptimalDenoiser(distribution), key, x_T, schedule).x_0))
    distances = np.array(distances)
    slope = np.polyfit(np.log(steps[1:-1]), np.log(distances[1:-1]), 1)[0]
    assert np.all(np.diff(distances) < 0)
    assert distances[-1] < 4 * floor  # at T = 400 hardly distinguishable from the data
    assert -1.15 < slope < -0.85


def test_erratum_algorithms_need_the_cumulative_product():
    # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; printed with alpha_t = 1 - beta_t of one step. From t = 2 on the
    # printed pair is not a sample of the chain: the loss of a denoiser detects it, here by ||eps + x_t||^2.
    abar, one_step, t = _abar(5), 1 - np.linspace(0.02, 0.9, 5), 3
    loss = losses.denoising_loss(lambda x, _: -x, jax.random.key(0), jnp.full((100_000, 1), 10.0), _schedule(5))
    seen = np.asarray(loss.squared_error, np.float64)[np.asarray(loss.t) == t]

    def truth(signal):
        return (1 + np.sqrt(1 - signal)) ** 2 + signal * 10.0**2

    assert_mean(seen, truth(abar[t]))
    with refuted():
        assert_mean(seen, truth(one_step[t - 1]))

    # Algorithm 2 divides beta_t by sqrt(1 - abar_t), printed sqrt(1 - alpha_t): visible in how far a constant eps moves
    # x_0 from a fixed x_T, since step t adds -eps beta_t / (divisor sqrt(alpha_t)) and each later one scales that.
    def end(eps):
        return ancestral(lambda x, _: eps * jnp.ones_like(x), jax.random.key(0), jnp.ones((1, 1)), _schedule(5)).x_0[
            0, 0
        ]

    def moved(divisor):
        reach = np.sqrt(np.cumprod(one_step))  # sqrt(alpha_1 .. alpha_t)
        return -np.sum((1 - one_step) / (divisor * reach))

    with jax.enable_x64(True):
        slope = jax.grad(end)(jnp.asarray(0.3))
        assert_close(slope, moved(np.sqrt(1 - abar[1:])), rtol=1e-12)
        with refuted():
            assert_close(slope, moved(np.sqrt(1 - one_step)), rtol=0.01)


def test_erratum_reverse_step_goes_to_the_next_state():
    # p(x_{t-1} | x_t), not the printed p(x_t | x_t): the level of the state falls by one with each step
    point, schedule = closed_form.empirical([[0.6]]), _schedule(5)
    x_T = schedule(5).alpha * 0.6 + schedule(5).sigma * jax.random.normal(jax.random.key(0), (50_000, 1))
    chain = ancestral(denoiser(point), jax.random.key(1), x_T, schedule, snapshots=5).trajectory
    assert_moments(chain.x_t[1], schedule(4).alpha * 0.6, schedule(4).sigma ** 2)
    with refuted():
        assert_moments(chain.x_t[1], schedule(5).alpha * 0.6, schedule(5).sigma ** 2)
