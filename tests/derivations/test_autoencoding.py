"""Misprints about variational autoencoders, tested on linear-Gaussian models, where every integral is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp

from tests.derivations.algebra import log_normal
from tests.derivations.check import assert_close, assert_disproved, assert_proved, refuted
from vdm_jax.gaussian import Normal, kl

# z ~ N(0, 1), x|z ~ N(SLOPE z + SHIFT, NOISE): so x ~ N(SHIFT, SLOPE^2 + NOISE)
SLOPE, SHIFT, NOISE = 2.0, 0.5, 0.3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _normal(mean, var):
    return Normal(jnp.asarray([mean]), var=jnp.asarray(var))


def _density(distribution, at):
    return np.exp(jax.vmap(distribution.log_prob)(jnp.asarray(at)[:, None]))


def _decoder(x, z):
    """N(x; SLOPE z + SHIFT, NOISE) at numbers x, z or grids of them."""
    x, z = jnp.broadcast_arrays(jnp.asarray(x, jnp.float64), jnp.asarray(z, jnp.float64))
    return np.exp(
        jax.vmap(lambda x, z: Normal(SLOPE * z[None] + SHIFT, var=jnp.asarray(NOISE)).log_prob(x[None]))(x, z)
    )


def test_erratum_the_decoder_is_a_distribution_of_x():
    # p(x|z) = N(x; mu(z), v). Printed as p(z|x) := N(x; mu(z), v), which does not integrate to 1 over z.
    x, z, shift = sp.symbols("x z b", real=True)
    slope, v = sp.symbols("w v", positive=True)
    distribution = sp.exp(log_normal(x, slope * z + shift, v))
    assert_proved(sp.integrate(distribution, (x, -sp.oo, sp.oo)), 1)
    over_z = sp.simplify(sp.integrate(distribution.subs(x, shift), (z, -sp.oo, sp.oo)))
    assert_proved(over_z, 1 / slope)
    assert_disproved(over_z, 1)
    # as p(x|z) it gives p(x) by the integral over z; as p(z|x) it is not the posterior of the same model
    grid = np.linspace(-12.0, 12.0, 6001)
    prior, evidence = _density(_normal(0.0, 1.0), grid), _normal(SHIFT, SLOPE**2 + NOISE)
    assert_close(np.trapezoid(_decoder(1.2, grid) * prior, grid), _density(evidence, [1.2])[0], rtol=1e-12)
    assert_close(np.trapezoid(_decoder(grid, 0.4), grid), 1.0, rtol=1e-12)
    with refuted():
        assert_close(np.trapezoid(_decoder(1.2, grid), grid), 1.0, rtol=0.1)


# A hierarchy of three levels: y = (x, z_1, z_2, z_3), each a multiple of the next plus noise, from z_3 ~ N(0, 1).
GAINS, NOISES = (2.0, 0.7, -0.5), (0.3, 0.4, 1.1)


def _joint_covariance():
    """Var of y: x = gain z_1 + noise, and so on up; from the top down."""
    covariance = np.eye(4)
    for i in (2, 1, 0):
        covariance[i, i + 1 :] = covariance[i + 1 :, i] = GAINS[i] * covariance[i + 1, i + 1 :]
        covariance[i, i] = GAINS[i] ** 2 * covariance[i + 1, i + 1] + NOISES[i]
    return covariance


def _conditional(y, i, j=None):
    """log p(y_i | y_j), or log p(y_i), of the joint distribution."""
    covariance = _joint_covariance()
    gain = 0.0 if j is None else covariance[i, j] / covariance[j, j]
    var = covariance[i, i] - (0.0 if j is None else gain * covariance[j, i])
    return Normal(gain * y[jnp.asarray([j or 0])], var=jnp.asarray(var)).log_prob(y[jnp.asarray([i])])


def _mass(log_density):
    """The integral over y of a centered Gaussian function, and its precision matrix."""
    value, hessian = jax.jit(lambda y: (log_density(y), jax.hessian(log_density)(y)))(jnp.zeros(4))
    precision = -np.asarray(hessian)
    return np.exp(value) * np.sqrt(np.linalg.det(2 * np.pi * np.linalg.inv(precision))), precision


def test_erratum_a_hierarchy_counts_each_latent_once():
    # p(x|z_1) p(z_1|z_2) p(z_2|z_3) p(z_3). Printed with p(x, z_1) for p(x|z_1), which counts p(z_1) twice.
    def down(y):
        return _conditional(y, 1, 2) + _conditional(y, 2, 3) + _conditional(y, 3)

    def correct(y):
        return _conditional(y, 0, 1) + down(y)

    def printed(y):
        return _conditional(y, 0, 1) + _conditional(y, 1) + down(y)

    mass, precision = _mass(correct)
    assert_close(mass, 1.0, rtol=1e-12)
    assert_close(np.linalg.inv(precision), _joint_covariance(), rtol=1e-12)
    mass, precision = _mass(printed)
    with refuted():
        assert_close(mass, 1.0, rtol=0.1)
    with refuted():
        assert_close(np.linalg.inv(precision), _joint_covariance(), rtol=0.1)

    # Bottom up, q(z_i|z_{i-1}): with this model's own conditionals p(x, z) / q(z|x) is p(x) at every z. Printed with
    # q(z_i|z_{i-2}), where z_0 = x: then z_2 is not conditioned on z_1, and the ratio depends on z.
    def up(y):
        return _conditional(y, 1, 0) + _conditional(y, 2, 1) + _conditional(y, 3, 2)

    def skipping(y):
        return _conditional(y, 1, 0) + _conditional(y, 2, 0) + _conditional(y, 3, 1)

    points = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)))

    @jax.jit
    @jax.vmap
    def claims(y):
        return _conditional(y, 0), correct(y) - up(y), correct(y) - skipping(y)

    evidence, ratio, other = claims(points)
    assert_close(ratio, evidence, rtol=1e-12)
    with refuted():
        assert_close(other, evidence, rtol=0.1)


def test_erratum_generation_samples_the_prior():
    # Decoded samples of the prior have the distribution p(x). Printed: samples of the encoder, N(mu_phi(x),
    # sigma_phi^2), which reconstruct the input x; the encoder used here is the optimal one, the posterior.
    evidence = _normal(SHIFT, SLOPE**2 + NOISE)
    posterior_var = NOISE / (SLOPE**2 + NOISE)

    def encoder(x):
        return _normal(SLOPE * (x - SHIFT) / (SLOPE**2 + NOISE), posterior_var)

    def decoded(distribution):
        return Normal(SLOPE * distribution.mean + SHIFT, var=SLOPE**2 * distribution.var + NOISE)

    # decoded() is the integral of p(x|z) over the distribution of z
    grid, x = np.linspace(-12.0, 12.0, 6001), np.array([-1.0, 0.2, 3.0])
    for distribution in (_normal(0.0, 1.0), encoder(1.7)):
        integral = [np.trapezoid(_decoder(value, grid) * _density(distribution, grid), grid) for value in x]
        assert_close(integral, _density(decoded(distribution), x), rtol=1e-10)

    assert_close(kl(decoded(_normal(0.0, 1.0)), evidence), 0.0, atol=1e-15)
    for start in (-2.0, 0.5, 1.7):
        with refuted():
            assert_close(kl(decoded(encoder(start)), evidence), 0.0, atol=0.1)
