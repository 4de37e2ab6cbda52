"""LAN: Langevin steps, their stationary distribution and its bias, and the time to cross between modes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp

from tests.derivations.algebra import R, log_normal
from tests.derivations.check import (
    assert_close,
    assert_disproved,
    assert_mean,
    assert_moments,
    assert_proved,
    refuted,
)
from tests.derivations.worlds import draws
from vdm_jax import closed_form, information, langevin
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import VarianceExploding

x, y, s = sp.symbols("x y s", real=True)
eta, v = sp.symbols("eta v", positive=True)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


_samples = jax.jit(draws, static_argnums=2)


# LAN-1


def test_LAN_1_small_steps_are_the_diffusion():
    # The change of E f in a step, over eta: the generator of dx = s dt + sqrt(2) dW, f' s + f''
    xi = sp.Symbol("xi", real=True)

    def mean(f, var):
        """E f(x + eta s + sqrt(var) xi), by the moments of xi ~ N(0, 1): 1, 3, 15 ..."""
        powers = sp.Poly(f.subs(x, x + eta * s + sp.sqrt(var) * xi), xi).terms()
        return sum(part * sp.factorial2(n - 1) for (n,), part in powers if n % 2 == 0)

    for f in (x, x**2, x**4, x**6 - 2 * x**3):
        generator = s * sp.diff(f, x) + sp.diff(f, x, 2)
        assert_proved(sp.expand((mean(f, 2 * eta) - f) / eta).subs(eta, 0), generator)
    # noise of sqrt(eta) belongs to another diffusion
    assert_disproved(sp.expand((mean(x**2, eta) - x**2) / eta).subs(eta, 0), 2 * s * x + 2)


def test_LAN_1_the_kernel():
    values = {x: R(3, 10), s: R(-7, 5), eta: R(1, 8), y: R(1, 2)}
    truth = log_normal(y, x + eta * s, 2 * eta).subs(values)
    at, slope, there = (jnp.full((1,), float(values[symbol])) for symbol in (x, s, y))
    kernel = langevin.langevin_kernel(at, slope, jnp.asarray(0.125))
    assert_close(kernel.log_prob(there), sp.N(truth, 20), rtol=1e-13)
    assert_close(kernel.mean, [0.125], rtol=1e-13)
    assert_close(kernel.var, 0.25)


@pytest.mark.slow
def test_LAN_1_a_chain_iterates_the_kernel():
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.5, 0.2])
    start = _samples(distribution, jax.random.key(1), 20_000)
    chain = langevin.ula(jax.vmap(distribution.score), jax.random.key(0), start, 0.1, 3, path=True)
    assert_close(chain.path[-1], chain.x, rtol=0.0)
    means = jax.jit(jax.vmap(lambda x: langevin.langevin_kernel(x, distribution.score(x), jnp.asarray(0.1)).mean))(
        chain.path[1]
    )
    noise = (chain.path[2] - means)[:, 0]
    assert_moments(noise, 0.0, 0.2)
    assert_mean(noise * chain.path[1][:, 0], 0.0, resolution=0.005)  # new at every step
    # a constant score: k eta is a time, and the step size does not matter
    for size, count in ((0.25, 1), (0.05, 5)):
        drifted = langevin.ula(lambda x: 0.0 * x - 3.0, jax.random.key(2), jnp.ones((20_000,)), size, count)
        assert_moments(drifted.x, 1.0 - 3.0 * 0.25, 2 * 0.25)


# LAN-2


def test_LAN_2_the_diffusion_leaves_the_distribution_invariant():
    # Fokker-Planck, dp/dt = -div(p grad log p) + lap p = 0, for any energy; with half the noise it is not zero
    energy = sp.Function("E")(x, y)
    for axes, p in (((x,), sp.exp(-sp.Function("E")(x))), ((x, y), sp.exp(-energy))):
        drift = sum(sp.diff(p * sp.diff(sp.log(p), at), at) for at in axes)
        assert_proved(-drift + sum(sp.diff(p, at, 2) for at in axes))
        p = p.subs(sp.Function("E")(x), x**4).subs(energy, x**4 + x * y).doit()
        drift = sum(sp.diff(p * sp.diff(sp.log(p), at), at) for at in axes)
        assert_disproved(-drift + sum(sp.diff(p, at, 2) for at in axes) / 2)


def test_LAN_2_a_step_from_a_normal_distribution_in_symbols():
    m, var = sp.symbols("m var", positive=True)
    start = sp.Symbol("start", real=True)
    k = sp.Symbol("k", integer=True, nonnegative=True)
    shrink, stationary = 1 - eta / v, v / (1 - eta / (2 * v))
    # x + eta s + noise with s = -(x - m)/v is affine: the mean and variance of step k + 1 from those of step k
    means, spreads = m + shrink**k * (start - m), stationary * (1 - shrink ** (2 * k))
    after = shrink * x + eta * m / v
    assert_proved(after, x - eta * (x - m) / v)
    assert_proved(means.subs(k, k + 1), after.subs(x, means))
    assert_proved(spreads.subs(k, k + 1), shrink**2 * spreads + 2 * eta)
    assert_proved(means.subs(k, 0), start)
    assert_proved(spreads.subs(k, 0))
    # the stationary distribution is eta/2 too wide to first order for any v; at 2v the variance grows by 2 eta a step
    assert_proved(shrink**2 * stationary + 2 * eta, stationary)
    assert_proved(sp.limit((stationary - v) / eta, eta, 0), R(1, 2))
    assert_proved((shrink**2 * var + 2 * eta - var).subs(eta, 2 * v), 4 * v)


MEAN, VAR = 0.7, 0.5


def _normal_score(x):
    return -(x - MEAN) / VAR


def _next(distribution, size):
    """The distribution after a step from a normal one, by the mean of the kernel, its derivative and its variance."""
    kernel = lambda x: langevin.langevin_kernel(x, _normal_score(x), jnp.asarray(size))  # noqa: E731
    origin = jnp.zeros(())
    mean, slope = kernel(origin).mean, jax.grad(lambda x: kernel(x).mean)(origin)
    return closed_form.Gaussian(
        distribution.mean, distribution.basis, distribution.variances, distribution.residual_variance
    ).pushforward(slope, mean[None], kernel(origin).var)


def test_LAN_2_stationary_distribution_of_the_kernel():
    for size in (0.4, 0.2, 0.1, 0.05):
        distribution = closed_form.gaussian([MEAN], [[VAR / (1 - size / (2 * VAR))]])
        after = _next(distribution, size)
        assert_close(after.mean, distribution.mean, rtol=1e-14)
        assert_close(after.variances, distribution.variances, rtol=1e-14)
        with refuted():
            assert_close(_next(closed_form.gaussian([MEAN], [[VAR]]), size).variances, [VAR], rtol=1e-3)


@pytest.mark.slow
def test_LAN_2_chains_have_the_exact_distribution_at_every_step():
    start, count = 3.0, 20_000
    run = partial(langevin.ula, _normal_score, jax.random.key(3), num_steps=40, path=True)
    for size in (0.2, 2 * VAR):  # at 2v the variance grows by 2 eta a step, without limit
        shrink = 1 - size / VAR
        chain = run(jnp.full((count,), start), size).path
        for k in (1, 3, 40):
            spread = 2 * size * sum(shrink ** (2 * i) for i in range(k))
            assert_moments(chain[k - 1], MEAN + shrink**k * (start - MEAN), spread)
    # two chains with the same noise converge by that factor, exactly; beyond 2v they diverge
    for size in (0.2, 1.1):
        near, far = (run(jnp.full((3,), at), size).path for at in (start, start + 1.0))
        assert_close((far - near)[:, 0], (1 - size / VAR) ** np.arange(1.0, 41.0), rtol=1e-9, atol=1e-12)
    long = run(jnp.full((count,), start), 0.2).x
    assert_mean((long - MEAN) ** 2, VAR / (1 - 0.2 / (2 * VAR)), resolution=0.01)
    with refuted():
        assert_mean((long - MEAN) ** 2, VAR)


MIXTURE = ([0.3, 0.7], [[-1.0], [0.8]], [0.5, 0.2])
SIZE = 0.25
PROBES = {"x": lambda x: x, "x^2": jnp.square, "tanh 3x": lambda x: jnp.tanh(3 * x), "x^4": lambda x: x**4}


def _chain(name, distribution, x, steps):
    """The chains of this sampler after so many steps."""
    if name == "mala":
        return langevin.mala(jax.vmap(distribution.log_prob), jax.random.key(4), x, SIZE, steps)
    return langevin.ula(jax.vmap(distribution.score), jax.random.key(4), x, SIZE, steps)


@pytest.mark.slow
def test_LAN_2_mala_leaves_the_distribution_invariant():
    # At a step size where the unadjusted chain is visibly too wide, starting from samples of the distribution
    distribution = closed_form.mixture(*MIXTURE)
    start = _samples(distribution, jax.random.key(5), 20_000)
    truth = [information.quadrature(lambda x, f=f: jnp.sum(f(x)), distribution).value for f in PROBES.values()]

    def probe(chain):
        return np.stack([f(chain.x[:, 0]) for f in PROBES.values()], -1)

    kept = _chain("mala", distribution, start, 20)
    assert_mean(probe(kept), truth, resolution=0.06)
    assert 0.5 < kept.acceptance_rate.mean() < 0.95
    wide = probe(_chain("ula", distribution, start, 20))
    with refuted():
        assert_mean(wide, truth)
    with refuted():
        assert_mean(wide[:, 1], truth[1])


@pytest.mark.slow
def test_LAN_2_mala_is_in_detailed_balance():
    # Pairs (x, x') of a stationary chain are as likely in reverse; f(x) g(x') detects a violation if f and g differ
    distribution = closed_form.mixture(*MIXTURE)
    start = _samples(distribution, jax.random.key(6), 50_000)
    x = np.asarray(start[:, 0])

    def turned(name):
        y = np.asarray(_chain(name, distribution, start, 1).x[:, 0])
        return np.stack(
            [f(x) * g(y) - g(x) * f(y) for f, g in ((np.tanh, np.square), (lambda x: x, lambda x: x**3))], -1
        )

    assert_mean(turned("mala"), np.zeros(2), resolution=0.015)
    with refuted():
        assert_mean(turned("ula"), np.zeros(2))


@pytest.mark.slow
def test_LAN_2_mala_has_the_metropolis_acceptance_rate():
    # E min(1, p(y) k(x|y) / p(x) k(y|x)) over y, written out on a grid
    weights, means, variances = (np.asarray(part, np.float64).reshape(2, -1) for part in MIXTURE)

    def log_p(x):
        return np.log(np.sum(weights * np.exp(-((x - means) ** 2) / 2 / variances) / np.sqrt(variances), 0))

    def score(x, h=1e-6):
        return (log_p(x + h) - log_p(x - h)) / (2 * h)

    def log_k(x, y):
        return -((y - x - SIZE * score(x)) ** 2) / (4 * SIZE)

    distribution, y = closed_form.mixture(*MIXTURE), np.linspace(-10.0, 10.0, 4001)
    starts = np.array([-1.5, -0.4, 0.2, 1.6])
    chain = _chain("mala", distribution, jnp.asarray(np.repeat(starts, 5000)[:, None]), 1)
    for start, rate in zip(starts, chain.acceptance_rate.reshape(4, -1), strict=True):
        proposal = np.exp(log_k(np.full_like(y, start), y))
        log_ratio = log_p(y) + log_k(y, np.full_like(y, start)) - log_p(np.full_like(y, start)) - np.log(proposal)
        truth = np.sum(proposal * np.exp(np.minimum(log_ratio, 0.0))) / np.sum(proposal)
        assert_mean(rate, truth, resolution=0.01)


def test_LAN_2_a_state_dependent_step_size_is_a_bias_in_symbols():
    # eta(x) for eta: drift eta s, noise sqrt(2 eta). Stationary is p / eta; with eta ~ 1/||s||^2, p ||s||^2.
    p, size = sp.Function("p", positive=True)(x), sp.Function("eta", positive=True)(x)

    def flow(distribution):
        return -sp.diff(distribution * size * sp.diff(sp.log(p), x), x) + sp.diff(distribution * size, x, 2)

    assert_proved(flow(p / size))
    assert_proved(flow(p), sp.diff(p * sp.diff(size, x), x))
    # E 1/R of R ~ chi^2_n, for what follows
    n, r = sp.symbols("n r", positive=True)
    density = r ** (n / 2 - 1) * sp.exp(-r / 2) / (2 ** (n / 2) * sp.gamma(n / 2))
    assert_proved(sp.integrate(density.subs(n, n + 2) / r, (r, 0, sp.oo)), 1 / n)


@pytest.mark.slow
def test_LAN_2_corrector_widens_the_distribution_by_its_step_size():
    # one step, and many, from a normal one: v (1 + h^2), v / (1 - h/2) with h = eta / v, and eta = 2 (r sigma)^2
    level, snr, dims = level_from_log_snr(jnp.asarray(0.5)), 0.3, 8
    distribution = closed_form.gaussian(np.full(dims, 0.4), 0.6 * np.eye(dims))
    noisy = closed_form.marginal(distribution, level)
    spread = float(level.alpha**2 * 0.6 + level.sigma**2)
    h = 2 * snr**2 * float(level.sigma) ** 2 / spread
    x_t = _samples(noisy, jax.random.key(7), 40_000 // dims)

    def corrected(steps):
        denoiser = closed_form.OptimalDenoiser(distribution, "v")
        found = langevin.langevin_corrector(
            denoiser, jax.random.key(9), x_t, level, prediction_type="v", snr=snr, steps=steps
        )
        return np.asarray(found - noisy.mean[None]).reshape(-1, 1)

    assert_moments(corrected(1), 0.0, spread * (1 + h**2))
    many = corrected(60)
    assert_moments(many, 0.0, spread / (1 - h / 2))
    with refuted():
        assert_mean(many**2, spread * (1 + 2 / dims))  # the result if eta ~ 1/||s||^2


# LAN-3


# Song & Ermon 2019, section 3.2.2
FAR = ([0.2, 0.8], [[-5.0, -5.0], [5.0, 5.0]], [1.0, 1.0])


def _large(x):
    """Whether an example is on the side of the second mode."""
    return np.asarray(x.sum(-1) > 0, np.float64)


def _score_of_two_modes():
    """The score of modes N(-c, v) and N(c, v) of weights w and 1 - w, with the logarithm of p / N(x; c, v) apart."""
    w, c = sp.symbols("w c", positive=True)
    beside = w * sp.exp(-2 * c * x / v) + 1 - w
    return w, c, beside, sp.diff(log_normal(x, c, v) + sp.log(beside), x)


def test_LAN_3_score_does_not_depend_on_the_weights_of_far_modes_in_symbols():
    # Modes N(-c, v) and N(c, v) of weights w and 1 - w. Near the second, p / N(x; c, v) is 1 - w + w ratio, and the
    # ratio exp(-2cx/v) goes to 0 as the modes separate: the score depends on w through it alone.
    w, c, beside, score = _score_of_two_modes()
    ratio = sp.Symbol("ratio", positive=True)
    p = w * sp.exp(log_normal(x, -c, v)) + (1 - w) * sp.exp(log_normal(x, c, v))
    assert_proved(p, beside * sp.exp(log_normal(x, c, v)))
    known = score.subs(sp.exp(-2 * c * x / v), ratio)
    assert_proved(known.subs(ratio, 0), -(x - c) / v)
    assert_proved(sp.diff(known, w).subs(ratio, 0))
    assert_disproved(sp.diff(known, w))  # nearer by it is there
    assert_proved(sp.limit(c * sp.exp(-2 * c * (c - 1)), c, sp.oo))  # even c times the ratio, 1 before the mode


@pytest.mark.slow
def test_LAN_3_score_does_not_depend_on_the_weights_of_far_modes():
    # the two of the library, 14 standard deviations apart, at samples of both: with the weights swapped, the same score
    distribution, turned = closed_form.mixture(*FAR), closed_form.mixture(FAR[0][::-1], *FAR[1:])
    points = _samples(distribution, jax.random.key(10), 1000)
    scores = jax.jit(lambda distribution: jax.vmap(distribution.score)(points))
    assert_close(scores(turned), scores(distribution), rtol=1e-9, atol=1e-12)
    w, c, _, score = _score_of_two_modes()
    values = {v: 1, x: 2, w: R(1, 5), c: R(3, 2)}
    near = closed_form.mixture([0.2, 0.8], [[-1.5], [1.5]], [1.0, 1.0])
    assert_close(near.score(jnp.asarray([2.0])), [sp.N(score.subs(values), 20)], rtol=1e-12)


@jax.jit
def _walk(distribution, size, grid):
    """The matrix of one unadjusted step on an even grid of the line: the distribution of the chain without sampling."""
    kernels = lambda x: langevin.langevin_kernel(x, distribution.score(x[None])[0], size)  # noqa: E731
    logs = jax.vmap(lambda x: jax.vmap(kernels(x).log_prob)(grid))(grid)
    return jnp.exp(logs) * (grid[1] - grid[0])


def _pair(c):
    """Equal modes N(-c, 1) and N(c, 1)."""
    return closed_form.mixture([0.5, 0.5], [[-c], [c]], [1.0, 1.0])


@pytest.mark.slow
def test_LAN_3_time_to_cross_is_kramers():
    # The rate at which the shares even out: the kernel's second eigenvalue. By Kramers, for small steps and a high
    # barrier, 4 / int_{-c}^{c} dx / p(x): exponential in c^2 / 2.
    size, grid = jnp.asarray(0.02), jnp.linspace(-10.0, 10.0, 201)
    places, weights = np.polynomial.legendre.leggauss(60)
    off, times = [], []
    for c in (2.0, 3.0, 4.0):
        second = np.sort(np.abs(np.linalg.eigvals(_walk(_pair(c), size, grid))))[-2]
        x = c * places
        over = np.sqrt(2 * np.pi) * np.exp((x**2 + c**2) / 2) / np.cosh(c * x)  # 1 / p
        kramers = 4 / (c * weights @ over)
        off.append(-np.log(second) / float(size) / kramers - 1)
        times.append(-1 / np.log(second))
        print(f"modes {2 * c:g} apart: even out in {times[-1]:.0f} steps, Kramers {1 / kramers / float(size):.0f}")
    assert np.abs(off).max() < 0.2, off
    assert abs(off[-1]) < 0.05, off
    assert times[2] > 10 * times[1] > 50 * times[0]


@pytest.mark.slow
def test_LAN_3_chains_cross_at_the_exact_rate():
    distribution, grid, size = _pair(2.0), jnp.linspace(-10.0, 10.0, 201), 0.1
    start = -2.0 + jax.random.normal(jax.random.key(11), (8000, 1))
    path = langevin.ula(jax.vmap(distribution.score), jax.random.key(12), start, size, 60, path=True).path
    mass, walk = np.exp(-0.5 * (np.asarray(grid) + 2) ** 2), np.asarray(_walk(distribution, jnp.asarray(size), grid))
    right = np.where(np.abs(grid) < 1e-9, 0.5, grid > 0)
    mass /= mass.sum()
    for step in range(60):
        mass = mass @ walk
        if step in (9, 59):
            assert_mean(_large(path[step]), mass @ right, resolution=0.006)
    assert mass @ right < 0.45  # still converging to one half


@pytest.mark.slow
def test_LAN_3_ula_and_mala_keep_the_weights_they_began_with():
    distribution = closed_form.mixture(*FAR)
    uniform = jax.random.uniform(jax.random.key(13), (2000, 2), minval=-8.0, maxval=8.0)
    small = _samples(closed_form.gaussian(FAR[1][0], np.eye(2)), jax.random.key(14), 2000)
    chains = {
        "ula": partial(langevin.ula, jax.vmap(distribution.score)),
        "mala": partial(langevin.mala, jax.vmap(distribution.log_prob)),
    }
    for name, chain in chains.items():
        ends = chain(jax.random.key(15), jnp.concatenate([uniform, small]), 0.1, 80).x
        share, crossed = _large(ends[:2000]), _large(ends[2000:])
        print(f"{name}: {share.mean():.3f} of those started anywhere in the large mode; crossed {crossed.mean():g}")
        assert crossed.sum() == 0
        # within their mode the chains are correct
        assert_mean(ends[2000:], FAR[1][0], resolution=0.03)
        # the basins meet where the two components have equal density, at x + y = -log(4)/10: the share is the uniform's
        assert_mean(share, 0.5 + np.log(4) / 10 / 16, resolution=0.012)
        with refuted():
            assert_mean(share, 0.8)


def _levels(high, low, count):
    return jax.vmap(VarianceExploding(low, high))(jnp.linspace(1.0, 0.0, count))


def _annealed_share(levels, rate, steps):
    """Share of the large mode by the exact distribution of the chains along the line through the modes."""
    distribution = closed_form.mixture(FAR[0], [[-np.sqrt(50)], [np.sqrt(50)]], FAR[2])
    before = np.linspace(-10 * FIRST, 10 * FIRST, 401)
    mass = np.exp(-0.5 * (before / FIRST) ** 2)
    for sigma in np.asarray(levels.sigma):
        grid = np.linspace(-1, 1, 401) * (10.0 + 6.0 * np.sqrt(1.0 + sigma**2))
        noisy = distribution.pushforward(jnp.ones(()), jnp.zeros(1), jnp.asarray(sigma**2))
        walk = np.asarray(_walk(noisy, jnp.asarray(rate * sigma**2), jnp.asarray(grid)))
        mass = np.interp(grid, before, mass)
        for _ in range(steps):
            mass = mass @ walk
        before, mass = grid, mass / mass.sum()
    return mass @ np.heaviside(grid, 0.5)


FIRST = 20.0  # the initial noise of annealed chains


@pytest.mark.slow
def test_LAN_3_annealed_chains_find_the_weights():
    distribution, levels = closed_form.mixture(*FAR), _levels(FIRST, 0.5, 20)
    start = FIRST * jax.random.normal(jax.random.key(16), (2000, 2))
    ends = langevin.annealed_langevin(
        closed_form.OptimalDenoiser(distribution, "score"), jax.random.key(17), start, levels, rate=0.2, steps=50
    ).x
    short, long = _annealed_share(levels, 0.2, 50), _annealed_share(levels, 0.1, 200)
    print(f"annealed: {_large(ends).mean():.3f} of the chains in the large mode; exactly {short:.4f}, {long:.4f}")
    assert_mean(_large(ends), short, resolution=0.01)
    # the deficit is due to finite steps: too few chains cross back as the noise falls
    assert 0.785 < short < long < 0.8
    assert long > 0.795


@pytest.mark.slow
def test_LAN_3_annealed_chains_of_a_normal_distribution():
    # For N(m, v) every step is affine, and so is the last denoising: a mean and a variance describe the chain
    m, var, rate, steps = 0.7, 0.5, 0.1, 5
    distribution, levels, start = closed_form.gaussian([m], [[var]]), _levels(3.0, 0.3, 4), jnp.full((20_000, 1), 2.5)
    mean, spread = 2.5, 0.0
    for sigma in np.asarray(levels.sigma):
        shrink = 1 - rate * sigma**2 / (var + sigma**2)
        for _ in range(steps):
            mean, spread = m + shrink * (mean - m), shrink**2 * spread + 2 * rate * sigma**2
    denoiser = closed_form.OptimalDenoiser(distribution, "eps")
    options = {"prediction_type": "eps", "rate": rate, "steps": steps, "path": True}
    run = partial(langevin.annealed_langevin, denoiser, jax.random.key(18), **options)
    exploding = run(start, levels)
    assert_moments(exploding.path[-1, :, 0], mean, spread)
    gain = var / (var + sigma**2)
    assert_moments(exploding.x[:, 0], m + gain * (mean - m), gain**2 * spread)
    # with a variance-preserving schedule it is the same chain, each state scaled by its alpha
    preserving = jax.vmap(level_from_log_snr)(levels.log_snr)
    same = run(start * preserving.alpha[0], preserving)
    assert_close(same.path / preserving.alpha[:, None, None], exploding.path, rtol=1e-9, atol=1e-11)
    assert_close(same.x, exploding.x, rtol=1e-9, atol=1e-11)
