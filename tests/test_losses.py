"""Training losses: the steps drawn, the parts returned, and one prediction seen through four kinds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, forward, losses
from vdm_jax.gaussian import Normal, kl
from vdm_jax.tables import linear_betas

TABLE = linear_betas(8, 0.01, 0.5)
WORLD = GaussianWorld(0.4, 0.6)
X_0 = WORLD.sample(jax.random.key(9), (500, 2))


@pytest.mark.parametrize("spread", [False, True])
def test_steps_are_uniform_on_one_to_t(spread):
    # counted per slot of the batch over many keys: each alone is uniform
    keys = jax.random.split(jax.random.key(0), 20_000)
    t = np.asarray(jax.vmap(lambda k: losses.draw_steps(k, 3, 7, spread=spread))(keys))
    assert t.min() == 1
    assert t.max() == 7
    for slot in range(3):
        assert stats.chisquare(np.bincount(t[:, slot], minlength=8)[1:]).pvalue > 1e-4


def test_spread_steps_cover_evenly():
    # 21 steps over T = 7: three of each, whatever the key; independent draws are hardly ever so even
    for key in jax.random.split(jax.random.key(1), 20):
        counts = np.bincount(losses.draw_steps(key, 21, 7, spread=True), minlength=8)[1:]
        assert counts.min() >= 2
        assert counts.max() <= 4
    keys = jax.random.split(jax.random.key(2), 500)
    even, loose = (
        np.asarray(jax.vmap(lambda k, s=s: losses.draw_steps(k, 16, 1000, spread=s).mean())(keys))
        for s in (True, False)
    )
    assert even.var() < loose.var() / 10  # in truth by B = 16
    unasked = np.asarray(jax.vmap(lambda k: losses.draw_steps(k, 16, 1000).mean())(keys))
    assert even.var() < unasked.var() / 10


def test_parts_of_a_loss():
    loss = losses.denoising_loss(denoiser(WORLD), jax.random.key(0), X_0, TABLE, weight=lambda step: 3.0 * step.t.sigma)
    assert loss.t.shape == loss.squared_error.shape == loss.weight.shape == (500,)
    assert set(np.unique(loss.t)) == set(range(1, 9))
    np.testing.assert_allclose(loss.weight, 3.0 * TABLE(loss.t).sigma, rtol=1e-6)  # of step t, not t - 1
    np.testing.assert_allclose(loss.loss, loss.weight * loss.squared_error)
    simple = losses.simple_loss(denoiser(WORLD), jax.random.key(0), X_0, TABLE)
    np.testing.assert_allclose(simple, loss.squared_error, rtol=1e-6)


def test_a_true_prediction_costs_nothing():
    # data that are one point: the exact denoiser knows the noise
    point = GaussianWorld(0.7, 0.0)
    for kind in ("x_0", "eps", "v", "score"):
        loss = losses.simple_loss(denoiser(point, kind), jax.random.key(0), jnp.full((50, 2), 0.7), TABLE, kind=kind)
        assert np.max(loss) < 1e-6


def test_one_prediction_through_four_kinds():
    # the same errors in other units: eps = -(alpha / sigma) x_0, score = -eps / sigma, v = eps / alpha at fixed x_t
    with jax.enable_x64(True):
        table, x_0 = linear_betas(8, 0.01, 0.5), jnp.asarray(np.asarray(X_0, np.float64))

        def error(kind):
            return losses.denoising_loss(denoiser(WORLD, kind, 0.2), jax.random.key(3), x_0, table, kind=kind)

        x, eps, v, score = (error(kind) for kind in ("x_0", "eps", "v", "score"))
        level = table(x.t)
        np.testing.assert_allclose(eps.squared_error, level.snr * x.squared_error, rtol=1e-9)
        np.testing.assert_allclose(score.squared_error, eps.squared_error / level.sigma**2, rtol=1e-9)
        np.testing.assert_allclose(v.squared_error, eps.squared_error / level.alpha**2, rtol=1e-9)


def test_ddpm_loss_is_the_bound_with_one_term():
    def decoder(x_hat, x_1, level):
        return Normal(x_hat, level.sigma**2)

    ours = losses.ddpm_loss(denoiser(WORLD), jax.random.key(0), X_0, TABLE, decoder, prior_log_var=0.2)
    theirs = elbo.bound(denoiser(WORLD), jax.random.key(0), X_0, TABLE, decoder, terms=1, prior_log_var=0.2)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b)
    standard = losses.ddpm_loss(denoiser(WORLD), jax.random.key(0), X_0, TABLE, decoder).prior
    truth = jax.vmap(lambda x: kl(forward.marginal(x, TABLE(TABLE.num_steps)), Normal(0 * x, jnp.asarray(1.0))))(X_0)
    np.testing.assert_allclose(standard, truth, rtol=1e-5)


def test_gradient_reaches_the_denoiser():
    # L(w) of w * (exact eps) is a parabola; its minimum lies at w = 1 in expectation, so the slopes have opposite signs
    def loss(w):
        scaled = jax.tree_util.Partial(lambda w, x, level: w * denoiser(GaussianWorld(0.0, 1.0))(x, level), w)
        x_0 = jax.random.normal(jax.random.key(5), (5000, 1))
        return losses.simple_loss(scaled, jax.random.key(0), x_0, TABLE).mean()

    assert jax.grad(loss)(0.5) < 0 < jax.grad(loss)(1.5)


def test_the_bounds_weight_is_infinite_at_the_decoders_step_only():
    weight = partial(elbo.diffusion_weight, kind="eps")
    loss = losses.denoising_loss(denoiser(WORLD), jax.random.key(0), X_0, TABLE, weight=weight)
    assert np.array_equal(np.isinf(loss.weight), loss.t == 1)
