"""TIME: how times are sampled: each uniform, weights without bias, and how much each scheme reduces the variance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.derivations.check import assert_close, assert_mean
from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, losses, time_sampling
from vdm_jax.discrete_schedules import linear_betas
from vdm_jax.schedules import LinearLogSNR

HOWS = ("independent", "low_discrepancy", "antithetic")
SKEWED = jnp.asarray([0.0, 0.5, 0.1, 0.0, 0.25, 1e-3, 0.149, 0.0])  # sums to 1; some bins have probability 0
BETAS = linear_betas(50, 0.002, 0.4)
DATA = GaussianWorld(0.0, 0.3)


def _many(function, count=20_000, seed=0):
    many = jax.jit(jax.vmap(function))
    return np.asarray(many(jax.random.split(jax.random.key(seed), count)), np.float64)


@pytest.mark.parametrize("how", HOWS)
def test_TIME_1_each_number_is_uniform(how):
    # slot by slot over many keys, by Kolmogorov and Smirnov's distance
    u = _many(lambda k: time_sampling.sample_times(k, 5, how))
    assert u.min() >= 0
    assert u.max() < 1
    for slot in range(5):
        assert stats.kstest(u[:, slot], "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_TIME_2_weights_have_no_bias_in_float32():
    # Every number that float32's generator can return, once, so that the bins' frequencies are exact. The mean of
    # weight f(bin) is the plain mean of f over bins, for T = 1000 and probabilities over eight orders of magnitude.
    grid = jnp.asarray(np.arange(2**23, dtype=np.float32) / 2**23)
    p = jnp.asarray(np.random.RandomState(0).lognormal(0, 3, 1000), jnp.float32)
    sampled = jax.jit(time_sampling.importance_sample)(grid, p)
    bins, weight = np.asarray(sampled.bin), np.asarray(sampled.weight, np.float64)
    total = np.bincount(bins, weight, 1000) / 2**23 * 1000
    p = np.asarray(p / p.sum(), np.float64)
    never = total == 0
    assert p[never].max() < 2 * 2.0**-23  # both ends rounded to one grain
    np.testing.assert_allclose(total[~never], 1.0, rtol=2e-7)
    print(f"{never.sum()} of 1000 bins are never sampled, together {p[never].sum():.1e}; the others' totals are off by")
    print(f"{np.abs(total[~never] - 1).max():.1e}")
    likely = p[bins] > 1e-4
    np.testing.assert_allclose(weight[likely], 1 / (1000 * p[bins][likely]), rtol=2e-3)
    assert np.all(np.diff(np.asarray(sampled.time)) >= 0)
    assert np.asarray(sampled.time).max() < 1


def test_TIME_2_the_inverse_cdf_is_exact_in_float64():
    # CDF(time(u)) = u, and weight * density = 1
    with jax.enable_x64(True):
        p = jnp.asarray(np.random.RandomState(1).lognormal(0, 2, 40))
        u = jnp.asarray(np.random.RandomState(2).uniform(size=1000))
        sample = jax.jit(time_sampling.importance_sample)
        sampled = sample(u, p)
        density = np.asarray(p / p.sum()) * 40
        cdf = np.interp(sampled.time, np.arange(41) / 40, np.r_[0, np.cumsum(density) / 40])
        assert_close(cdf, u, rtol=0, atol=1e-14)
        assert_close(sampled.weight * density[np.asarray(sampled.bin)], np.ones(1000), rtol=1e-11)
        # equal probabilities leave the times unchanged
        same = sample(u, jnp.full(40, 3.0))
        assert_close(same.time, u, rtol=0, atol=1e-15)
        assert_close(same.weight, np.ones(1000), rtol=1e-14)


# The variance of each scheme, on the integrand of the bound of a distribution known in closed form


SCHEDULE = LinearLogSNR(6.0, -6.0)


def _integrand(t):
    """1/2 gamma'(t) E ||eps - eps_hat||^2 of N(0, v) with its exact denoiser, v = 0.3: t is the only noise."""
    snr = jnp.exp(SCHEDULE.log_snr(t))
    return 6.0 * DATA.var * snr / (1.0 + DATA.var * snr)


INTEGRAL = 0.5 * (np.log1p(DATA.var * np.exp(6.0)) - np.log1p(DATA.var * np.exp(-6.0)))  # of d log(1 + v SNR) / 2


def _estimates(how, warped):
    """The variance of means over 16 times, `warped` to another distribution of times; their mean has no bias."""
    p = jnp.linspace(2.0, 0.5, 32)

    def mean(key):
        u = time_sampling.sample_times(key, 16, how)
        sampled = time_sampling.importance_sample(u, p)
        return jnp.mean(sampled.weight * _integrand(sampled.time) if warped else _integrand(u))

    samples = _many(mean, 4000)
    assert_mean(samples, INTEGRAL, resolution=0.02)
    return samples.var()


def test_TIME_1_every_arrangement_is_unbiased_and_two_have_less_variance():
    independent, low_discrepancy, antithetic = (_estimates(how, False) for how in HOWS)
    assert independent > 6 * antithetic  # the integrand is monotone
    assert independent > 20 * low_discrepancy


@pytest.mark.slow
def test_TIME_1_importance_sampling_is_unbiased_in_every_arrangement():
    independent, low_discrepancy, _ = (_estimates(how, True) for how in HOWS)
    assert _estimates("independent", False) > 2 * independent
    assert independent > 20 * low_discrepancy  # stratified importance sampling


# The terms of L_vlb for a distribution where their second moments are known


DIMS = 64
STANDARD = GaussianWorld(0.0, 1.0)
EXACT, EXACT_STANDARD = denoiser(DATA), denoiser(STANDARD)


def _moments(var=DATA.var):
    """E L_t and sqrt(E L_t^2) of the diffusion terms t = 2..T, 0 at t = 1: ||eps - eps_hat||^2 is e chi^2_D."""
    with jax.enable_x64(True):
        schedule = linear_betas(50, 0.002, 0.4)
        t = jnp.arange(2, 51)
        step = schedule.step(t - 1, t)
        weight = np.asarray(jax.vmap(partial(elbo.diffusion_weight, prediction_type="eps"))(step))
        snr = np.asarray(step.t.snr)
    error = snr * var / (1 + snr * var)  # Var[eps | x_t]
    first = np.r_[0.0, weight * error * DIMS]
    return first, first * np.sqrt(1 + 2 / DIMS)


def _second_moment(p, root):
    """E (L_t / (T p_t))^2 under t ~ p; terms that are zero do not contribute. The least is (mean of the roots)^2."""
    used = root > 0
    return np.sum(root[used] ** 2 / np.asarray(p, np.float64)[used]) / root.size**2


def _without_decoder(step):
    """The bound's weight, and 0 at the decoder's step."""
    last = jnp.isinf(step.log_snr_drop)
    drop = step._replace(log_snr_drop=jnp.where(last, 1.0, step.log_snr_drop))
    return jnp.where(last, 0.0, elbo.diffusion_weight(drop, "eps"))


def _loss(key, batch, **options):
    x_0 = jnp.sqrt(DATA.var) * jax.random.normal(jax.random.fold_in(key, 7), (batch, DIMS))
    return losses.denoising_loss(EXACT, key, x_0, BETAS, weight=_without_decoder, **options)


@pytest.mark.slow
def test_TIME_2_second_moments_approach_the_optimal_proposal():
    first, root = _moments()
    best, even = root.mean() ** 2, _second_moment(np.full(50, 1 / 50), root)
    moments = time_sampling.LossSecondMomentSampler.init(50)
    for i in range(12):
        p = moments.probabilities()
        loss = _loss(jax.random.key(i), 1000, probabilities=p)
        assert_mean(loss.loss, first.mean())
        assert i > 0 or np.array_equal(p, np.full(50, np.float32(0.02)))
        moments = moments.update(loss.t, loss.term)
    ours = _second_moment(moments.probabilities(), root)
    measured = np.var(_loss(jax.random.key(99), 20_000, probabilities=moments.probabilities()).loss)
    uniform = np.var(_loss(jax.random.key(99), 20_000).loss)
    print(f"second moment over the best: {ours / best:.4f} (uniform {even / best:.3f});", end=" ")
    print(f"variance: uniform {uniform:.3f}, ours {measured:.4f}, the best {best - first.mean() ** 2:.4f}")
    assert 1.0 <= ours / best < 1.03
    assert even / best > 1.5
    assert measured < uniform / 8
    assert measured == pytest.approx(ours - first.mean() ** 2, rel=0.1)


def test_TIME_3_the_optimal_proposal_is_the_root_of_the_second_moment():
    # for standard normal data it is sigma_t^2 / sigma_{t-1}^2 - 1, up to its sum
    with jax.enable_x64(True):
        _, root = _moments(var=1.0)
        level = linear_betas(50, 0.002, 0.4)(jnp.arange(51))
        assert_close(time_sampling.timestep_proposal(level), root / root.sum(), rtol=1e-9)
        log_var = 2 * np.asarray(level.log_sigma)[1:]
        ours = time_sampling.geometric_variance_proposal(level)
        assert_close(ours, np.r_[0.0, np.diff(log_var) / (log_var[-1] - log_var[0])], rtol=1e-9)


@pytest.mark.slow
def test_TIME_3_variance_proposal_is_near_the_best_for_standard_normal_data():
    # The best is sigma_t^2 / sigma_{t-1}^2 - 1, in E[(L / p)^2] as in closed form; the logarithm is its first order.
    with jax.enable_x64(True):
        _, root = _moments(var=1.0)
        level = linear_betas(50, 0.002, 0.4)(jnp.arange(51))
        cost = [
            _second_moment(p, root) / root.mean() ** 2
            for p in (time_sampling.geometric_variance_proposal(level), np.full(50, 0.02))
        ]
        print(f"second moment over the best: log sigma^2 {cost[0]:.4f}, uniform {cost[1]:.3f}")
        assert time_sampling.geometric_variance_proposal(level)[0] == 0
        assert 1.0 < cost[0] < 1.2
        assert cost[1] > 4.0
        # bins of a continuous schedule: the excess falls with the square of the bins' width
        excess = []
        for count in (50, 100, 200):
            log_var = 2 * SCHEDULE(jnp.linspace(0.0, 1.0, count + 1)).log_sigma
            p = time_sampling.geometric_variance_proposal(SCHEDULE(jnp.linspace(0.0, 1.0, count + 1)))
            assert_close(p, np.diff(log_var) / (log_var[-1] - log_var[0]), rtol=1e-9)
            nodes, weights = np.polynomial.legendre.leggauss(8)
            t = (np.arange(count)[:, None] + 0.5 + 0.5 * nodes) / count
            slope = 12.0 * np.asarray(SCHEDULE(jnp.asarray(t)).alpha) ** 2  # d log sigma^2 / dt = gamma' alpha^2
            second = np.sum((slope**2 @ weights) / 2 / count / (np.asarray(p) * count))
            excess.append(second / float(log_var[-1] - log_var[0]) ** 2 - 1)
        assert excess[0] < 2e-3
        np.testing.assert_allclose(np.array(excess[:-1]) / excess[1:], 4.0, rtol=0.05)


@pytest.mark.slow
def test_TIME_3_the_optimal_proposal_leaves_the_variance_of_the_noise_only():
    # L_t / p_t then has one mean, so that the variance is that of chi^2_D alone: 2 / D of the mean's square
    p = time_sampling.timestep_proposal(BETAS(jnp.arange(51)))
    x_0 = jax.random.normal(jax.random.key(5), (20_000, DIMS))
    first, _ = _moments(var=1.0)
    mean, var = first.mean(), {}
    for how in ("independent", "low_discrepancy"):
        loss = losses.denoising_loss(
            EXACT_STANDARD,
            jax.random.key(6),
            x_0,
            BETAS,
            weight=_without_decoder,
            probabilities=p,
            time_sampling=how,
        )
        assert_mean(loss.loss, mean, resolution=0.01)
        assert np.asarray(loss.t).min() == 2  # p_1 = 0: the decoder's step is never sampled
        var[how] = np.var(loss.loss)
        assert var[how] == pytest.approx(mean**2 * 2 / DIMS, rel=0.05)
    even = losses.denoising_loss(EXACT_STANDARD, jax.random.key(6), x_0, BETAS, weight=_without_decoder)
    print(f"variance: uniform {np.var(even.loss):.3f}, the best {var['independent']:.4f}")
    assert np.var(even.loss) > 50 * var["independent"]
