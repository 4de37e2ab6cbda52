"""Score-based and variational functions agree wherever a function of one view has a counterpart in the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.check import assert_mean
from tests.derivations.worlds import draws
from vdm_jax import (
    autoencoder,
    closed_form,
    elbo,
    information,
    langevin,
    losses,
    samplers,
    score_matching,
    sure,
    tweedie,
)
from vdm_jax.discrete_schedules import from_betas, linear_betas
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr
from vdm_jax.parameterization import ScoreFromDenoiser, to_eps, to_score
from vdm_jax.schedules import LinearLogSNR

KEY = jax.random.key(0)
MIXTURE = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
BEST = closed_form.OptimalDenoiser(MIXTURE)
WEIGHTS = jnp.asarray(np.random.RandomState(0).normal(size=(2, 2)), jnp.float32)


def net(weights, x_t, level):
    """A small network that is not optimal for any loss."""
    return jnp.tanh(x_t @ weights + level.sigma[:, None]) - 0.3 * x_t


def as_score(denoiser, x_t, level):
    """An eps-network as a score network."""
    return jax.vmap(lambda value, x, lv: to_score(value, x, lv, "eps"))(denoiser(x_t, level), x_t, level)


def as_eps(denoiser, x_t, level):
    """A score network as an eps-network."""
    return jax.vmap(lambda value, x, lv: to_eps(value, x, lv, "score"))(denoiser(x_t, level), x_t, level)


DENOISERS = {"network": Partial(net, WEIGHTS), "exact": BEST}
each_denoiser = pytest.mark.parametrize("name", ["network", pytest.param("exact", marks=pytest.mark.slow)])


def at(levels: NoiseLevel, i: int) -> NoiseLevel:
    return jax.tree.map(lambda field: field[i], levels)


def exploding(sigma) -> NoiseLevel:
    """The level x + sigma eps of a variance-exploding process."""
    sigma = jnp.asarray(sigma)
    return NoiseLevel(jnp.ones_like(sigma), sigma, jnp.zeros_like(sigma), jnp.log(sigma))


# The losses


@each_denoiser
def test_score_matching_at_a_level_is_half_the_eps_loss(name):
    # example by example, with the same noise; with weight 1 it is half the squared error of the score
    x_0, levels = draws(MIXTURE, KEY, 6), level_from_log_snr(jnp.linspace(-4.0, 4.0, 6))

    @jax.jit
    def losses_of(denoiser):
        score = Partial(as_score, denoiser)
        matching = partial(score_matching.denoising_at_level, score, KEY, x_0, levels)
        return (
            (matching(), elbo.denoising_error(denoiser, KEY, x_0, levels, "eps")),
            (
                matching(weight=lambda level: jnp.ones_like(level.sigma)),
                elbo.denoising_error(score, KEY, x_0, levels, "score"),
            ),
        )

    for matched, loss in losses_of(DENOISERS[name]):
        np.testing.assert_allclose(matched, 0.5 * loss, rtol=1e-4)


def test_twice_score_matching_over_the_levels_is_ddpm_s_simple_loss():
    # in expectation over the level too, for a schedule with few levels
    schedule, many, net = from_betas([0.1, 0.3, 0.6]), 30_000, DENOISERS["network"]
    x_0 = draws(MIXTURE, KEY, many)

    @jax.jit
    def both(net):
        steps = jnp.arange(many) % 3 + 1
        matched = score_matching.denoising_at_level(Partial(as_score, net), jax.random.key(1), x_0, schedule(steps))
        return losses.simple_loss(net, KEY, x_0, schedule), matched

    simple, matched = both(net)
    assert_mean(np.asarray(simple, np.float64) - 2.0 * np.asarray(matched, np.float64), 0.0, resolution=0.02)


def test_likelihood_weighs_score_matching_by_the_diffusion():
    # Song et al. 2021: with w = g^2 = -sigma^2 lambda' it is the rate of the bound in continuous time
    schedule, slope = LinearLogSNR(6.0, -8.0), -14.0
    x_0 = draws(MIXTURE, KEY, 6)

    @jax.jit
    def both(t):
        levels = jax.vmap(schedule)(t)
        rate = jax.vmap(lambda level: elbo.continuous_diffusion_weight(level, jnp.float32(slope), "eps"))(levels)
        matched = score_matching.denoising_at_level(
            BEST, KEY, x_0, levels, prediction_type="eps", weight=lambda level: -slope * level.sigma**2
        )
        return matched, rate * elbo.denoising_error(BEST, KEY, x_0, levels, "eps")

    matched, bound = both(jnp.linspace(0.1, 0.9, 6))
    np.testing.assert_allclose(matched, bound, rtol=1e-5)


# The networks


@each_denoiser
def test_langevin_samples_with_the_score_of_a_ddpm(name):
    levels, x = level_from_log_snr(jnp.linspace(-5.0, 4.0, 5)), draws(MIXTURE, KEY, 7)
    eps = langevin.annealed_langevin(DENOISERS[name], KEY, x, levels, prediction_type="eps", steps=4, path=True)
    score = langevin.annealed_langevin(Partial(as_score, DENOISERS[name]), KEY, x, levels, steps=4, path=True)
    np.testing.assert_allclose(score.path, eps.path, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.x, eps.x, rtol=1e-4, atol=1e-5)


@each_denoiser
def test_a_score_network_samples_as_a_ddpm(name):
    schedule, x_T = linear_betas(12, 0.01, 0.4), jax.random.normal(KEY, (7, 2))
    score = Partial(as_score, DENOISERS[name])
    ours = samplers.ancestral(score, KEY, x_T, schedule, prediction_type="score", snapshots=12)
    there = samplers.ancestral(Partial(as_eps, score), KEY, x_T, schedule, prediction_type="eps", snapshots=12)
    np.testing.assert_allclose(ours.trajectory.x_t, there.trajectory.x_t, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.x_0, there.x_0, rtol=1e-3, atol=1e-4)
    first = samplers.ancestral(DENOISERS[name], KEY, x_T, schedule, prediction_type="eps").x_0
    np.testing.assert_allclose(ours.x_0, first, rtol=1e-3, atol=1e-4)


# The posterior


@pytest.mark.parametrize("process", ["preserving", pytest.param("exploding", marks=pytest.mark.slow)])
def test_tweedie_is_the_posterior(process):
    with jax.enable_x64(True):
        distribution = closed_form.mixture(
            [0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [[[0.3, 0.1], [0.1, 0.2]], [[0.05, 0], [0, 0.4]]]
        )

        @jax.jit
        def claims(log_snr):
            level = level_from_log_snr(log_snr) if process == "preserving" else exploding(jnp.exp(-0.5 * log_snr))
            noisy = closed_form.marginal(distribution, level)
            x_t, score = draws(noisy, KEY, 5), jax.vmap(noisy.score)
            posterior = jax.vmap(lambda x: distribution.posterior(x, level))(x_t)
            networks = {  # also from what a network of any kind predicts
                kind: ScoreFromDenoiser(closed_form.OptimalDenoiser(distribution, kind), level, kind)
                for kind in ("x_0", "eps", "v")
            }
            ours = [tweedie.posterior_mean(s, x_t, level) for s in (score, *networks.values())]
            return (
                (ours, jax.vmap(lambda p: p.mean)(posterior)),
                (tweedie.posterior_covariance(score, x_t, level), jax.vmap(lambda p: p.covariance())(posterior)),
            )

        for log_snr in (-3.0, 0.5, 3.0):
            (means, mean), (ours, covariance) = claims(jnp.asarray(log_snr))
            for each in means:
                np.testing.assert_allclose(each, mean, rtol=1e-10)
            np.testing.assert_allclose(ours, covariance, rtol=1e-9, atol=1e-12)


# The autoencoder


def _tweedie(level, y):
    return tweedie.posterior_mean(jax.vmap(closed_form.marginal(MIXTURE, level).score), y, level)


DEVIATIONS = {
    "sin": jnp.sin,
    "turned": lambda y: y[:, ::-1],
    "back": lambda y: _tweedie(exploding(0.6), y) - y,
}


@pytest.mark.parametrize("name", ["sin", *(pytest.param(n, marks=pytest.mark.slow) for n in ("turned", "back"))])
def test_the_best_denoising_autoencoder_is_tweedie_s(name):
    # any other function's risk exceeds it by its mean squared distance: the optimal error is uncorrelated with y
    level, x = exploding(0.6), draws(MIXTURE, KEY, 40_000)

    @jax.jit
    def claims(x):
        def error(share):
            return autoencoder.denoising_reconstruction_error(
                lambda y: _tweedie(level, y) + share * DEVIATIONS[name](y),
                lambda z: z,
                jax.random.key(1),
                x,
                level.sigma,
            )

        y = x + level.sigma * jax.random.normal(jax.random.key(2), x.shape)
        return error(0.1) - error(0.0), jnp.sum((0.1 * DEVIATIONS[name](y)) ** 2, 1)

    more, square = (np.asarray(part, np.float64) for part in claims(x))
    assert more.mean() > 4 * more.std() / np.sqrt(more.size)
    assert_mean(more - square, 0.0)


def test_the_risk_of_the_best_denoiser_is_the_mmse():
    level, key = exploding(0.6), jax.random.key(1)
    y, x = draws(closed_form.marginal(MIXTURE, level), KEY, 40_000), draws(MIXTURE, KEY, 40_000)

    @jax.jit
    def claims(x, y):
        best = Partial(_tweedie, level)
        risks = (
            sure.sure(best, None, y, level.sigma, trace="exact"),
            sure.sure(best, key, y, level.sigma),
            autoencoder.denoising_reconstruction_error(best, lambda z: z, key, x, level.sigma),  # with clean data
        )
        return risks, information.mmse(MIXTURE, level, partial(information.quadrature, nodes=101)).value

    risks, expected = claims(x, y)
    for risk in risks:
        assert_mean(risk, expected, resolution=0.01)


# The samples


def _features(x):
    """For each sample: its coordinates, their products, and whether x_1 > 0."""
    x = np.asarray(x, np.float64)
    return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2, x[:, 0] > 0], axis=1)


def _expected_features(noise):
    """The features' means under the distribution with added noise of this variance, by hand."""
    weights, means, spread = np.array([0.3, 0.7]), np.array([[-1.0, 0.2], [0.8, -0.4]]), np.array([0.05, 0.2]) + noise
    products = np.einsum("k,ki,kj->ij", weights, means, means) + weights @ spread * np.eye(2)
    side = weights @ stats.norm.cdf(means[:, 0] / np.sqrt(spread))
    return np.array([*(weights @ means), products[0, 0], products[0, 1], products[1, 1], side])


@pytest.mark.parametrize("view", ["variational", "score"])
def test_both_views_sample_the_same_distribution(view):
    # Langevin's bias of a mode's variance, rate sigma^2 / (v + sigma^2) / 2 < 0.03 of it, is below the error bar
    noise = jax.random.normal(KEY, (4000, 2))
    if view == "variational":
        x, extra = samplers.ancestral(BEST, jax.random.key(1), noise, linear_betas(500, 2e-4, 0.04)).x_0, 0.0
    else:
        levels = level_from_log_snr(jnp.linspace(-5.0, 2.5, 12))
        chain = langevin.annealed_langevin(
            closed_form.OptimalDenoiser(MIXTURE, "score"),
            jax.random.key(1),
            noise,
            levels,
            rate=0.08,
            steps=300,
            denoise=False,
        )
        end = at(levels, -1)
        x, extra = chain.x / end.alpha, float(1.0 / end.snr)
    assert_mean(_features(x), _expected_features(extra), resolution=0.03)
