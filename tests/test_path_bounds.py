"""Bounds along whole paths as functions; their theorems are in `derivations/test_elbo.py` and `test_vdm.py` there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.derivations.check import assert_mean
from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, path_bounds
from vdm_jax.discrete_schedules import discretize
from vdm_jax.gaussian import Normal
from vdm_jax.schedules import Cosine, VarianceExploding

GAUSSIAN = GaussianWorld(0.4, 0.6)
NARROW, WIDE = Normal(0.0, var=20.0), Normal(0.3, var=55.0)


def _decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def _scaled(w, x_t, level):
    return w * denoiser(GAUSSIAN)(x_t, level)


@pytest.mark.parametrize(
    "function",
    [
        path_bounds.joint_log_ratio,
        path_bounds.consistency_bound,
        lambda *given: path_bounds.importance_weighted_bound(*given, samples=2),
    ],
)
def test_gradients_are_finite(function):
    x_0, schedule = GAUSSIAN.sample(jax.random.key(2), (4, 3)), discretize(Cosine(), 6)

    def loss(w):
        result = function(Partial(_scaled, w), jax.random.key(0), x_0, schedule, _decoder)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, result))

    assert np.isfinite(jax.grad(loss)(0.9))


def test_consistency_bound_in_another_prior():
    # another prior moves E KL(q(x_T|x_{T-1}) || p) as it moves KL(q(x_T|x_0) || p): pathwise identity
    x_0, schedule = jnp.full((20_000, 1), 0.7), discretize(VarianceExploding(0.1, 5.0), 5)
    arguments = denoiser(GAUSSIAN), jax.random.key(0), x_0, schedule, _decoder
    near, far = (path_bounds.consistency_bound(*arguments, prior=p).prior for p in (NARROW, WIDE))
    level = schedule(5)
    expected = elbo.prior_kl(x_0[0], level, WIDE) - elbo.prior_kl(x_0[0], level, NARROW)
    assert_mean(far - near, expected)


def test_one_path_is_the_joint_ratio_and_more_are_their_mean():
    x_0, schedule = GAUSSIAN.sample(jax.random.key(2), (4, 3)), discretize(Cosine(), 6)
    arguments = x_0, schedule, _decoder
    keys = jax.random.split(jax.random.key(0), 3)
    ratios = np.stack([path_bounds.joint_log_ratio(denoiser(GAUSSIAN), key, *arguments) for key in keys])
    ours = path_bounds.importance_weighted_bound(denoiser(GAUSSIAN), jax.random.key(0), *arguments, samples=3)
    np.testing.assert_allclose(np.exp(-np.asarray(ours, np.float64)), np.exp(ratios.astype(float)).mean(0), rtol=1e-4)
    one = path_bounds.importance_weighted_bound(denoiser(GAUSSIAN), jax.random.key(0), *arguments, samples=1)
    ratio = path_bounds.joint_log_ratio(denoiser(GAUSSIAN), jax.random.split(jax.random.key(0), 1)[0], *arguments)
    np.testing.assert_allclose(one, -ratio, rtol=1e-6)


def test_another_prior_reaches_the_importance_bound():
    x_0, schedule = jnp.full((4, 1), 0.7), discretize(VarianceExploding(0.1, 5.0), 5)
    near, far = (
        path_bounds.importance_weighted_bound(
            denoiser(GAUSSIAN), jax.random.key(0), x_0, schedule, _decoder, samples=1, prior=Normal(0.0, var=v)
        )
        for v in (25.0, 1e13)
    )
    assert np.all(far > near + 5)


def test_zero_paths_are_refused():
    x_0, schedule = jnp.full((4, 1), 0.7), discretize(Cosine(), 5)
    with pytest.raises(ValueError, match=r"samples is 0.*at least one"):
        path_bounds.importance_weighted_bound(denoiser(GAUSSIAN), jax.random.key(0), x_0, schedule, _decoder, samples=0)
