"""DPM-Solver++(2M): its first-order steps equal those of other samplers, and its order of convergence."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_close, refuted
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize, from_gammas, linear_betas
from vdm_jax.samplers import ancestral, ddim, dpmpp_2m, dpmpp_2m_sde
from vdm_jax.schedules import LinearLogSNR

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _setup():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    return closed_form.OptimalDenoiser(distribution), jax.random.normal(jax.random.key(5), (32, 2))


@pytest.mark.parametrize("stochastic", [False, True])
def test_steps_by_hand(stochastic, monkeypatch):
    module = importlib.import_module("vdm_jax.samplers.dpmpp")
    monkeypatch.setattr(module, "noise", lambda key, t, x: jnp.full_like(x, 0.5) * t.astype(x.dtype))
    gammas, x = np.array([-4.0, -1.0, 0.5, 3.0]), np.array([[0.7, -1.2]])
    alpha, sigma = np.sqrt(1 / (1 + np.exp(gammas))), np.sqrt(1 / (1 + np.exp(-gammas)))
    ours = (dpmpp_2m_sde if stochastic else dpmpp_2m)(
        lambda x, _: 0.8 * x, KEY, jnp.asarray(x), from_gammas(gammas), prediction_type="x_0"
    )
    previous, h_previous = 0.0, np.inf  # the first step is of first order
    for t in (3, 2, 1):
        h, x_hat = 0.5 * (gammas[t] - gammas[t - 1]), 0.8 * x
        target = x_hat + h / (2 * h_previous) * (x_hat - previous)
        if stochastic:
            kept = np.exp(-2 * h)
            z = 0.5 * (t + 1)
            x = sigma[t - 1] / sigma[t] * np.exp(-h) * x + alpha[t - 1] * (1 - kept) * target
            x = x + sigma[t - 1] * np.sqrt(1 - kept) * z
        else:
            x = sigma[t - 1] / sigma[t] * x + alpha[t - 1] * (1 - np.exp(-h)) * target
        previous, h_previous = x_hat, h
    assert_close(ours.x_0, 0.8 * x)


@pytest.mark.slow
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_first_step_and_the_last_are_of_first_order(stochastic):
    best, x_T = _setup()
    for schedule in (from_gammas([-4.0, 3.0]), linear_betas(9, 0.01, 0.6)):
        steps = schedule.num_steps
        ours = (dpmpp_2m_sde if stochastic else dpmpp_2m)(best, KEY, x_T, schedule, snapshots=steps)
        other = ddim(best, KEY, x_T, schedule, eta=float(stochastic), snapshots=steps)
        assert_close(ours.trajectory.x_t[:2], other.trajectory.x_t[:2], atol=1e-12)
        if stochastic:
            assert_close(
                ours.trajectory.x_t[:2],
                ancestral(best, KEY, x_T, schedule, snapshots=2 if steps == 2 else steps).trajectory.x_t[:2],
                atol=1e-12,
            )
        assert_close(ours.x_0, ours.trajectory.x_hat[-1], atol=1e-12)
        if steps == 2:
            assert_close(ours.x_0, other.x_0, atol=1e-12)
        else:
            with refuted():
                assert_close(ours.x_0, other.x_0, rtol=1e-3)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_constant_x_0_is_integrated_exactly_however_long_the_steps(stochastic):
    schedule = from_gammas([-8.0, -1.0, 0.5, 4.0])
    z = jax.random.normal(KEY, (4, 3))
    x_T = schedule(4).alpha * 0.6 + schedule(4).sigma * z
    chain = (dpmpp_2m_sde if stochastic else dpmpp_2m)(
        lambda x, _: jnp.full_like(x, 0.6),
        KEY,
        x_T,
        schedule,
        prediction_type="x_0",
        snapshots=4,
    )
    if stochastic:
        return np.testing.assert_array_equal(chain.x_0, np.full((4, 3), 0.6))
    for t, x_t in zip(chain.trajectory.t, chain.trajectory.x_t, strict=True):
        assert_close(x_t, schedule(t).alpha * 0.6 + schedule(t).sigma * z)  # alpha x_0 + sigma eps, with one eps


@pytest.mark.slow
def test_the_sde_s_variance_converges_to_second_order(monkeypatch):
    # normal data: x_0 is linear in x_T and in the noise; its variance is the sum of the squared responses
    var, steps, errors = 0.3, [16, 32, 64, 128], []
    best = closed_form.OptimalDenoiser(closed_form.gaussian([0.0], [[var]]))
    for count in steps:
        for name in ("ancestral", "dpmpp"):
            module = importlib.import_module(f"vdm_jax.samplers.{name}")
            monkeypatch.setattr(module, "noise", lambda key, t, x: jax.nn.one_hot(t, len(x), dtype=x.dtype)[:, None])
        schedule = discretize(LinearLogSNR(12.0, -6.0), count)
        last = schedule(count)
        x_T = jnp.zeros((count + 1, 1)).at[0].set(jnp.sqrt(last.alpha**2 * var + last.sigma**2))

        def net(x, level):  # a new function, so that no chain compiled with another noise is reused
            return best(x, level)

        chains = ancestral(net, KEY, x_T, schedule), dpmpp_2m_sde(net, KEY, x_T, schedule)
        end = (
            schedule(1).sigma ** 2 * var / (schedule(1).alpha ** 2 * var + schedule(1).sigma ** 2)
        )  # the conditional variance at level 1
        errors.append([abs(float(jnp.sum(chain.x_0**2) + end) / var - 1) for chain in chains])
    slopes = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"variance of normal data, ancestral and the SDE: errors {np.array(errors).T}, orders {slopes}")
    assert abs(slopes[0] - 1.0) < 0.2
    assert abs(slopes[1] - 2.0) < 0.3
