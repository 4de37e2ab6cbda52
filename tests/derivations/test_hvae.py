"""HVAE: the bound with many latents, on linear-Gaussian chains; and a diffusion model as a hierarchical VAE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.check import assert_close, assert_mean, assert_proved, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form, elbo, forward, hvae, path_bounds, vae
from vdm_jax.discrete_schedules import discretize
from vdm_jax.gaussian import Normal, kl
from vdm_jax.parameterization import prediction_target, to_x_0
from vdm_jax.schedules import LinearLogSNR


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# y = (x, z_1, z_2, z_3): each a multiple of the next plus noise, from z_3 ~ N(0, 1). All constants differ, so that a
# wrong order fails.
GAINS, NOISES = np.array([1.3, 0.7, -0.5]), np.array([0.3, 0.4, 1.1])
X, COUNT = 0.8, 50_000  # one shape wherever possible: one compilation


def _joint():
    """Var of y."""
    path = np.eye(4)  # y = path noise, the noise of z_3 being z_3
    for i in range(4):
        for j in range(i + 1, 4):
            path[i, j] = np.prod(GAINS[i:j])
    return path @ np.diag([*NOISES, 1.0]) @ path.T


def _regression(i, given):
    """Gains and variance of y_i given others, by their joint covariance."""
    joint = _joint()
    gains = np.linalg.solve(joint[np.ix_(given, given)], joint[given, i])
    return gains, joint[i, i] - gains @ joint[given, i]


def _kernel(gain, var, y):
    return Normal(gain * y, var=jnp.full(y.shape, var))


def _sum_kernel(gains, var, above, x):
    mean = gains[0] * x if above is None else gains[0] * above + gains[1] * x
    return Normal(mean, var=jnp.full(x.shape, var))


def _link(gain, var):
    return Partial(_kernel, jnp.asarray(gain), jnp.asarray(var))


def _decoder(z):
    return GAINS[0] * z


def _likelihood(mean):
    return Normal(mean, var=jnp.asarray(NOISES[0]))


DOWN = (2, 1)  # p(z_2|z_3), p(z_1|z_2): the top first


def _conditionals():
    return [_link(GAINS[i], NOISES[i]) for i in DOWN]


def _chain(direction, spoil=0.0):
    """The model with its own posterior as encoder; `spoil` perturbs the encoder's gains."""
    if direction == "bottom_up":
        distributions = [_regression(i, [i - 1]) for i in (1, 2, 3)]
        encoders = [_link(gains[0] + spoil, var) for gains, var in distributions]
        return hvae.bottom_up((1,), encoders, _conditionals(), _decoder)
    distributions = [_regression(3, [0]), _regression(2, [3, 0]), _regression(1, [2, 0])]
    posteriors = [Partial(_sum_kernel, jnp.asarray(gains + spoil), jnp.asarray(var)) for gains, var in distributions]
    return hvae.top_down((1,), posteriors, _conditionals(), _decoder)


def _inferred(direction, spoil):
    """Mean (given x) and covariance of (z_1, z_2, z_3) under q, and conditional variances, by propagating noises."""
    if direction == "bottom_up":
        steps = [(i, [i - 1], _regression(i, [i - 1])) for i in (1, 2, 3)]
    else:
        steps = [
            (3, [0], _regression(3, [0])),
            (2, [3, 0], _regression(2, [3, 0])),
            (1, [2, 0], _regression(1, [2, 0])),
        ]
    path, noises = np.zeros((4, 4)), np.zeros(4)  # y as a combination of x and three noises
    path[0, 0] = 1.0
    for i, given, (gains, var) in steps:
        path[i] = (gains + spoil) @ path[given]
        path[i, i], noises[i] = 1.0, var
    return path[1:, 0], path[1:, 1:] @ np.diag(noises[1:]) @ path[1:, 1:].T


def _truth(direction, spoil, x=X):
    """-log p(x) + KL(q(z|x) || p(z|x)), of three numbers."""
    gains, cov = _inferred(direction, spoil)
    joint = _joint()
    best, var = joint[1:, 0] / joint[0, 0], joint[1:, 1:] - np.outer(joint[1:, 0], joint[0, 1:]) / joint[0, 0]
    precision, apart = np.linalg.inv(var), (gains - best) * x
    logs = np.linalg.slogdet(var)[1] - np.linalg.slogdet(cov)[1]
    gap = 0.5 * (np.trace(precision @ cov) + apart @ precision @ apart - 3 + logs)
    return -stats.norm.logpdf(x, 0, joint[0, 0] ** 0.5) + gap


DIRECTIONS = ("bottom_up", "top_down")
directions = pytest.mark.parametrize("direction", DIRECTIONS)


def _fixed_latents(values):
    """A `Draw` that takes these latents, in order."""
    return lambda i, q, p: jnp.asarray(values[i])


@jax.jit
def _sampled(hierarchy, key, x):
    """The latents of `hvae.bound` with this key, and the input of its likelihood."""
    return hierarchy(x, lambda i, q, p: vae.reparameterized_sample(q, jax.random.fold_in(key, i)))


def _log_probs(distribution, z):
    return np.asarray(jax.vmap(Normal.log_prob)(distribution, z))


# HVAE-1, HVAE-2


@pytest.mark.slow
@directions
def test_HVAE_1_generation_has_the_chains_distribution(direction):
    key = jax.random.key(0)
    hierarchy, joint = _chain(direction), _joint()
    latents, mean = hierarchy(COUNT, lambda i, q, p: vae.reparameterized_sample(p, jax.random.fold_in(key, i)))
    assert [latent.q for latent in latents] == [None] * 3
    above = np.stack([latent.z[:, 0] for latent in reversed(latents)], 1)  # z_1, z_2, z_3
    assert_mean(above[:, :, None] * above[:, None, :], joint[1:, 1:])
    assert_close(mean[:, 0], GAINS[0] * above[:, 0], rtol=1e-15)
    x = hvae.sample(hierarchy, _likelihood, jax.random.key(1), COUNT)
    assert_mean(x[:, 0] ** 2, joint[0, 0], resolution=0.02)
    cool = hvae.sample(hierarchy, _likelihood, jax.random.key(1), COUNT, temperature=0.5)
    assert_mean(cool[:, 0] ** 2, 0.25 * (joint[0, 0] - NOISES[0]) + NOISES[0], resolution=0.02)  # latents' noise alone


def _densities(direction, y):
    """log q(z|x) and log p(x, z) at rows y, by the hierarchy's distributions."""
    z = y[:, 1:, None].swapaxes(0, 1)
    latents, mean = _chain(direction)(jnp.asarray(y[:, :1]), _fixed_latents(z if direction == "bottom_up" else z[::-1]))
    log_q = sum(_log_probs(latent.q, latent.z) for latent in latents)
    log_p = sum(_log_probs(latent.p, latent.z) for latent in latents)
    return log_q, log_p + _log_probs(jax.vmap(_likelihood)(mean), jnp.asarray(y[:, :1]))


@directions
def test_HVAE_1_the_joint_density_is_the_product(direction):
    y = 1.5 * np.random.RandomState(0).randn(20, 4)
    assert_close(_densities(direction, y)[1], stats.multivariate_normal(np.zeros(4), _joint()).logpdf(y), rtol=1e-12)


@directions
def test_HVAE_2_inference_inverts_the_posterior(direction):
    # p(z_1|x) p(z_2|z_1) p(z_3|z_2), or p(z_3|x) p(z_2|z_3,x) p(z_1|z_2,x): p(z|x), as the chain is Markov
    y = 1.5 * np.random.RandomState(1).randn(20, 4)
    joint = _joint()
    gains = joint[1:, 0] / joint[0, 0]
    posterior = stats.multivariate_normal(np.zeros(3), joint[1:, 1:] - np.outer(gains, joint[0, 1:]))
    assert_close(_densities(direction, y)[0], posterior.logpdf(y[:, 1:] - y[:, :1] * gains), rtol=1e-11)


@pytest.mark.slow
@directions
def test_HVAE_2_samples_follow_the_chain(direction):
    # the joint distribution of all latents under a perturbed encoder, by its own chain
    spoil, key = 0.2, jax.random.key(2)
    x = jnp.full((COUNT, 1), X)
    latents, _ = _sampled(_chain(direction, spoil), key, x)
    z = np.stack([latent.z[:, 0] for latent in (latents if direction == "bottom_up" else latents[::-1])], 1)
    gains, cov = _inferred(direction, spoil)
    assert_mean(z, gains * X)
    apart = z - gains * X
    assert_mean(apart[:, :, None] * apart[:, None, :], cov)


# HVAE-3


@pytest.mark.slow
@directions
def test_HVAE_3_is_the_evidence_where_q_is_the_posterior(direction):
    x = jnp.asarray(np.random.RandomState(8).randn(COUNT, 1))
    truth = -stats.norm.logpdf(x[:, 0], 0, _joint()[0, 0] ** 0.5)
    ours = hvae.bound(_chain(direction), _likelihood, jax.random.key(0), x, sampled_kl=True)
    assert_close(ours.total, truth, rtol=1e-12)  # for every sample


@pytest.mark.slow
@directions
@pytest.mark.parametrize("spoil", [0.0, 0.2])
def test_HVAE_3_bound_is_the_evidence_and_a_divergence(direction, spoil):
    # in expectation, with every KL in closed form that can be, and with none in closed form
    x, truth = jnp.full((COUNT, 1), X), _truth(direction, spoil)
    assert (truth > _truth(direction, 0.0) + 0.05) == (spoil > 0)
    for sampled in (False, True):
        ours = hvae.bound(_chain(direction, spoil), _likelihood, jax.random.key(3), x, sampled_kl=sampled).total
        if sampled and spoil == 0:
            assert_close(ours, np.full(len(x), truth), rtol=1e-11)
        else:
            assert_mean(ours, truth, resolution=0.02)


@directions
def test_HVAE_3_sampled_terms_add_up_to_the_joint_ratio(direction):
    # -log p(x, z) / q(z|x) at the sampled z, by scipy's densities of four and of three numbers
    spoil, key = 0.2, jax.random.key(4)
    x = 1.3 * np.random.RandomState(2).randn(COUNT, 1)
    hierarchy = _chain(direction, spoil)
    latents, _ = _sampled(hierarchy, key, jnp.asarray(x))
    z = np.concatenate([latent.z for latent in (latents if direction == "bottom_up" else latents[::-1])], 1)
    gains, cov = _inferred(direction, spoil)
    log_q = stats.multivariate_normal(np.zeros(3), cov).logpdf(z - x * gains)
    log_p = stats.multivariate_normal(np.zeros(4), _joint()).logpdf(np.concatenate([x, z], 1))
    ours = hvae.bound(hierarchy, _likelihood, key, jnp.asarray(x), sampled_kl=True)
    assert_close(ours.total, log_q - log_p, rtol=1e-10)
    # one row per level, in sampling order
    for row, latent in zip(ours.kl, latents, strict=True):
        assert_close(row, _log_probs(latent.q, latent.z) - _log_probs(latent.p, latent.z), rtol=1e-10, atol=1e-12)


def test_HVAE_3_closed_form_where_the_level_above_is_sampled_first():
    # top down every KL has a closed form; bottom up only the topmost
    x, key = jnp.full((COUNT, 1), X), jax.random.key(5)
    for direction, closed in (("top_down", [True] * 3), ("bottom_up", [False, False, True])):
        hierarchy = _chain(direction, 0.2)
        latents, _ = _sampled(hierarchy, key, x)
        rows = hvae.bound(hierarchy, _likelihood, key, x).kl
        for row, latent, is_closed in zip(rows, latents, closed, strict=True):
            assert latent.upward == (not is_closed)
            divergence = np.asarray(jax.vmap(kl)(latent.q, latent.p))
            log_ratio = _log_probs(latent.q, latent.z) - _log_probs(latent.p, latent.z)
            assert_close(row, divergence if is_closed else log_ratio, rtol=1e-12, atol=1e-14)
            assert np.abs(divergence - log_ratio).mean() > 0.01


@pytest.mark.slow
def test_HVAE_3_one_level_is_the_vae():
    gains, var = _regression(1, [0])
    encoder, x, key = _link(gains[0] + 0.1, var), jnp.asarray([[0.8], [-1.7]]), jax.random.key(6)
    upward = hvae.bottom_up((1,), [encoder], [], _decoder)
    downward = hvae.top_down((1,), [lambda above, x: encoder(x)], [], _decoder)
    for sampled in (False, True):
        one = vae.bound(encoder, _decoder, _likelihood, jax.random.fold_in(key, 0), x, sampled_kl=sampled)
        for hierarchy in (upward, downward):
            ours = hvae.bound(hierarchy, _likelihood, key, x, sampled_kl=sampled)
            assert_close(ours.reconstruction, one.reconstruction, rtol=1e-15)
            assert_close(ours.kl[0], one.kl, rtol=1e-15)
            assert_close(ours.total, one.total, rtol=1e-15)


@pytest.mark.slow
def test_HVAE_3_more_samples_tighten_the_bound():
    x, gaps = jnp.full((10_000, 1), X), []
    truth = -stats.norm.logpdf(X, 0, _joint()[0, 0] ** 0.5)
    for samples in (1, 32):
        ours = hvae.importance_weighted_bound(
            _chain("bottom_up", 0.2), _likelihood, jax.random.key(samples), x, samples=samples
        )
        gaps.append(float(ours.mean()) - truth)
        assert_mean(np.exp(truth - np.asarray(ours)), 1.0, resolution=0.05)  # unbiased, with its -log K
        if samples == 1:
            assert_mean(ours, _truth("bottom_up", 0.2), resolution=0.05)
    assert gaps[0] > 5 * gaps[1] > -20 * float(ours.std()) / 100


def test_erratum_hierarchy_kl_needs_the_sample():
    # Printed: E KL(q(z_i|z_{i-1}) || p(z_i|z_{i+1})) over the chain from the bottom up. There z_{i+1} depends on the
    # sample z_i, but the KL averages over another z_i. Correct: E log q(z_i|z_{i-1}) / p(z_i|z_{i+1}).
    # With one level, z' = a z + noise above it, q(z) = N(m, s), p(z|z') = N(g z', n): the two differ by a g s / n.
    w, other, e, m, a, g = sp.symbols("w other e m a g", real=True)
    s, n, u = sp.symbols("s n u", positive=True)

    def cost(maker):
        """E of -log p(z|z') up to a constant: z by the standard normal w, z' by `maker` and e."""
        f = (m + sp.sqrt(s) * w - g * (a * (m + sp.sqrt(s) * maker) + sp.sqrt(u) * e)) ** 2 / (2 * n)
        for normal in (w, other, e):  # quadratic in each: E 1 = 1, E w = 0, E w^2 = 1
            f = sp.expand(f)
            f = f.coeff(normal, 0) + f.coeff(normal, 2)
        return f

    assert_proved(cost(other) - cost(w), a * g * s / n)

    # in the library, level by level: its terms have the correct mean, and the printed ones differ by that amount
    x, key = jnp.full((COUNT, 1), X), jax.random.key(7)
    hierarchy = _chain("bottom_up")
    latents, _ = _sampled(hierarchy, key, x)
    ours = hvae.bound(hierarchy, _likelihood, key, x)
    printed = np.stack([jax.vmap(kl)(latent.q, latent.p) for latent in latents])
    up = [_regression(i, [i - 1]) for i in (1, 2, 3)]
    excess = [up[i][0][0] * GAINS[i] * up[i - 1][1] / NOISES[i] for i in (1, 2)]
    for i, extra in enumerate(excess):
        assert extra > 0.05
        assert_mean(printed[i] - np.asarray(ours.kl[i]), extra, resolution=0.02)
        with refuted():
            assert_mean(printed[i] - np.asarray(ours.kl[i]), 0.0)
    assert_close(printed[2], ours.kl[2], rtol=1e-12)  # the topmost level has no level above
    truth = -stats.norm.logpdf(X, 0, _joint()[0, 0] ** 0.5)  # the model's own posterior: the gap is zero
    assert_mean(ours.total, truth, resolution=0.02)
    with refuted():
        assert_mean(np.asarray(ours.reconstruction) + printed.sum(0), truth)


# HVAE-4: two levels, each of two numbers, each linear in x: z_2 = SLOPE x + noise, and z_1 by z_2 and x

SLOPE, LEFT = np.array([0.9, 0.6]), np.array([0.3, 0.5])
WIDTH = 0.7


def _row(mean, log_var):
    return Normal(mean, var=jnp.broadcast_to(jnp.exp(log_var)[None], mean.shape))


def _upper(parameters, above, x):
    del above
    slope, shift, log_var = parameters
    return _row(slope[None] * x + shift[None], log_var)


def _lower(parameters, above, x):
    slope, shift, log_var = parameters
    return _row(0.5 * above + slope[None] * x + shift[None], log_var)


def _between(above):
    return Normal(0.5 * above, var=jnp.full(above.shape, WIDTH))


def _deaf(z):
    return jnp.zeros_like(z)


def _with_ignored_codes(slopes, shifts, log_vars):
    """A top-down hierarchy whose decoder ignores its codes: q(z_2|x), q(z_1|z_2,x) linear in x, and p(z_1|z_2)."""
    upper, lower = zip(slopes, shifts, log_vars, strict=True)
    return hvae.top_down((2,), [Partial(_upper, upper), Partial(_lower, lower)], [_between], _deaf)


def _start():
    return jnp.asarray([SLOPE, [0.4, -0.3]]), jnp.asarray([[0.2, 0.0], [0.0, -0.3]]), jnp.log(jnp.asarray([LEFT, LEFT]))


def _points(count):
    """Data with the moments of N(0, I)."""
    x = np.random.RandomState(3).randn(count, 2)
    x = x - x.mean(0)
    return jnp.asarray(x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / count)).T)


def _wide(mean):
    return Normal(mean, var=jnp.asarray(1.0))


@jax.jit
def _train(x, parameters, free_nats):
    def loss(parameters, key):
        return hvae.free_bits_objective(
            hvae.bound(_with_ignored_codes(*parameters), _wide, key, x), free_nats=free_nats
        )

    def update(parameters, key):
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, jax.grad(loss)(parameters, key)), None

    return jax.lax.scan(update, parameters, jax.random.split(jax.random.key(8), 400))[0]


@pytest.mark.slow
def test_HVAE_4_a_decoder_that_ignores_its_codes_collapses_the_posterior():
    x = _points(500)
    before, trained = _start(), _train(x, _start(), jnp.asarray(0.0))
    active = hvae.collapse_diagnostics(_with_ignored_codes(*before), jax.random.key(9), x)
    assert_close(active.active_units, [2, 2], rtol=0)
    assert np.all(np.asarray(active.kl) > 0.1)
    assert np.all(np.asarray(active.mutual_information) > 0.3)
    collapsed = hvae.collapse_diagnostics(_with_ignored_codes(*trained), jax.random.key(9), x)
    assert_close(collapsed.kl, np.zeros(2), atol=1e-12)
    assert_close(collapsed.mutual_information, np.zeros(2), atol=1e-8)
    assert_close(collapsed.active_units, [0, 0], rtol=0)
    # this is the optimum: the bound is the decoder's -log p(x), which no bound can undercut
    bound = hvae.bound(_with_ignored_codes(*trained), _wide, jax.random.key(10), x)
    assert_close(bound.total, -stats.norm.logpdf(x).sum(1), rtol=1e-8)
    bound = hvae.bound(_with_ignored_codes(*before), _wide, jax.random.key(10), x)
    assert_close(bound.reconstruction, -stats.norm.logpdf(x).sum(1), rtol=1e-12)
    assert np.all(np.asarray(bound.kl) > 0)


def test_HVAE_4_diagnostics_of_an_active_and_a_collapsed_level():
    # x ~ N(0, I): z_2 has I(x; z_2) = 1/2 log(1 + SLOPE^2 / LEFT) per dimension, and the collapsed z_1 adds 0
    count = 500
    x = _points(count)
    slopes, shifts = jnp.asarray([SLOPE, [0.0, 0.0]]), jnp.zeros((2, 2))
    hierarchy = _with_ignored_codes(slopes, shifts, jnp.log(jnp.asarray([LEFT, [WIDTH, WIDTH]])))
    diagnose = jax.jit(hvae.collapse_diagnostics)
    runs = [diagnose(hierarchy, key, x) for key in jax.random.split(jax.random.key(11), 8)]
    ours = hvae.CollapseDiagnostics(*(np.stack(field) for field in zip(*runs, strict=True)))
    kl_top = 0.5 * np.sum(SLOPE**2 + LEFT - 1 - np.log(LEFT))
    assert_close(ours.kl, np.tile([kl_top, 0.0], (8, 1)), rtol=1e-12, atol=1e-15)
    assert_close(ours.active_units, np.tile([2, 0], (8, 1)), rtol=0)
    information = 0.5 * np.log1p(SLOPE**2 / LEFT).sum()
    print(
        f"active and collapsed: KL {ours.kl[0]}, information {ours.mutual_information.mean(0)}, exact {information:.4f}"
    )
    # for one data set, not the distribution: the difference is the sampling error of N examples
    assert ours.mutual_information.mean(0)[0] == pytest.approx(information, rel=0.03)
    assert_close(ours.mutual_information[:, 1], ours.mutual_information[:, 0], atol=1e-9)
    assert information < np.log(count)
    # with a very strong signal the codes identify each example: the information is log N, its maximum
    names = _with_ignored_codes(1e4 * slopes, shifts, jnp.log(jnp.asarray([LEFT, [WIDTH, WIDTH]])))
    assert_close(diagnose(names, jax.random.key(12), x).mutual_information, [np.log(count)] * 2, rtol=1e-12)
    # a unit is inactive if its mean hardly varies, for any KL: below a variance of 0.01 relative to the prior's 1;
    # relative to the prior's WIDTH = 0.7 there, 0.09 suffices and 0.075 does not
    faint = _with_ignored_codes(jnp.asarray([[0.9, 0.09], [0.09, 0.075]]), shifts + 1.0, jnp.log(jnp.full((2, 2), 0.1)))
    found = diagnose(faint, jax.random.key(13), x)
    assert_close(found.active_units, [1, 1], rtol=0)
    assert np.all(np.asarray(found.kl) > 1.0)


@pytest.mark.slow
def test_HVAE_4_information_adds_up_along_the_levels():
    # two live levels: I(x; z_2, z_1) = I(x; z_2) + I(x; z_1 | z_2), by determinants of their joint covariance
    count = 500
    x = _points(count)
    slopes = np.array([SLOPE, [0.8, -0.9]])
    hierarchy = _with_ignored_codes(jnp.asarray(slopes), jnp.zeros((2, 2)), jnp.log(jnp.asarray([LEFT, LEFT])))
    truth = np.zeros(2)
    for a, b, v in zip(*slopes, LEFT, strict=True):  # z_2 = a x + e_2, z_1 = z_2 / 2 + b x + e_1
        noise = np.array([[v, v / 2], [v / 2, v / 4 + v]])
        signal = np.array([a, a / 2 + b])
        truth[0] += 0.5 * np.log(1 + a**2 / v)
        truth[1] += 0.5 * np.log(np.linalg.det(noise + np.outer(signal, signal)) / np.linalg.det(noise))
    runs = [hvae.collapse_diagnostics(hierarchy, key, x) for key in jax.random.split(jax.random.key(14), 8)]
    ours = np.mean([run.mutual_information for run in runs], 0)
    assert ours == pytest.approx(truth, rel=0.05)
    assert truth[1] > 1.2 * truth[0]


def test_HVAE_4_free_nats_by_hand():
    bound = hvae.HierarchicalBound(jnp.asarray([1.0, 3.0]), jnp.asarray([[0.2, 0.4], [2.0, 1.0], [0.6, 0.2]]))
    assert_close(hvae.free_bits_objective(bound), bound.total.mean(), rtol=1e-15)
    assert_close(hvae.free_bits_objective(bound, beta=0.5, free_nats=0.5), 2.0 + 0.5 * (0.5 + 1.5 + 0.5), rtol=1e-15)
    slopes = jax.grad(lambda kl: hvae.free_bits_objective(bound._replace(kl=kl), free_nats=0.5))(bound.kl)
    assert_close(slopes, [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]], rtol=0)  # no gradient below the free nats
    assert_close([hvae.kl_warm_up(step, 4) for step in (0, 1, 3, 9)], [0.25, 0.5, 1.0, 1.0], rtol=0)


@pytest.mark.slow
def test_HVAE_4_free_nats_keep_a_level_active():
    # trained with a decoder that ignores the codes, both levels collapse to the free nats and no further
    x = _points(500)
    trained = _with_ignored_codes(*_train(x, _start(), jnp.asarray(0.3)))
    alive = hvae.collapse_diagnostics(trained, jax.random.key(15), x)
    print(f"free nats 0.3: KL {alive.kl}, information {alive.mutual_information}")
    assert np.asarray(alive.kl) == pytest.approx([0.3, 0.3], rel=0.15)
    assert np.all(np.asarray(alive.mutual_information) > 0.05)


# HVAE-5: T levels of a discrete schedule; any denoiser of noise

STEPS = 3


def _schedule():
    return discretize(LinearLogSNR(1.0, -4.0), STEPS)


def _denoiser(x_t, level):
    return jnp.tanh(x_t + level.t[:, None].astype(x_t.dtype) * 0.1) - 0.2 * x_t


def _vectorized(tree, count):
    return jax.tree.map(lambda leaf: jnp.full((count,), leaf), tree)


def _reverse(t, z):
    """p(z_{t-1}|z_t): the posterior with the denoiser's prediction in the place of x_0."""
    step = _vectorized(_schedule().step(t - 1, t), len(z))
    x_hat = jax.vmap(lambda *a: to_x_0(*a, prediction_type="eps"))(_denoiser(z, step.t), z, step.t)
    return jax.vmap(forward.posterior)(z, x_hat, step)


def _last(z):
    level = _vectorized(_schedule()(1), len(z))
    return jax.vmap(lambda *a: to_x_0(*a, prediction_type="eps"))(_denoiser(z, level), z, level), z, level


def _likelihood_of_x(x_hat, z, level):
    return Normal(x_hat, var=0.3 + level.sigma**2)


def _read(output):
    return _likelihood_of_x(*output)


def _top(above, x):
    del above
    level = _vectorized(_schedule()(STEPS), len(x))
    return jax.vmap(forward.marginal)(x, level)


def _posterior(t, above, x):
    return jax.vmap(forward.posterior)(above, x, _vectorized(_schedule().step(t - 1, t), len(x)))


def _forward(t, z):
    return jax.vmap(forward.transition)(z, _vectorized(_schedule().step(t - 1, t), len(z)))


def _diffusion(direction, dims=2):
    """A diffusion model as a hierarchy: dim z = dim x, a fixed linear-Gaussian encoder, z_T ~ N(0, I)."""
    down = [Partial(_reverse, t) for t in range(STEPS, 1, -1)]
    if direction == "top_down":
        return hvae.top_down((dims,), [_top, *(Partial(_posterior, t) for t in range(STEPS, 1, -1))], down, _last)
    return hvae.bottom_up((dims,), [Partial(_forward, t) for t in range(1, STEPS + 1)], down, _last)


@jax.jit
def _diffusion_terms(x, latents):
    """The bound's terms by `elbo`, at x_T..x_1."""
    schedule = _schedule()

    def term(z, t):
        step = _vectorized(schedule.step(t - 1, t), len(x))
        eps = (z - step.t.alpha[:, None] * x) / step.t.sigma[:, None]
        truth = jax.vmap(lambda x, e, level: prediction_target(x, e, level, "eps"))(x, eps, step.t)
        return jax.vmap(lambda a, b, step: elbo.diffusion_kl(a, b, step, "eps"))(truth, _denoiser(z, step.t), step)

    prior = jax.vmap(lambda one: elbo.prior_kl(one, schedule(STEPS)))(x)
    cost = jax.vmap(lambda one, *output: -_likelihood_of_x(*output).log_prob(one))(x, *_last(latents[-1]))
    return prior, jnp.stack([term(z, STEPS - i) for i, z in enumerate(latents[:-1])]), cost


def test_HVAE_5_terms_are_those_of_the_diffusion_bound():
    # along the same latents, each term by itself: prior, T - 1 steps, reconstruction
    hierarchy, key = _diffusion("top_down"), jax.random.key(0)
    x = jnp.asarray(np.random.RandomState(6).randn(50, 2))
    latents, _ = _sampled(hierarchy, key, x)
    ours = hvae.bound(hierarchy, _read, key, x)
    prior, terms, cost = _diffusion_terms(x, [latent.z for latent in latents])
    for row, truth in ((ours.kl[0], prior), (ours.kl[1:], terms), (ours.reconstruction, cost)):
        assert_close(row, truth, rtol=1e-12, atol=1e-12 * float(truth.max()))


def _next(hierarchy):
    """Counting levels from 1, as `path_bounds` does: the same noises, so the same path."""
    return Partial(lambda hierarchy, x, draw: hierarchy(x, lambda i, q, p: draw(i + 1, q, p)), hierarchy)


@pytest.mark.slow
def test_HVAE_5_from_the_bottom_up_it_is_the_joint_ratio():
    # path by path: the chain q(x_t|x_{t-1}) and all its logarithms
    x, key = jnp.asarray(np.random.RandomState(7).randn(50, 2)), jax.random.key(1)
    ours = hvae.bound(_next(_diffusion("bottom_up")), _read, key, x, sampled_kl=True)
    ratio = path_bounds.joint_log_ratio(_denoiser, key, x, _schedule(), _likelihood_of_x)
    assert_close(ours.total, -ratio, rtol=1e-12)


@pytest.mark.slow
def test_HVAE_5_bound_of_many_paths_is_the_importance_weighted_bound():
    x, key = jnp.asarray(np.random.RandomState(7).randn(50, 2)), jax.random.key(1)
    many = hvae.importance_weighted_bound(_next(_diffusion("bottom_up")), _read, key, x, samples=3)
    assert_close(
        many,
        path_bounds.importance_weighted_bound(_denoiser, key, x, _schedule(), _likelihood_of_x, samples=3),
        rtol=1e-12,
    )


@pytest.mark.slow
def test_HVAE_5_both_have_the_bounds_expectation():
    x = jnp.broadcast_to(jnp.asarray([[0.7, -1.1]]), (COUNT, 2))
    truth = elbo.bound(_denoiser, jax.random.key(2), x, _schedule(), _likelihood_of_x)
    for direction in DIRECTIONS:
        ours = hvae.bound(_diffusion(direction), _read, jax.random.key(3), x)
        assert_mean(np.asarray(ours.total) - np.asarray(truth.total), 0.0, resolution=0.1)
        assert_mean(np.asarray(ours.reconstruction) - np.asarray(truth.reconstruction), 0.0, resolution=0.1)
        if direction == "top_down":  # term by term
            assert_close(ours.kl[0], truth.prior, rtol=1e-12)
            assert_mean(np.asarray(ours.kl[1:].sum(0)) - np.asarray(truth.diffusion), 0.0, resolution=0.1)


@pytest.mark.slow
def test_HVAE_5_with_the_exact_denoiser_it_bounds_the_entropy_of_the_data():
    # condition (2) fixes the encoder: only the denoiser is learned, and the optimal one is known
    distribution = closed_form.gaussian([0.4], [[0.5]])
    schedule, best = _schedule(), closed_form.OptimalDenoiser(distribution, "x_0")

    def reverse(t, z):
        step = _vectorized(schedule.step(t - 1, t), len(z))
        return jax.vmap(forward.posterior)(z, best(z, step.t), step)

    def last(z):
        return jax.vmap(lambda z: distribution.posterior(z, schedule(1)))(z)

    posteriors = [_top, *(Partial(_posterior, t) for t in range(STEPS, 1, -1))]
    hierarchy = hvae.top_down((1,), posteriors, [Partial(reverse, t) for t in range(STEPS, 1, -1)], last)
    x = draws(distribution, jax.random.key(4), 100_000)
    ours = hvae.bound(hierarchy, lambda distribution: distribution, jax.random.key(5), x)
    snr = np.exp(np.linspace(1.0, -4.0, STEPS))
    error = 1 / (1 / 0.5 + snr)  # precisions add up
    steps = 0.5 * (snr[:-1] - snr[1:]) * error[1:]
    assert_mean(ours.kl[1:].T, steps[::-1])
    assert_mean(ours.reconstruction, 0.5 * np.log(2 * np.pi * np.e * error[0]), resolution=0.01)
    assert ours.total.mean() > distribution.entropy()
