"""Twisted sequential Monte Carlo: unbiased at any number of particles, and importance sampling without a twist."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.derivations.check import assert_close, assert_mean, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form, forward
from vdm_jax.discrete_schedules import discretize, from_betas
from vdm_jax.guidance import LinearMeasurement, ReconstructionGuidance
from vdm_jax.samplers import ancestral, repaint, systematic_resampling, twisted_smc
from vdm_jax.schedules import LinearLogSNR

KEY = jax.random.key(0)
MEAN, VAR = 0.3, 0.5  # of normal data, independent in two entries
Y, NOISE = 1.1, 0.2  # the measurement of the first entry


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _schedule(steps, log_snr_max=6.0):
    return discretize(LinearLogSNR(log_snr_max, -4.0), steps)


def _optimal_x_0(x_t, level):
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    return MEAN + alpha * VAR / (alpha**2 * VAR + sigma**2) * (x_t - alpha * MEAN)


def _exact_variances(schedule):
    """Of q(x_{t-1} | x_t), the reverse transitions of the normal data, for t = 1..T."""
    t = np.arange(1, schedule.num_steps + 1)
    step = schedule.step(t - 1, t)
    _, c_2, sigma = forward.posterior_coefficients(step)
    return sigma**2 + c_2**2 * VAR * step.t.sigma**2 / (step.t.alpha**2 * VAR + step.t.sigma**2)


def _log_likelihood(x_hat, level, twist=1.0):
    """Of the first entry; at noisy levels with a variance that no theory suggests, which the weights correct for."""
    var = NOISE + twist * level.sigma
    return -0.5 * ((Y - x_hat[:, 0]) ** 2 / var + jnp.log(2 * jnp.pi * var))


def _first(x):
    return x[:, :1]


@partial(jax.jit, static_argnames=("ess_threshold", "count", "repeats"))
def _repeated(key, twist, ess_threshold, count=6, repeats=20_000):
    """Many runs of few particles, whose chain of four steps has the distribution of the data at every level."""
    schedule = _schedule(4)
    level, variances = schedule(4), _exact_variances(schedule)

    def one(key):
        key_T, key = jax.random.split(key)
        x_T = jax.random.normal(key_T, (count, 2)) * jnp.sqrt(level.alpha**2 * VAR + level.sigma**2)
        return twisted_smc(
            _optimal_x_0, key, x_T + level.alpha * MEAN, schedule, Partial(_log_likelihood, twist=twist),
            prediction_type="x_0", variance=variances, ess_threshold=ess_threshold,
        )  # fmt: skip

    return jax.vmap(one)(jax.random.split(key, repeats))


@pytest.mark.parametrize(
    ("ess_threshold", "twist"),
    [(0.7, 1.0), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.0, 1.0), (1.0, 1.0), (0.7, 0.1)))],
)
def test_the_evidence_and_unnormalized_means_are_unbiased_with_few_particles(ess_threshold, twist):
    particles = jax.tree.map(np.asarray, _repeated(KEY, twist, ess_threshold))
    # x_0 is the mean given x_1, whose variance is less than that of the data
    level = jax.tree.map(np.asarray, _schedule(4)(1))
    var = VAR * level.alpha**2 * VAR / (level.alpha**2 * VAR + level.sigma**2)
    gain = var / (var + NOISE)
    mean, left = MEAN + gain * (Y - MEAN), (1 - gain) * var
    evidence = np.exp(-0.5 * (Y - MEAN) ** 2 / (var + NOISE)) / np.sqrt(2 * np.pi * (var + NOISE))
    estimates, weights = np.exp(particles.log_evidence), np.exp(particles.log_weights)
    np.testing.assert_allclose(weights.sum(1), 1.0)
    total = (weights * estimates[:, None])[..., None]
    first, second = np.moveaxis(particles.x_0, -1, 0)[..., None]
    functions = np.concatenate([np.ones_like(first), first, second, (first - mean) ** 2, (second - MEAN) ** 2], -1)
    truth = evidence * np.array([1.0, mean, MEAN, left, var])
    assert_mean(np.sum(total * functions, 1), truth, resolution=0.01)
    with refuted():  # the logarithm of an unbiased estimate is too small on average
        assert_mean(particles.log_evidence, np.log(evidence))
    sizes = particles.effective_sample_size
    np.testing.assert_allclose(sizes[:, -1], 1 / np.sum(weights**2, 1))
    assert sizes.shape == (20_000, 5)
    assert np.all((sizes > 1.0 - 1e-9) & (sizes < 6.0 + 1e-9))


def test_without_a_twist_it_is_importance_sampling_by_the_ancestral_chain():
    schedule, x_T = _schedule(4), jnp.asarray(np.random.RandomState(1).normal(size=(500, 2)))
    likelihood = lambda x, level: jnp.where(level.sigma > 0, 0.0, _log_likelihood(x, level))  # noqa: E731
    options = {"prediction_type": "x_0", "variance": "fixed_large", "clip": 0.8}
    ours = twisted_smc(_optimal_x_0, KEY, x_T, schedule, likelihood, **options)
    x_0 = ancestral(_optimal_x_0, jax.random.split(KEY)[0], x_T, schedule, **options).x_0
    assert_close(ours.x_0, x_0, atol=1e-12)
    log_p = -0.5 * (Y - np.asarray(x_0)[:, 0]) ** 2 / NOISE - 0.5 * np.log(2 * np.pi * NOISE)
    assert_close(np.exp(ours.log_weights), np.exp(log_p) / np.exp(log_p).sum(), rtol=1e-10)
    assert_close(np.exp(ours.log_evidence), np.exp(log_p).mean(), rtol=1e-10)
    assert_close(ours.effective_sample_size[:-1], np.full(4, 500.0), rtol=1e-10)  # equal weights: no resampling
    assert np.max(np.abs(ours.x_0)) <= 0.8


def test_the_proposals_are_guided_ancestral_steps_from_the_resampled_particles():
    # all particles but one are far from the measurement, so that the first step has many copies of that one
    schedule, x_T = _schedule(4), jnp.full((500, 2), 1e3).at[7].set(jnp.array([0.4, -0.2]))
    measured = Partial(_first), jnp.full((500, 1), Y), NOISE
    options = {"prediction_type": "x_0", "variance": _exact_variances(schedule)}
    ours = twisted_smc(_optimal_x_0, KEY, x_T, schedule, LinearMeasurement(*measured), ess_threshold=0.1, **options)
    assert np.all(
        np.diff(np.asarray(ours.effective_sample_size) < 50) == [True, False, False, False]
    )  # the first alone
    guided, start = ReconstructionGuidance(_optimal_x_0, *measured, prediction_type="x_0"), x_T[jnp.full(500, 7)]
    chain = ancestral(guided, jax.random.split(KEY)[0], start, schedule, snapshots=4, **options).trajectory
    level = jax.tree.map(lambda field: jnp.full(500, field), schedule(1))
    assert_close(ours.x_0, _optimal_x_0(chain.x_t[-1], level), rtol=1e-9, atol=1e-9)  # the last step has no guidance


def test_one_step_is_importance_sampling():
    schedule, x_T = from_betas(np.array([0.6])), jnp.asarray(np.random.RandomState(1).normal(size=(500, 2)))
    ours = twisted_smc(_optimal_x_0, KEY, x_T, schedule, _log_likelihood, prediction_type="x_0", ess_threshold=0.0)
    x_0 = np.asarray(_optimal_x_0(x_T, jax.tree.map(lambda field: jnp.full(500, field), schedule(1))))
    assert_close(ours.x_0, x_0, atol=1e-12)
    log_p = -0.5 * (Y - x_0[:, 0]) ** 2 / NOISE
    assert_close(np.exp(ours.log_weights), np.exp(log_p) / np.exp(log_p).sum(), rtol=1e-10)


def test_systematic_resampling_has_the_expected_counts():
    log_weights = np.log(np.array([0.3, 0.0001, 0.15, 0.05, 0.4999])) + 700.0  # not normalized
    keys = jax.random.split(KEY, 20_000)
    chosen = np.asarray(jax.jit(jax.vmap(systematic_resampling, (0, None)))(keys, log_weights))
    counts = np.sum(chosen[:, :, None] == np.arange(5), axis=1)
    expected = 5 * np.exp(log_weights - 700.0)
    assert_mean(counts, expected)
    assert np.all((counts == np.floor(expected)) | (counts == np.ceil(expected)))
    never = jax.vmap(systematic_resampling, (0, None))(keys[:100], jnp.log(jnp.array([0.0, 1.0, 0.0, 1.0, 0.0])))
    assert set(np.unique(never)) == {1, 3}


def test_a_likelihood_of_zero_and_errors():
    x_T, schedule = jnp.zeros((3, 2)), _schedule(3)
    sample = partial(twisted_smc, _optimal_x_0, KEY, x_T, schedule, prediction_type="x_0")
    impossible = sample(lambda x, level: jnp.where(level.sigma > 0, 0.0, -jnp.inf))
    assert float(impossible.log_evidence) == -np.inf
    assert np.all(np.isnan(impossible.log_weights))
    assert jax.eval_shape(lambda: sample(_log_likelihood, ess_threshold=1.0)).x_0.shape == (3, 2)  # the end is allowed
    for ess_threshold in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"ess_threshold is -?\d.1: it must be in \[0, 1\]"):
            sample(_log_likelihood, ess_threshold=ess_threshold)
    with pytest.raises(ValueError, match=r"the log-likelihood returned shape \(3, 2\): it must return shape \(3,\)"):
        sample(lambda x, level: x)
    with pytest.raises(ValueError, match="unknown variance 'learned'"):  # a type checker would refuse it first
        inspect.unwrap(twisted_smc)(_optimal_x_0, KEY, x_T, schedule, _log_likelihood, variance="learned")
    with pytest.raises(ValueError, match=r"variance has shape \(2,\): with T = 3 steps"):
        sample(_log_likelihood, variance=jnp.ones(2))


# Modes of the posterior: two modes, whose measured entries are closer together than the noise of most levels

MODES = np.array([[-1.0, -1.0], [1.0, 1.0]])
SIGHT, SHARP = np.array([0.2]), 0.002  # y of the first entry and its noise variance


def _mode(x_0, weights):
    """The probability of the mode at (1, 1), and the mean of the unknown entry."""
    x_0, weights = np.asarray(x_0), np.asarray(weights)
    return float(weights @ (x_0[:, 1] > 0)), float(weights @ x_0[:, 1])


@pytest.mark.slow
def test_the_posterior_of_a_mixture_is_sampled_where_guidance_and_repaint_fail():
    data, count = closed_form.mixture([0.5, 0.5], MODES, [0.1, 0.1]), 4_000
    best, schedule = closed_form.OptimalDenoiser(data), discretize(LinearLogSNR(10.0, -9.0), 250)
    y = jnp.broadcast_to(SIGHT, (count, 1))
    measurement = LinearMeasurement(Partial(_first), y, SHARP, data_variance=1.1)
    posterior = closed_form.linear_posterior(data, Partial(_first), SIGHT, SHARP)
    log_evidence = float(closed_form.linear_measurement(data, Partial(_first), SHARP).log_prob(jnp.asarray(SIGHT)))
    exact, equal = draws(posterior, KEY, 100_000), np.full(count, 1 / count)
    truth = _mode(exact, np.full(100_000, 1e-5))
    runs, plain = [], []
    for i in range(8):
        x_T = jax.random.normal(jax.random.key(i), (count, 2))
        ours = twisted_smc(best, jax.random.key(100 + i), x_T, schedule, measurement)
        runs.append([*_mode(ours.x_0, np.exp(ours.log_weights)), float(ours.log_evidence)])
        plain.append(float(ours.effective_sample_size[-1]))
    runs = np.array(runs)
    guided = ReconstructionGuidance(best, Partial(_first), y, SHARP, data_variance=1.1)
    known, mask = (
        jnp.broadcast_to(jnp.array([0.2, 0.0]), (count, 2)),
        jnp.broadcast_to(jnp.array([1.0, 0.0]), (count, 2)),
    )
    others = {
        "conditional denoiser": ancestral(closed_form.OptimalDenoiser(posterior), KEY, x_T, schedule).x_0,
        "reconstruction guidance": ancestral(guided, KEY, x_T, schedule).x_0,
        "RePaint": repaint(best, KEY, x_T, schedule, known, mask).x_0,
        "RePaint, 10 resamplings": repaint(best, KEY, x_T, schedule, known, mask, resamplings=10).x_0,
    }
    found = {name: _mode(x_0, equal) for name, x_0 in others.items()}
    error = runs.std(0, ddof=1) / np.sqrt(8)
    print(f"\nexact {truth}, log-evidence {log_evidence}\ntwisted {runs.mean(0)} +- {error}, ESS {plain}\n{found}")
    assert abs(runs[:, 0].mean() - truth[0]) < 4 * error[0] + 0.005  # here and below the bias of 250 steps
    assert abs(runs[:, 1].mean() - truth[1]) < 4 * error[1] + 0.02
    assert abs(runs[:, 2].mean() - log_evidence) < 4 * error[2] + 0.08
    assert abs(found["conditional denoiser"][0] - truth[0]) < 0.01
    assert found["reconstruction guidance"][0] < truth[0] - 0.1
    assert found["RePaint"][0] < truth[0] - 0.1
