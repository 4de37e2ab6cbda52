"""Kernels of the forward process and its posterior: any shape, special cases, and one chain followed by sampling.

Their derivations are in `derivations/test_forward.py` and `derivations/test_posterior.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_mean, assert_moments
from vdm_jax import forward
from vdm_jax.discrete_schedules import discretize, from_betas, linear_betas
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import step_from_log_snr
from vdm_jax.schedules import LinearLogSNR, VarianceExploding

SCHEDULE = from_betas(np.array([0.1, 0.2, 0.3, 0.4]))


@jax.jit
def _kernels(x):
    step = SCHEDULE.step(1, 3)
    return [
        forward.marginal(x, step.t),
        forward.transition(x, step),
        forward.posterior(x, x + 1, step),
        forward.posterior_from_eps(x, x, step),
        forward.posterior_from_score(x, x, step),
    ]


@pytest.mark.parametrize("shape", [(), (2, 4, 1)])
def test_kernels_take_any_shape(shape):
    x = np.random.RandomState(0).normal(size=shape).astype(np.float32)
    for distribution, alone in zip(_kernels(x), _kernels(x.reshape(-1)[0]), strict=True):
        assert distribution.mean.shape == shape
        assert distribution.var.shape == ()
        assert float(alone.mean) == pytest.approx(float(distribution.mean.reshape(-1)[0]), rel=1e-6)  # elementwise


@pytest.mark.parametrize("schedule", [SCHEDULE, linear_betas(1000), discretize(VarianceExploding(), 10)])
def test_from_clean_data_the_transition_is_the_marginal_and_the_posterior_a_point(schedule):
    x_0, x_t = jnp.asarray([0.3, -1.0]), jnp.asarray([7.0, 0.1])
    for t in (1, 2, schedule.num_steps):
        step = schedule.step(0, t)
        marginal, transition = forward.marginal(x_0, step.t), forward.transition(x_0, step)
        np.testing.assert_allclose(transition.mean, marginal.mean, rtol=1e-6)
        np.testing.assert_allclose(transition.var, marginal.var, rtol=1e-6)
        distribution = forward.posterior(x_t, x_0, step)
        assert np.array_equal(distribution.mean, x_0)
        assert float(distribution.var) == 0.0
        assert tuple(map(float, forward.posterior_coefficients(step))) == (0.0, 1.0, 0.0)


def test_posterior_tends_to_x_0_for_clean_s_and_to_x_t_for_short_steps():
    x_t, x_0 = jnp.asarray([2.0]), jnp.asarray([-1.0])
    with jax.enable_x64(True):
        x_t, x_0 = jnp.asarray([2.0]), jnp.asarray([-1.0])
        short = forward.posterior(x_t, x_0, step_from_log_snr(jnp.asarray(1e-9), jnp.asarray(0.0)))
        assert float(short.mean[0]) == pytest.approx(2.0, rel=1e-8)
        assert float(short.var) < 1e-8
        long = forward.posterior(x_t, x_0, step_from_log_snr(jnp.asarray(40.0), jnp.asarray(0.0)))
        assert float(long.mean[0]) == pytest.approx(-1.0, rel=1e-8)
        assert float(long.var) < 1e-8


def test_a_sampled_chain_has_the_marginal_of_every_level():
    x = jnp.full((100_000,), 1.5)
    for t in range(1, 5):
        distribution = forward.transition(x, SCHEDULE.step(t - 1, t))
        x = Normal(distribution.mean, var=distribution.var).sample(jax.random.key(t))
        expected = forward.marginal(jnp.asarray(1.5), SCHEDULE(t))
        assert_moments(x, expected.mean, expected.var)


def test_the_regression_of_a_sampled_pair_is_the_posterior_mean():
    # x_s and x_t sampled forward from x_0: x_s deviates from the posterior mean by independent noise of its variance.
    step, x_0 = SCHEDULE.step(2, 4), jnp.asarray(0.8)
    key_s, key_t = jax.random.split(jax.random.key(5))
    marginal = forward.marginal(x_0, step.s)
    x_s = Normal(jnp.full((200_000,), marginal.mean), var=marginal.var).sample(key_s)
    x_t = forward.transition(x_s, step).sample(key_t)
    distribution = jax.vmap(lambda x: forward.posterior(x, x_0, step))(x_t)
    rest = x_s - distribution.mean
    assert_moments(rest, 0.0, distribution.var[0])
    assert_mean(rest * (x_t - x_t.mean()), 0.0)


def test_bridge_is_bayes_rule_and_ends_in_the_posterior():
    # q(x_s|x_r,x_t) q(x_t|x_r) = q(x_s|x_r) q(x_t|x_s), pointwise; from clean data it is the posterior
    with jax.enable_x64(True):
        x_r, x_s, x_t = (jnp.asarray(x) for x in np.random.RandomState(0).randn(3, 4))
        for continuous in (LinearLogSNR(4.0, -3.0), VarianceExploding(0.1, 5.0)):
            first, second, across = (continuous.step(*times) for times in ((0.1, 0.3), (0.3, 0.8), (0.1, 0.8)))
            joint = forward.transition(x_r, first).log_prob(x_s) + forward.transition(x_s, second).log_prob(x_t)
            bayes = joint - forward.transition(x_r, across).log_prob(x_t)
            assert float(forward.bridge(x_r, x_t, first, second).log_prob(x_s)) == pytest.approx(float(bayes), rel=1e-9)
        schedule = linear_betas(10, 0.1, 0.5)
        ours = forward.bridge(x_r, x_t, schedule.step(0, 4), schedule.step(4, 7))
        expected = forward.posterior(x_t, x_r, schedule.step(4, 7))
        np.testing.assert_allclose(ours.mean, expected.mean, rtol=1e-11)
        assert float(ours.var) == pytest.approx(float(expected.var), rel=1e-12)
