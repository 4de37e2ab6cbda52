"""Networks that take a timestep 0..T-1: the right timestep at every level, and the same results as an exact denoiser.

The network in closed form has its own alpha-bar, computed with NumPy from the betas, and never sees a noise level.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.optimizations import unoptimized
from vdm_jax import closed_form, discrete_schedules, elbo, probability_flow, reverse_variance, samplers
from vdm_jax.discrete_schedules import InterpolatedSchedule, linear_betas
from vdm_jax.gaussian import Normal
from vdm_jax.models.ddpm import DDPM
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.parameterization import from_timesteps
from vdm_jax.schedules import Cosine, LinearLogSNR

T = 20
SCHEDULE = linear_betas(T, 0.01, 0.6)
ABAR = np.cumprod(1 - np.linspace(0.01, 0.6, T))  # at timesteps 0..T-1
LOG_SNR = np.log(ABAR / (1 - ABAR))
OTHER = LinearLogSNR(LOG_SNR[0], LOG_SNR[-1])  # the same noise levels at other times
WEIGHTS, MEANS, VARIANCES = (0.3, 0.7), (-1.0, 0.8), (0.05, 0.02)
EXACT = closed_form.OptimalDenoiser(closed_form.mixture(WEIGHTS, [[mean] for mean in MEANS], VARIANCES))
X_0 = jnp.asarray([[-1.2], [0.1], [0.9], [0.7]])
KEY = jax.random.key(0)


def network(params, x_t, timestep):
    """E[eps | x_t] of the mixture with these weights, means and variances, shape (2,) each."""
    weights, means, variances = params
    abar = jax.nn.sigmoid(jnp.interp(timestep, jnp.arange(float(T)), jnp.asarray(LOG_SNR, jnp.float32)))[:, None]
    noisy, residual = abar * variances[None] + 1 - abar, x_t - jnp.sqrt(abar) * means[None]
    share = weights[None] * jnp.exp(-0.5 * residual**2 / noisy) / jnp.sqrt(noisy)
    eps = jnp.sqrt(1 - abar) * residual / noisy
    return (share * eps).sum(1, keepdims=True) / share.sum(1, keepdims=True)


def timesteps(level, schedule=SCHEDULE, **options):
    """What a network is given at levels of shape (B,)."""
    echo = from_timesteps(lambda x_t, timestep: timestep, schedule, **options)
    return np.asarray(jax.jit(echo)(jnp.zeros((len(level.alpha), 1)), level))


def decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def discrete(denoiser):
    few = SCHEDULE.subsequence(discrete_schedules.uniform_steps(T, 6))
    bound = elbo.bound(denoiser, KEY, X_0, SCHEDULE, decoder).total
    return bound, samplers.ddim(denoiser, None, 2 * X_0, few).x_0


def continuous(denoiser):
    return probability_flow.log_likelihood(denoiser, None, X_0, OTHER, trace="exact").log_prob


@pytest.mark.parametrize("results", [discrete, pytest.param(continuous, marks=pytest.mark.slow)])
def test_bounds_samples_and_likelihood_are_those_of_the_exact_denoiser(results):
    params = tuple(jnp.asarray(numbers) for numbers in (WEIGHTS, MEANS, VARIANCES))
    ours, exact = map(unoptimized(results), (from_timesteps(Partial(network, params), SCHEDULE), EXACT))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, exact)


@pytest.mark.parametrize("num_steps", [T, 1000])
def test_the_levels_of_the_schedule_have_whole_timesteps(num_steps):
    schedule = linear_betas(num_steps) if num_steps == 1000 else SCHEDULE
    steps = np.arange(1, num_steps + 1)
    np.testing.assert_array_equal(timesteps(schedule(steps), schedule), np.arange(num_steps))
    few = schedule.subsequence([0, 1, 7, num_steps])
    np.testing.assert_array_equal(timesteps(few(np.arange(1, 4)), schedule), [0, 6, num_steps - 1])
    # as those that a DDPM of this package is given
    np.testing.assert_array_equal(timesteps(schedule(steps), schedule), DDPM().condition(schedule(steps)))


def test_between_the_levels_timesteps_are_fractions_of_the_log_snr():
    wanted = np.linspace(0, T - 1, 50)
    level = InterpolatedSchedule(SCHEDULE)(jnp.asarray(wanted / (T - 1), jnp.float32))
    np.testing.assert_allclose(timesteps(level), wanted, atol=1e-4)
    other = level_from_log_snr(jnp.asarray([20.0, 0.5 * (LOG_SNR[3] + LOG_SNR[4]), -20.0], jnp.float32))
    np.testing.assert_allclose(timesteps(other), [0, 3.5, T - 1], atol=1e-5)  # levels that only have a log-SNR
    rounded = timesteps(level, integer=True)
    assert rounded.dtype == np.int32
    np.testing.assert_array_equal(rounded, np.round(wanted))


def test_a_network_that_also_predicts_a_variance():
    """With v = -1 the variance is the posterior's, and the bound that of the prediction alone."""

    def network(x_t, timestep):
        output = jnp.concatenate([0.1 * timestep[:, None, None] * x_t, jnp.full_like(x_t, -1.0)], axis=1)
        return reverse_variance.split_learned_range(output, axis=1)

    def with_fraction(x_hat, fraction, x_1, level):
        return decoder(x_hat + fraction, x_1, level)

    @unoptimized
    def bounds(x_0):
        learned, plain = (from_timesteps(net, SCHEDULE) for net in (network, lambda x, t: network(x, t)[0]))
        return (
            reverse_variance.learned_variance_bound(learned, KEY, x_0, SCHEDULE, with_fraction).total,
            elbo.bound(plain, KEY, x_0, SCHEDULE, decoder).total,
        )

    np.testing.assert_allclose(*bounds(jnp.linspace(-1.0, 1.0, 24).reshape(4, 2, 3)), rtol=1e-5)  # channels first


def test_the_learned_range_ends_at_the_two_fixed_variances():
    step = SCHEDULE.step(4, 5)
    output = jnp.asarray([[[0.3], [0.4], [-1.0], [1.0]]])  # two channels and their v
    prediction, fraction = reverse_variance.split_learned_range(output, axis=1)
    np.testing.assert_array_equal(prediction, output[:, :2])
    beta = np.linspace(0.01, 0.6, T)[4]
    posterior = beta * (1 - ABAR[3]) / (1 - ABAR[4])
    ours = reverse_variance.interpolated_variance(fraction, step)
    np.testing.assert_allclose(ours[0, :, 0], [posterior, beta], rtol=1e-5)
    with pytest.raises(ValueError, match=r"3 channels in axis 1"):
        reverse_variance.split_learned_range(output[:, :3], axis=1)


def test_another_schedule_than_a_discrete_one_is_refused():
    with pytest.raises(TypeError, match=r"Cosine.*linear_betas"):
        inspect.unwrap(from_timesteps)(network, Cosine())
