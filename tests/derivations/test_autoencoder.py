"""AE: the optimal autoencoder where it is known in closed form; the distribution of its codes is not constrained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial
from scipy.spatial import cKDTree

from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from tests.derivations.worlds import draws
from vdm_jax import autoencoder, closed_form, information, linear_gaussian
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import NoiseLevel


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# 300 points in five dimensions, away from the origin
SPREAD = np.array([2.0, 1.4, 0.7, 0.4, 0.3])


def _data():
    random = np.random.RandomState(0)
    rotation, _ = np.linalg.qr(random.randn(5, 5))
    return random.randn(300, 5) * SPREAD @ rotation.T + np.linspace(-0.5, 0.5, 5)


def _eigen(data):
    """Eigenvalues of the covariance, the largest first, and their vectors as columns: by a singular decomposition."""
    data = np.asarray(data)
    _, scales, rows = np.linalg.svd(data - data.mean(0), full_matrices=False)
    return scales**2 / len(data), rows.T


def _affine(parameters, x):
    weights, shift = parameters
    return x @ weights + shift[None]


def _linear(weights, x):
    return x @ weights


def _mean_error(encoder, decoder, data):
    return autoencoder.reconstruction_error(encoder, decoder, data).mean()


def _projection_error(basis, data):
    """Reconstruction error of the autoencoder that projects onto orthonormal columns."""
    basis, centered = jnp.asarray(basis), jnp.asarray(data - data.mean(0))
    return _mean_error(Partial(_linear, basis), Partial(_linear, basis.T), centered)


def test_AE_1_projection_on_a_line_loses_the_variance_across_it():
    # Two dimensions with variances l > m, one code: projection onto a line at angle theta to the first axis.
    theta, x, y = sp.symbols("theta x y", real=True)
    m, extra = sp.symbols("m extra", positive=True)
    line, point = sp.Matrix([sp.cos(theta), sp.sin(theta)]), sp.Matrix([x, y])
    rest = point - line * line.dot(point)
    error = sp.expand(rest.dot(rest)).subs(x * y, 0).subs({x**2: m + extra, y**2: m})  # E: uncorrelated axes
    assert_proved(error, m + extra * sp.sin(theta) ** 2)  # m, the discarded eigenvalue, is the minimum
    # the same with the library's functions, in the plane of the first two principal axes
    data = _data()
    variances, directions = _eigen(data)
    for angle in (0.0, 0.4, -1.1):
        planar = error.subs({theta: angle, m: variances[1], extra: variances[0] - variances[1]})
        direction = directions[:, :2] @ np.array([[np.cos(angle)], [np.sin(angle)]])
        assert_close(_projection_error(direction, data), float(planar) + variances[2:].sum(), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_AE_1_training_ends_in_the_principal_subspace(k):
    # Gradient descent on the error alone: affine maps from a random start, without an orthogonality constraint.
    data = jnp.asarray(_data())
    random = np.random.RandomState(1)
    start = [(0.3 * random.randn(*shape), np.zeros(shape[1])) for shape in ((5, k), (k, 5))]

    def loss(parameters):
        encoder, decoder = (Partial(_affine, each) for each in parameters)
        return _mean_error(encoder, decoder, data)

    def update(parameters, _):
        return jax.tree.map(lambda p, g: p - 0.03 * g, parameters, jax.grad(loss)(parameters)), None

    train = jax.jit(lambda parameters: jax.lax.scan(update, parameters, length=4000)[0])
    trained = train(jax.tree.map(jnp.asarray, start))
    variances, directions = _eigen(data)
    assert_close(loss(trained), variances[k:].sum(), rtol=1e-10)
    assert_close(linear_gaussian.principal_components(data).reconstruction_error(k), variances[k:].sum(), rtol=1e-12)
    rows, _ = np.linalg.qr(np.asarray(trained[1][0]).T)
    assert_close(rows @ rows.T, directions[:, :k] @ directions[:, :k].T, atol=1e-6)


def test_AE_1_no_other_subspace_does_better():
    # The error of an orthogonal projection is the total minus the retained variance, which the principal axes maximize.
    data = _data()
    variances, directions = _eigen(data)
    covariance, principal = np.cov(data.T, bias=True), linear_gaussian.principal_components(jnp.asarray(data))
    for k in range(1, 5):
        encode = partial(principal.encode, k=k)
        ours = autoencoder.reconstruction_error(encode, principal.decode, jnp.asarray(data))
        assert_close(ours.mean(), variances[k:].sum(), rtol=1e-12)
    assert_close(np.abs(np.sum(principal.directions * directions, 0)), np.ones(5), rtol=1e-12)  # up to signs

    random = np.random.RandomState(2)
    for size in (1e-3, 0.1, 10.0):  # subspaces close to the principal one, and random ones
        for _ in range(5):
            basis, _ = np.linalg.qr(directions[:, :2] + size * random.randn(5, 2))
            ours = _projection_error(basis, data)
            assert_close(ours, np.trace(covariance) - np.trace(basis.T @ covariance @ basis), rtol=1e-12)
            assert ours > variances[2:].sum()


# Distributions of clean data for AE-2: one dimension, where integrals are sums over a grid.
DISTRIBUTIONS = {
    "gaussian": lambda: closed_form.gaussian([0.4], [[0.5]]),
    "mixture": lambda: closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02]),
}
SIGMA = 0.6


def _level(sigma=SIGMA):
    """Unscaled data plus noise: alpha = 1."""
    one, sigma = jnp.ones(()), jnp.asarray(sigma)
    return NoiseLevel(one, sigma, jnp.zeros(()), jnp.log(sigma))


def _best(distribution, sigma=SIGMA):
    return jax.vmap(lambda y: closed_form.optimal_prediction(distribution, y, _level(sigma), "x_0"))


def _denoisers(distribution):
    """Batched maps y -> x: the optimal one and others."""
    best = _best(distribution)
    return {
        "best": best,
        "shifted": lambda y: best(y) + 0.2,
        "for less noise": _best(distribution, SIGMA / 2),
        "bent": lambda y: jnp.tanh(2.0 * y),
    }


def _identity(y):
    return y


def _error(denoiser, key, x, sigma=SIGMA):
    return autoencoder.denoising_reconstruction_error(_identity, denoiser, key, x, sigma)


def _square_at_noisy(f, key, x):
    """||f(y)||^2 at exactly the y that `_error` uses: the error of a decoder x + f(y)."""
    return _error(lambda y: x + f(y), key, x)


def _over_noisy(distribution, f):
    """E f(y) over y = x + sigma eps, one y at a time, by quadrature."""
    return information.quadrature(f, closed_form.marginal(distribution, _level())).value


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_AE_2_best_denoiser_is_the_conditional_expectation(name):
    # E ||x - D(x + sigma eps)||^2 = E Var[x | y] + E ||D(y) - E[x | y]||^2, both by quadrature
    distribution, key = DISTRIBUTIONS[name](), jax.random.key(1)
    x, denoisers = draws(distribution, jax.random.key(0), 50_000), _denoisers(distribution)
    best = denoisers["best"]

    def claims(denoiser):
        def apart(y):
            return denoiser(y) - best(y)

        excess = _over_noisy(distribution, lambda y: jnp.sum(apart(y[None]) ** 2))
        return _error(denoiser, key, x), _square_at_noisy(apart, key, x), excess

    def all_claims():
        least = _over_noisy(distribution, lambda y: jnp.sum(distribution.posterior(y, _level()).variance))
        return least, {name: claims(denoiser) for name, denoiser in denoisers.items()}

    least, found = jax.jit(all_claims)()
    for other, (error, apart, excess) in found.items():
        assert_mean(error, least + excess, resolution=0.02 * (least + excess))
        if other != "best":  # paired, with the same noise: the cross term has mean 0
            assert_mean(np.asarray(error) - found["best"][0] - apart, 0.0, resolution=0.02)
            assert error.mean() > found["best"][0].mean()
    if name == "gaussian":  # by the regression of x on y
        assert_close(least, 0.5 * SIGMA**2 / (0.5 + SIGMA**2), rtol=1e-12)
    assert_close(least, information.mmse(distribution, _level()).value, rtol=1e-12)


def test_AE_2_no_noise_is_AE_1():
    x = jnp.asarray(_data())
    ours = _error(jnp.tanh, jax.random.key(0), x, sigma=0.0)
    assert_close(ours, autoencoder.reconstruction_error(_identity, jnp.tanh, x), rtol=1e-15)
    assert_close(ours, np.square(x - np.tanh(x)).sum(1), rtol=1e-12)


def test_AE_2_error_is_a_score_error_in_symbols():
    # with D(y) = y + sigma^2 s(y):  (x - D)^2 = sigma^4 (s - d log q(y|x) / dy)^2
    x, y, s = sp.symbols("x y s", real=True)
    sigma = sp.Symbol("sigma", positive=True)
    conditional = sp.diff(-((y - x) ** 2) / (2 * sigma**2), y)
    assert_proved((x - (y + sigma**2 * s)) ** 2, sigma**4 * (s - conditional) ** 2)


@pytest.mark.slow
def test_AE_2_training_is_denoising_score_matching():
    distribution = DISTRIBUTIONS["mixture"]()
    x, key = draws(distribution, jax.random.key(2), 50_000), jax.random.key(3)
    noisy, denoisers = closed_form.marginal(distribution, _level()), _denoisers(distribution)
    conditional = jax.vmap(lambda x, y: jax.grad(Normal(x, var=jnp.asarray(SIGMA**2)).log_prob)(y))

    def score(denoiser, y):
        return (denoiser(y) - y) / SIGMA**2

    def claims(denoiser):
        matched = _square_at_noisy(lambda y: score(denoiser, y) - conditional(x, y), key, x)
        fisher = _over_noisy(distribution, lambda y: jnp.sum((score(denoiser, y[None])[0] - noisy.score(y)) ** 2))
        return _error(denoiser, key, x), matched, fisher

    # the constant: E ||grad log q(y|x) - grad log q(y)||^2 = E Var[x|y] / sigma^4
    constant = information.mmse(distribution, _level()).value / SIGMA**4
    for error, matched, fisher in jax.jit(lambda: [claims(denoiser) for denoiser in denoisers.values()])():
        assert_close(error, SIGMA**4 * matched, rtol=1e-9, atol=1e-12)
        # and matching the score of the *marginal* distribution: the same up to the constant, for any denoiser
        assert_mean(error / SIGMA**4 - fisher, constant, resolution=0.1 * constant)


# AE-3


def test_AE_3_error_does_not_depend_on_the_scale_of_codes():
    # Codes z A, A invertible, with the inverse in the decoder: the error is the same for any distribution of the codes.
    data = jnp.asarray(_data())
    principal, z = linear_gaussian.principal_components(data), jax.random.normal(jax.random.key(0), (20_000, 2))
    best, seen = principal.reconstruction_error(2), []
    for matrix in ([[1.0, 0.0], [0.0, 1.0]], [[0.2, 0.0], [0.0, 0.2]], [[5.0, 1.0], [-2.0, 3.0]]):
        matrix = jnp.asarray(matrix)
        inverse = jnp.linalg.inv(matrix)

        def decode(z, inverse=inverse):
            return principal.decode(z @ inverse)

        assert_close(_mean_error(lambda x, a=matrix: principal.encode(x, 2) @ a, decode, data), best, rtol=1e-11)
        decoded = decode(z)
        assert_mean(np.square(decoded - principal.mean[None]).sum(1), np.trace(inverse @ inverse.T))
        seen.append(np.square(decoded - principal.mean[None]).sum(1).mean())
    assert max(seen) > 100 * min(seen)
    # the codes of a linear VAE are normal: decoded samples have the data's variance in the plane, minus the noise
    model = linear_gaussian.probabilistic_pca(data, 2)
    kept = _eigen(data)[0][:2].sum() - 2 * _eigen(data)[0][2:].mean()
    assert_mean(np.square(model.decode(z) - principal.mean[None]).sum(1), kept)


@pytest.mark.slow
def test_AE_3_decoded_normal_codes_are_off_the_data():
    # Data in 16 dimensions within [-1, 1], on a plane plus a little noise.
    factor = 0.15 * np.linalg.qr(np.random.RandomState(3).randn(16, 2))[0] * np.sqrt(16) * [1.0, 0.5]
    distribution = closed_form.low_rank(np.zeros(16), factor, 0.01**2)
    data, fresh = draws(distribution, jax.random.key(0), 500), draws(distribution, jax.random.key(1), 500)
    principal, model = linear_gaussian.principal_components(data), linear_gaussian.probabilistic_pca(data, 2)
    z = jax.random.normal(jax.random.key(2), (500, 2))
    noise = jnp.sqrt(model.var) * jax.random.normal(jax.random.key(3), data.shape)
    tree = cKDTree(np.asarray(data))

    def distances(x):
        ours = np.asarray(autoencoder.nearest_distance(x, data))
        assert_close(ours, tree.query(np.asarray(x))[0], rtol=1e-10)
        return ours

    off, near, own = distances(principal.decode(z)), distances(model.decode(z) + noise), distances(fresh)
    print(f"nearest datum: autoencoder {off.mean():.3f}, linear VAE {near.mean():.4f}, fresh data {own.mean():.4f}")
    assert_mean(near - own, 0.0, resolution=0.003)  # the VAE's samples are as near to the data as new data are
    with refuted():
        assert_mean(off - own, 0.0)
    assert off.mean() > 5 * own.mean()
