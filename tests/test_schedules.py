"""Continuous schedules: the published formulas, the differential identities between level and drop, the errors."""

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
TIMES = np.linspace(0.001, 0.999, 57)

parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@parametrize("schedule", PRESERVING, ids=repr)
def test_variance_is_preserved(schedule):
    level = schedule(jnp.asarray(np.r_[0.0, TIMES, 1.0]))
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, rtol=1e-13)


@parametrize("schedule", ALL, ids=repr)
def test_logarithms_are_those_of_the_scales(schedule):
    level = schedule(jnp.asarray(TIMES))
    np.testing.assert_allclose(jnp.exp(level.log_alpha), level.alpha, rtol=1e-13)
    np.testing.assert_allclose(jnp.exp(level.log_sigma), level.sigma, rtol=1e-13)
    np.testing.assert_allclose(schedule.log_snr(jnp.asarray(TIMES)), np.log(level.snr), rtol=1e-10, atol=1e-12)
    assert np.array_equal(level.t, TIMES)


@parametrize("schedule", ALL, ids=repr)
def test_signal_falls_and_noise_rises(schedule):
    level = schedule(jnp.asarray(np.r_[0.0, TIMES, 1.0]))
    assert np.all(np.diff(level.sigma) > 0)
    assert np.all(np.diff(level.alpha) < 0) or np.all(level.alpha == 1)
    with np.errstate(invalid="ignore"):
        assert np.all(np.diff(level.log_snr) < 0)


@parametrize("schedule", BEGIN_CLEAN, ids=repr)
def test_time_zero_is_clean(schedule):
    clean = schedule(0.0)
    assert (float(clean.sigma), float(clean.log_alpha)) == (0.0, 0.0)
    assert float(clean.alpha) == pytest.approx(1.0, rel=1e-15)
    assert float(clean.log_sigma) == -np.inf
    assert float(clean.log_snr) == np.inf
    assert float(schedule.step(0.0, 0.3).log_snr_drop) == np.inf


@parametrize("schedule", NO_SIGNAL_LEFT, ids=repr)
def test_no_signal_is_left_at_time_one(schedule):
    assert float(schedule(1.0).alpha) == 0.0
    assert float(schedule(1.0).sigma) == pytest.approx(1.0, rel=1e-15)


@parametrize("schedule", ALL, ids=repr)
def test_drop_is_the_difference_of_the_log_snrs(schedule):
    s, t = jnp.asarray(TIMES[:-7]), jnp.asarray(TIMES[7:])
    drop = schedule.step(s, t).log_snr_drop
    np.testing.assert_allclose(drop, schedule.log_snr(s) - schedule.log_snr(t), rtol=1e-10)


@parametrize("schedule", ALL, ids=repr)
def test_drops_add_up(schedule):
    s, u, t = jnp.asarray(TIMES[:-9]), jnp.asarray(TIMES[3:-6]), jnp.asarray(TIMES[9:])
    whole = schedule.step(s, t).log_snr_drop
    np.testing.assert_allclose(schedule.step(s, u).log_snr_drop + schedule.step(u, t).log_snr_drop, whole, rtol=1e-12)


@parametrize("schedule", ALL, ids=repr)
def test_drop_of_a_short_step_is_the_derivative(schedule):
    # central difference: the error is of order h^2
    h = 1e-6
    slope = jax.vmap(jax.grad(schedule.log_snr))(jnp.asarray(TIMES))
    drop = schedule.step(jnp.asarray(TIMES - h / 2), jnp.asarray(TIMES + h / 2)).log_snr_drop
    np.testing.assert_allclose(drop / h, -slope, rtol=1e-6)


@parametrize("schedule", ALL, ids=repr)
def test_numpy_and_jax_arrays_give_the_same(schedule):
    for ours, theirs in zip(schedule(TIMES), schedule(jnp.asarray(TIMES)), strict=True):
        assert isinstance(ours, np.ndarray)
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-15)


@parametrize("schedule", [*ALL, LinearLogSNR(20.0, -20.0), VarianceExploding(1e-4, 1e4)], ids=repr)
def test_float32_keeps_its_digits(schedule):
    t = np.r_[np.logspace(-6, -1, 31), np.linspace(0.1, 0.9, 31), 1 - np.logspace(-1, -6, 31)].astype(np.float32)
    wide = jnp.asarray(t, jnp.float64)
    level, step = schedule(wide), schedule.step(wide[:-1], wide[1:])
    with jax.enable_x64(False):
        ours, drop = jax.jit(schedule)(t), jax.jit(lambda s, t: schedule.step(s, t).log_snr_drop)(t[:-1], t[1:])
    np.testing.assert_allclose(ours.alpha, level.alpha, rtol=5e-7)
    np.testing.assert_allclose(ours.sigma, level.sigma, rtol=5e-7)
    np.testing.assert_allclose(drop, step.log_snr_drop, rtol=1e-6)


def test_defaults_are_the_published_numbers():
    # Song et al.'s, Nichol & Dhariwal's, Jabri et al.'s, Kingma et al.'s, Song & Ermon's
    published = [LinearBeta(0.1, 20.0), Cosine(0.008), Sigmoid(-3.0, 3.0, 1.0)]
    published += [LinearLogSNR(13.3, -5.0), VarianceExploding(0.01, 50.0)]
    for schedule in published:
        assert type(schedule)() == schedule


def test_linear_beta_accumulates_beta():
    schedule = LinearBeta(0.1, 20.0)
    # abar solves d abar / dt = -beta(t) abar with beta linear between its ends
    rate = jax.vmap(jax.grad(lambda t: -2.0 * schedule(t).log_alpha))(jnp.asarray(TIMES))
    np.testing.assert_allclose(rate, np.interp(TIMES, [0, 1], [0.1, 20.0]), rtol=1e-9)
    total, _ = integrate.quad(lambda t: np.interp(t, [0, 1], [0.1, 20.0]), 0, 1)
    assert float(schedule(1.0).alpha) ** 2 == pytest.approx(np.exp(-total), rel=1e-12)


def test_cosine_is_nichol_and_dhariwals_formula():
    def f(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    np.testing.assert_allclose(Cosine()(jnp.asarray(TIMES)).alpha ** 2, f(TIMES) / f(0.0), rtol=1e-10)


def test_sigmoid_is_the_published_formula():
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for start, end, tau in [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-1.0, 2.0, 0.7)]:
        end_value, here = sigmoid(end / tau), sigmoid((TIMES * (end - start) + start) / tau)
        printed = (end_value - here) / (end_value - sigmoid(start / tau))
        np.testing.assert_allclose(Sigmoid(start, end, tau)(jnp.asarray(TIMES)).alpha ** 2, printed, rtol=1e-10)


def test_linear_log_snr_is_a_straight_line():
    schedule = LinearLogSNR(13.3, -5.0)
    np.testing.assert_allclose(schedule.log_snr(jnp.asarray(TIMES)), np.interp(TIMES, [0, 1], [13.3, -5.0]), rtol=1e-12)
    assert float(schedule.log_snr(0.0)) == pytest.approx(13.3)
    assert float(schedule.log_snr(1.0)) == pytest.approx(-5.0)


def test_variance_exploding_is_geometric():
    schedule = VarianceExploding(0.01, 50.0)
    assert float(schedule(0.0).sigma) == pytest.approx(0.01, rel=1e-14)
    assert float(schedule(1.0).sigma) == pytest.approx(50.0, rel=1e-14)
    assert float(schedule(0.5).sigma) == pytest.approx(np.sqrt(0.5), rel=1e-14)  # the geometric mean of the ends
    assert np.all(schedule(jnp.asarray(TIMES)).alpha == 1.0)


@parametrize("schedule", ALL, ids=repr)
@parametrize("t", [-0.1, 1.0001, np.nan])
def test_time_out_of_range(schedule, t):
    with pytest.raises(ValueError, match=r"out of range.*\[0, 1\]"):
        schedule(t)
    with pytest.raises(ValueError, match="out of range"):
        schedule.step(0.5, t)
    traced = jax.jit(schedule)(t)
    # alpha may be constant: it is 1 at any time of a variance-exploding schedule
    assert np.all(np.isnan([traced.sigma, traced.log_sigma, traced.log_snr]))


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


@parametrize("schedule", ALL, ids=repr)
def test_time_from_log_snr_is_the_inverse(schedule):
    np.testing.assert_allclose(time_from_log_snr(schedule.log_snr(jnp.asarray(TIMES)), schedule), TIMES, rtol=1e-8)
    ends = time_from_log_snr(jnp.asarray([1e4, -1e4]), schedule)
    assert np.array_equal(ends, [0.0, 1.0])


def _learned(parameters):
    gamma_0, gamma_1, *rest = parameters
    return LearnedSchedule(gamma_0, gamma_1, Partial(lambda a, s, t: a[0] * (t - s) + a[1] * (t**3 - s**3), rest))


def test_time_from_log_snr_has_the_gradient_of_the_inverse():
    # by finite differences, in the log-SNR and in every parameter of the schedule; zero beyond the ends
    def times(log_snr, parameters):
        return time_from_log_snr(log_snr, _learned(list(parameters)))

    log_snr, parameters, h = jnp.asarray(1.3), jnp.asarray([-6.0, 5.0, 1.0, 0.7]), 1e-5
    ours = jax.grad(times, argnums=(0, 1))(log_snr, parameters)
    secants = [
        (times(log_snr, parameters.at[i].add(h)) - times(log_snr, parameters.at[i].add(-h))) / (2 * h) for i in range(4)
    ]
    np.testing.assert_allclose(ours[1], secants, rtol=1e-6)
    secant = (times(log_snr + h, parameters) - times(log_snr - h, parameters)) / (2 * h)
    np.testing.assert_allclose(ours[0], secant, rtol=1e-6)
    beyond = jax.grad(times, argnums=(0, 1))(jnp.asarray(9.0), parameters)
    assert not np.any(beyond[0])
    assert not np.any(beyond[1])
