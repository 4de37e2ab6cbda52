"""DDIM: eta = 0 and 1, the marginals, and the inversion."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_close, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize, from_gammas, linear_betas
from vdm_jax.probability_flow import sample
from vdm_jax.samplers import ancestral, ddim, ddim_inverse, euler
from vdm_jax.schedules import LinearLogSNR, VarianceExploding

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _setup():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    return closed_form.OptimalDenoiser(distribution), jax.random.normal(jax.random.key(5), (32, 2))


@pytest.mark.slow
@pytest.mark.parametrize("preserving", [True, False])
def test_eta_1_is_ancestral_and_eta_0_is_euler(preserving):
    best, z = _setup()
    schedule = linear_betas(12, 1e-3, 0.6) if preserving else discretize(VarianceExploding(0.01, 20.0), 12)
    x_T = schedule(schedule.num_steps).sigma * z
    options = {"snapshots": schedule.num_steps}
    ancestral_noise, no_noise = (ddim(best, KEY, x_T, schedule, eta=eta, **options) for eta in (1.0, 0.0))
    chain, ode = ancestral(best, KEY, x_T, schedule, **options), euler(best, KEY, x_T, schedule, **options)
    assert_close(ancestral_noise.trajectory.x_t, chain.trajectory.x_t, atol=1e-12)
    assert_close(no_noise.trajectory.x_t, ode.trajectory.x_t, atol=1e-12)
    assert_close(ddim(best, jax.random.key(1), x_T, schedule).x_0, no_noise.x_0)  # the key is not used
    with refuted():
        assert_close(no_noise.x_0, ancestral_noise.x_0, rtol=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_has_the_marginals_of_its_x_0(eta, monkeypatch):
    # with the exact x_0 at every step, x_t ~ N(alpha x_0, sigma^2): the squared responses to noise sum to sigma^2
    schedule, x_0 = from_gammas(np.array([-6.0, -2.0, -1.0, 0.5, 3.0])), 0.7
    module = importlib.import_module("vdm_jax.samplers.ddim")
    monkeypatch.setattr(module, "noise", lambda key, t, x: jax.nn.one_hot(t, 7, dtype=x.dtype)[:, None])
    last = schedule(5)
    x_T = last.alpha * x_0 + last.sigma * jnp.zeros((7, 1)).at[0].set(1.0)  # the last row has no noise
    chain = ddim(
        lambda x, _: jnp.full_like(x, x_0), KEY, x_T, schedule, prediction_type="x_0", eta=eta, snapshots=5
    ).trajectory
    for t, x_t in zip(chain.t, chain.x_t[..., 0], strict=True):
        assert_close(x_t[-1], schedule(t).alpha * x_0)
        assert_close(np.sum(np.square(x_t[:-1] - x_t[-1])), schedule(t).sigma ** 2)


def test_a_step_of_the_inversion_by_hand():
    # x_hat = 0.5 x_s at every level; at level 1 it is predicted from alpha_1 x_0
    gammas = np.array([-4.0, -1.0, 0.5, 3.0])
    alpha, sigma = np.sqrt(1 / (1 + np.exp(gammas))), np.sqrt(1 / (1 + np.exp(-gammas)))
    x_0 = np.array([[0.3, -1.0]])
    ours = ddim_inverse(lambda x, _: 0.5 * x, jnp.asarray(x_0), from_gammas(gammas), prediction_type="x_0")
    start = alpha[0] * x_0
    x = start + sigma[0] * (start - alpha[0] * 0.5 * start) / sigma[0]
    for s in range(3):
        x_hat = 0.5 * x
        x = alpha[s + 1] * x_hat + sigma[s + 1] * (x - alpha[s] * x_hat) / sigma[s]
    assert_close(ours, x)


def _error(first, there, back):
    return float(jnp.sqrt(jnp.mean((back(there(first)) - first) ** 2)))


@pytest.mark.slow
def test_sampling_and_inversion_are_inverse_to_first_order():
    best, z = _setup()
    x_0, steps = draws(best.distribution, jax.random.key(2), 32), [64, 128, 256, 512]
    errors = []
    for count in steps:
        schedule = discretize(
            LinearLogSNR(16.0, -6.0), count
        )  # little noise at level 1, whose step does not get shorter

        def there(x, schedule=schedule):
            return ddim_inverse(best, x, schedule)

        def back(x, schedule=schedule):
            return ddim(best, KEY, x, schedule).x_0

        errors.append([_error(x_0, there, back), _error(z, back, there)])
    slopes = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"ddim_inverse and back: errors {np.array(errors).T}, orders {slopes}")
    assert np.all(np.abs(slopes - 1.0) < 0.15)


@pytest.mark.slow
def test_the_inversion_converges_to_the_ode():
    # the latent converges to that of the ODE, to first order
    best, _ = _setup()
    schedule, steps = LinearLogSNR(16.0, -6.0), [128, 256, 512]
    x_T = jax.random.normal(jax.random.key(3), (32, 2))
    x_0 = sample(best, x_T, schedule, tolerance=1e-11)  # x_1, in which there is hardly any noise
    errors = [jnp.sqrt(jnp.mean((ddim_inverse(best, x_0, discretize(schedule, n)) - x_T) ** 2)) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(np.array(errors)), 1)[0]
    print(f"ddim_inverse: errors {np.array(errors)}, order {slope:.2f}")
    assert abs(slope - 1.0) < 0.2
    for prediction_type in ("x_0", "v", "score"):
        other = ddim_inverse(
            closed_form.OptimalDenoiser(best.distribution, prediction_type),
            x_0,
            discretize(schedule, 64),
            prediction_type=prediction_type,
        )
        assert_close(other, ddim_inverse(best, x_0, discretize(schedule, 64)), atol=1e-9)


def test_the_inversion_evaluates_once_a_step():
    times = []

    def spy(x_t, level):
        jax.debug.callback(lambda t: times.append(float(t[0])), level.t)
        return 0.1 * x_t

    jax.block_until_ready(ddim_inverse(spy, jnp.ones((3, 2)), discretize(LinearLogSNR(), 6)))
    jax.effects_barrier()
    assert sorted(times) == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_gradient_with_respect_to_eta_is_finite_also_at_1():
    """The step to clean data has no noise, and no direction either at eta = 1."""
    best, x_T = _setup()
    schedule = from_gammas([-4.0, 0.0, 3.0])
    total = jax.jit(lambda eta: ddim(best, KEY, x_T, schedule, eta=eta).x_0.sum())
    slope = jax.jit(jax.grad(total))
    assert_close(slope(0.5), (total(0.5 + 1e-6) - total(0.5 - 1e-6)) / 2e-6, rtol=1e-6)
    assert_close(slope(1.0), (total(1.0) - total(1.0 - 1e-6)) / 1e-6, rtol=1e-4)


def test_eta_out_of_range():
    best, z = jnp.sin, jnp.ones((2, 1))
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got"):
            ddim(best, KEY, z, linear_betas(5), eta=eta)
    for eta in (0.1, jnp.asarray(0.1)):
        with pytest.raises(ValueError, match=r"key must not be None when eta > 0: pass a key"):
            ddim(best, None, z, linear_betas(5), eta=eta)
    assert ddim(lambda x, _: 0.0 * x, None, z, linear_betas(2), prediction_type="x_0").x_0.shape == z.shape
