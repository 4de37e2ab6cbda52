"""SURE: the risk of a denoiser without clean data, for every clean x; the optimal denoiser, and score matching."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from scipy import stats

from tests.derivations import worlds
from tests.derivations.algebra import expected, log_normal
from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from vdm_jax import closed_form, divergence, information, score_matching, sure, tweedie
from vdm_jax.noise_levels import NoiseLevel

draws = jax.jit(worlds.draws, static_argnums=2)
SIGMA = 0.6
MATRIX = np.array([[0.9, -0.4, 0.2], [0.3, 0.7, -0.5], [-0.8, 0.1, 0.4]])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _level():
    one, sigma = jnp.ones(()), jnp.asarray(SIGMA)
    return NoiseLevel(one, sigma, jnp.zeros(()), jnp.log(sigma))


def _shrink(y):
    return 0.7 * y


def _soft(y):
    return sure.soft_threshold(y, jnp.asarray(0.5))


def _coupled(y):
    return y - 0.4 * jnp.tanh(y @ MATRIX) @ MATRIX


DENOISERS = {"shrink": _shrink, "soft threshold": _soft, "coupled": _coupled}

# SURE-1


def test_SURE_1_by_steins_lemma():
    # y ~ N(x, sigma^2), any D: the error of the estimate is a derivative, whose integral vanishes at the ends
    x, y = sp.symbols("x y", real=True)
    sigma = sp.Symbol("sigma", positive=True)
    p, d = sp.exp(log_normal(y, x, sigma**2)), sp.Function("D")(y)
    assert_proved(sp.diff(p * d, y), p * sp.diff(d, y) - p * (y - x) / sigma**2 * d)
    off = (d - y) ** 2 - sigma**2 + 2 * sigma**2 * sp.diff(d, y) - (d - x) ** 2
    assert_proved(p * off, sp.diff(p * sigma**2 * (2 * d - y - x), y))
    # carried out, for a parabola
    parabola = y**2 / 3 - y / 2
    assert_proved(expected(off.subs(d, parabola).doit(), y, x, sigma**2))


def _soft_risk(x, threshold, sigma):
    """E (D(y) - x)^2 of the soft threshold, in closed form (Donoho & Johnstone)."""
    x, t = x / sigma, threshold / sigma
    inside = stats.norm.cdf(t - x) - stats.norm.cdf(-t - x)
    edges = (t - x) * stats.norm.pdf(t + x) + (t + x) * stats.norm.pdf(t - x)
    return sigma**2 * (1 + t**2 + (x**2 - 1 - t**2) * inside - edges)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["exact", "rademacher"])
def test_SURE_1_has_the_risk_for_every_x(trace):
    # one x for all: the distribution of clean data does not matter
    clean = np.array([0.0, 0.8, -2.0])
    y = clean[None] + SIGMA * jax.random.normal(jax.random.key(0), (50_000, 3))
    known = {
        "shrink": np.sum((0.3 * clean) ** 2) + 3 * 0.7**2 * SIGMA**2,
        "soft threshold": _soft_risk(clean, 0.5, SIGMA).sum(),
    }
    for name, denoise in DENOISERS.items():
        ours = np.asarray(sure.sure(denoise, jax.random.key(1), y, SIGMA, trace=trace))
        loss = np.square(np.asarray(jax.jit(denoise)(y)) - clean).sum(1)
        assert_mean(ours - loss, 0.0, resolution=0.01)
        if name in known:
            assert_mean(ours, known[name], resolution=0.01)


def test_SURE_1_by_quadrature():
    # for the kinked denoiser too, piece by piece between its kinks
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for x in (0.0, 0.8, -2.0):
        pieces = np.array([-9 * SIGMA + min(x, -0.5), -0.5, 0.5, 9 * SIGMA + max(x, 0.5)])
        low, width = pieces[:-1, None], np.diff(pieces)[:, None]
        y = (low + width * (nodes + 1) / 2).ravel()
        p = (width / 2 * weights).ravel() * stats.norm(x, SIGMA).pdf(y)
        ours = sure.sure(_soft, None, jnp.asarray(y)[:, None], SIGMA, trace="exact")
        assert_close(p @ np.asarray(ours), _soft_risk(x, 0.5, SIGMA), rtol=1e-10)
        # a jump has no derivative: the estimate for the hard threshold lacks its two edges, 0.5 high at +-0.5
        hard = sure.sure(_hard, None, jnp.asarray(y)[:, None], SIGMA, trace="exact")
        risk = p @ np.square(np.where(np.abs(y) > 0.5, y, 0.0) - x)
        edges = 2 * SIGMA**2 * 0.5 * stats.norm(x, SIGMA).pdf([-0.5, 0.5]).sum()
        assert_close(p @ np.asarray(hard) + edges, risk, rtol=1e-10)
        with refuted():
            assert_close(p @ np.asarray(hard), risk, rtol=0.01)


def _hard(y):
    return jnp.where(jnp.abs(y) > 0.5, y, 0.0)


@pytest.mark.slow
def test_SURE_1_fails_where_the_denoiser_jumps():
    y = 0.4 + SIGMA * jax.random.normal(jax.random.key(2), (50_000, 1))
    off = np.asarray(sure.sure(_hard, jax.random.key(3), y, SIGMA)) - np.square(np.asarray(_hard(y))[:, 0] - 0.4)
    with refuted():
        assert_mean(off, 0.0)
    assert_mean(off, -2 * SIGMA**2 * 0.5 * stats.norm(0.4, SIGMA).pdf([-0.5, 0.5]).sum(), resolution=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace", ["rademacher", *(pytest.param(t, marks=pytest.mark.slow) for t in ("gaussian", "sphere"))]
)
def test_SURE_1_estimated_divergence_has_no_bias(trace):
    y = jnp.broadcast_to(jnp.asarray([[0.3, -1.0, 0.6]]), (20_000, 3))
    exactly = sure.sure(_coupled, None, y[:1], SIGMA, trace="exact")
    jacobian = jax.jit(jax.jacfwd(lambda y: _coupled(y[None])[0]))(y[0])
    change = np.asarray(jax.jit(_coupled)(y[:1]) - y[:1])
    assert_close(exactly, np.sum(change**2) + SIGMA**2 * (2 * np.trace(jacobian) - 3), rtol=1e-12)
    assert_mean(sure.sure(_coupled, jax.random.key(4), y, SIGMA, trace=trace), exactly, resolution=0.02)


@pytest.mark.slow
def test_SURE_1_best_threshold_is_the_least_of_all():
    y = jnp.asarray(np.random.RandomState(0).randn(4, 10) * [[0.3], [1.0], [1.0], [4.0]])

    def at(threshold):
        return sure.sure(lambda y: sure.soft_threshold(y, threshold), None, y.reshape(1, -1), SIGMA, trace="exact")[0]

    thresholds = np.linspace(0.0, 10.0, 2001)
    # at a candidate itself the derivative has a kink: evaluate just above it, where that number counts as cut
    candidates = np.append(np.abs(y).ravel() * (1 + 1e-12), 0.0)
    grid, tried = (np.asarray(jax.jit(jax.vmap(at))(jnp.asarray(t))) for t in (thresholds, candidates))
    threshold, estimate = sure.sure_threshold(y, SIGMA)
    assert_close(estimate, tried.min(), rtol=1e-9)
    assert_close(threshold, candidates[tried.argmin()], rtol=1e-9)
    assert np.all(grid >= estimate - 1e-9)
    assert 0.0 < threshold < np.abs(y).max()  # neither end of the range
    assert grid.min() - estimate < 0.02 * abs(estimate)
    # pure signal: no entry is cut; pure noise: all entries are cut
    assert_close(sure.sure_threshold(10.0 + y, SIGMA)[0], 0.0)
    faint = 0.1 * y / jnp.abs(y).max()
    assert_close(sure.sure_threshold(faint, SIGMA), [0.1, np.sum(np.square(faint)) - 40 * SIGMA**2], rtol=1e-12)


@pytest.mark.slow
def test_SURE_1_best_threshold_is_near_the_oracles():
    # Donoho and Johnstone's setting: 1,000 numbers, 50 of them not zero, noise 1. The oracle knows the clean ones.
    random = np.random.RandomState(1)
    clean = np.zeros((40, 1000))
    clean[:, :50] = 4.0 * random.choice([-1.0, 1.0], (40, 50))
    y = clean + random.randn(40, 1000)
    thresholds = jax.vmap(lambda y: sure.sure_threshold(y, 1.0)[0])(jnp.asarray(y))
    ours = np.square(np.asarray(sure.soft_threshold(jnp.asarray(y), thresholds[:, None])) - clean).sum(1)
    grid = np.linspace(0.0, 4.0, 81)
    oracle = np.min([np.square(np.sign(y) * np.maximum(np.abs(y) - t, 0) - clean).sum(1) for t in grid], axis=0)
    universal = np.square(np.sign(y) * np.maximum(np.abs(y) - np.sqrt(2 * np.log(1000)), 0) - clean).sum(1)
    print(f"loss: SURE {ours.mean():.1f}, oracle {oracle.mean():.1f}, universal {universal.mean():.1f}, none 1000")
    assert ours.mean() < 1.05 * oracle.mean()
    assert universal.mean() > 1.5 * oracle.mean()


# SURE-2


def test_SURE_2_best_affine_denoiser_is_wieners_in_symbols():
    # in symbols, in one dimension, for any distribution of mean m and variance v: only two moments of y matter
    c, b, m, y = sp.symbols("c b m y", real=True)
    v, sigma = sp.symbols("v sigma", positive=True)
    estimate = sp.expand((c * y + b - y) ** 2 - sigma**2 + 2 * sigma**2 * c)
    risk = estimate.subs(y**2, v + sigma**2 + m**2).subs(y, m)
    best = sp.solve([sp.diff(risk, c), sp.diff(risk, b)], [c, b])
    assert_proved(best[c], v / (v + sigma**2))
    assert_proved(best[b], m * sigma**2 / (v + sigma**2))
    assert_proved(risk.subs(best), v * sigma**2 / (v + sigma**2))


@pytest.mark.slow
def test_SURE_2_best_affine_denoiser_is_wieners():
    # in the library: the estimate over normal data is quadratic in (A, b), so one Newton step reaches the minimum
    distribution = closed_form.gaussian([0.3, -0.5], [[0.8, 0.3], [0.3, 0.4]])
    noisy, level = closed_form.marginal(distribution, _level()), _level()

    def risk_of(parameters):
        def one(y):
            pushforward = jax.tree_util.Partial(lambda p, y: y @ p[:4].reshape(2, 2) + p[4:][None], parameters)
            return sure.sure(pushforward, None, y[None], SIGMA, trace="exact")[0]

        return information.quadrature(one, noisy, 31).value

    @jax.jit
    def newton(start):
        return start - jnp.linalg.solve(jax.hessian(risk_of)(start), jax.grad(risk_of)(start))

    best = newton(jnp.zeros(6))
    gain = np.linalg.solve(np.asarray(distribution.covariance()) + SIGMA**2 * np.eye(2), distribution.covariance())
    assert_close(best[:4].reshape(2, 2), gain, rtol=1e-9)
    assert_close(best[4:], distribution.mean - distribution.mean @ gain, rtol=1e-9)
    y = jnp.asarray([[0.7, 0.1], [-1.0, 2.0]])
    tweedies = tweedie.posterior_mean(jax.vmap(noisy.score), y, level)
    assert_close(y @ best[:4].reshape(2, 2) + best[4:][None], tweedies, rtol=1e-9)
    assert_close(jax.jit(risk_of)(best), information.mmse(distribution, level).value, rtol=1e-10)


@cache
def _mixture():
    return closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])


@pytest.mark.slow
def test_SURE_2_no_denoiser_has_less_risk_than_tweedies():
    # E SURE(best + c h) = mmse + c^2 E h^2 for any h: no direction decreases the risk
    distribution, level = _mixture(), _level()
    noisy = closed_form.marginal(distribution, level)
    score = jax.vmap(noisy.score)

    def best(y):
        return tweedie.posterior_mean(score, y, level)

    others = {"up": jnp.ones_like, "wider": lambda y: y, "waves": lambda y: jnp.sin(3 * y), "best": best}

    def mean(loss):
        return information.quadrature(lambda y: loss(y[None])[0], noisy).value

    @jax.jit
    def claims():
        def estimate(h, c):
            return mean(lambda y: sure.sure(lambda y: best(y) + c * h(y), None, y, SIGMA, trace="exact"))

        found = {
            name: [estimate(h, c) for c in (-0.5, 1e-2, 0.5)] + [mean(lambda y, h=h: jnp.sum(h(y) ** 2, 1))]
            for name, h in others.items()
        }
        return found, estimate(jnp.ones_like, 0.0), information.mmse(distribution, level).value

    found, at_best, mmse = claims()
    assert_close(at_best, mmse, rtol=1e-11)
    for *risks, square in found.values():
        assert_close(risks, mmse + np.array([0.25, 1e-4, 0.25]) * square, rtol=1e-11)


@pytest.mark.slow
def test_SURE_2_risk_of_tweedies_denoiser_by_sampling():
    # over the distribution of clean data, without clean data: the mean of the estimate is the least squared error
    distribution, level = _mixture(), _level()
    y = draws(closed_form.marginal(distribution, level), jax.random.key(5), 50_000)
    score = jax.vmap(closed_form.marginal(distribution, level).score)

    @jax.jit
    def claims():
        ours = sure.sure(lambda y: tweedie.posterior_mean(score, y, level), jax.random.key(6), y, SIGMA)
        wrong = sure.sure(lambda y: y + 0.25 * SIGMA**2 * score(y), jax.random.key(6), y, SIGMA)
        return ours, wrong, information.mmse(distribution, level).value

    ours, wrong, mmse = claims()
    assert_mean(ours, mmse, resolution=0.02 * mmse)
    with refuted():  # a denoiser for less noise is worse
        assert_mean(wrong, mmse)


# SURE-3


def test_SURE_3_in_symbols():
    y = sp.symbols("y_1 y_2", real=True)
    sigma = sp.Symbol("sigma", positive=True)
    s = [sp.Function(name)(*y) for name in ("s_1", "s_2")]
    change = [sigma**2 * part for part in s]
    spread = sum(sp.diff(at + d, at) for at, d in zip(y, change, strict=True))
    estimate = -2 * sigma**2 + sum(d**2 for d in change) + 2 * sigma**2 * spread
    implicit = sum(part**2 for part in s) / 2 + sum(sp.diff(part, at) for at, part in zip(y, s, strict=True))
    assert_proved(estimate, 2 * sigma**2 + 2 * sigma**4 * implicit)


@pytest.mark.slow
def test_SURE_3_is_implicit_score_matching():
    # sample by sample, for a field that is not a gradient; with estimated traces too, with the same directions
    y, key = jax.random.normal(jax.random.key(7), (10, 3)), jax.random.key(8)

    def field(y):
        return jnp.tanh(y @ MATRIX) @ MATRIX - 0.5 * y

    def denoise(y):
        return y + SIGMA**2 * field(y)

    @jax.jit
    def claims():
        exactly = sure.sure(denoise, None, y, SIGMA, trace="exact"), score_matching.implicit(field, y)
        return {"exact": exactly} | {
            trace: (sure.sure(denoise, key, y, SIGMA, trace=trace), score_matching.sliced(field, key, y, trace=trace))
            for trace in ("rademacher", "sphere", "gaussian")
        }

    found = {trace: (np.asarray(ours), np.asarray(loss)) for trace, (ours, loss) in claims().items()}
    for trace in ("exact", "rademacher", "sphere"):
        ours, loss = found[trace]
        assert_close(ours, 3 * SIGMA**2 + 2 * SIGMA**4 * loss, rtol=1e-12, atol=1e-14)
        with refuted():
            assert_close(ours, 3 * SIGMA**2 + SIGMA**4 * loss, rtol=1e-2)
    # for normal directions |v|^2 is D on average only, and the identity in D takes part in the estimate
    ours, loss = found["gaussian"]
    with refuted():
        assert_close(ours, 3 * SIGMA**2 + 2 * SIGMA**4 * loss, rtol=1e-2)
    v = divergence.hutchinson_probes(key, y, "gaussian")[0]
    excess = 2 * SIGMA**2 * (np.square(v).sum(1) - 3)
    assert_close(ours, 3 * SIGMA**2 + 2 * SIGMA**4 * loss + excess, rtol=1e-12, atol=1e-14)
