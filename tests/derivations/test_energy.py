"""EBM: unnormalized densities, their scores, recovery of log p by line integrals, and maximum-likelihood learning."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy as sp
from jax.tree_util import Partial

from tests.derivations.algebra import R, log_normal
from tests.derivations.check import assert_close, assert_disproved, assert_mean, assert_proved, refuted
from tests.derivations.worlds import draws
from vdm_jax import closed_form, energy


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _rule(nodes=200, reach=8.0):
    """Gauss-Legendre on [-reach, reach]: nodes (N,) and the logarithms of their weights."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return jnp.asarray(reach * places), jnp.asarray(np.log(reach * weights))


def _plane(nodes=120):
    """The same on a square: nodes (N, 2)."""
    line, log_weights = _rule(nodes)
    grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    return grid, (log_weights[:, None] + log_weights[None, :]).reshape(-1)


DISTRIBUTIONS = {
    "gaussian": lambda: closed_form.gaussian([0.5, -1.0], [[0.8, 0.3], [0.3, 0.5]]),
    "mixture": lambda: closed_form.mixture([0.3, 0.7], [[-1.0, 0.5], [1.2, -0.4]], [0.4, 0.7]),
}


def _energy_of(distribution, lift=0.0):
    """E of an exact distribution, `lift` above -log p: log Z is -lift."""
    log_prob = jax.jit(jax.vmap(distribution.log_prob))
    return lambda x: lift - log_prob(x)


# EBM-1


def test_EBM_1_lower_energy_at_one_point_lowers_the_other_probabilities():
    # d log p_j / dE_i = p_i - [i = j], of any three points
    energies = sp.symbols("E_1:4", real=True)
    total = sum(sp.exp(-e) for e in energies)
    masses = [sp.exp(-e) / total for e in energies]
    for i, at in enumerate(energies):
        for j, mass in enumerate(masses):
            assert_proved(sp.diff(sp.log(mass), at), masses[i] - int(i == j))

    def log_masses(schedule):
        log_partition = energy.log_partition(lambda x: schedule, jnp.zeros(3), jnp.zeros(3))
        return energy.log_density(lambda x: schedule, jnp.zeros(3), log_partition)

    values = [R(1, 3), R(-1), R(2)]
    truth = [
        [sp.N(sp.diff(sp.log(mass), at).subs(dict(zip(energies, values, strict=True)))) for at in energies]
        for mass in masses
    ]
    schedule = jnp.asarray([float(value) for value in values])
    assert_close(jax.jacobian(log_masses)(schedule), truth, rtol=1e-13)


def test_EBM_1_a_bump_on_the_energy_moves_mass_away():
    # Along E + u phi:  d log p(y) / du = E_p phi - phi(y). A bump exp(-(x-c)^2/2b) has E_p phi in closed form.
    mean, var, center, width = 0.3, 0.6, 1.0, 0.2
    nodes, log_weights = _rule()
    y = jnp.asarray([1.0, 0.8, -0.5, -2.0])

    def log_p(u):
        def lifted(x):
            return (x - mean) ** 2 / (2 * var) + u * jnp.exp(-((x - center) ** 2) / (2 * width))

        return energy.log_density(lifted, y, energy.log_partition(lifted, nodes, log_weights))

    value, slope = jax.jit(lambda u: jax.jvp(log_p, (u,), (1.0,)))(0.0)
    assert_close(value, [float(log_normal(sp.Float(float(x), 20), mean, var)) for x in y], rtol=1e-12)
    mass = np.sqrt(width / (width + var)) * np.exp(-((mean - center) ** 2) / (2 * (width + var)))
    assert_close(slope, mass - np.exp(-((np.asarray(y) - center) ** 2) / (2 * width)), rtol=1e-11)
    assert np.all(np.sign(slope) == [-1, -1, 1, 1])  # a higher energy at the bump: lower density there


def test_EBM_1_partition_by_quadrature():
    x = sp.Symbol("x", real=True)
    for power, ours in ((2, lambda x: x**2), (4, lambda x: x**4 / 4)):
        whole = sp.integrate(sp.exp(-(x**power) / (1 if power == 2 else 4)), (x, -sp.oo, sp.oo))
        assert_close(energy.log_partition(ours, *_rule()), sp.N(sp.log(whole), 20), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_EBM_1_the_partition_function_normalizes_the_density(name):
    # the exact energy plus a constant, which log Z subtracts again
    distribution = DISTRIBUTIONS[name]()
    lifted = _energy_of(distribution, 3.7)
    log_z = energy.log_partition(lifted, *_plane())
    assert_close(log_z, -3.7, rtol=1e-11)
    x = draws(distribution, jax.random.key(0), 5)
    truth = -_energy_of(distribution)(x)
    assert_close(energy.log_density(lifted, x, log_z), truth, rtol=1e-10)
    with refuted():
        assert_close(energy.log_density(lifted, x), truth, rtol=0.1)


SPREAD = 1.5  # the standard deviation of q; p has 1


def _estimates(count, repeats, lift=0.7):
    """`repeats` estimates of log Z of E = x^2/2 + lift, each from `count` samples of q = N(0, SPREAD^2)."""
    x = SPREAD * jax.random.normal(jax.random.key(count), (repeats, count))
    log_q = -(x**2) / (2 * SPREAD**2) - 0.5 * np.log(2 * np.pi * SPREAD**2)
    log_weights = -log_q - np.log(count)
    return jax.vmap(lambda x, w: energy.log_partition(lambda x: 0.5 * x**2 + lift, x, w))(x, log_weights)


@pytest.mark.slow
def test_EBM_1_sampled_log_partition_is_biased_low():
    truth = 0.5 * np.log(2 * np.pi) - 0.7
    # bias of one sample: -KL(q || p); of N samples: -Var(p/q) / 2N + O(1/N^2); the estimate of Z itself is unbiased
    w = SPREAD**2
    kl, chi = 0.5 * (w - 1 - np.log(w)), w / np.sqrt(2 * w - 1) - 1
    for count, low, resolution in ((1, kl, 0.005), (50, chi / 100, 0.0004)):
        ours = _estimates(count, 60_000 if count == 1 else 30_000)
        assert_mean(np.exp(ours - truth), 1.0, resolution=0.005)
        assert_mean(ours, truth - low, resolution=resolution)
        with refuted():
            assert_mean(ours, truth)


# EBM-2


def test_EBM_2_the_constant_has_no_gradient():
    x, y, z, c = sp.symbols("x y Z c", positive=True)
    potential = sp.Function("E")(x, y)
    for at in (x, y):
        assert_proved(sp.diff(sp.log(sp.exp(-potential - c) / z), at), -sp.diff(potential, at))


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_EBM_2_score_is_that_of_the_exact_distribution(name):
    distribution = DISTRIBUTIONS[name]()
    x = draws(distribution, jax.random.key(1), 20)
    score = jax.jit(lambda x, lift, scale: energy.score(lambda x: lift + scale * _energy_of(distribution)(x), x))
    ours = score(x, 0.0, 1.0)
    assert_close(ours, jax.vmap(distribution.score)(x), rtol=1e-10, atol=1e-12)
    for lift in (-3.7, 1e3, 1e9):  # for any constant added, to the bit
        assert_close(score(x, lift, 1.0), ours, rtol=0.0)
    assert_close(score(x, 0.0, 0.5), ours / 2, rtol=1e-14)  # a distribution of twice the temperature has another score


# EBM-3


def _straight(u, start, end):
    return start + u * (end - start)


def _left(v):
    """A quarter turn to the left, of vectors (B, 2)."""
    return jnp.stack([-v[:, 1], v[:, 0]], -1)


def _bent(u, start, end):
    """A parabola to the left: the area between it and the straight line is |end - start|^2 / 4."""
    return _straight(u, start, end) + 1.5 * u * (1 - u) * _left(end - start)


def _detour(u, start, end):
    """A path with a loop, at a varying pace."""
    turn = 2 * jnp.pi * u
    return _straight(u**2, start, end) + jnp.stack([1 - jnp.cos(turn), jnp.sin(turn)])[None, :]


PATHS = {"straight": None, "bent": _bent, "detour": _detour}


def test_EBM_3_the_integral_is_independent_of_the_path_in_symbols():
    # From (0, 0) to (1, 2) by paths of any bend b and pace c: the integral depends on the potential at the ends alone.
    u, b, c, x, y, w = sp.symbols("u b c x y omega", real=True)
    potential = x**4 + x * y + y**2 / 2 - 3 * x
    path = {x: u + b * u * (1 - u), y: 2 * u**2 + c * u * (1 - u)}

    def integral(field):
        along = sum(s.subs(path, simultaneous=True) * sp.diff(r, u) for s, r in zip(field, path.values(), strict=True))
        return sp.integrate(sp.expand(along), (u, 0, 1))

    score = [-sp.diff(potential, at) for at in (x, y)]
    assert_proved(integral(score), potential.subs({x: 0, y: 0}) - potential.subs({x: 1, y: 2}))
    # a rotational field is not a gradient: the integral depends on the path
    turning = integral([score[0] - w * y, score[1] + w * x])
    assert_disproved(sp.diff(turning, b))


@pytest.mark.slow
def test_EBM_3_every_path_recovers_the_log_density():
    distribution = DISTRIBUTIONS["mixture"]()
    start, end = draws(distribution, jax.random.key(2), 8).reshape(2, 4, 2)
    lifted = _energy_of(distribution, 3.7)
    truth = lifted(start) - lifted(end)
    score = Partial(energy.score, Partial(lifted))
    for path in PATHS.values():
        ours = energy.line_integral(score, start, end, path=path, nodes=96)
        assert_close(ours, truth, rtol=1e-9, atol=1e-10)
    assert_close(energy.line_integral(score, end, start, nodes=96), -truth, rtol=1e-9, atol=1e-10)


def test_EBM_3_a_rotation_differs_by_its_circulation():
    # Green: forward by the path on the left and back by the straight line encloses -area, where the curl is 2 omega.
    omega = 0.7
    start, end = jax.random.normal(jax.random.key(3), (2, 4, 2))
    straight, bent = (
        energy.line_integral(lambda x: -x + omega * _left(x), start, end, path=path, nodes=4)
        for path in (_straight, _bent)
    )
    area = np.sum(np.square(end - start), 1) / 4  # of height 1.5 |end - start| u (1 - u)
    assert_close(bent - straight, -2 * omega * area, rtol=1e-12)
    still = [energy.line_integral(lambda x: -x, start, end, path=path, nodes=4) for path in (_straight, _bent)]
    assert_close(*still, rtol=1e-12)


@pytest.mark.slow
def test_EBM_3_number_of_nodes_for_a_polynomial():
    # n nodes integrate degree 2n - 1: a quartic energy on a straight line needs two
    start, end = jax.random.normal(jax.random.key(4), (2, 6, 2, 2))
    truth = np.sum(start**4 - end**4, (1, 2)) / 4
    assert_close(energy.line_integral(lambda x: -(x**3), start, end, nodes=2), truth, rtol=1e-11)
    with refuted():
        assert_close(energy.line_integral(lambda x: -(x**3), start, end, nodes=1), truth, rtol=0.01)


# EBM-4


def test_EBM_4_gradient_of_the_likelihood_in_symbols():
    # any energy on three points: the derivative of log Z is the expectation of that of -E under the model
    theta = sp.Symbol("theta", real=True)
    energies = [sp.Function(f"E_{i}")(theta) for i in range(3)]
    total = sum(sp.exp(-e) for e in energies)
    model = sum(sp.exp(-e) / total * sp.diff(e, theta) for e in energies)
    assert_proved(sp.diff(-energies[0] - sp.log(total), theta), model - sp.diff(energies[0], theta))
    # a normal distribution of mean m and precision k, data of mean mu and variance s
    x, m, mu = sp.symbols("x m mu", real=True)
    k, s = sp.symbols("kappa s", positive=True)
    distribution = log_normal(x, m, 1 / k)
    potential = k * (x - m) ** 2 / 2

    def mean(f, center, var):
        return sp.expand(f).subs(x**2, center**2 + var).subs(x, center)

    for at in (m, k):
        ours = mean(sp.diff(potential, at), m, 1 / k) - mean(sp.diff(potential, at), mu, s)
        assert_proved(sp.diff(mean(distribution, mu, s), at), ours)
        assert_disproved(sp.diff(mean(distribution, mu, s), at), -ours)


def _well(parameters, x):
    """A double-well energy on the line, a x^4 - b x^2 + c x."""
    a, b, c = parameters
    return a * x**4 - b * x**2 + c * x


@pytest.mark.slow
def test_EBM_4_samples_of_the_model_give_the_gradient():
    # Exact samples by inversion, and chains too short to move: the gradient of -log p, by quadrature of Z.
    parameters = jnp.asarray([0.25, 0.8, 0.2])
    x = jnp.asarray([-0.5, 0.3, 1.0, 1.2])
    nodes, log_weights = _rule(reach=5.0)

    def cost(parameters):
        ours = Partial(_well, parameters)
        return -energy.log_density(ours, x, energy.log_partition(ours, nodes, log_weights)).mean()

    grid = np.linspace(-5.0, 5.0, 20_001)
    mass = np.cumsum(np.exp(-np.asarray(_well(parameters, grid))))
    uniform = np.asarray(jax.random.uniform(jax.random.key(10), (100_000,)))
    start = jnp.asarray(np.interp(uniform, mass / mass[-1], grid))

    def contrast(parameters):
        return energy.contrastive_divergence(Partial(_well, parameters), jax.random.key(6), x, start, 1e-12, 1)

    slopes, data = jax.jacfwd(contrast)(parameters)[1::-1]
    truth = jax.grad(cost)(parameters)
    assert_mean(data.mean(0)[None] - slopes, truth, resolution=0.05)
    assert np.abs(truth).min() > 0.2  # large enough to distinguish it from its negative
    assert_close(jax.grad(lambda p: contrast(p).loss)(parameters), data.mean(0) - slopes.mean(0), rtol=1e-11)


# A normal model of mean M and precision K; data of mean MU and variance S
M, K, MU, S, ETA = 0.4, 2.0, 1.2, 0.8, 0.1


def _normal(parameters, x):
    mean, precision = parameters
    return precision * (x - mean) ** 2 / 2


@partial(jax.jit, static_argnums=3)
def _contrast(key, x, start, num_steps):
    """Contrastive loss of the normal model and its derivatives by mean and precision, shape (B, 2), per example."""

    def both(parameters):
        found = energy.contrastive_divergence(Partial(_normal, parameters), key, x, start, ETA, num_steps)
        return found.data - found.model, found

    slopes, found = jax.jacfwd(both, has_aux=True)(jnp.asarray([M, K]))
    return slopes, found


def _data(count=20_000):
    return MU + np.sqrt(S) * jax.random.normal(jax.random.key(7), (count,))


# the exact gradient, and the one of chains that end with this mean and variance
def _gradient(mean, var):
    return np.array([-K * (MU - mean), 0.5 * (S + (MU - M) ** 2 - var - (mean - M) ** 2)])


EXACT = _gradient(M, 1 / K)
STATIONARY = _gradient(M, 1 / K / (1 - ETA * K / 2))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 5])
def test_EBM_4_contrastive_divergence_underestimates_the_gradient(num_steps):
    # After k steps from the data, with a = 1 - eta K: mean M + a^k (MU - M), variance a^2k S + 2 eta sum_{i<k} a^2i.
    shrink = 1 - ETA * K
    var = shrink ** (2 * num_steps) * S + 2 * ETA * sum(shrink ** (2 * i) for i in range(num_steps))
    truth = _gradient(M + shrink**num_steps * (MU - M), var)
    x = _data()
    slopes, found = _contrast(jax.random.key(8), x, x, num_steps)
    assert_mean(slopes, truth, resolution=0.015)
    assert_close(truth[0], EXACT[0] * (1 - shrink**num_steps), rtol=1e-12)  # that fraction of it, in the mean
    with refuted():
        assert_mean(slopes, EXACT)
    # no gradient runs through the chain: the negatives are held constant
    ours = np.stack([-K * (x - found.negatives), ((x - M) ** 2 - (found.negatives - M) ** 2) / 2], -1)
    assert_close(slopes, ours, rtol=1e-10, atol=1e-12)
    # and the fraction is exact: the same noise from other data
    _, moved = _contrast(jax.random.key(8), x, x + 1.0, num_steps)
    assert_close(moved.negatives - found.negatives, np.full(x.shape, shrink**num_steps), rtol=1e-11)


def test_EBM_4_persistent_chains_approach_the_gradient():
    # Chains of five steps, each from the last state: what remains is the bias of the step size, eta / 2 in the
    # variance of a normal distribution, by LAN-2
    x = _data()
    found = x
    for key in jax.random.split(jax.random.key(9), 8):
        slopes, contrast = _contrast(key, x, found, 5)
        found = contrast.negatives
    assert_mean(slopes, STATIONARY, resolution=0.02)
    assert_close(EXACT[0], STATIONARY[0], rtol=1e-15)
    assert np.abs(STATIONARY - EXACT).max() < 0.56 * ETA / 2
    with refuted():
        assert_mean(slopes, _gradient(M + (1 - ETA * K) ** 5 * (MU - M), 1 / K))
