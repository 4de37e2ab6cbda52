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
X_0 = (0.4 + 0.6**0.5 * np.random.RandomState(2).randn(4, 3)).astype(np.float32)
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
    schedule = discretize(Cosine(), 6)

    @jax.jit
    @jax.grad
    def slope(w, x_0):
        result = function(Partial(_scaled, w), jax.random.key(0), x_0, schedule, _decoder)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, result))

    assert np.isfinite(slope(0.9, X_0))


def test_consistency_bound_in_another_prior():
    # another prior moves E KL(q(x_T|x_{T-1}) || p) as it moves KL(q(x_T|x_0) || p): pathwise identity
    schedule = discretize(VarianceExploding(0.1, 5.0), 5)

    @jax.jit
    def both(x_0, prior):
        bound = path_bounds.consistency_bound(
            denoiser(GAUSSIAN), jax.random.key(0), x_0, schedule, _decoder, prior=prior
        )
        return bound.prior, elbo.prior_kl(x_0[0], schedule(5), prior)

    (near, near_kl), (far, far_kl) = (both(np.full((20_000, 1), 0.7, np.float32), prior) for prior in (NARROW, WIDE))
    assert_mean(np.asarray(far) - np.asarray(near), far_kl - near_kl)


def test_one_path_is_the_joint_ratio_and_more_are_their_mean():
    schedule = discretize(Cosine(), 6)

    @jax.jit
    def evaluate(x_0, key):
        ratio = lambda k: path_bounds.joint_log_ratio(denoiser(GAUSSIAN), k, x_0, schedule, _decoder)  # noqa: E731
        arguments = denoiser(GAUSSIAN), key, x_0, schedule, _decoder
        one, three = (path_bounds.importance_weighted_bound(*arguments, samples=samples) for samples in (1, 3))
        return one, three, jax.lax.map(ratio, jnp.concatenate([jax.random.split(key, n) for n in (1, 3)]))

    one, three, (first, *ratios) = evaluate(X_0, jax.random.key(0))
    mean = np.exp(np.asarray(ratios, np.float64)).mean(0)
    np.testing.assert_allclose(np.exp(-np.asarray(three, np.float64)), mean, rtol=1e-4)
    np.testing.assert_allclose(one, -first, rtol=1e-6)


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
