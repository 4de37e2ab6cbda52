"""Samplers as programs: conditioning, clipping, snapshots, results, order of convergence, distribution of the samples.

The ancestral chain is tested in `derivations/test_sampling.py`, features of single samplers in their own files.
"""

import importlib
import inspect
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.derivations.check import assert_close, assert_mean, refuted
from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import closed_form, forward
from vdm_jax.discrete_schedules import (
    InterpolatedSchedule,
    discretize,
    from_betas,
    from_gammas,
    karras_steps,
    linear_betas,
    log_snr_uniform_steps,
    uniform_steps,
)
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.probability_flow import sample
from vdm_jax.samplers import (
    adaptive,
    ancestral,
    ancestral_learned,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    heun,
    predictor_corrector,
)
from vdm_jax.samplers.chain import warn_of_amplification
from vdm_jax.samplers.churn import Churn, add_noise
from vdm_jax.schedules import LinearLogSNR, VarianceExploding

KEY = jax.random.key(0)
SCHEDULE = linear_betas(12, 0.01, 0.4)
GAUSSIAN = GaussianWorld(0.4, 0.6)
X_T = jnp.asarray(np.random.RandomState(7).normal(size=(5, 3)), jnp.float32)


def optimal_eps(x_t, level):
    """The exact denoiser of `GAUSSIAN`, whose program compiles faster than that of `denoiser(GAUSSIAN)`."""
    level = jax.tree.map(lambda field: field[:, None], level)
    return (x_t - level.alpha * GAUSSIAN.x_hat(x_t, level)) / level.sigma


def _sample(schedule=SCHEDULE, prediction_type="eps", key=0, **options):
    return ancestral(
        optimal_eps if prediction_type == "eps" else denoiser(GAUSSIAN, prediction_type),
        jax.random.key(key),
        X_T,
        schedule,
        prediction_type=prediction_type,
        **options,
    )


def test_trajectory_is_the_chain():
    chain = _sample(snapshots=12).trajectory
    assert np.array_equal(chain.t, np.arange(12, 0, -1))
    assert np.array_equal(chain.x_t[0], X_T)
    assert chain.x_t.shape == chain.x_hat.shape == (12, 5, 3)
    # each x_hat is the denoiser's of its x_t, and each next state the posterior's mean plus a standard normal
    noises = []
    for i, t in enumerate(range(12, 1, -1)):
        x_hat = GAUSSIAN.x_hat(chain.x_t[i], SCHEDULE(t))
        np.testing.assert_allclose(chain.x_hat[i], x_hat, rtol=2e-4, atol=1e-5)
        distribution = forward.posterior(chain.x_t[i], x_hat, SCHEDULE.step(t - 1, t))
        noises.append((chain.x_t[i + 1] - distribution.mean) / jnp.sqrt(distribution.var))
    noise = np.stack(noises).reshape(-1)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert 0.6 < noise.var() < 1.5
    assert len(np.unique(noise.round(4))) > 0.95 * noise.size  # fresh for every step, example and dimension


@pytest.mark.parametrize("snapshots", [5, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 1, 2, 12))])
def test_snapshots_are_states_of_the_chain(snapshots):
    full, some = _sample(snapshots=12), _sample(snapshots=snapshots)
    np.testing.assert_allclose(some.x_0, full.x_0, rtol=1e-4, atol=1e-5)  # compiled apart, so rounded apart
    t = np.asarray(some.trajectory.t)
    assert np.array_equal(t, np.round(np.linspace(12, 1, snapshots)))
    assert np.all(np.diff(t) < 0)
    assert snapshots < 2 or (t[0], t[-1]) == (12, 1)
    np.testing.assert_allclose(some.trajectory.x_t, full.trajectory.x_t[12 - t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(some.trajectory.x_hat, full.trajectory.x_hat[12 - t], rtol=1e-4, atol=1e-5)


def test_the_last_step_has_no_noise():
    for variance in ("fixed_small", "fixed_large"):
        samples = _sample(snapshots=12, variance=variance)
        assert int(samples.trajectory.t[-1]) == 1
        np.testing.assert_array_equal(samples.x_0, samples.trajectory.x_hat[-1])


@pytest.mark.slow
def test_the_noise_of_a_step_has_the_selected_variance():
    # from x_2 = 0 and predictions of 0, x_1 is the noise of its step alone; abar_1 = 0.7, abar_2 = 0.28
    schedule, nothing = from_betas(np.array([0.3, 0.6])), jnp.zeros((1000, 50))
    for variance, expected in (("fixed_small", 0.6 * 0.3 / 0.72), ("fixed_large", 0.6)):
        chain = ancestral(
            lambda x_t, level: jnp.zeros_like(x_t), jax.random.key(3), nothing, schedule,
            prediction_type="x_0", variance=variance, snapshots=2,
        ).trajectory  # fmt: skip
        assert stats.kstest(chain.x_t[1].reshape(-1), stats.norm(0.0, np.sqrt(expected)).cdf).pvalue > 1e-3


def test_no_snapshots_by_default():
    trajectory = _sample().trajectory
    assert trajectory.t.shape == (0,)
    assert trajectory.x_t.shape == trajectory.x_hat.shape == (0, 5, 3)


@pytest.mark.slow
def test_clip_bounds_every_prediction():
    free, clipped, wide = _sample(snapshots=12), _sample(snapshots=12, clip=0.3), _sample(snapshots=12, clip=100.0)
    assert np.max(np.abs(free.trajectory.x_hat)) > 0.31
    assert np.max(np.abs(clipped.trajectory.x_hat)) <= np.float32(0.3)
    assert np.max(np.abs(clipped.x_0)) <= np.float32(0.3)
    np.testing.assert_allclose(wide.x_0, free.x_0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clipped.trajectory.x_hat[0], jnp.clip(free.trajectory.x_hat[0], -0.3, 0.3), rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["x_0", "v", "score"])
def test_prediction_types_give_the_same_samples(prediction_type):
    np.testing.assert_allclose(
        _sample(prediction_type=prediction_type).x_0, _sample(prediction_type="eps").x_0, rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_keys():
    np.testing.assert_array_equal(_sample(key=1).x_0, _sample(key=1).x_0)
    assert np.all(_sample(key=1).x_0 != _sample(key=2).x_0)


def test_a_subsequence_conditions_on_the_original_times():
    levels_seen = []

    def spy(x_t, level):
        jax.debug.callback(lambda t: levels_seen.append(np.asarray(t)), level.t, ordered=True)
        return jnp.zeros_like(x_t)

    short = SCHEDULE.subsequence(uniform_steps(12, 4))
    samples = ancestral(spy, jax.random.key(0), X_T, short, snapshots=4)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.stack(levels_seen)[:, 0], [12, 9, 6, 3])
    np.testing.assert_array_equal(samples.trajectory.t, [4, 3, 2, 1])  # positions in the given schedule


def test_refusals():
    # unwrapped, since the tests' run-time type checker would raise first
    with pytest.raises(ValueError, match="unknown variance 'middle': choose 'fixed_small' or 'fixed_large'"):
        inspect.unwrap(ancestral)(denoiser(GAUSSIAN), jax.random.key(0), X_T, SCHEDULE, variance="middle")
    for snapshots in (-1, 13):
        with pytest.raises(ValueError, match=rf"snapshots must be in 0\.\.12.* got {snapshots}"):
            _sample(snapshots=snapshots)
    for shape in ((11,), (12, 2), (12, 5, 3)):
        with pytest.raises(ValueError, match=r"variance has shape .*T = 12.*\(T,\) or \(T, \*x\)"):
            _sample(variance=jnp.ones(shape))
    with pytest.raises(ValueError, match=r"snapshots must be in 0\.\.12.* got 13"):
        _learned(0.0, snapshots=13)


# Variances given, and learned


def _learned(fraction, key=0, **options):
    def model(x_t, level):
        return optimal_eps(x_t, level), jnp.broadcast_to(fraction, x_t.shape)

    return ancestral_learned(model, jax.random.key(key), X_T, SCHEDULE, **options)


def _beta(lower):
    step = SCHEDULE.step(jnp.arange(12), jnp.arange(1, 13))
    beta = step.t.sigma**2 * step.one_minus_ratio
    return jax.vmap(forward.posterior_variance)(step) if lower else beta


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed_small", "fixed_large"])
def test_constant_and_learned_variances_equal_the_named_ones(name):
    expected = _sample(variance=name, snapshots=12)
    given = _beta(name == "fixed_small")
    for chain in (
        _sample(variance=given, snapshots=12),
        _sample(variance=jnp.broadcast_to(given[:, None], (12, 3)), snapshots=12),
        _learned(jnp.asarray(0.0 if name == "fixed_small" else 1.0), snapshots=12),
    ):
        np.testing.assert_allclose(chain.x_0, expected.x_0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(chain.trajectory.x_t, expected.trajectory.x_t, rtol=1e-4, atol=1e-5)
        assert np.array_equal(chain.x_0, chain.trajectory.x_hat[-1])  # no noise in the last step for any variance


def test_each_dimension_has_its_own_variance(monkeypatch):
    # from x_2 = 0 and predictions of 0, with z = 1, x_1 is the deviation of its step alone; abar_1 = 0.7, abar_2 = 0.28
    module = importlib.import_module("vdm_jax.samplers.ancestral")
    monkeypatch.setattr(module, "noise", lambda key, t, x: jnp.ones_like(x))
    schedule, nothing = from_betas(np.array([0.3, 0.6])), jnp.zeros((2, 3))
    options = {"prediction_type": "x_0", "snapshots": 2}

    def deviation(variance):
        net = lambda x, _: 0 * x  # noqa: E731
        return ancestral(net, KEY, nothing, schedule, variance=variance, **options).trajectory.x_t[1, 1]

    given, low, high = jnp.asarray([[9.0, 9.0, 9.0], [0.2, 0.5, 2.0]]), 0.6 * 0.3 / 0.72, 0.6
    np.testing.assert_allclose(deviation(given), np.sqrt([0.2, 0.5, 2.0]), rtol=1e-5)
    np.testing.assert_allclose(deviation(given[:, 1]), np.sqrt(0.5), rtol=1e-5)
    np.testing.assert_allclose(deviation("fixed_small"), np.sqrt(low), rtol=1e-5)
    np.testing.assert_allclose(deviation("fixed_large"), np.sqrt(high), rtol=1e-5)
    fractions = jnp.asarray([0.0, 0.5, 1.0])

    def model(x_t, level):
        return 0 * x_t, jnp.broadcast_to(fractions, x_t.shape)

    chain = ancestral_learned(model, KEY, nothing, schedule, **options).trajectory
    np.testing.assert_allclose(chain.x_t[1, 1] ** 2, [low, np.sqrt(low * high), high], rtol=1e-5)


def test_a_learned_chain_clips_and_takes_any_prediction_type():
    assert np.max(np.abs(_learned(0.4, clip=0.3, snapshots=3).trajectory.x_hat)) <= np.float32(0.3)

    def as_v(x_t, level):
        return denoiser(GAUSSIAN, "v")(x_t, level), jnp.full_like(x_t, 0.4)

    other = ancestral_learned(as_v, jax.random.key(0), X_T, SCHEDULE, prediction_type="v")
    np.testing.assert_allclose(other.x_0, _learned(0.4).x_0, rtol=1e-3, atol=1e-4)


# All samplers. name -> function, options, and number of evaluations at the levels T, T-1..2 and 1.

SAMPLERS = {
    "ancestral": (ancestral, {}, (1, 1, 1)),
    "ancestral, upper": (ancestral, {"variance": "fixed_large"}, (1, 1, 1)),
    "ddim": (ddim, {}, (1, 1, 1)),
    "ddim, eta 1/2": (ddim, {"eta": 0.5}, (1, 1, 1)),
    "ddim, eta 1": (ddim, {"eta": 1.0}, (1, 1, 1)),
    "euler": (euler, {}, (1, 1, 1)),
    "heun": (heun, {}, (1, 2, 2)),
    "heun, churn": (heun, {"s_churn": 3.0, "s_noise": 1.003}, (1, 2, 2)),
    "dpmpp_2m": (dpmpp_2m, {}, (1, 1, 1)),
    "dpmpp_2m_sde": (dpmpp_2m_sde, {}, (1, 1, 1)),
    "predictor-corrector": (predictor_corrector, {"corrector_steps": 2}, (1, 3, 3)),
}


def _each(*fast):
    """Every sampler; all but these are slow tests, since each takes long to compile."""
    names = [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
    return pytest.mark.parametrize("name", names)


ALL = _each(*SAMPLERS)


def _run(name, net, x_T, schedule, key=0, **options):
    function, own, _ = SAMPLERS[name]
    return function(net, jax.random.key(key), x_T, schedule, **own, **options)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@_each("heun", "heun, churn", "dpmpp_2m", "predictor-corrector")
def test_the_network_is_evaluated_at_the_documented_levels(name):
    levels_seen = []

    def spy(x_t, level):
        _ = name  # plain functions that capture equal values share a compiled program: here two empty lists
        jax.debug.callback(lambda level: levels_seen.append(level), level)
        return 0.3 * x_t

    schedule = linear_betas(60, 1e-3, 0.3).subsequence(karras_steps(linear_betas(60, 1e-3, 0.3), 7))
    jax.block_until_ready(_run(name, spy, X_T, schedule))
    jax.effects_barrier()
    noisiest, between, first = SAMPLERS[name][2]
    t = np.asarray(schedule.levels.t)
    if name == "heun, churn":  # at a step's start the level has more noise, at its end it is the schedule's
        levels_seen = [level for level in levels_seen if np.isin(level.t[0], t)]
        noisiest, between, first = 1, 1, 1  # the noisiest level has the schedule's last t
    want = Counter({float(t[7]): noisiest, **dict.fromkeys(t[2:7].tolist(), between), float(t[1]): first})
    assert Counter(float(level.t[0]) for level in levels_seen) == want
    for level in levels_seen:
        assert level.t.shape == X_T.shape[:1]
        expected = schedule(int(np.searchsorted(t, level.t[0])))
        if not (name == "heun, churn" and level.t[0] == t[7]):
            np.testing.assert_allclose(level.sigma, np.full(5, expected.sigma), rtol=1e-6)
            np.testing.assert_allclose(level.log_snr, np.full(5, expected.log_snr), rtol=1e-5)


@pytest.mark.slow
@_each("dpmpp_2m")
def test_snapshots_are_states_with_their_predictions(name):
    full, two, empty = (_run(name, denoiser(GAUSSIAN), X_T, SCHEDULE, snapshots=k) for k in (12, 2, 0))
    chain = full.trajectory
    np.testing.assert_array_equal(chain.t, np.arange(12, 0, -1))
    np.testing.assert_array_equal(chain.x_t[0], X_T)
    np.testing.assert_array_equal(full.x_0, chain.x_hat[-1])  # the last step ends in what is predicted at level 1
    np.testing.assert_allclose(two.trajectory.x_t, chain.x_t[jnp.array([0, 11])], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(empty.x_0, full.x_0, rtol=1e-4, atol=1e-5)
    assert empty.trajectory.x_t.shape == (0, *X_T.shape)
    if name != "heun, churn":  # there x_hat belongs to the state after churn
        for t, x_t, x_hat in zip(chain.t, chain.x_t, chain.x_hat, strict=True):
            np.testing.assert_allclose(x_hat, GAUSSIAN.x_hat(x_t, SCHEDULE(t)), rtol=2e-4, atol=2e-5)
    assert len(np.unique(np.asarray(chain.x_t))) > 150  # no state twice


@_each("heun", "dpmpp_2m_sde")
def test_every_sampler_clips(name):
    clipped = _run(name, optimal_eps, X_T, SCHEDULE, snapshots=12, clip=0.3)
    assert np.max(np.abs(_run(name, optimal_eps, X_T, SCHEDULE).x_0)) > 0.31
    assert np.max(np.abs(clipped.trajectory.x_hat)) <= np.float32(0.3)
    assert np.max(np.abs(clipped.x_0)) <= np.float32(0.3)


@_each("heun, churn")
def test_clipping_equals_a_network_that_predicts_the_clipped_value(name):
    # the noise is computed from x_t and the clipped x_0, not from the network's unclipped prediction
    if name == "predictor-corrector":
        pytest.skip("its corrector takes the score as it is")
    loud, quiet = (
        _run(
            name,
            lambda x, _, value=value: jnp.full_like(x, value),
            X_T,
            SCHEDULE,
            prediction_type="x_0",
            snapshots=12,
            clip=clip,
        )
        for value, clip in ((1.0, 0.3), (np.float32(0.3), None))
    )
    np.testing.assert_allclose(loud.trajectory.x_t, quiet.trajectory.x_t, rtol=1e-5, atol=1e-5)


@_each()
@pytest.mark.usefixtures("x64")
def test_samples_depend_neither_on_the_prediction_type_nor_on_the_scale_of_the_schedule(name):
    # x / alpha and sigma / alpha determine the samples: exploding and preserving schedules give the same data
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
    exploding = discretize(VarianceExploding(0.004, 20.0), 9)
    preserving = from_gammas(2 * np.asarray(exploding.levels.log_sigma)[1:])
    z = jax.random.normal(jax.random.key(1), (6, 2))
    x_T = {exploding: exploding(9).sigma * z, preserving: preserving(9).sigma * z}
    expected = _run(name, closed_form.OptimalDenoiser(distribution), x_T[preserving], preserving).x_0
    for schedule in (preserving, exploding):
        if schedule is exploding and name == "ancestral, upper":
            continue  # the forward step's variance is a schedule's own
        for prediction_type in ("eps", "x_0", "v", "score"):
            ours = _run(
                name,
                closed_form.OptimalDenoiser(distribution, prediction_type),
                x_T[schedule],
                schedule,
                prediction_type=prediction_type,
            ).x_0
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10)


# Normal data: every step is linear in the state and its noise, so the variance of x_0 follows a recursion by hand.


def _x_0_response(name, n, alpha, var):
    """Derivatives of x_0 by x_T and each step's noise for data N(0, var), in y = x/alpha and n = sigma/alpha."""
    last = len(n) - 1
    unit, memory = np.eye(last + 1), None
    y = unit[0] / alpha[last]
    for t in range(last, 0, -1):
        y, memory = _rule(name, y, unit[t], n[t], n[t - 1], alpha[t] / alpha[t - 1], var, last, memory)
    return y


def _rule(name, y, z, n, m, ratio, var, steps, memory):
    """One step from noise n to m, of coefficients."""
    x_hat = var / (var + n**2) * y
    eta = {"ancestral": 1.0, "ddim": 0.0, "ddim, eta 1/2": 0.5, "ddim, eta 1": 1.0, "euler": 0.0}.get(name)
    if eta is not None:
        q = eta * m * np.sqrt(1 - (m / n) ** 2)
        return x_hat + np.sqrt(m**2 - q**2) * (y - x_hat) / n + q * z, None
    if name == "ancestral, upper":
        noise = ratio * np.sqrt(n**2 - m**2) if m > 0 else 0.0
        return x_hat + (m / n) ** 2 * (y - x_hat) + noise * z, None
    if name.startswith("heun"):
        if "churn" in name:
            more = n * (1 + min(3.0 / steps, np.sqrt(2) - 1))
            y, n = y + np.sqrt(more**2 - n**2) * 1.003 * z, more
        slope = n / (var + n**2) * y
        euler = y + (m - n) * slope
        return (y + (m - n) * (slope + m / (var + m**2) * euler) / 2 if m > 0 else euler), None
    target, h = x_hat, np.log(n / m) if m > 0 else np.inf
    if memory is not None and m > 0:
        target = x_hat + h / (2 * memory[1]) * (x_hat - memory[0])
    if name == "dpmpp_2m":
        return np.exp(-h) * y + (1 - np.exp(-h)) * target, (x_hat, h)
    kept = np.exp(-2 * h)
    return kept * y + (1 - kept) * target + m * np.sqrt(1 - kept) * z, (x_hat, h)


@ALL
@pytest.mark.usefixtures("x64")
def test_normal_data_have_the_closed_form_variance(name, monkeypatch):
    gammas, var = np.array([-9.0, -6.5, -5.0, -2.0, -1.2, 0.4, 3.0, 4.5]), 0.6
    schedule, steps = from_gammas(gammas), len(gammas)
    n, alpha = np.append(0.0, np.exp(gammas / 2)), np.append(1.0, np.sqrt(1 / (1 + np.exp(gammas))))
    x_T, start = np.eye(steps + 1)[:, :1], alpha[-1] * 0.4
    if name == "predictor-corrector":  # its corrector samples its own noise: only the response to x_T is known
        keep = [1 - 2 * 0.16**2 * m**2 / (var + m**2) if m > 0 else 1.0 for m in n[:-1]]  # of a Langevin step
        down = [m**2 / k**2 + (1 - m**2 / k**2) * var / (var + k**2) for m, k in pairwise(n)]
        one, two = (_run(name, optimal_eps, jnp.asarray(start + k * x_T), schedule).x_0 for k in (1.0, 2.0))
        return assert_close(two[0, 0] - one[0, 0], np.prod(down) * np.prod(keep) ** 2 / alpha[-1])
    sampler = euler if name.startswith("heun") else SAMPLERS[name][0]  # heun corrects the steps of euler
    module = importlib.import_module(sampler.__module__)
    monkeypatch.setattr(module, "noise", lambda key, t, x: jax.nn.one_hot(t, steps + 1, dtype=x.dtype)[:, None])
    ours = _run(name, lambda x, level: optimal_eps(x, level), jnp.asarray(start + x_T), schedule).x_0[:, 0] - 0.4
    expected = _x_0_response(name, n, alpha, var)
    assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    x_T_var = alpha[-1] ** 2 * var + 1 / (1 + np.exp(-gammas[-1]))
    weights = np.append(x_T_var, np.ones(steps))
    with refuted():  # eight steps are not the limit
        assert_close(weights @ np.square(expected), var, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_predictor_corrector_has_the_closed_form_variance():
    gammas, var = np.array([-5.0, -2.0, -1.2, 0.4, 3.0]), 0.6
    n = np.append(0.0, np.exp(gammas / 2))
    v = var + n[-1] ** 2
    for m, k in zip(n[-2::-1], n[:0:-1], strict=True):
        r = m**2 / k**2
        v = (r + (1 - r) * var / (var + k**2)) ** 2 * v + m**2 * (1 - r)
        for _ in range(2 if m > 0 else 0):
            eta = 2 * (0.3 * m) ** 2
            v = (1 - eta / (var + m**2)) ** 2 * v + 2 * eta
    schedule, distribution = from_gammas(gammas), closed_form.gaussian([0.0], [[var]])
    x_T = jnp.sqrt(schedule(5).alpha ** 2 * var + schedule(5).sigma ** 2) * jax.random.normal(
        jax.random.key(3), (200_000, 1)
    )
    best = closed_form.OptimalDenoiser(distribution)
    x_0 = predictor_corrector(best, jax.random.key(4), x_T, schedule, snr=0.3, corrector_steps=2).x_0
    assert_mean(np.square(x_0), v, resolution=0.005)
    with refuted():
        assert_mean(np.square(x_0), var)


# Shared parts, by hand


def test_an_array_of_variances_has_one_for_each_step():
    """A denoiser that predicts x_0 = 0 leaves c_1 x_t + sqrt(var) z of each step."""
    schedule, variance = from_gammas([-3.0, -1.0, 2.0]), np.float32([9.0, 0.2, 0.5])
    options = {"prediction_type": "x_0", "variance": jnp.asarray(variance), "snapshots": 3}
    states = ancestral(lambda x, _: 0.0 * x, KEY, jnp.zeros((20_000, 1)), schedule, **options).trajectory.x_t
    c_1 = np.asarray(schedule.levels.alpha[1] / schedule.levels.alpha[2]) * np.exp(-2.0)  # SNR(2) / SNR(1) = e^-2
    assert_mean(np.square(states[1]), 0.5)  # at t = 2, after the step from t = 3
    assert_mean(np.square(states[2]), c_1**2 * 0.5 + 0.2)


@pytest.mark.usefixtures("x64")
def test_added_noise_by_hand():
    x, z = (jnp.asarray(a) for a in np.random.RandomState(0).normal(size=(2, 2, 3)))
    exploding = [discretize(VarianceExploding(low, high), 4) for low, high in ((0.1, 10.0), (0.01, 0.5))]
    for schedule in (from_gammas([-4.0, -1.0, 0.5, 3.0]), *exploding):
        n_of = np.asarray(schedule.levels.sigma / schedule.levels.alpha)[1:]
        level = jax.tree.map(lambda field: field[2], schedule.levels)
        n = float(level.sigma / level.alpha)
        for churn, gamma in (
            (Churn(0.8, 0.0, np.inf, 1.5), 0.2),
            (Churn(0.8, n, n, 1.0), 0.2),  # the ends belong to the interval
            (Churn(0.8, 1.01 * n, np.inf, 1.0), 0.0),
            (Churn(0.8, 0.0, 0.99 * n, 1.0), 0.0),
            (Churn(100.0, 0.0, np.inf, 1.0), np.sqrt(2) - 1),
        ):
            ours, new = add_noise(x, level, z, churn, 4, schedule)
            m = n * (1 + gamma)
            alpha = 1.0 if schedule.levels.alpha[4] == 1.0 else 1 / np.sqrt(1 + m**2)
            t = np.interp(np.log(m), np.log(n_of), [1, 2, 3, 4])
            assert_close(new, [alpha, alpha * m, np.log(alpha), np.log(alpha * m), t], rtol=1e-12, atol=1e-15)
            assert_close(ours, alpha * (x / level.alpha + churn.s_noise * np.sqrt(m**2 - n**2) * z), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_first_step_that_amplifies_errors_is_warned_of():
    # an error of eps, in x_s: sigma_s (e^(h/2) - 1), or sigma / alpha in one step to clean data
    sigma = np.sqrt(1 / (1 + np.exp(2.0)))
    for gammas, gain in (([-2.0, 9.0], sigma * np.expm1(5.5)), ([9.0], np.exp(4.5)), ([-2.0, 6.2], 20.5)):
        schedule = from_gammas(gammas)
        for prediction_type in ("eps", "score"):
            with pytest.warns(UserWarning, match=f"type='{prediction_type}'.* errors by {gain:,.0f}: pass clip=1.0"):
                warn_of_amplification(schedule, prediction_type, None)
        warn_of_amplification(schedule, "eps", 1.0)
        for prediction_type in ("x_0", "v"):
            warn_of_amplification(schedule, prediction_type, None)
    warn_of_amplification(from_gammas([-2.0, 6.1]), "eps", None)  # 19.5, and the limit is 20


@pytest.mark.slow
def test_the_warning_points_at_the_call_of_the_sampler(tmp_path):
    """In a process without checks of annotations, which put frames of their own between."""
    calls = [f"samplers.{name}(lambda x, _: x, key, x_T, schedule)" for name in ("ancestral", "ddim", "heun")]
    script = tmp_path / "script.py"
    script.write_text(
        """import jax, jax.numpy as jnp
from vdm_jax import discrete_schedules, samplers
key, x_T, schedule = jax.random.key(0), jnp.zeros((1, 1)), discrete_schedules.from_gammas([9.0])
"""
        + "\n".join(calls)
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert [f"{script}:{4 + i}: UserWarning" in run.stderr for i in range(3)] == [True] * 3, run.stderr


def test_adaptive_is_the_flow_to_time_0_and_the_x_0_predicted_there(monkeypatch):
    def flow(net, x_T, schedule, *, prediction_type, tolerance, max_steps):
        assert (prediction_type, max_steps) == ("eps", 7)
        return x_T + tolerance

    monkeypatch.setattr(importlib.import_module("vdm_jax.samplers.adaptive"), "sample", flow)
    schedule = LinearLogSNR(3.0, -2.0)
    ours = adaptive(optimal_eps, None, X_T, schedule, tolerance=0.25, clip=0.5, max_steps=7)
    x_hat = np.asarray(GAUSSIAN.x_hat(np.asarray(X_T) + np.float32(0.25), schedule(np.zeros((), np.float32))))
    assert np.abs(x_hat).min() < 0.5 < np.abs(x_hat).max()
    np.testing.assert_allclose(ours.x_0, np.clip(x_hat, -0.5, 0.5), rtol=1e-5)
    assert ours.trajectory.x_t.shape == ours.trajectory.x_hat.shape == (0, 5, 3)
    assert ours.trajectory.t.shape == (0,)


# Order of convergence and distribution of the samples

CONTINUOUS = LinearLogSNR(8.0, -6.0)
MIXTURE = ([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.usefixtures("x64")
def test_order_of_convergence(name):
    # at level 1, where the flow ends; the step from there to clean data is of first order in all of them
    distribution, x_T = closed_form.mixture(*MIXTURE), jax.random.normal(jax.random.key(5), (64, 2))
    best = closed_form.OptimalDenoiser(distribution)
    expected = sample(best, x_T, CONTINUOUS, tolerance=1e-11)
    steps, errors = [32, 64, 128, 256], []
    for count in steps:
        state = _run(name, best, x_T, discretize(CONTINUOUS, count + 1), snapshots=2).trajectory
        assert int(state.t[-1]) == 1
        errors.append(float(jnp.sqrt(jnp.mean((state.x_t[-1] - expected) ** 2))))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"{name}: errors {errors}, order {slope:.3f}")
    assert abs(slope - ORDERS[name]) < 0.15


@_each()
def test_samples_have_the_distribution_of_the_data(name):
    distribution = closed_form.mixture([0.3, 0.5, 0.2], [[-1.0, 0.2], [0.8, -0.4], [0.2, 1.5]], [0.05, 0.2, 0.02])
    schedule = discretize(LinearLogSNR(10.0, -9.0), 256)
    options = {"snr": 0.1} if name == "predictor-corrector" else {}
    if name == "heun, churn":
        options = {"s_churn": 60.0, "s_noise": 1.0}
    function, own, _ = SAMPLERS[name]
    x_T = jax.random.normal(jax.random.key(6), (5_000, 2))
    x_0 = function(
        closed_form.OptimalDenoiser(distribution), jax.random.key(7), x_T, schedule, **{**own, **options}
    ).x_0
    level = NoiseLevel(jnp.float32(1.0), jnp.float32(1e-2), jnp.float32(0.0), jnp.log(jnp.float32(1e-2)))
    shares = jnp.exp(jax.vmap(lambda x: distribution.posterior(x, level).log_weights)(x_0))
    assert_mean(shares, [0.3, 0.5, 0.2], resolution=0.008)
    assert_mean(x_0, distribution.mean, resolution=0.015)
    deviations = np.asarray(x_0 - distribution.mean[None])
    assert_mean(deviations[:, :, None] * deviations[:, None, :], distribution.covariance(), resolution=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [uniform_steps, log_snr_uniform_steps, karras_steps])
@pytest.mark.usefixtures("x64")
def test_a_few_steps_of_a_long_schedule(steps):
    # normal data: the flow keeps x over its deviation, so x_0 is known; the places chosen decide the error
    schedule, var = linear_betas(1000), 0.09
    distribution, x_T = closed_form.gaussian([0.0], [[var]]), jnp.array([[1.3], [-0.4]])
    expected = np.sqrt(var / (var * schedule(1000).alpha ** 2 + schedule(1000).sigma ** 2)) * np.asarray(x_T)
    index = steps(1000, 20) if steps is uniform_steps else steps(schedule, 20)
    second = 0.15 if steps is uniform_steps else 0.08
    for name, bound in {"ddim": 0.25, "heun": second, "dpmpp_2m": second}.items():
        ours = _run(name, closed_form.OptimalDenoiser(distribution), x_T, schedule.subsequence(index)).x_0
        loss = np.max(np.abs(ours / expected - 1))
        print(f"{steps.__name__}, {name}: {loss:.1e}")
        assert loss < bound


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_adaptive_is_the_flow_and_its_x_0():
    distribution, x_T = closed_form.mixture(*MIXTURE), jax.random.normal(jax.random.key(5), (16, 2))
    best, continuous = closed_form.OptimalDenoiser(distribution), LinearLogSNR(12.0, -6.0)
    fine = heun(best, jax.random.key(0), x_T, discretize(continuous, 2_000)).x_0
    rough, ours = (adaptive(best, None, x_T, continuous, tolerance=tolerance) for tolerance in (1e-3, 1e-8))
    assert_close(ours.x_0, fine, rtol=0.0, atol=1e-4)
    assert 1e-6 < np.max(np.abs(rough.x_0 - ours.x_0)) < 0.05
    assert ours.trajectory.x_t.shape == (0, 16, 2)
    for prediction_type in ("x_0", "v", "score"):
        same = adaptive(
            closed_form.OptimalDenoiser(distribution, prediction_type),
            None,
            x_T,
            continuous,
            prediction_type=prediction_type,
            tolerance=1e-8,
        )
        assert_close(same.x_0, ours.x_0, rtol=0.0, atol=1e-6)
    assert np.max(np.abs(adaptive(best, None, x_T, continuous, clip=0.5).x_0)) <= 0.5
    assert np.all(np.isnan(adaptive(best, None, x_T, continuous, max_steps=3).x_0))
    schedule = discretize(continuous, 9)  # through its levels, evenly spaced in log-SNR, the same schedule
    assert_close(
        adaptive(best, None, x_T, InterpolatedSchedule(schedule), tolerance=1e-8).x_0, ours.x_0, rtol=0.0, atol=1e-6
    )


@ALL
def test_a_wrong_number_of_snapshots(name):
    for snapshots in (-1, 13):
        with pytest.raises(ValueError, match=rf"snapshots must be in 0\.\.12.* got {snapshots}"):
            _run(name, optimal_eps, X_T, SCHEDULE, snapshots=snapshots)
