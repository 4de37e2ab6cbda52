"""VAE: the bound with one latent, on models where p(x) and p(z|x) are known."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.algebra import expected, log_normal
from tests.derivations.check import assert_close, assert_mean, assert_moments, assert_proved, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form, hvae, information, linear_gaussian, vae
from vdm_jax.gaussian import Normal


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


SHIFT, VAR = np.array([0.5, -0.2, 0.1]), 0.3
# Columns of W: where they are orthogonal, the z of one x are independent, and a diagonal q can be the posterior.
WEIGHTS = {
    "orthogonal": np.array([[1.2, 0.3], [0.6, -0.9], [0.0, 0.4]]),
    "slanted": np.array([[1.2, 0.7], [-0.4, 0.9], [0.3, 0.2]]),
}
X = np.array([[0.9, -0.7, 0.4], [-0.3, 1.1, 0.0]])


def _model(name="orthogonal", var=VAR):
    weights = WEIGHTS[name].copy()
    if name == "orthogonal":  # to the last digit
        weights[:, 1] -= weights[:, 0] * (weights[:, 0] @ weights[:, 1]) / (weights[:, 0] @ weights[:, 0])
    return linear_gaussian.LinearGaussianModel(*map(jnp.asarray, (weights, SHIFT, np.float64(var))))


def _evidence(model):
    """The distribution of x, by scipy."""
    weights = np.asarray(model.weights)
    return stats.multivariate_normal(model.bias, weights @ weights.T + float(model.var) * np.eye(len(weights)))


def _posterior(model, x):
    """Mean and covariance of p(z|x), by the regression of z on x in their joint distribution."""
    weights, evidence = np.asarray(model.weights), _evidence(model)
    gain = np.linalg.solve(evidence.cov, weights).T
    return (np.asarray(x) - evidence.mean) @ gain.T, np.eye(weights.shape[1]) - gain @ weights


def _gaussian_kl(mean, cov, other_mean, other_cov):
    """KL of two normals with any covariances."""
    precision, apart = np.linalg.inv(other_cov), mean - other_mean
    logs = np.linalg.slogdet(other_cov)[1] - np.linalg.slogdet(cov)[1]
    return 0.5 * (np.trace(precision @ cov) + apart @ precision @ apart - len(mean) + logs)


def _parts(model):
    return Partial(linear_gaussian.LinearGaussianModel.decode, model), Partial(
        linear_gaussian.LinearGaussianModel.likelihood, model
    )


@jax.jit
def _exact_bound(model, q, x):
    """The bound's expectation: a quadratic's mean under q is its mean over points +-sqrt(k) sigma along each axis."""
    k = q.mean.shape[1]
    nodes = jnp.sqrt(1.0 * k) * jnp.concatenate([jnp.eye(k), -jnp.eye(k)])

    def cost(node):
        return vae.reconstruction_nll(*_parts(model), q.mean + jnp.sqrt(q.var) * node[None], x)

    return jax.vmap(cost)(nodes).mean(0) + jax.vmap(vae.kl_to_prior)(q)


def _some_q(count=2):
    """A q of the two z of each of `count` examples that is not the posterior."""
    mean, var = np.array([0.7, -0.4]), np.array([0.5, 0.2])
    return Normal(jnp.asarray(np.tile(mean, (count, 1))), var=jnp.asarray(np.tile(var, (count, 1))))


def _fixed(q, x):
    del x
    return q


# One scalar code and a nonlinear decoder: neither p(x) nor p(z|x) is normal; integrals are sums.
GRID = np.linspace(-9.0, 9.0, 4001)


def _bent(z):
    return jnp.concatenate([jnp.tanh(2.0 * z), 0.5 * z**2], axis=1)


def _bent_likelihood(mean):
    return Normal(mean, var=jnp.asarray(0.2))


def _bent_costs(x):
    """-log p(x|z) of one x on the grid of z."""
    z = jnp.asarray(GRID[:, None])
    return np.asarray(vae.reconstruction_nll(_bent, _bent_likelihood, z, jnp.broadcast_to(x, (len(GRID), 2))))


def _integral(values):
    return np.trapezoid(values, GRID, axis=-1)


# VAE-1


def _on_plane(model, x):
    """log p(x|z) and log p(z) on a grid of both z, with the area of its cells."""
    line = np.linspace(-8.0, 8.0, 501)
    z = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    cost = vae.reconstruction_nll(*_parts(model), jnp.asarray(z), jnp.broadcast_to(jnp.asarray(x), (len(z), 3)))
    return -np.asarray(cost), stats.multivariate_normal(np.zeros(2)).logpdf(z), z, (line[1] - line[0]) ** 2


def test_VAE_1_evidence_is_the_integral_over_codes():
    model = _model("slanted")
    truth = _evidence(model).logpdf(X)
    assert_close(jax.vmap(model.log_prob)(jnp.asarray(X)), truth, rtol=1e-12)
    for x, log_p in zip(X, truth, strict=True):
        decoder, prior, _, cell = _on_plane(model, x)
        assert_close(np.log(np.sum(np.exp(decoder + prior)) * cell), log_p, rtol=1e-10)


def _prior_square(model, x):
    """E p(x|z)^2 / p(x)^2 under the prior: N(x; m, v)^2 is N(x; m, v / 2), times (4 pi v)^(-D/2)."""
    half = _evidence(model._replace(var=model.var / 2)).pdf(x)
    return half * (4 * np.pi * float(model.var)) ** (-len(x) / 2) / _evidence(model).pdf(x) ** 2


@pytest.mark.slow
def test_VAE_1_samples_of_the_prior_rarely_explain_the_data():
    # p(x) by samples of the prior, and of normals near p(z|x): all unbiased; the variance of their ratio to p(x) is
    # int p(x,z)^2 / q dz / p(x)^2 - 1, which is 0 for the posterior alone.
    model, count = _model(var=0.05), 100_000
    x = jnp.broadcast_to(jnp.asarray(X[0]), (count, 3))
    best = model.encoder(jnp.asarray(X[:1]))
    decoder, prior, z, cell = _on_plane(model, X[0])
    evidence, variances = _evidence(model).logpdf(X[0]), {}
    for name, distribution in {
        "prior": Normal(jnp.zeros((1, 2)), var=jnp.ones((1, 2))),
        "wide": replace(best, var=1.5 * best.var),
        "posterior": best,
    }.items():
        q = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, 2)), distribution)
        cost = vae.importance_weighted_bound(Partial(_fixed, q), *_parts(model), jax.random.key(1), x, samples=1)
        ratio = np.exp(-np.asarray(cost) - evidence)
        log_q = stats.multivariate_normal(distribution.mean[0], np.diag(distribution.var[0])).logpdf(z)
        variances[name] = np.sum(np.exp(2 * (decoder + prior - evidence) - log_q)) * cell - 1
        if name == "posterior":
            assert_close(ratio, np.ones(count), rtol=1e-11)
            assert_close(variances[name], 0.0, atol=1e-9)
        else:
            assert_mean(ratio, 1.0, resolution=0.03)
            assert_mean((ratio - 1) ** 2, variances[name])
    assert_close(variances["prior"], _prior_square(model, X[0]) - 1, rtol=1e-9)
    print(f"variance of p(x)'s estimate over p(x)^2: {variances}")
    assert variances["prior"] > 50 * variances["wide"]
    # with less noise or more codes the number of samples explodes: only the closed form can be evaluated there
    small = [float(_prior_square(_model(var=v), SHIFT)) for v in (0.05, 0.005, 0.0005)]
    assert np.diff(np.log10(small)) == pytest.approx([1.0, 1.0], abs=0.05)  # as v^(-k/2), k = 2
    weights = np.linalg.qr(np.random.RandomState(0).randn(64, 20))[0] * 2.0
    many = linear_gaussian.LinearGaussianModel(*map(jnp.asarray, (weights, np.zeros(64), np.float64(0.05))))
    wanted = _prior_square(many, _evidence(many).rvs(random_state=0)) / 0.1**2
    print(f"64 numbers of 20 codes: {wanted:.1e} samples of the prior for p(x) within a tenth")
    assert wanted > 1e12


# VAE-2


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_VAE_2_bound_is_the_evidence_and_a_divergence(name):
    model, x = _model(name), jnp.asarray(X)
    mean, cov = _posterior(model, X)
    ours_mean, ours_cov = model.posterior(x)
    assert_close(ours_mean, mean, rtol=1e-12)
    assert_close(ours_cov, cov, rtol=1e-12, atol=1e-15)
    for q in (_some_q(), model.encoder(x), Normal(jnp.zeros((2, 2)), var=jnp.ones((2, 2)))):
        gaps = [_gaussian_kl(*moments, m, cov) for moments, m in zip(_moments(q), mean, strict=True)]
        assert_close(_exact_bound(model, q, x) - np.array(gaps), -_evidence(model).logpdf(X), rtol=1e-12)
    # and the library's estimates have this mean
    q = _some_q(100_000)
    many = jnp.broadcast_to(x[:1], (100_000, 3))
    for sampled in (False, True):
        ours = vae.bound(Partial(_fixed, q), *_parts(model), jax.random.key(0), many, sampled_kl=sampled)
        assert_mean(ours.total, _exact_bound(model, _some_q(), x)[0], resolution=0.02)


def _moments(q):
    """Mean and covariance of each example's q, for numpy."""
    return [(np.asarray(m), np.diag(v)) for m, v in zip(q.mean, q.var, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_VAE_2_equality_at_the_posterior_alone(name):
    model, x = _model(name), jnp.asarray(X)
    best, truth = model.encoder(x), -_evidence(model).logpdf(X)
    # the optimal q among the independent ones: the gradient by its mean and variance is zero
    slopes = jax.grad(lambda q: _exact_bound(model, q, x).sum())(best)
    assert_close([slopes.mean, slopes.var], np.zeros((2, 2, 2)), atol=1e-12)
    gap = np.asarray(_exact_bound(model, best, x)) - truth
    if name == "orthogonal":
        assert_close(gap, np.zeros(2), atol=1e-12)
        ratio = vae.bound(model.encoder, *_parts(model), jax.random.key(0), x, sampled_kl=True).total
        assert_close(ratio, truth, rtol=1e-12)  # for every sample
    else:  # dependent z: 1/2 log of the precision's diagonal over its determinant
        precision = np.linalg.inv(_posterior(model, X)[1])
        lost = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
        assert_close(gap, np.full(2, lost), rtol=1e-10)
        assert lost > 0.01
    for factor, shift in ((0.8, 0.0), (1.2, 0.0), (1.0, 0.1), (1.0, -0.1)):
        other = Normal(best.mean + shift, var=factor * best.var)
        assert np.all(_exact_bound(model, other, x) > _exact_bound(model, best, x) + 1e-3)


def test_VAE_2_for_any_decoder():
    # a posterior of two modes, and a normal q
    x = jnp.asarray([0.1, 0.9])
    cost, prior = _bent_costs(x), stats.norm.pdf(GRID)
    evidence = _integral(np.exp(-cost) * prior)
    log_posterior = -cost + stats.norm.logpdf(GRID) - np.log(evidence)
    for mean, var in ((0.3, 0.5), (-1.0, 0.1)):
        q = stats.norm.pdf(GRID, mean, var**0.5)
        distribution = Normal(jnp.asarray([mean]), var=jnp.asarray([var]))
        bound = _integral(q * cost) + vae.kl_to_prior(distribution)
        gap = _integral(q * (stats.norm.logpdf(GRID, mean, var**0.5) - log_posterior))
        assert_close(bound - gap, -np.log(evidence), rtol=1e-10)


# VAE-3


def test_VAE_3_three_forms_of_one_bound():
    # E_q log p(x,z)/q(z|x) = E_q log p(x|z) - KL(q || p) = log p(x) - KL(q || p(z|x)): by sums over a grid of z, and by
    # the library at the same samples and in the mean
    x, mean, var = jnp.asarray([0.1, 0.9]), 0.3, 0.5
    cost, prior, q = _bent_costs(x), stats.norm.pdf(GRID), stats.norm.pdf(GRID, mean, var**0.5)
    jensen = _integral(q * (np.log(q) - np.log(prior) + cost))  # E of the log, as a cost
    assert_close(_integral(q * cost) + vae.kl_to_prior(Normal(jnp.asarray([mean]), var=jnp.asarray([var]))), jensen)
    assert jensen > -np.log(_integral(np.exp(-cost) * prior))  # Jensen: the log of E is more

    count, key = 100_000, jax.random.key(0)
    distribution = Normal(jnp.full((count, 1), mean), var=jnp.full((count, 1), var))
    arguments = Partial(_fixed, distribution), _bent, _bent_likelihood, key, jnp.broadcast_to(x, (count, 2))
    ours, ratio = vae.bound(*arguments), vae.bound(*arguments, sampled_kl=True)
    assert_close(ours.reconstruction, ratio.reconstruction, rtol=1e-15)
    assert_mean(ours.total, jensen, resolution=0.02)
    assert_mean(ratio.total, jensen, resolution=0.02)
    z = np.asarray(vae.reparameterized_sample(distribution, key))
    log_ratio = stats.norm.logpdf(z, mean, var**0.5) - stats.norm.logpdf(z)
    log_decoder = stats.norm.logpdf(x, np.concatenate([np.tanh(2 * z), z**2 / 2], 1), 0.2**0.5).sum(1)
    assert_close(ratio.total, log_ratio[:, 0] - log_decoder, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_VAE_3_more_samples_tighten_the_bound():
    x, count = jnp.asarray([0.1, 0.9]), 10_000
    evidence = _integral(np.exp(-_bent_costs(x)) * stats.norm.pdf(GRID))
    distribution = Normal(jnp.full((count, 1), 0.3), var=jnp.full((count, 1), 0.8))
    arguments, gaps = (Partial(_fixed, distribution), _bent, _bent_likelihood), []
    for samples in (1, 4, 32):
        ours = vae.importance_weighted_bound(
            *arguments, jax.random.key(samples), jnp.broadcast_to(x, (count, 2)), samples=samples
        )
        gaps.append(float(ours.mean()) + np.log(evidence))
        assert_mean(np.exp(-np.asarray(ours)) / evidence, 1.0, resolution=0.05)  # unbiased, with its -log K
    error = float(ours.std()) / count**0.5
    assert gaps[0] > gaps[1] + 4 * error > gaps[2] + 8 * error > 4 * error
    one = vae.bound(*arguments, jax.random.key(7), jnp.broadcast_to(x, (count, 2))).total
    assert_mean(one, gaps[0] - np.log(evidence), resolution=0.1)
    # K equal ratios are one
    same = vae.importance_weighted_average(jnp.full((5, 2), -1.3))
    assert_close(same, np.full(2, 1.3), rtol=1e-15)


# VAE-4


def test_VAE_4_kl_to_the_prior():
    z, m = sp.symbols("z m", real=True)
    v = sp.Symbol("v", positive=True)
    one = (m**2 + v - 1 - sp.log(v)) / 2
    assert_proved(expected(log_normal(z, m, v) - log_normal(z, 0, 1), z, m, v), one)
    # of k numbers: the sum, (||mu||^2 + tr Sigma - k - log |Sigma|) / 2
    mean, var = np.array([0.5, -1.0, 0.0]), np.array([0.3, 2.0, 1.0])
    q = Normal(jnp.asarray(mean), var=jnp.asarray(var))
    truth = sum(float(one.subs({m: a, v: b})) for a, b in zip(mean, var, strict=True))
    assert_close(vae.kl_to_prior(q), truth, rtol=1e-13)
    assert_close(vae.kl_to_prior(q), _gaussian_kl(mean, np.diag(var), np.zeros(3), np.eye(3)), rtol=1e-13)
    # at one point
    point = np.array([0.2, -0.3, 1.1])
    log_ratio = stats.norm.logpdf(point, mean, var**0.5).sum() - stats.norm.logpdf(point).sum()
    assert_close(vae.kl_monte_carlo(q, jnp.asarray(point)), log_ratio, rtol=1e-13)


# VAE-5


def test_VAE_5_samples_have_the_distribution():
    # z = mu + sigma eps: the density of eps at (z - mu) / sigma, less log of the stretching, is the density of z
    z, m = sp.symbols("z m", real=True)
    v = sp.Symbol("v", positive=True)
    assert_proved(log_normal((z - m) / sp.sqrt(v), 0, 1) - sp.log(sp.sqrt(v)), log_normal(z, m, v))
    q = _some_q(100_000)
    sampled = vae.reparameterized_sample(q, jax.random.key(0))
    assert_moments(sampled, q.mean[0], q.var[0])
    white = (sampled - q.mean) / jnp.sqrt(q.var)
    assert stats.kstest(np.asarray(white).ravel(), "norm").pvalue > 1e-3
    # the noise does not depend on mean and variance: gradients pass through the latter
    other = Normal(q.mean + 1.7, var=4.0 * q.var)
    assert_close(
        (vae.reparameterized_sample(other, jax.random.key(0)) - other.mean) / jnp.sqrt(other.var),
        white,
        rtol=1e-9,
        atol=1e-11,
    )
    assert_mean(white[:-1] * white[1:], np.zeros(2))  # each example has noise of its own


@pytest.mark.slow
def test_VAE_5_two_gradients_of_one_bound():
    # Of the bound's expectation, by mean and log-deviation of q: both unbiased, the score function's far more spread.
    model, count = _model(), 40_000
    x, q = jnp.broadcast_to(jnp.asarray(X[0]), (count, 3)), _some_q(count)

    def distribution(parameters, x=None):
        mean, log_deviation = parameters
        return Normal(mean, var=jnp.exp(2 * log_deviation))

    parameters = q.mean, 0.5 * jnp.log(q.var)
    one = jax.tree.map(lambda leaf: leaf[:1], parameters)
    truth = jnp.stack(jax.grad(lambda p: _exact_bound(model, distribution(p), x[:1]).sum())(one))[:, 0]

    def gradients(**options):
        def total(parameters):
            return vae.bound(
                Partial(distribution, parameters), *_parts(model), jax.random.key(0), x, **options
            ).total.sum()

        return np.stack(jax.jit(jax.grad(total))(parameters), 1)

    variances = {}
    for gradient in ("reparameterized", "score_function"):
        for sampled in (False, True):
            ours = gradients(gradient=gradient, sampled_kl=sampled)
            assert_mean(ours, truth, resolution=0.15)
            variances[gradient, sampled] = ours.var(0)
    ratios = [variances["score_function", s] / variances["reparameterized", s] for s in (False, True)]
    print(
        f"variance of the score function's gradient over the reparameterised one's, by mean and log-deviation: {ratios}"
    )
    assert np.min(ratios) > 2
    assert np.max(ratios) > 20
    values = [
        vae.bound(Partial(_fixed, q), *_parts(model), jax.random.key(0), x, gradient=g).total
        for g in ("reparameterized", "score_function")
    ]
    assert_close(*values, rtol=1e-15)  # one value


@pytest.mark.slow
def test_VAE_5_score_function_needs_no_gradient_of_the_cost():
    # E 1[z > 0] under N(m, 1) is Phi(m): its derivative is the density at m, but every sample's own derivative is 0.
    mean, count = 0.4, 100_000
    distribution = Normal(jnp.full((count, 1), mean), var=jnp.ones((count, 1)))

    def total(m, gradient):
        q = replace(distribution, mean=m)
        z = vae.reparameterized_sample(q, jax.random.key(0))
        if gradient == "reparameterized":
            return jnp.sum(z > 0, dtype=m.dtype) + 0.0 * z.sum()
        z = jax.lax.stop_gradient(z)
        cost = (z[:, 0] > 0).astype(m.dtype)
        return vae.reinforce_surrogate(cost, jax.vmap(Normal.log_prob)(q, z)).sum()

    assert_mean(jax.grad(total)(distribution.mean, "score_function"), stats.norm.pdf(mean), resolution=0.01)
    with refuted():
        assert_close(jax.grad(total)(distribution.mean, "reparameterized").mean(), stats.norm.pdf(mean), rtol=0.1)


# VAE-6, VAE-7


def _pairs():
    random = np.random.RandomState(0)
    z = random.randn(40, 2)
    return z, z @ WEIGHTS["slanted"].T + SHIFT + 0.4 * random.randn(40, 3)


@pytest.mark.slow
def test_VAE_6_a_decoder_on_pairs_is_least_squares():
    z, x = _pairs()
    solution, rest, *_ = np.linalg.lstsq(np.c_[z, np.ones(40)], x, rcond=None)
    pairs = Normal(jnp.asarray(z), var=jnp.zeros((40, 2)))
    ours = linear_gaussian.maximum_likelihood_decoder(pairs, jnp.asarray(x))
    assert_close(ours.weights, solution[:2].T, rtol=1e-11)
    assert_close(ours.bias, solution[2], rtol=1e-11)
    assert_close(ours.var, rest.sum() / (40 * 3), rtol=1e-11)  # the remaining mean square

    @jax.jit
    def cost(model):
        return vae.reconstruction_nll(*_parts(model), pairs.mean, jnp.asarray(x)).sum()

    for slope in jax.grad(cost)(ours):
        assert_close(slope, np.zeros(slope.shape), atol=1e-9)
    # at any fixed variance maximum likelihood differs from least squares by a scale only
    one, other = ours._replace(var=jnp.asarray(0.7)), _model("slanted", var=0.7)
    squares = [np.sum((x - z @ np.asarray(m.weights).T - np.asarray(m.bias)) ** 2) for m in (one, other)]
    assert_close(cost(other) - cost(one), (squares[1] - squares[0]) / (2 * 0.7), rtol=1e-10)
    random = np.random.RandomState(1)
    for _ in range(10):
        moved = jax.tree.map(lambda leaf: leaf + 0.05 * random.randn(*leaf.shape), ours)
        assert cost(moved) > cost(ours)


def test_VAE_6_uncertain_codes_count_their_variance():
    # With q's variance: the derivative of the *expected* cost is zero, by the exact mean of the quadratic.
    z, x = map(jnp.asarray, _pairs())
    q = Normal(z, var=jnp.broadcast_to(jnp.asarray([0.3, 0.1]), z.shape))
    ours = linear_gaussian.maximum_likelihood_decoder(q, x)
    for slope in jax.grad(lambda model: _exact_bound(model, q, x).sum())(ours):
        assert_close(slope, np.zeros(slope.shape), atol=1e-9)
    points = linear_gaussian.maximum_likelihood_decoder(replace(q, var=jnp.zeros_like(q.var)), x)
    assert np.all(np.abs(points.weights) > np.abs(ours.weights))  # uncertain codes shrink the weights


def test_VAE_7_gaussian_bound_in_full():
    # One dimension of each, -log N(x; mu(z), v) and the KL in symbols; in the library at its own sample.
    x, mu, m = sp.symbols("x mu m", real=True)
    v, s = sp.symbols("v s", positive=True)
    cost = (x - mu) ** 2 / (2 * v) + sp.log(2 * sp.pi * v) / 2
    assert_proved(sp.integrate(sp.exp(-cost), (x, -sp.oo, sp.oo)), 1)
    assert_proved(-log_normal(x, mu, v), cost)
    model, q = _model("slanted"), _some_q()
    ours = vae.bound(Partial(_fixed, q), *_parts(model), jax.random.key(0), jnp.asarray(X))
    z = np.asarray(vae.reparameterized_sample(q, jax.random.key(0)))
    squares = np.sum((X - z @ WEIGHTS["slanted"].T - SHIFT) ** 2, 1)
    assert_close(ours.reconstruction, squares / (2 * VAR) + 3 / 2 * np.log(2 * np.pi * VAR), rtol=1e-13)
    one = (m**2 + s - 1 - sp.log(s)) / 2
    truth = [
        sum(float(one.subs({m: a, s: b})) for a, b in zip(*distribution, strict=True))
        for distribution in zip(q.mean, q.var, strict=True)
    ]
    assert_close(ours.kl, truth, rtol=1e-13)
    assert_close(ours.total, squares / (2 * VAR) + 3 / 2 * np.log(2 * np.pi * VAR) + truth, rtol=1e-13)


# VAE-8


def _overlapping():
    """Five examples in three dimensions and codes in two, some of them overlapping."""
    random = np.random.RandomState(3)
    mean = np.array([[0.0, 0.0], [0.4, 0.1], [2.0, -1.0], [2.1, -1.2], [-3.0, 3.0]])
    return jnp.asarray(random.randn(5, 3)), Normal(jnp.asarray(mean), var=jnp.asarray(random.uniform(0.1, 0.5, (5, 2))))


def test_VAE_8_the_best_mean_is_an_average():
    # sum_n q(z|x_n) ||x_n - f||^2 at each z, by scipy's densities: any other f adds its square, times their sum
    data, q = _overlapping()
    random = np.random.RandomState(4)
    for z in ([0.2, 0.0], [2.0, -1.1], [0.7, 0.6], [-3.0, 3.0]):
        weights = stats.norm.pdf(np.array(z), q.mean, np.sqrt(q.var)).prod(1)
        best = np.asarray(vae.optimal_mean_decoder(q, data, jnp.asarray(z)))

        def loss(f, weights=weights):
            return np.sum(weights * np.sum((np.asarray(data) - f) ** 2, 1))

        for _ in range(3):
            other = best + random.randn(3)
            assert_close(loss(other) - loss(best), weights.sum() * np.sum((other - best) ** 2), rtol=1e-10)
    # two codes in one place: halfway between their examples; an isolated one: its own example
    same = Normal(jnp.zeros((2, 2)), var=jnp.full((2, 2), 0.3))
    assert_close(vae.optimal_mean_decoder(same, data[:2], jnp.asarray([0.4, -0.2])), data[:2].mean(0), rtol=1e-14)
    assert_close(vae.optimal_mean_decoder(q, data, jnp.asarray([-3.0, 3.0])), data[4], rtol=1e-10)


@pytest.mark.slow
def test_VAE_8_the_residual_is_orthogonal_to_every_decoder():
    # over x_n of the data and z ~ q(z|x_n): E (x - E[x|z]) g(z) = 0, so that no decoder can lower the bound
    data, q = _overlapping()
    n = jnp.arange(100_000) % 5
    z = vae.reparameterized_sample(Normal(q.mean[n], var=q.var[n]), jax.random.key(0))
    best = jax.vmap(lambda z: vae.optimal_mean_decoder(q, data, z))(z)

    def costs(mean):
        return np.asarray(vae.reconstruction_nll(lambda z: mean, lambda m: Normal(m, var=jnp.asarray(0.5)), z, data[n]))

    left = np.asarray(data[n] - best)
    for g in (jnp.ones(len(z)), z[:, 0], jnp.tanh(3 * z[:, 1])):
        assert_mean(left * np.asarray(g)[:, None], np.zeros(3), resolution=0.02)
        other = best + 0.3 * g[:, None]
        assert_mean(costs(other) - costs(best), float(np.mean(3 * 0.09 * np.asarray(g) ** 2)), resolution=0.02)
    assert np.abs(left).mean() > 0.1  # a blur that remains


# VAE-9, VAE-10


def _cloud():
    random = np.random.RandomState(5)
    rotation, _ = np.linalg.qr(random.randn(4, 4))
    return random.randn(200, 4) * np.array([2.0, 1.2, 0.5, 0.4]) @ rotation.T + np.array([0.3, -0.5, 0.0, 1.0])


def _best_log_likelihood(data, k):
    """Tipping & Bishop: -1/2 (D log 2 pi + sum of the k first log eigenvalues + (D - k) log v + D)."""
    values = np.sort(np.linalg.eigvalsh(np.cov(data.T, bias=True)))[::-1]
    dims, var = len(values), values[k:].mean()
    return -0.5 * (dims * np.log(2 * np.pi) + np.log(values[:k]).sum() + (dims - k) * np.log(var) + dims)


def test_VAE_9_em_never_lowers_the_bound_and_reaches_probabilistic_pca():
    data = _cloud()
    x, random = jnp.asarray(data), np.random.RandomState(6)
    start = linear_gaussian.LinearGaussianModel(*map(jnp.asarray, (random.randn(4, 2), np.zeros(4), np.float64(1.0))))

    def e_step(model):
        return model.encoder(x)

    last, history = vae.variational_em(
        e_step, lambda q: linear_gaussian.maximum_likelihood_decoder(q, x), start, iterations=1500
    )
    assert_close(history.weights[0], start.weights, rtol=1e-15)
    after = jax.tree.map(lambda leaf, end: jnp.concatenate([leaf[1:], end[None]]), history, last)

    @jax.jit
    @jax.vmap
    def bounds(old, new):  # after each E-step, and after the M-step upon it
        return tuple(-_exact_bound(model, e_step(old), x).mean() for model in (old, new))

    elbo = np.stack(bounds(history, after), 1).ravel()
    assert np.all(np.diff(elbo) > -1e-12)
    assert elbo[-1] > elbo[0] + 1
    best = _best_log_likelihood(data, 2)
    assert_close(elbo[-1], best, rtol=1e-9)
    assert_close(_evidence(last).logpdf(data).mean(), best, rtol=1e-9)
    # the same model up to signs and order of codes: W W^T is unique
    closed = linear_gaussian.probabilistic_pca(x, 2)
    assert_close(last.weights @ last.weights.T, closed.weights @ closed.weights.T, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3])
def test_VAE_9_probabilistic_pca_maximizes_the_likelihood(k):
    data = _cloud()
    model, best = linear_gaussian.probabilistic_pca(jnp.asarray(data), k), _best_log_likelihood(data, k)
    assert_close(_evidence(model).logpdf(data).mean(), best, rtol=1e-12)

    @jax.jit
    def mean_log_prob(model):
        return jax.vmap(model.log_prob)(jnp.asarray(data)).mean()

    assert_close(mean_log_prob(model), best, rtol=1e-12)
    for slope in jax.grad(mean_log_prob)(model):
        assert_close(slope, np.zeros(slope.shape), atol=1e-11)
    random = np.random.RandomState(7)
    for size in (1e-2, 0.3):
        for _ in range(5):
            moved = jax.tree.map(lambda leaf, size=size: leaf + size * random.rand(*leaf.shape), model)
            assert mean_log_prob(moved) < best
    # its encoder is the posterior: the bound is the likelihood
    assert_close(-_exact_bound(model, model.encoder(jnp.asarray(data)), jnp.asarray(data)).mean(), best, rtol=1e-12)


def _two_modes():
    return closed_form.mixture([0.4, 0.6], [[-1.0, 0.3], [0.9, 0.1]], [0.3, 0.1])


def _nearest(mean, cov):
    """Of all normal distributions the nearest to data in the plane: the one with its moments."""
    values, vectors = np.linalg.eigh(cov)
    return linear_gaussian.LinearGaussianModel(
        *map(jnp.asarray, (vectors[:, 1:] * np.sqrt(values[1] - values[0]), mean, values[0]))
    )


@pytest.mark.slow
def test_VAE_10_maximum_likelihood_minimizes_the_kl():
    # E_data[-log p_model] = KL(p_data || p_model) + h(p_data): of one model or another, the same difference
    distribution = _two_modes()
    x, entropy = (
        draws(distribution, jax.random.key(0), 40_000),
        jax.jit(information.entropy, static_argnums=1)(distribution, information.quadrature).value,
    )
    nearest = _nearest(distribution.mean, distribution.covariance())

    @jax.jit
    def both(model):
        divergence = information.quadrature(
            lambda x: distribution.log_prob(x) - model.log_prob(x), distribution, nodes=101
        ).value
        return -jax.vmap(model.log_prob)(x), divergence

    costs, divergences = [], []
    for model in (nearest, nearest._replace(bias=nearest.bias + 0.2), nearest._replace(var=0.7 * nearest.var)):
        cost, divergence = both(model)
        assert_mean(cost - entropy, divergence, resolution=0.02)
        costs.append(cost.mean())
        divergences.append(float(divergence))
    assert np.argmin(costs) == np.argmin(divergences) == 0


def test_VAE_10_exactly_for_normal_data():
    # and so the gradients are equal
    mean, cov = np.asarray(_two_modes().mean), np.asarray(_two_modes().covariance())
    nearest = _nearest(mean, cov)
    normal = closed_form.gaussian(mean, cov)
    cost_of = jax.jit(lambda m: information.quadrature(lambda x: -m.log_prob(x), normal, nodes=61).value)
    for model in (nearest, nearest._replace(bias=nearest.bias + 0.2, weights=1.3 * nearest.weights)):
        own = _evidence(model)
        assert_close(cost_of(model), _gaussian_kl(mean, cov, own.mean, own.cov) + normal.entropy(), rtol=1e-12)
    # the most likely model of a data set is the nearest to its moments: probabilistic PCA, at divergence 0
    data = _cloud()
    three = linear_gaussian.probabilistic_pca(jnp.asarray(data), 3)
    own = _evidence(three)
    assert_close(_gaussian_kl(data.mean(0), np.cov(data.T, bias=True), own.mean, own.cov), 0.0, atol=1e-12)


# VAE-11


def test_VAE_11_kl_splits_into_information_and_mismatch():
    # Six examples, scalar codes: each part by sums over a grid of z.
    mean, var = np.array([-1.5, -1.2, 0.0, 0.1, 0.8, 2.0]), np.array([0.3, 0.2, 0.5, 0.1, 0.4, 0.2])
    q = Normal(jnp.asarray(mean[:, None]), var=jnp.asarray(var[:, None]))
    density = stats.norm.pdf(GRID, mean[:, None], np.sqrt(var)[:, None])
    log_q = stats.norm.logpdf(GRID, mean[:, None], np.sqrt(var)[:, None])
    log_all = np.log(density.mean(0) + 1e-300)
    log_prob = jax.jit(jax.vmap(lambda z: vae.aggregated_posterior_log_prob(q, z[None])))
    ours = log_prob(jnp.asarray(GRID[1000:3001]))
    assert_close(ours, log_all[1000:3001], rtol=1e-10, atol=1e-12)
    shared = _integral(density * (log_q - log_all))
    apart = _integral(density * (log_all - stats.norm.logpdf(GRID)))
    split = vae.kl_decomposition(q, jax.random.key(0), samples=1)
    assert_close(split.kl, shared + apart, rtol=1e-9)
    assert 0.5 < shared.mean() < np.log(6)
    keys = jax.random.split(jax.random.key(1), 5000)
    split = jax.jit(jax.vmap(lambda key: vae.kl_decomposition(q, key, samples=2)))(keys)
    assert_mean(split.mutual_information, shared)  # example by example
    assert_mean(split.marginal_kl, apart)
    assert_mean((split.mutual_information + split.marginal_kl - split.kl).mean(1), 0.0, resolution=0.02)


@pytest.mark.slow
def test_VAE_11_codes_that_identify_examples_and_codes_that_do_not():
    names = Normal(100.0 * jnp.arange(5.0)[:, None], var=jnp.ones((5, 1)))  # each example has a distinct code: log N
    split = vae.kl_decomposition(names, jax.random.key(0), samples=100)
    assert_close(split.mutual_information, np.full(5, np.log(5)), rtol=1e-12)
    constant = Normal(jnp.full((5, 1), 0.7), var=jnp.full((5, 1), 0.4))
    split = vae.kl_decomposition(constant, jax.random.key(0), samples=20_000)
    assert_close(split.mutual_information, np.zeros(5), atol=1e-12)
    assert float(split.marginal_kl.mean()) == pytest.approx(float(split.kl.mean()), rel=0.02)  # all of it is mismatch


@pytest.mark.slow
def test_VAE_11_kl_of_a_perfect_vae_is_the_information():
    # Where q is the posterior of the correct model, the codes of all data together are the prior: KL(q(z)||p) = 0,
    # and E KL(q(z|x) || p(z)) = I(x; z) = 1/2 log |W W^T / v + I|.
    model = _model()
    weights = np.asarray(model.weights)
    truth = 0.5 * np.linalg.slogdet(weights @ weights.T / VAR + np.eye(3))[1]
    q = model.encoder(jnp.asarray(_evidence(model).rvs(3000, random_state=0)))
    split = vae.kl_decomposition(q, jax.random.key(0), samples=2)
    assert_mean(split.kl, truth, resolution=0.03)
    assert_mean(split.mutual_information, truth, resolution=0.03)
    assert_mean(split.marginal_kl, 0.0, resolution=0.03)
    assert truth < np.log(3000)


# VAE-12


def test_VAE_12_new_data_come_from_the_prior():
    model, count = _model("slanted"), 40_000
    decode, likelihood = _parts(model)
    # a VAE is a hierarchy of one level
    hierarchy = hvae.top_down((2,), [lambda above, x: model.encoder(x)], [], decode)
    truth, weights = _evidence(model), WEIGHTS["slanted"]

    def squares(x):
        apart = np.asarray(x) - SHIFT
        return apart[:, :, None] * apart[:, None, :]

    new = hvae.sample(hierarchy, likelihood, jax.random.key(0), count)
    assert_mean(new, SHIFT)
    assert_mean(squares(new), truth.cov)
    assert_mean(-truth.logpdf(new), truth.entropy(), resolution=0.02)
    cool = hvae.sample(hierarchy, likelihood, jax.random.key(1), count, temperature=0.5)
    assert_mean(squares(cool), 0.25 * weights @ weights.T + VAR * np.eye(3))
    # samples of the encoder reconstruct the input x
    x = jnp.broadcast_to(jnp.asarray(X[0]), (count, 3))
    again = hvae.reconstruct(hierarchy, jax.random.key(2), x, keep=1)
    q = model.encoder(x[:1])
    assert_mean(again, weights @ np.asarray(q.mean[0]) + SHIFT)
    for moment, value in ((again, SHIFT), (squares(again), truth.cov - VAR * np.eye(3))):
        with refuted():
            assert_mean(moment, value)
    # and with keep=0 the result does not depend on x: the prior's mean, decoded
    assert_close(hvae.reconstruct(hierarchy, jax.random.key(2), x[:1], keep=0)[0], SHIFT, rtol=1e-15)
