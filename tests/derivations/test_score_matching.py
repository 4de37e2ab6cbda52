"""SM: matching an unknown score. Each loss against the explicit one, by parts, by sums and by samples."""

import itertools
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial
from scipy import stats

from tests.derivations import worlds
from tests.derivations.algebra import expected, log_normal
from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from tests.derivations.worlds import denoiser
from vdm_jax import closed_form, divergence, elbo, energy, information, losses, score_matching
from vdm_jax.discrete_schedules import linear_betas
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import VarianceExploding

draws = jax.jit(worlds.draws, static_argnums=2)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# A two-dimensional mixture: correlated, with two modes
@cache
def _mixture():
    covariances = [[[0.3, 0.1], [0.1, 0.2]], [[0.4, -0.2], [-0.2, 0.3]]]
    return closed_form.mixture([0.3, 0.7], [[-1.0, 0.3], [0.8, -0.4]], covariances)


@cache
def _exact_score():
    return jax.vmap(_mixture().score)


MATRIX = np.array([[0.9, -0.4, 0.2], [0.3, 0.7, -0.5], [-0.8, 0.1, 0.4]])  # not symmetric: not the field of a gradient


def _bent(x):
    """A coupled, rotational field in up to 3 dimensions."""
    weights = MATRIX[: x.shape[1], : x.shape[1]]
    return jnp.tanh(x @ weights) @ weights - 0.5 * x


def _affine(x):
    return 0.6 * x[:, ::-1] - x + 0.2


def _shifted(x):
    return _exact_score()(x) + 0.3


FIELDS = {"bent": _bent, "affine": _affine}


def _mean(distribution, loss):
    """E loss(x) by quadrature, of a loss on batches."""
    return information.quadrature(lambda x: loss(x[None])[0], distribution, 101).value


# SM-1


@pytest.mark.slow
def test_SM_1_is_zero_at_the_exact_score_alone():
    x, truth = draws(_mixture(), jax.random.key(0), 100), _exact_score()

    @jax.jit
    def claims():
        off = _bent(x) - jax.vmap(jax.grad(_mixture().log_prob))(x)
        return off, [score_matching.explicit(s, truth, x) for s in (truth, _shifted, _bent)]

    off, (right, shifted, bent) = claims()
    assert_close(right, np.zeros(100))
    # the loss of a wrong score is its squared error, wherever it is wrong
    assert_close(shifted, np.full(100, 0.5 * 2 * 0.3**2), rtol=1e-12)
    assert_close(bent, 0.5 * np.linalg.norm(off, axis=1) ** 2, rtol=1e-10)
    assert np.all(bent > 0)


def test_SM_1_of_two_normal_distributions_in_symbols():
    y, m, n = sp.symbols("y m n", real=True)
    v, w = sp.symbols("v w", positive=True)
    s, truth = (sp.diff(log_normal(y, *distribution), y) for distribution in ((n, w), (m, v)))
    assert_proved(expected((s - truth) ** 2 / 2, y, m, v), ((m - n) ** 2 / w**2 + (v - w) ** 2 / (v * w**2)) / 2)


@pytest.mark.slow
def test_SM_1_of_two_normal_distributions_in_closed_form():
    # in two dimensions: the shift of means, and the precisions' difference over the covariance of p
    spread, other = np.array([[1.0, 0.4], [0.4, 0.5]]), np.array([[0.6, -0.1], [-0.1, 0.9]])
    p, q = closed_form.gaussian([0.3, -0.2], spread), closed_form.gaussian([-0.5, 0.1], other)
    shift = np.linalg.solve(other, [0.8, -0.3])
    tilt = np.linalg.inv(other) - np.linalg.inv(spread)
    fisher = shift @ shift + np.trace(tilt @ spread @ tilt)
    scores = jax.vmap(q.score), jax.vmap(p.score)
    assert_close(jax.jit(lambda: _mean(p, lambda x: score_matching.explicit(*scores, x)))(), fisher / 2, rtol=1e-11)
    ours = score_matching.explicit(*scores, draws(p, jax.random.key(1), 20_000))
    assert_mean(ours, fisher / 2, resolution=0.03 * fisher)


@pytest.mark.slow
def test_SM_1_hardly_depends_on_the_weights_of_separate_modes():
    # The loss is zero at the exact score alone, but with no data between two modes it hardly depends on their weights.
    def compare(distance):
        p, q = (closed_form.mixture(w, [[-distance], [distance]], [1.0, 1.0]) for w in ([0.5, 0.5], [0.1, 0.9]))
        fisher = _mean(p, lambda x: score_matching.explicit(jax.vmap(q.score), jax.vmap(p.score), x))
        return fisher, information.quadrature(lambda x: p.log_prob(x) - q.log_prob(x), p).value

    found = np.array(jax.jit(lambda: [compare(distance) for distance in (1.0, 3.0, 6.0)])())
    print("half the Fisher divergence, and KL:", found.tolist())
    assert np.all(np.diff(found[:, 0]) < 0)
    assert found[-1, 0] < 1e-6
    assert_close(found[-1, 1], 0.5 * np.log(0.5 / 0.1) + 0.5 * np.log(0.5 / 0.9), rtol=1e-6)


# SM-2


def test_SM_2_by_parts():
    # any p and s: the explicit loss minus the implicit one is |exact score|^2 / 2, and a derivative, that of -p s
    y, m = sp.symbols("y m", real=True)
    v = sp.Symbol("v", positive=True)
    p, s = sp.Function("p", positive=True)(y), sp.Function("s")(y)
    truth = sp.diff(sp.log(p), y)
    difference = (s - truth) ** 2 / 2 - (s**2 / 2 + sp.diff(s, y))
    assert_proved(p * (difference - truth**2 / 2), -sp.diff(p * s, y))
    # whose integral depends on the ends: for a normal p and a power of y, 0; carried out, half the information 1 / v
    normal = sp.exp(log_normal(y, m, v))
    for end in (sp.oo, -sp.oo):
        assert_proved(sp.limit((normal * y**3).subs({m: 1, v: 2}), y, end))
    slope, offset = sp.symbols("slope offset", real=True)
    line = slope * y + offset
    carried_out = difference.subs(s, line).subs(p, normal).doit()
    assert_proved(expected(sp.simplify(carried_out), y, m, v), 1 / (2 * v))


@pytest.mark.slow
def test_SM_2_is_the_explicit_loss_minus_a_constant():
    distribution, truth = _mixture(), _exact_score()
    x = draws(distribution, jax.random.key(2), 50_000)

    def differences(x):
        return {
            name: score_matching.explicit(s, truth, x) - score_matching.implicit(s, x) for name, s in FIELDS.items()
        }

    def constant(x):
        return 0.5 * jnp.sum(jax.vmap(jax.grad(distribution.log_prob))(x) ** 2, axis=1)

    @jax.jit
    def claims():
        by_quadrature = [_mean(distribution, lambda x, name=name: differences(x)[name]) for name in FIELDS]
        return by_quadrature, _mean(distribution, constant), differences(x)

    ours, half_fisher, each = claims()
    assert_close(ours, np.full(len(FIELDS), half_fisher), rtol=1e-10)
    for difference in each.values():  # sample by sample
        assert_mean(difference, half_fisher, resolution=0.01 * half_fisher)


UNIFORM = stats.uniform(-1.0, 2.5)
TRUNCATED = stats.truncnorm(-1.0, 1.5)


@pytest.mark.parametrize("distribution", [UNIFORM, TRUNCATED], ids=["uniform", "truncated normal"])
def test_SM_2_needs_a_density_that_vanishes_at_its_edge(distribution):
    # On [a, b]:  E explicit = E implicit + E |exact score|^2 / 2 - [p s]_a^b, and the last term depends on s
    a, b = distribution.support()
    nodes, weights = np.polynomial.legendre.leggauss(80)
    x = jnp.asarray(a + (b - a) * (nodes + 1) / 2)[:, None]
    p = (b - a) / 2 * weights * distribution.pdf(x[:, 0])

    def truth(x):
        return -x if distribution is TRUNCATED else 0.0 * x

    def edge(s):
        ends = jnp.asarray([[a], [b]])
        return np.diff(distribution.pdf([a, b]) * np.asarray(s(ends))[:, 0])[0]

    def vanishing(x):
        return _bent(x) * (x - a) * (b - x)

    constant = p @ np.asarray(truth(x))[:, 0] ** 2 / 2
    fields = (_bent, jnp.sinh, vanishing)
    claims = jax.jit(lambda: [(score_matching.explicit(s, truth, x), score_matching.implicit(s, x)) for s in fields])
    for s, (explicit, implicit) in zip(fields, claims(), strict=True):
        assert_close(p @ np.asarray(explicit), p @ np.asarray(implicit) + constant - edge(s), rtol=1e-11)
        if s is vanishing:
            assert_close(p @ np.asarray(explicit), p @ np.asarray(implicit) + constant, rtol=1e-11)
        else:
            with refuted():
                assert_close(p @ np.asarray(explicit), p @ np.asarray(implicit) + constant, rtol=0.05)


def _smooth_energy(x):
    """Neither quadratic nor separable."""
    x = x.reshape(x.shape[0], -1)
    return jnp.log(jnp.cosh(x[:, :3] @ MATRIX)).sum(1) + 0.1 * (x**4).sum(1)


def _downhill(x):
    return energy.score(_smooth_energy, x)


@pytest.mark.slow
def test_SM_2_trace_is_the_jacobians():
    for field, shape in ((_bent, (7, 3)), (_downhill, (7, 2, 3))):
        x = jax.random.normal(jax.random.key(3), shape)

        @jax.jit
        def claims(x, field=field):
            matrices = jax.vmap(jax.jacrev(lambda x: field(x[None])[0].reshape(-1)))(x)
            hessians = jax.vmap(jax.hessian(lambda x: _smooth_energy(x[None])[0]))(x)
            return matrices, field(x), score_matching.implicit(field, x), hessians

        matrices, s, ours, hessians = claims(x)
        traces = np.trace(np.asarray(matrices).reshape(7, x[0].size, -1), axis1=1, axis2=2)
        assert_close(ours, 0.5 * np.square(s).reshape(7, -1).sum(1) + traces, rtol=1e-12)
    # of an energy: minus the Laplacian
    assert_close(traces, -np.trace(hessians.reshape(7, 6, 6), axis1=1, axis2=2), rtol=1e-12)


@pytest.mark.slow
def test_SM_2_the_best_normal_distribution_has_the_moments_of_the_data():
    # Scores -P (x - m) of normals: the loss on a data set is minimal where P^-1 is its covariance, m its mean.
    x = draws(_mixture(), jax.random.key(4), 300)
    mean, precision = np.asarray(x).mean(0), np.linalg.inv(np.cov(np.asarray(x).T, bias=True))

    def loss(parameters):
        return score_matching.implicit(Partial(lambda p, x: (p[1][None] - x) @ p[0], parameters), x).mean()

    loss_and_slope = jax.jit(jax.value_and_grad(loss))
    value, slope = loss_and_slope((jnp.asarray(precision), jnp.asarray(mean)))
    assert_close(value, -np.trace(precision) / 2, rtol=1e-11)
    assert_close(slope[0], np.zeros((2, 2)), atol=1e-11)
    assert_close(slope[1], np.zeros(2), atol=1e-11)
    for wrong in (
        (1.1 * precision, mean),
        (precision, mean + 0.1),
        (precision + np.array([[0.0, 0.2], [-0.2, 0.0]]), mean),
    ):
        assert loss_and_slope(tuple(map(jnp.asarray, wrong)))[0] > value + 1e-3


# SM-3


def _copies(count):
    """One point, many times: only the directions differ."""
    return jnp.broadcast_to(jnp.asarray([0.4, -0.7, 1.1]), (count, 3))


def _at_the_point():
    """s, its Jacobian made symmetric, and the implicit loss there."""
    x = np.array([0.4, -0.7, 1.1])
    s = np.tanh(x @ MATRIX) @ MATRIX - 0.5 * x
    jacobian = MATRIX.T @ np.diag(1 - np.tanh(x @ MATRIX) ** 2) @ MATRIX.T - 0.5 * np.eye(3)
    implicit = float(score_matching.implicit(_bent, _copies(1))[0])
    assert_close(implicit, s @ s / 2 + np.trace(jacobian), rtol=1e-13)
    return s, (jacobian + jacobian.T) / 2, implicit


def _along(x, v):
    return jax.jit(divergence.value_and_divergence, static_argnums=0)(_bent, x, v)


@pytest.mark.slow
def test_SM_3_all_signs_give_the_trace():
    # every vector of signs once: their mean is the trace, and the variance comes from the off-diagonal entries
    _, jacobian, implicit = _at_the_point()
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=3)))
    value, each = _along(_copies(8), signs[None])
    assert_close(0.5 * np.sum(value**2, axis=1).mean() + each.mean(), implicit, rtol=1e-13)
    assert_close(each.var(), 2 * np.sum((jacobian - np.diag(np.diag(jacobian))) ** 2), rtol=1e-12)
    _, together = _along(_copies(1), signs[:, None])  # as directions of one example
    assert_close(together[0], np.trace(jacobian), rtol=1e-13)
    # with a diagonal Jacobian every single vector of signs is exact, and so is the library's
    x = jax.random.normal(jax.random.key(5), (6, 2, 4))
    ours = score_matching.sliced(jnp.sinh, jax.random.key(6), x)
    assert_close(ours, score_matching.implicit(jnp.sinh, x), rtol=1e-13)
    with refuted():
        ours = score_matching.sliced(jnp.sinh, jax.random.key(6), x, trace="gaussian")
        assert_close(ours, score_matching.implicit(jnp.sinh, x), rtol=1e-2)


def test_SM_3_normal_directions_have_twice_the_jacobians_square():
    # v^T J v is of degree 2 in v, its square of degree 4: three nodes of Gauss and Hermite an axis are exact
    _, jacobian, _ = _at_the_point()
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    v = np.array(list(itertools.product(nodes, repeat=3)))
    weights = np.prod(list(itertools.product(weights / weights.sum(), repeat=3)), axis=1)
    _, each = _along(_copies(27), jnp.asarray(v)[None])
    assert_close(weights @ np.asarray(each), np.trace(jacobian), rtol=1e-13)
    assert_close(weights @ np.asarray(each - np.trace(jacobian)) ** 2, 2 * np.sum(jacobian**2), rtol=1e-12)


def _variance(matrix, trace):
    """Variance of v^T A v, A symmetric, for the three distributions of v."""
    square, dims = np.sum(matrix**2), len(matrix)
    if trace == "rademacher":
        return 2 * (square - np.sum(np.diag(matrix) ** 2))
    if trace == "gaussian":
        return 2 * square
    return dims / (dims + 2) * (np.trace(matrix) ** 2 + 2 * square) - np.trace(matrix) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace", ["rademacher", *(pytest.param(t, marks=pytest.mark.slow) for t in ("gaussian", "sphere"))]
)
def test_SM_3_has_the_implicit_losss_mean(trace):
    # unreduced it is v^T (J + s s^T / 2) v: both forms' means, and the variances of quadratic forms
    s, jacobian, implicit = _at_the_point()
    x = _copies(100_000)
    for reduced, matrix in ((True, jacobian), (False, jacobian + 0.5 * np.outer(s, s))):
        ours = score_matching.sliced(_bent, jax.random.key(7), x, trace=trace, reduced=reduced)
        variance = _variance(matrix, trace)
        assert_mean(ours, implicit, resolution=0.01 * np.sqrt(variance))
        assert_mean((np.asarray(ours) - implicit) ** 2, variance, resolution=0.02 * variance)
    few = score_matching.sliced(_bent, jax.random.key(8), x[:40_000], trace=trace, reduced=False, probes=4)
    assert_mean(few, implicit, resolution=0.01 * np.sqrt(variance))
    assert_mean((np.asarray(few) - implicit) ** 2, variance / 4, resolution=0.01 * variance)


def test_SM_3_the_reduced_form_need_not_vary_less_in_symbols():
    # Var = 2 |J|^2 reduced and 2 |J + s s^T / 2|^2 not: for s = -x of N(0, I), 2 D and 2 D - 2 |x|^2 + |x|^4 / 2
    x = sp.symbols("x_1 x_2 x_3", real=True)
    for dims in (1, 2, 3):
        s, square = -sp.Matrix(x[:dims]), sum(part**2 for part in x[:dims])
        matrix = -sp.eye(dims) + s * s.T / 2
        assert_proved(2 * sum(part**2 for part in matrix) - 2 * dims, square**2 / 2 - 2 * square)
    # over x: E |x|^2 = D, E |x|^4 = D (D + 2), so less in one dimension and no more in two
    each, dims = expected(x[0] ** 4, x[0], 0, 1), sp.Symbol("D")
    more = (dims * each + dims * (dims - 1)) / 2 - 2 * dims
    assert_proved(more, dims * (dims - 2) / 2)


@pytest.mark.slow
def test_SM_3_the_reduced_form_need_not_vary_less():
    @partial(jax.jit, static_argnums=(0, 1))
    def both(dims, trace):
        sliced = partial(score_matching.sliced, jnp.negative, jax.random.key(9), jnp.ones((50_000, dims)), trace=trace)
        return sliced(), sliced(reduced=False)

    # at x = 1 in one dimension, where the loss is 1/2 - 1; and signs, of which the reduced form needs one only
    reduced, plain = both(1, "gaussian")
    assert_mean((np.asarray(reduced) + 0.5) ** 2, 2.0, resolution=0.1)
    assert_mean((np.asarray(plain) + 0.5) ** 2, 0.5, resolution=0.03)
    reduced, plain = both(4, "rademacher")
    assert_close(reduced, np.full(50_000, 2.0 - 4.0))
    assert_mean((np.asarray(plain) + 2.0) ** 2, 2 * 12 * 0.5**2, resolution=0.1)


@pytest.mark.slow
def test_SM_3_finite_differences_have_an_error_of_order_h_squared():
    h, c = sp.Symbol("h"), sp.symbols("c:7")
    ahead, behind = (sum(c[k] * (sign * h) ** k / sp.factorial(k) for k in range(7)) for sign in (1, -1))
    loss = sp.expand(((ahead - behind) / (2 * h)) ** 2 / 2 - (ahead - 2 * c[0] + behind) / h**2)
    assert_proved(loss.coeff(h, 0), c[1] ** 2 / 2 - c[2])  # the sliced loss along the line
    assert_proved(loss.coeff(h, 1))
    assert_proved(loss.coeff(h, 2), c[1] * c[3] / 6 - c[4] / 12)
    # in the library, of the same directions
    x, key = jax.random.normal(jax.random.key(10), (5, 3)), jax.random.key(11)
    options = {"trace": "gaussian", "probes": 2}
    truth = np.asarray(score_matching.sliced(_downhill, key, x, reduced=False, **options))
    sizes = jnp.asarray([0.02, 0.01, 0.005])
    ours = [score_matching.finite_difference(_smooth_energy, key, x, size, **options) for size in sizes]
    off = np.array(ours) - truth[None]
    assert_close(off[:-1] / off[1:], np.full((2, 5), 4.0), rtol=0.02)
    assert np.abs(off[-1]).max() < 1e-3
    # and the size of the bias: x^4 in one dimension, c_1 = 4 x^3, c_3 = 24 x, c_4 = 24
    one = jnp.asarray([[0.5], [1.0], [-1.2]])
    ours = score_matching.finite_difference(lambda x: (x**4).sum(1), key, one, 0.01)
    plain = 0.5 * (4 * one**3) ** 2 - 12 * one**2
    leading = 4 * one**3 * 24 * one / 6 - 24 / 12
    assert_close(ours - plain[:, 0], 1e-4 * leading[:, 0], rtol=1e-3)


# SM-4


class Logistic(NamedTuple):
    """Non-Gaussian noise."""

    mean: Any
    scale: Any

    def sample(self, key):
        return self.mean + self.scale * jax.random.logistic(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, y):
        z = (y - self.mean) / self.scale
        return jnp.sum(-z - 2 * jax.nn.softplus(-z) - jnp.log(self.scale))


class At(NamedTuple):
    """A distribution's density with a fixed sample: so an expectation over samples is a sum."""

    distribution: Any
    y: Any

    def sample(self, key):
        return self.y

    def log_prob(self, y):
        return self.distribution.log_prob(y)


# q(y|x): the library's object, and its density and score by hand
KERNELS = {
    "normal": (lambda x: Normal(x, var=jnp.asarray(0.25)), lambda x: stats.norm(x, 0.5), lambda x, y: (x - y) / 0.25),
    "logistic": (
        lambda x: Logistic(x, jnp.asarray(0.4)),
        lambda x: stats.logistic(x, 0.4),
        lambda x, y: -np.tanh((y - x) / 0.8) / 0.4,
    ),
    "neither additive nor even": (
        lambda x: Normal(0.8 * x + 0.3 * x**2, var=0.1 + 0.2 * x**2),
        lambda x: stats.norm(0.8 * x + 0.3 * x**2, np.sqrt(0.1 + 0.2 * x**2)),
        lambda x, y: -(y - 0.8 * x - 0.3 * x**2) / (0.1 + 0.2 * x**2),
    ),
}
POINTS, SHARES = np.array([-1.0, 0.2, 1.1]), np.array([0.5, 0.2, 0.3])


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("normal", "logistic")), "neither additive nor even"]
)
def test_SM_4_is_the_explicit_loss_of_the_noisy_distribution_and_a_constant(name):
    # Three clean points, all noisy y on a line: an example is a pair (x, y), and expectations are sums.
    kernel, density, conditional = KERNELS[name]
    line = np.linspace(-30.0, 30.0, 2001)
    x, y = np.repeat(POINTS, 2001), np.tile(line, 3)
    share = np.repeat(SHARES, 2001) * density(x).pdf(y) * 0.03
    assert_close(share.sum(), 1.0)
    # the score of the noisy distribution: the mean of the conditional ones, given y
    joint = np.array([w * density(c).pdf(line) for w, c in zip(SHARES, POINTS, strict=True)])
    slopes = np.array([conditional(c, line) for c in POINTS])
    inside = joint.sum(0) > 1e-200  # the density elsewhere is negligible
    mean_slope = np.where(inside, (joint * slopes).sum(0) / np.where(inside, joint.sum(0), 1.0), 0.0)

    def log_marginal(y):
        terms = [jnp.log(w) + kernel(jnp.asarray([c])).log_prob(y) for w, c in zip(SHARES, POINTS, strict=True)]
        return jax.nn.logsumexp(jnp.stack(terms))

    truth = jax.vmap(jax.grad(log_marginal))
    assert_close(truth(jnp.asarray(line)[:, None])[inside, 0], mean_slope[inside], rtol=1e-9, atol=1e-12)
    constant = share @ (conditional(x, y) - np.tile(mean_slope, 3)) ** 2 / 2
    information_lost = share @ (conditional(x, y) ** 2 - np.tile(mean_slope, 3) ** 2) / 2
    assert_close(constant, information_lost, rtol=1e-11)  # the difference of two Fisher informations
    pairs, noisy = jnp.stack([jnp.asarray(x), jnp.asarray(y)], 1), jnp.asarray(y)[:, None]

    def noise(pair):
        return At(kernel(pair[:1]), pair[1:])

    def losses_of(s):
        return (
            score_matching.denoising(s, jax.random.key(0), pairs, noise),
            score_matching.explicit(s, truth, noisy),
            score_matching.implicit(s, noisy),
        )

    for s in (_bent, lambda y: 0.3 - 0.8 * y, truth):
        denoising, explicit, implicit = (share @ np.asarray(loss) for loss in jax.jit(losses_of, static_argnums=0)(s))
        assert_close(denoising, explicit + constant, rtol=1e-10)
        assert_close(denoising, implicit + share @ conditional(x, y) ** 2 / 2, rtol=1e-10)
    with refuted():  # without the constant the identity fails
        assert_close(denoising, explicit, rtol=1e-3)


@pytest.mark.slow
def test_SM_4_samples_of_the_library():
    # clean points in the plane under logistic noise: the excess loss of a score is its explicit loss
    clean = closed_form.empirical([[-1.0, 0.5], [0.2, -0.3], [1.0, 1.0]], [0.5, 0.2, 0.3])
    x = draws(clean, jax.random.key(12), 50_000)

    def noise(x):
        return Logistic(x, jnp.asarray(0.4))

    def log_marginal(y):
        return jax.nn.logsumexp(clean.log_weights + jax.vmap(lambda point: noise(point).log_prob(y))(clean.points))

    truth = jax.vmap(jax.grad(log_marginal))

    @jax.jit
    def claims():
        keys = jax.random.split(jax.random.key(13), 2)
        fresh = jax.vmap(lambda x, key: noise(x).sample(key))(x, jax.random.split(keys[1], x.shape[0]))
        best, *others = (score_matching.denoising(s, keys[0], x, noise) for s in (truth, _bent, _affine))
        return [
            (d - best, score_matching.explicit(s, truth, fresh)) for d, s in zip(others, (_bent, _affine), strict=True)
        ]

    for more, fisher in claims():
        assert_mean(more - fisher, 0.0, resolution=0.02 * fisher.mean())
        assert more.mean() > 0.1


@pytest.mark.slow
def test_SM_4_needs_noise_with_unbounded_support():
    # Uniform noise on a normal distribution: the score of q(y|x) is 0 inside, and the loss is minimal at s = 0.
    class Flat(NamedTuple):
        x: Any

        def sample(self, key):
            return self.x + jax.random.uniform(key, self.x.shape, self.x.dtype, -1.0, 1.0)

        def log_prob(self, y):
            return 0.0 * jnp.sum(y) - jnp.log(2.0)

    x = jax.random.normal(jax.random.key(14), (20_000, 1))
    truth = jax.vmap(
        jax.grad(lambda y: jnp.sum(jnp.log(jax.scipy.special.ndtr(y + 1) - jax.scipy.special.ndtr(y - 1))))
    )

    @jax.jit
    def claims():
        y = x + jax.random.uniform(jax.random.key(15), x.shape, x.dtype, -1.0, 1.0)
        zero, best = (score_matching.denoising(s, jax.random.key(16), x, Flat) for s in (jnp.zeros_like, truth))
        return zero, best, score_matching.explicit(jnp.zeros_like, truth, y)

    zero, best, fisher = claims()
    assert_close(zero, np.zeros(20_000))
    assert fisher.mean() > 0.1
    assert_mean(best - fisher, 0.0, resolution=0.02)  # higher than at s = 0, not lower
    with refuted():
        assert_mean(zero - best - fisher, 0.0)


# SM-5


@cache
def _levels():
    preserving = level_from_log_snr(jnp.asarray([-6.0, -1.0, 0.0, 2.0, 6.0]))
    exploding = jax.vmap(VarianceExploding(0.1, 5.0))(jnp.asarray([0.0, 0.5, 1.0]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), preserving._replace(t=None), exploding._replace(t=None))


def _each_level(count):
    """Levels of a batch, each of the eight `count` times."""
    return jax.tree.map(lambda part: jnp.repeat(part, count), _levels())


def test_SM_5_target_in_symbols():
    x, eps, s = sp.symbols("x eps s", real=True)
    a, g = sp.symbols("alpha sigma", positive=True)
    y = sp.Symbol("y", real=True)
    target = sp.diff(log_normal(y, a * x, g**2), y)
    assert_proved(target, -(y - a * x) / g**2)
    assert_proved(target.subs(y, a * x + g * eps), -eps / g)
    # with the weight sigma^2 it is the loss of eps_hat = -sigma s
    assert_proved(g**2 * (s + eps / g) ** 2 / 2, (eps - (-g * s)) ** 2 / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prediction_type",
    ["score", "v", *(pytest.param(prediction_type, marks=pytest.mark.slow) for prediction_type in ("x_0", "eps"))],
)
def test_SM_5_is_half_the_noise_loss(prediction_type):
    # sample by sample, for every prediction type; the score's error is unweighted with the weight 1
    levels, key = _each_level(4), jax.random.key(17)
    x_0 = draws(_mixture(), jax.random.key(18), 32)

    @jax.jit
    def claims():
        ours = partial(
            score_matching.denoising_at_level,
            denoiser(_mixture(), prediction_type, shift=0.2),
            key,
            x_0,
            levels,
            prediction_type=prediction_type,
        )
        errors = [
            elbo.denoising_error(denoiser(_mixture(), other, shift=0.2), key, x_0, levels, other)
            for other in ("eps", "score")
        ]
        return ours(), ours(weight=lambda level: jnp.ones_like(level.sigma)), *errors

    ours, bare, by_noise, by_score = claims()
    assert_close(ours, 0.5 * by_noise, rtol=1e-7)
    assert_close(bare, 0.5 * by_score, rtol=1e-7)
    assert_close(ours, bare * levels.sigma**2, rtol=1e-12)


@pytest.mark.slow
def test_SM_5_is_SM_4_with_normal_noise():
    # the same noise in both: an example carries its own noise and level, for the distribution that `denoising` uses
    levels, key = _each_level(4), jax.random.key(19)
    x_0 = draws(_mixture(), jax.random.key(20), 32)
    eps = jax.random.normal(key, x_0.shape, x_0.dtype)
    scales = jnp.stack([levels.alpha, levels.sigma], 1)

    def noise(example):
        x, eps, (alpha, sigma) = example.reshape(3, 2)
        return At(Normal(alpha * x, var=sigma**2), alpha * x + sigma * eps)

    plain = score_matching.denoising(_bent, key, jnp.concatenate([x_0, eps, scales], 1), noise)
    for weight, factor in ((lambda level: jnp.ones_like(level.sigma), 1.0), (None, levels.sigma**2)):
        ours = score_matching.denoising_at_level(lambda x_t, level: _bent(x_t), key, x_0, levels, weight=weight)
        assert_close(ours, factor * plain, rtol=1e-11)


@pytest.mark.slow
def test_SM_5_at_the_exact_denoiser_is_the_least_error():
    # 1/2 E |eps - E[eps|x_t]|^2 = SNR mmse / 2; and with the score 0, D / 2: with this weight, of equal size
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])
    x_0 = draws(distribution, jax.random.key(21), 20_000)
    exactly = denoiser(distribution)

    @jax.jit
    def claims(level):
        ours = score_matching.denoising_at_level(exactly, jax.random.key(22), x_0, level, prediction_type="eps")
        blind = score_matching.denoising_at_level(lambda x, level: jnp.zeros_like(x), jax.random.key(23), x_0, level)
        return ours, blind, level.snr * information.mmse(distribution, level).value / 2

    for i in (1, 3, 6):
        ours, blind, best = claims(jax.tree.map(lambda part, i=i: part[i], _levels()))
        assert_mean(ours, best, resolution=0.04 * best)
        assert_mean(blind, 0.5, resolution=0.01)


@pytest.mark.slow
def test_SM_5_over_a_discrete_schedule_is_the_simple_loss():
    schedule, steps = linear_betas(4, 0.05, 0.4), jnp.tile(jnp.arange(1, 5), 10_000)
    x_0, spoiled = draws(_mixture(), jax.random.key(24), 40_000), denoiser(_mixture(), shift=0.3)

    @jax.jit
    def claims():
        simple = losses.simple_loss(spoiled, jax.random.key(25), x_0, schedule, time_sampling="low_discrepancy")
        return simple, score_matching.denoising_at_level(
            spoiled, jax.random.key(26), x_0, jax.vmap(schedule)(steps), prediction_type="eps"
        )

    simple, ours = claims()
    assert_mean(2 * ours - simple, 0.0, resolution=0.02 * simple.mean())


# Cost


def _inner(equation):
    """The programs that a loop or a call runs."""
    parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
    return [getattr(p, "jaxpr", p) for p in parameters if hasattr(p, "eqns")]


def _products(jaxpr):
    """The number of matrix products that a program runs, counting loop iterations."""
    count = 0
    for equation in jaxpr.eqns:
        inner = sum(_products(sub) for sub in _inner(equation))
        count += (equation.primitive.name == "dot_general") + equation.params.get("length", 1) * inner
    return count


@pytest.mark.slow
def test_SM_2_and_3_and_4_cost():
    # A network of two matrices: half the number of its products is the number of passes.
    key, found = jax.random.key(27), {}
    for dims in (8, 16, 32, 64):
        x = jnp.zeros((5, dims))
        into, out = jnp.ones((dims, 16)), jnp.ones((16, dims))

        def net(x, into=into, out=out):
            return jnp.tanh(x @ into) @ out

        def height(x, into=into, out=out):
            return jnp.tanh(jnp.tanh(x @ into) @ out).sum(1)

        programs = {
            "network": net,
            "implicit": lambda x, net=net: score_matching.implicit(net, x),
            "sliced": lambda x, net=net: score_matching.sliced(net, key, x),
            "finite_difference": lambda x, e=height: score_matching.finite_difference(e, key, x, 0.1),
            "denoising": lambda x, net=net: score_matching.denoising(
                net, key, x, lambda x: Normal(x, var=jnp.ones(()))
            ),
        }
        found[dims] = {name: _products(jax.make_jaxpr(program)(x).jaxpr) / 2 for name, program in programs.items()}
    print(found)
    for dims, passes in found.items():
        assert passes == {
            "network": 1,
            "implicit": 1 + dims,
            "sliced": 2,
            "finite_difference": 3,
            "denoising": 1,
        }
