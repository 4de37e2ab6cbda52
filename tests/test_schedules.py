"""Continuous schedules: the published formulas, the differential identities between level and drop, the errors.

Most tests evaluate the formulas in NumPy. `test_numpy_and_jax_arrays_give_the_same` compares every field with JAX's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import integrate

from vdm_jax.schedules import (
    Cosine,
    LearnedSchedule,
    LinearBeta,
    LinearLogSNR,
    Sigmoid,
    VarianceExploding,
    check_noise_at_start,
    time_from_log_snr,
)

PRESERVING = [
    LinearBeta(),
    LinearBeta(0.5, 4.0),
    Cosine(),
    Cosine(0.1),
    Sigmoid(),
    Sigmoid(-1.0, 2.0, 0.7),
    LinearLogSNR(),
]
ALL = [*PRESERVING, VarianceExploding()]
BEGIN_CLEAN = [s for s in PRESERVING if not isinstance(s, LinearLogSNR)]
NO_SIGNAL_LEFT = [s for s in ALL if isinstance(s, Cosine | Sigmoid)]
KINDS = [LinearBeta(), Cosine(), Sigmoid(-1.0, 2.0, 0.7), LinearLogSNR(), VarianceExploding()]  # one of each class
TIMES = np.linspace(0.001, 0.999, 57)

parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _infinite_logarithms():
    with np.errstate(divide="ignore", invalid="ignore"):
        yield


def _log_snr(schedule, t):
    level = schedule(t)
    return 2.0 * (level.log_alpha - level.log_sigma)


@jax.jit
def _levels_and_steps(schedule, t, s, u):
    return schedule(t), schedule.step(s, u)


@parametrize("schedule", PRESERVING, ids=repr)
def test_variance_is_preserved(schedule):
    level = schedule(np.r_[0.0, TIMES, 1.0])
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, rtol=1e-13)


@parametrize("schedule", ALL, ids=repr)
def test_logarithms_are_those_of_the_scales(schedule):
    level = schedule(TIMES)
    np.testing.assert_allclose(np.exp(level.log_alpha), level.alpha, rtol=1e-13)
    np.testing.assert_allclose(np.exp(level.log_sigma), level.sigma, rtol=1e-13)
    np.testing.assert_allclose(np.exp(_log_snr(schedule, TIMES)), (level.alpha / level.sigma) ** 2, rtol=1e-10)
    assert np.array_equal(level.t, TIMES)


@parametrize("schedule", ALL, ids=repr)
def test_signal_falls_and_noise_rises(schedule):
    level = schedule(np.r_[0.0, TIMES, 1.0])
    assert np.all(np.diff(level.sigma) > 0)
    assert np.all(np.diff(level.alpha) < 0) or np.all(level.alpha == 1)
    assert np.all(np.diff(level.log_alpha - level.log_sigma) < 0)


@parametrize("schedule", BEGIN_CLEAN, ids=repr)
def test_time_zero_is_clean(schedule):
    zero = np.zeros(1)
    for clean in (schedule(zero), schedule.step(zero, zero + 0.3).s):
        np.testing.assert_allclose(clean.alpha, 1.0, rtol=1e-15)
        assert (clean.sigma, clean.log_alpha, clean.log_sigma) == (0.0, 0.0, -np.inf)
    assert schedule.step(zero, zero + 0.3).log_snr_drop == np.inf


@parametrize("schedule", NO_SIGNAL_LEFT, ids=repr)
def test_no_signal_is_left_at_time_one(schedule):
    level = schedule(np.ones(1))
    np.testing.assert_allclose(level.sigma, 1.0, rtol=1e-15)
    assert level.alpha == 0.0


@parametrize("schedule", ALL, ids=repr)
def test_drop_is_the_difference_of_the_log_snrs(schedule):
    s, t = TIMES[:-7], TIMES[7:]
    drop = schedule.step(s, t).log_snr_drop
    np.testing.assert_allclose(drop, _log_snr(schedule, s) - _log_snr(schedule, t), rtol=1e-10)


@parametrize("schedule", ALL, ids=repr)
def test_drops_add_up(schedule):
    s, u, t = TIMES[:-9], TIMES[3:-6], TIMES[9:]
    whole = schedule.step(s, t).log_snr_drop
    np.testing.assert_allclose(schedule.step(s, u).log_snr_drop + schedule.step(u, t).log_snr_drop, whole, rtol=1e-12)


def test_drop_of_a_short_step_is_the_derivative():
    # central difference: the error is of order h^2
    h = 1e-6
    slopes = jax.jit(lambda t: [jax.vmap(jax.grad(schedule.log_snr))(t) for schedule in KINDS])(TIMES)
    for schedule, slope in zip(KINDS, slopes, strict=True):
        drop = schedule.step(TIMES - h / 2, TIMES + h / 2).log_snr_drop
        np.testing.assert_allclose(drop / h, -slope, rtol=1e-6, err_msg=repr(schedule))


@parametrize("schedule", KINDS, ids=repr)
def test_numpy_and_jax_arrays_give_the_same(schedule):
    t = np.r_[0.0, TIMES, 1.0]
    arguments = t, t[:-7], t[7:]
    ours = schedule(arguments[0]), schedule.step(*arguments[1:])
    theirs = _levels_and_steps(schedule, *arguments)
    assert all(isinstance(field, np.ndarray) for field in jax.tree.leaves(ours))
    jax.tree.map(lambda *fields: np.testing.assert_allclose(*fields, rtol=1e-13, atol=1e-15), ours, theirs)


# `test_accuracy.py` has the defaults
@parametrize("schedule", [LinearBeta(0.5, 4.0), Sigmoid(-1.0, 2.0, 0.7), VarianceExploding(1e-4, 1e4)], ids=repr)
def test_float32_keeps_its_digits(schedule):
    t = np.r_[np.logspace(-6, -1, 31), np.linspace(0.1, 0.9, 31), 1 - np.logspace(-1, -6, 31)].astype(np.float32)
    wide = t.astype(np.float64)
    level, step = schedule(wide), schedule.step(wide[:-1], wide[1:])
    with jax.enable_x64(False):
        ours, steps = _levels_and_steps(schedule, t, t[:-1], t[1:])
    np.testing.assert_allclose(ours.alpha, level.alpha, rtol=5e-7)
    np.testing.assert_allclose(ours.sigma, level.sigma, rtol=5e-7)
    np.testing.assert_allclose(steps.log_snr_drop, step.log_snr_drop, rtol=1e-6)


def test_defaults_are_the_published_numbers():
    # Song et al.'s, Nichol & Dhariwal's, Jabri et al.'s, Kingma et al.'s, Song & Ermon's
    published = [LinearBeta(0.1, 20.0), Cosine(0.008), Sigmoid(-3.0, 3.0, 1.0)]
    published += [LinearLogSNR(13.3, -5.0), VarianceExploding(0.01, 50.0)]
    for schedule in published:
        assert type(schedule)() == schedule


def test_linear_beta_accumulates_beta():
    schedule = LinearBeta(0.1, 20.0)
    # abar solves d abar / dt = -beta(t) abar with beta linear between its ends
    rate = jax.jit(jax.vmap(jax.grad(lambda t: -2.0 * schedule(t).log_alpha)))(TIMES)
    np.testing.assert_allclose(rate, np.interp(TIMES, [0, 1], [0.1, 20.0]), rtol=1e-9)
    total, _ = integrate.quad(lambda t: np.interp(t, [0, 1], [0.1, 20.0]), 0, 1)
    np.testing.assert_allclose(schedule(np.ones(1)).alpha ** 2, np.exp(-total), rtol=1e-12)


def test_cosine_is_nichol_and_dhariwals_formula():
    def f(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    np.testing.assert_allclose(Cosine()(TIMES).alpha ** 2, f(TIMES) / f(0.0), rtol=1e-10)


def test_sigmoid_is_the_published_formula():
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for start, end, tau in [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-1.0, 2.0, 0.7)]:
        end_value, here = sigmoid(end / tau), sigmoid((TIMES * (end - start) + start) / tau)
        printed = (end_value - here) / (end_value - sigmoid(start / tau))
        np.testing.assert_allclose(Sigmoid(start, end, tau)(TIMES).alpha ** 2, printed, rtol=1e-10)


def test_linear_log_snr_is_a_straight_line():
    t = np.r_[0.0, TIMES, 1.0]
    np.testing.assert_allclose(
        _log_snr(LinearLogSNR(13.3, -5.0), t), np.interp(t, [0, 1], [13.3, -5.0]), rtol=1e-12, atol=1e-13
    )


def test_variance_exploding_is_geometric():
    level = VarianceExploding(0.01, 50.0)(np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(level.sigma, [0.01, np.sqrt(0.01 * 50.0), 50.0], rtol=1e-14)
    assert np.all(level.alpha == 1.0)


@parametrize("schedule", ALL, ids=repr)
@parametrize("t", [-0.1, 1.0001, np.nan])
def test_time_out_of_range(schedule, t):
    with pytest.raises(ValueError, match=r"out of range.*\[0, 1\]"):
        schedule(np.array([0.5, t]))
    for s, u in ((0.5, t), (t, 0.5)):
        with pytest.raises(ValueError, match="out of range"):
            schedule.step(np.array(s), np.array(u))


def test_traced_time_out_of_range_gives_nan():
    times = np.array([-0.1, 1.0001, np.nan])
    for level in jax.jit(lambda t: [schedule(t) for schedule in (LinearLogSNR(), VarianceExploding())])(times):
        assert np.all(np.isnan([level.alpha, level.sigma, level.log_sigma, level.log_snr]))


def test_integer_time_is_refused():
    with pytest.raises(TypeError, match=r"t has dtype int.*discretize"):
        Cosine()(1)
    with pytest.raises(TypeError, match="discretize"):
        jax.jit(Cosine())(jnp.arange(3))


def test_schedules_are_static_under_jit():
    assert jax.tree.leaves(Cosine()) == []
    assert hash(Cosine()) == hash(Cosine(0.008))
    assert float(jax.jit(lambda schedule, t: schedule(t).alpha)(Cosine(), 0.5)) == pytest.approx(
        float(Cosine()(0.5).alpha)
    )


def test_noise_at_the_start_is_checked():
    check_noise_at_start(LinearLogSNR(), 0.0, jnp.float32)
    check_noise_at_start(Cosine(), 0.01, jnp.float32)
    with pytest.raises(ValueError, match=r"Cosine.* has no noise at t = 0\.0: choose"):
        check_noise_at_start(Cosine(), 0.0, jnp.float32)
    for t_0 in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"t_0 is .*\[0, 1\)"):
            check_noise_at_start(LinearLogSNR(), t_0, jnp.float32)
    assert jax.jit(lambda t_0: check_noise_at_start(Cosine(), t_0, jnp.float32) or t_0)(0.0) == 0.0  # not checked


@parametrize("schedule", [LinearBeta(0.5, 4.0), Cosine()], ids=repr)
def test_time_from_log_snr_is_the_inverse(schedule):
    times = time_from_log_snr(jnp.asarray(np.r_[_log_snr(schedule, TIMES), 1e4, -1e4]), schedule)
    np.testing.assert_allclose(times[:-2], TIMES, rtol=1e-8)
    assert np.array_equal(times[-2:], [0.0, 1.0])


def _learned(parameters):
    gamma_0, gamma_1, *rest = parameters
    return LearnedSchedule(gamma_0, gamma_1, Partial(lambda a, s, t: a[0] * (t - s) + a[1] * (t**3 - s**3), rest))


def test_a_learned_schedule_runs_between_its_ends_along_its_shape():
    t = np.r_[0.0, TIMES, 1.0]
    shape = (0.3 * t + 0.7 * t**3) / (0.3 + 0.7)
    log_snr = 6.0 - 11.0 * shape  # gamma from -6 to 5
    level, step = _levels_and_steps(_learned([-6.0, 5.0, 0.3, 0.7]), t, t[:-7], t[7:])
    np.testing.assert_allclose(level.log_snr, log_snr, rtol=1e-12)
    np.testing.assert_allclose(level.alpha**2, 1 / (1 + np.exp(-log_snr)), rtol=1e-12)
    np.testing.assert_allclose(step.log_snr_drop, log_snr[:-7] - log_snr[7:], rtol=1e-12)
    assert np.array_equal(level.t, t)


def test_time_from_log_snr_has_the_gradient_of_the_inverse():
    # by finite differences, in the log-SNR and in every parameter of the schedule; zero beyond the ends
    def times(arguments):
        log_snr, *parameters = arguments
        return time_from_log_snr(log_snr, _learned(parameters))

    arguments, h = np.array([1.3, -6.0, 5.0, 1.0, 0.7]), 1e-5
    moved = np.concatenate([arguments + h * np.eye(5), arguments - h * np.eye(5)])
    there, back = np.split(jax.jit(jax.vmap(times))(moved), 2)
    beyond = np.r_[9.0, arguments[1:]], np.r_[-9.0, arguments[1:]]
    slopes = jax.jit(jax.vmap(jax.grad(times)))(np.stack([arguments, *beyond]))
    np.testing.assert_allclose(slopes[0], (there - back) / (2 * h), rtol=1e-6)
    assert not np.any(slopes[1:])
