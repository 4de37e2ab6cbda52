"""Training losses: their parts, every way to sample the steps, and one prediction as four prediction types."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_mean
from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, forward, losses, time_sampling
from vdm_jax.discrete_schedules import linear_betas
from vdm_jax.gaussian import Normal, kl

SCHEDULE = linear_betas(8, 0.01, 0.5)
GAUSSIAN = GaussianWorld(0.4, 0.6)
X_0 = GAUSSIAN.sample(jax.random.key(9), (500, 2))
NET = denoiser(GAUSSIAN, shift=0.3)
PREDICTION_TYPES = ("x_0", "eps", "v", "score")
PROBABILITIES = jnp.asarray([0.3, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.2])


@jax.jit
def _parts(key, x_0):
    loss = partial(losses.denoising_loss, denoiser(GAUSSIAN), key, x_0, SCHEDULE)
    weighted = loss(weight=lambda step: 3.0 * step.t.sigma)
    simple = losses.simple_loss(denoiser(GAUSSIAN), key, x_0, SCHEDULE)
    return weighted, simple, loss(probabilities=PROBABILITIES), SCHEDULE(weighted.t).sigma


def test_parts_of_a_loss():
    loss, simple, sampled, sigma = _parts(jax.random.key(0), X_0)
    assert loss.t.shape == loss.squared_error.shape == loss.weight.shape == (500,)
    assert set(np.unique(loss.t)) == set(range(1, 9))
    np.testing.assert_allclose(loss.weight, 3.0 * sigma, rtol=1e-6)  # of step t, not t - 1
    np.testing.assert_allclose(loss.loss, np.asarray(loss.weight) * np.asarray(loss.squared_error), rtol=1e-6)
    np.testing.assert_allclose(simple, loss.squared_error, rtol=1e-6)
    assert np.array_equal(loss.importance, np.ones(500))
    np.testing.assert_array_equal(loss.term, loss.loss)
    np.testing.assert_array_equal(sampled.term, sampled.squared_error)
    np.testing.assert_array_equal(sampled.loss, np.asarray(sampled.squared_error) * np.asarray(sampled.importance))


def test_the_loss_of_an_exact_prediction_is_zero():
    # data that are one point: the exact denoiser predicts the noise exactly
    @jax.jit
    def all_losses(key, x_0):
        return [
            losses.simple_loss(denoiser(GaussianWorld(0.7, 0.0), each), key, x_0, SCHEDULE, prediction_type=each)
            for each in PREDICTION_TYPES
        ]

    assert np.max(all_losses(jax.random.key(0), np.full((50, 2), 0.7, np.float32))) < 1e-6


def test_one_prediction_as_four_prediction_types():
    # the same errors in other units: eps = -(alpha / sigma) x_0, score = -eps / sigma, v = eps / alpha at fixed x_t
    with jax.enable_x64(True):
        schedule = linear_betas(8, 0.01, 0.5)

        @jax.jit
        def errors(key, x_0):
            return [
                losses.denoising_loss(denoiser(GAUSSIAN, each, 0.2), key, x_0, schedule, prediction_type=each)
                for each in PREDICTION_TYPES
            ]

        x, eps, v, score = errors(jax.random.key(3), np.asarray(X_0, np.float64))
        level = jax.tree.map(np.asarray, jax.jit(schedule)(x.t))
        np.testing.assert_allclose(eps.squared_error, (level.alpha / level.sigma) ** 2 * x.squared_error, rtol=1e-9)
        np.testing.assert_allclose(score.squared_error, eps.squared_error / level.sigma**2, rtol=1e-9)
        np.testing.assert_allclose(v.squared_error, eps.squared_error / level.alpha**2, rtol=1e-9)


def test_ddpm_loss_is_the_bound_with_one_term():
    def decoder(x_hat, x_1, level):
        return Normal(x_hat, var=level.sigma**2)

    @jax.jit
    def bounds(key, x_0, prior):
        arguments = denoiser(GAUSSIAN), key, x_0, SCHEDULE, decoder
        last, standard = SCHEDULE(SCHEDULE.num_steps), Normal(jnp.zeros(2), var=jnp.asarray(1.0))
        return (
            losses.ddpm_loss(*arguments, prior=prior),
            elbo.bound(*arguments, terms=1, prior=prior),
            losses.ddpm_loss(*arguments).prior,
            jax.vmap(lambda x: kl(forward.marginal(x, last), standard))(x_0),
        )

    ours, theirs, standard, expected = bounds(jax.random.key(0), X_0, Normal(0.0, var=1.2))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b)
    np.testing.assert_allclose(standard, expected, rtol=1e-5)


def test_gradient_reaches_the_denoiser():
    # L(w) of w * (exact eps) is a parabola; its minimum is at w = 1 in expectation, so the slopes have opposite signs
    @jax.jit
    @jax.grad
    def slope(w, x_0):
        scaled = jax.tree_util.Partial(lambda w, x, level: w * denoiser(GaussianWorld(0.0, 1.0))(x, level), w)
        return losses.simple_loss(scaled, jax.random.key(0), x_0, SCHEDULE).mean()

    x_0 = np.random.RandomState(5).randn(5000, 1).astype(np.float32)
    assert slope(0.5, x_0) < 0 < slope(1.5, x_0)


def test_the_bounds_weight_is_infinite_at_the_decoders_step_only():
    weight = partial(elbo.diffusion_weight, prediction_type="eps")
    loss = losses.denoising_loss(denoiser(GAUSSIAN), jax.random.key(0), X_0, SCHEDULE, weight=weight)
    assert np.array_equal(np.isinf(loss.weight), loss.t == 1)


@pytest.mark.parametrize("how", ["independent", "low_discrepancy", pytest.param("antithetic", marks=pytest.mark.slow)])
def test_importance_changes_the_steps_and_not_the_mean(how):
    # the mean of all terms, here in closed form: E ||eps - eps_hat||^2 = SNR D (Var[x_0 | x_t] + shift^2)
    level = jax.tree.map(np.asarray, SCHEDULE(jnp.arange(1, 9)))
    expected = np.mean((level.alpha / level.sigma) ** 2 * 2 * (GAUSSIAN.var_x_0(level) + 0.3**2))
    x_0 = (GAUSSIAN.mean + GAUSSIAN.var**0.5 * np.random.RandomState(8).randn(300, 64, 2)).astype(np.float32)
    for probabilities in (None, PROBABILITIES):

        def sample(k, x, p=probabilities):
            sampled = losses.denoising_loss(NET, k, x, SCHEDULE, time_sampling=how, probabilities=p)
            return sampled, sampled.loss.mean()

        sampled, mean = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(4), 300), x_0)
        assert_mean(mean, expected, resolution=0.2)  # batches are independent, the examples of one are not
        share = np.bincount(np.asarray(sampled.t).ravel(), minlength=9)[1:] / sampled.t.size
        wanted = np.full(8, 0.125) if probabilities is None else np.asarray(PROBABILITIES)
        np.testing.assert_allclose(share, wanted, atol=0.012)
        np.testing.assert_allclose(sampled.importance, (1 / (8 * wanted))[np.asarray(sampled.t) - 1], rtol=1e-5)


def test_low_discrepancy_and_antithetic_reduce_the_variance_of_a_batch():
    # t ||eps||^2 grows steadily with t, and in many dimensions this dominates
    @jax.jit
    @jax.vmap
    def means(key):
        loss = partial(losses.denoising_loss, _silent, key, jnp.zeros((16, 400)), SCHEDULE, weight=_by_step)
        return {how: loss(time_sampling=how).loss.mean() for how in ("independent", "low_discrepancy", "antithetic")}

    var = {how: np.var(mean) for how, mean in means(jax.random.split(jax.random.key(4), 400)).items()}
    print({how: round(var["independent"] / v, 1) for how, v in var.items()})
    assert var["low_discrepancy"] < var["independent"] / 10
    assert var["antithetic"] < var["independent"] / 4


def _silent(x_t, level):
    return jnp.zeros_like(x_t)


def _by_step(step):
    return step.t.t


def test_low_discrepancy_timesteps_are_those_of_time_sampling():
    @jax.jit
    def both(key, x_0):
        loss = losses.denoising_loss(NET, key, x_0, SCHEDULE, time_sampling="low_discrepancy")
        return loss.t, time_sampling.sample_timesteps(jax.random.split(key)[0], 500, 8, time_sampling="low_discrepancy")

    assert np.array_equal(*both(jax.random.key(0), X_0))


def test_probabilities_of_another_number_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"probabilities has shape \(7,\).*\(8,\)"):
        losses.denoising_loss(NET, jax.random.key(0), X_0, SCHEDULE, probabilities=PROBABILITIES[1:])
    negative = PROBABILITIES.at[0].set(-0.1)
    assert np.all(np.isnan(losses.denoising_loss(NET, jax.random.key(0), X_0, SCHEDULE, probabilities=negative).loss))


def test_probabilities_that_change_do_not_compile_anew():
    net = chex.assert_max_traces(lambda x_t, level: NET(x_t, level), n=1)
    for p in (PROBABILITIES, PROBABILITIES[::-1]):
        losses.denoising_loss(net, jax.random.key(0), X_0, SCHEDULE, probabilities=p)
