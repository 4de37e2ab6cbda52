"""Discrete schedules: published numbers, level 0 clean, the three conventions, exact subsequences, the errors."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from vdm_jax.discrete_schedules import (
    DiscretizedSchedule,
    InterpolatedSchedule,
    discretize,
    from_betas,
    from_gammas,
    from_standard_deviations,
    karras_steps,
    linear_betas,
    log_snr_uniform_steps,
    to_betas,
    to_gammas,
    to_standard_deviations,
    uniform_steps,
)
from vdm_jax.schedules import Cosine, LinearBeta, LinearLogSNR, Sigmoid, VarianceExploding

SCHEDULES = [LinearBeta(), Cosine(), Sigmoid(), LinearLogSNR(), VarianceExploding()]
BETAS = np.array([0.02, 0.05, 0.1, 0.3, 0.6])

parametrize = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def _levels(schedule, t):
    return schedule(t)


@jax.jit
def _steps(schedule, s, t):
    return schedule.step(s, t)


_to_betas = jax.jit(to_betas)
_to_standard_deviations = jax.jit(to_standard_deviations)


@pytest.fixture(scope="module")
def tables():
    with jax.enable_x64(True):
        continuous = [discretize(s, 12) for s in SCHEDULES]
        return [*continuous, linear_betas(1000), from_betas(BETAS), from_gammas(np.array([-3.0, 0.5, 2.0]))]


def test_level_zero_is_exactly_clean(tables):
    for schedule in tables:
        step = _steps(schedule, 0, 1)
        for clean in (jax.tree.map(lambda field: field[0], schedule.levels), step.s):
            assert tuple(map(float, clean[:4])) == (1.0, 0.0, 0.0, -np.inf)
        assert float(schedule.log_snr[0]) == np.inf
        assert float(step.log_snr_drop) == np.inf


def test_a_schedule_of_t_steps_has_levels_zero_to_t():
    schedule = linear_betas(7, 0.01, 0.2)
    assert schedule.num_steps == 7
    levels = _levels(schedule, np.arange(8))
    assert np.array_equal(levels.t, np.arange(8))
    np.testing.assert_allclose(levels.alpha**2, np.cumprod(1 - np.r_[0.0, np.linspace(0.01, 0.2, 7)]), rtol=1e-13)
    with pytest.raises(ValueError, match="out of range"):
        schedule(8)


def test_levels_fall_and_fields_agree(tables):
    for schedule in tables:
        levels = jax.tree.map(lambda field: np.asarray(field)[1:], schedule.levels)
        log_snr = np.asarray(schedule.log_snr[1:])
        assert np.all(np.diff(log_snr) < 0)
        assert np.all(np.diff(levels.sigma) > 0)
        np.testing.assert_allclose(np.exp(levels.log_alpha), levels.alpha, rtol=1e-14)
        np.testing.assert_allclose(np.exp(levels.log_sigma), levels.sigma, rtol=1e-14)
        np.testing.assert_allclose(log_snr, 2 * np.log(levels.alpha / levels.sigma), rtol=1e-9, atol=1e-12)


def test_published_numbers_of_linear_betas():
    schedule = jax.tree.map(np.asarray, linear_betas().levels)
    assert schedule.alpha[1000] ** 2 == pytest.approx(4.0358e-05, rel=1e-5)  # abar_1000, as Ho et al.'s code has it
    assert schedule.sigma[1] ** 2 == pytest.approx(1e-4, rel=1e-12)
    with mpmath.workdps(50):
        betas = [mpmath.mpf(1) / 10**4 + (mpmath.mpf(2) / 100 - mpmath.mpf(1) / 10**4) * k / 999 for k in range(1000)]
        for t in (1, 2, 10, 500, 1000):
            abar = mpmath.fprod(1 - b for b in betas[:t])
            assert schedule.alpha[t] ** 2 == pytest.approx(float(abar), rel=1e-13)
            assert schedule.sigma[t] ** 2 == pytest.approx(float(1 - abar), rel=1e-11)


def test_little_noise_and_little_signal_keep_their_digits():
    betas = np.array([1e-10, 0.3, 0.9999, 0.9999, 0.9999])
    levels = jax.tree.map(np.asarray, from_betas(betas).levels)
    with mpmath.workdps(50):
        for t in range(1, 6):
            abar = mpmath.fprod(1 - mpmath.mpf(b) for b in betas[:t])
            assert float(levels.sigma[t]) ** 2 == pytest.approx(float(1 - abar), rel=1e-13)
            assert float(levels.log_sigma[t]) == pytest.approx(float(mpmath.log(1 - abar) / 2), rel=1e-12, abs=0)


def test_step_drop_is_exact_between_any_two_levels():
    schedule = linear_betas()
    s, t = np.array([1, 1, 499, 998]), np.array([2, 1000, 500, 1000])
    step, log_snr = _steps(schedule, s, t), np.asarray(schedule.log_snr)
    np.testing.assert_allclose(step.log_snr_drop, log_snr[s] - log_snr[t], rtol=1e-9)
    np.testing.assert_array_equal(step.s.t, s)
    np.testing.assert_array_equal(step.t.t, t)


def test_step_drop_keeps_its_digits_in_float32():
    s, t = np.array([1, 499, 998, 999], np.int32), np.array([2, 500, 999, 1000], np.int32)
    expected = _steps(linear_betas(), s, t).log_snr_drop
    with jax.enable_x64(False):  # the difference of two float32 log-SNRs has four digits here
        drop = _steps(linear_betas(), s, t).log_snr_drop
        assert drop.dtype == jnp.float32
    np.testing.assert_allclose(drop, expected, rtol=3e-7)


@parametrize("continuous", [LinearBeta(), Sigmoid(), Cosine()], ids=repr)
def test_discretize_evaluates_the_schedule_at_i_over_t(continuous):
    schedule, last = discretize(continuous, 16), 15  # the last step of a schedule without signal is clipped
    steps = np.arange(1, last + 1)
    for ours, theirs in zip(schedule.levels[:4], continuous(steps / 16)[:4], strict=True):
        np.testing.assert_allclose(ours[1:-1], theirs, rtol=1e-12, atol=1e-15)
    ours, theirs = _steps(schedule, steps[:-1], steps[1:]), continuous.step(steps[:-1] / 16, steps[1:] / 16)
    np.testing.assert_allclose(ours.log_snr_drop, theirs.log_snr_drop)


@parametrize("continuous", [LinearLogSNR(), VarianceExploding()], ids=repr)
def test_discretize_adds_a_clean_level_to_a_schedule_with_noise_at_0(continuous):
    schedule = discretize(continuous, 9)
    for ours, theirs in zip(schedule.levels[:4], continuous(np.linspace(0.0, 1.0, 9))[:4], strict=True):
        np.testing.assert_allclose(ours[1:], theirs, rtol=1e-12, atol=1e-15)


@parametrize("num_steps", [4, 1000])
def test_discrete_cosine_is_nichol_and_dhariwals(num_steps):
    def f(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    grid = np.arange(num_steps + 1) / num_steps
    printed = np.minimum(1 - f(grid[1:]) / f(grid[:-1]), 0.999)
    betas = _to_betas(discretize(Cosine(), num_steps)).beta
    np.testing.assert_allclose(betas, printed, rtol=1e-9)
    assert float(betas[-1]) == pytest.approx(0.999, rel=1e-12)  # the clip is at work
    # and the same schedule, built from the published betas
    theirs = from_betas(printed)
    np.testing.assert_allclose(discretize(Cosine(), num_steps).levels.alpha, theirs.levels.alpha, rtol=1e-9)


class _Quieter:
    """Half the noise of the cosine schedule, and so no preserved variance."""

    def __call__(self, t):
        level = Cosine()(t)
        return level._replace(sigma=0.5 * level.sigma, log_sigma=level.log_sigma - np.log(2.0))

    def step(self, s, t):
        return Cosine().step(s, t)


def test_levels_before_the_clip_are_the_schedules():
    ours, theirs = discretize(_Quieter(), 16).levels, _Quieter()(np.arange(1, 16) / 16)
    np.testing.assert_allclose(ours.alpha[1:-1], theirs.alpha, rtol=1e-12)
    np.testing.assert_allclose(ours.sigma[1:-1], theirs.sigma, rtol=1e-12)


def test_max_beta_clips_every_step():
    betas = _to_betas(discretize(LinearBeta(), 10, max_beta=0.5)).beta
    free = np.asarray(_to_betas(discretize(LinearBeta(), 10)).beta)
    assert np.any(free > 0.5)
    np.testing.assert_allclose(betas, np.minimum(free, 0.5), rtol=1e-12)


def test_linear_betas_and_their_continuous_limit():
    # With T beta kept, Ho's discrete product tends to the integral; the error falls like 1 / T.
    errors = []
    for num_steps in (100, 1000, 10_000):
        discrete = linear_betas(num_steps, 0.1 / num_steps, 20 / num_steps)
        gap = np.asarray(discrete.levels.log_alpha) - discretize(LinearBeta(), num_steps).levels.log_alpha
        errors.append(float(np.max(np.abs(gap))))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)


def test_three_conventions_give_the_same_kernels():
    schedule = from_betas(BETAS)
    # a standard deviation is the root of a variance; gamma = log((1 - abar) / abar)
    abar = np.cumprod(1 - BETAS)
    for other in (from_standard_deviations(np.sqrt(BETAS)), from_gammas(np.log((1 - abar) / abar))):
        np.testing.assert_allclose(other.levels.alpha, schedule.levels.alpha, rtol=1e-13)
        np.testing.assert_allclose(other.levels.sigma, schedule.levels.sigma, rtol=1e-13)
        drop, expected = (_steps(t, np.arange(1, 5), np.arange(2, 6)).log_snr_drop for t in (other, schedule))
        np.testing.assert_allclose(drop, expected, rtol=1e-12)


def test_conventions_round_trip():
    schedule = linear_betas(200, 1e-4, 0.2)
    betas = np.linspace(1e-4, 0.2, 200)
    ho, lai = _to_betas(schedule), _to_standard_deviations(schedule)
    ho, lai, gammas = jax.tree.map(np.asarray, (ho, lai, to_gammas(schedule)))
    np.testing.assert_allclose(ho.beta, betas, rtol=1e-10)
    np.testing.assert_allclose(ho.alpha, 1 - betas, rtol=1e-12)
    np.testing.assert_allclose(ho.abar, np.cumprod(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(lai.beta**2, betas, rtol=1e-10)
    np.testing.assert_allclose(lai.alpha, np.sqrt(1 - lai.beta**2), rtol=1e-12)
    np.testing.assert_allclose(lai.abar, np.cumprod(lai.alpha), rtol=1e-12)
    np.testing.assert_allclose(np.exp(-gammas), ho.abar / (1 - ho.abar), rtol=1e-10)
    for again in (from_betas(ho.beta), from_standard_deviations(lai.beta), from_gammas(gammas)):
        np.testing.assert_allclose(again.levels.log_alpha, schedule.levels.log_alpha, rtol=1e-9)


def test_a_subsequence_has_the_same_levels():
    schedule, steps = linear_betas(1000), np.array([0, 3, 10, 500, 1000])
    short = schedule.subsequence(steps)
    assert short.num_steps == 4
    for ours, theirs in zip(jax.tree.leaves(short), jax.tree.leaves(schedule), strict=True):
        assert np.array_equal(ours, np.asarray(theirs)[steps])  # t included, the network's conditioning
    i = np.arange(1, 5)
    drops = _steps(short, i - 1, i).log_snr_drop, _steps(schedule, steps[i - 1], steps[i]).log_snr_drop
    np.testing.assert_array_equal(*drops)


@parametrize("num_steps,count", [(10, 10), (10, 3), (1000, 7), (1000, 999), (5, 1)])
def test_uniform_steps(num_steps, count):
    steps = uniform_steps(num_steps, count)
    assert len(steps) == count + 1
    assert steps[0] == 0
    assert steps[-1] == num_steps
    gaps = np.diff(steps)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@parametrize("count", [0, 11])
def test_uniform_steps_refuses_a_wrong_count(count):
    with pytest.raises(ValueError, match=rf"count is {count}.*1\.\.10 steps"):
        uniform_steps(10, count)


@parametrize("steps", [[1, 2], [0], [0, 3, 3], [0, 5, 2], [[0, 1]]])
def test_a_subsequence_must_increase_from_zero(steps):
    with pytest.raises(ValueError, match=r"steps is \[.*increasing.*start at 0"):
        linear_betas(10).subsequence(np.array(steps))


def test_a_subsequence_must_stay_in_the_schedule():
    with pytest.raises(ValueError, match=r"out of range.*steps 0\.\.10"):
        linear_betas(10).subsequence(np.array([0, 11]))


@parametrize("continuous", [LinearLogSNR(7.0, -5.0), VarianceExploding()])
def test_discretized_schedule_has_the_levels_of_discretize(continuous):
    grid, schedule, t = DiscretizedSchedule(continuous, 9), discretize(continuous, 9), np.arange(10)
    assert grid.num_steps == 9
    levels, steps = jax.jit(lambda t: (grid(t), grid.step(t[:-1], t[1:])))(t)
    for ours, theirs in zip(levels[:4], schedule.levels[:4], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(levels.t, [0, *np.linspace(0, 1, 9)], rtol=1e-15)
    np.testing.assert_allclose(steps.log_snr_drop, _steps(schedule, t[:-1], t[1:]).log_snr_drop, rtol=1e-12)
    assert np.isinf(steps.log_snr_drop[0])
    np.testing.assert_array_equal(steps.s.sigma, levels.sigma[:-1])
    np.testing.assert_array_equal(steps.t.sigma, levels.sigma[1:])


def test_discretized_schedule_checks_its_steps():
    grid = DiscretizedSchedule(LinearLogSNR(), 10)
    with pytest.raises(ValueError, match=r"t = 11 is out of range.*steps 0\.\.10"):
        grid(11)
    with pytest.raises(TypeError):
        grid.step(0, jnp.asarray(1.0))
    for t in (-1, 11):
        assert np.all(np.isnan(np.stack(_levels(grid, t))))
        assert np.isnan(_steps(grid, 1, t).log_snr_drop)
    with pytest.raises(ValueError, match=r"num_steps is 1.*at least 2"):
        DiscretizedSchedule(LinearLogSNR(), 1)
    two = DiscretizedSchedule(LinearLogSNR(3.0, -3.0), 2)
    np.testing.assert_allclose([two(1).log_snr, two(2).log_snr], [3.0, -3.0], rtol=1e-6)  # the two ends


def test_a_schedule_of_one_step_is_one_noise_level():
    for schedule in (from_betas([0.3]), linear_betas(1, 0.3, 0.3), from_gammas([np.log(0.3 / 0.7)])):
        np.testing.assert_allclose(schedule.levels.alpha, [1.0, np.sqrt(0.7)], rtol=1e-14)
        np.testing.assert_allclose(np.stack(_to_betas(schedule)).ravel(), [0.3, 0.7, 0.7], rtol=1e-14)
        np.testing.assert_allclose(_to_standard_deviations(schedule).beta, [np.sqrt(0.3)], rtol=1e-14)
        np.testing.assert_allclose(to_gammas(schedule), [np.log(0.3 / 0.7)], rtol=1e-14)
        for few in (uniform_steps, log_snr_uniform_steps, karras_steps):
            steps = few(1, 1) if few is uniform_steps else few(schedule, 1)
            assert steps.tolist() == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, schedule.subsequence(steps), schedule)
    for continuous in (LinearBeta(), Cosine(), Sigmoid()):  # one step adds all noise, up to max_beta
        np.testing.assert_allclose(_to_betas(discretize(continuous, 1)).beta, [0.999], rtol=1e-12)


def test_one_step_is_too_few_for_a_continuous_schedule_and_for_two_betas():
    with pytest.raises(ValueError, match=r"num_steps=1.*num_steps=2"):
        InterpolatedSchedule(linear_betas(1, 0.1, 0.1))
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *[from_betas([beta, 0.3]) for beta in (0.1, 0.2)])
    levels = jax.vmap(lambda schedule: InterpolatedSchedule(schedule)(jnp.zeros(())))(
        stacked
    )  # two stacked schedules are not a schedule of one step
    np.testing.assert_allclose(levels.sigma**2, [0.1, 0.2], rtol=1e-14)
    with pytest.raises(ValueError, match=r"beta_1 is 0\.1 and beta_T is 0\.2"):
        linear_betas(1, 0.1, 0.2)
    for gamma in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="gammas must be finite"):
            from_gammas([gamma])


def test_interpolated_schedule_goes_through_the_levels():
    schedule = linear_betas(20, 0.001, 0.3)
    line, log_snr = InterpolatedSchedule(schedule), np.asarray(schedule.log_snr)[1:]
    # on the levels, and between two of them along the chord
    position = np.r_[np.arange(20), 7.5, 7.4]
    level, slopes = jax.jit(lambda t: (line(t), jax.vmap(jax.grad(line.log_snr))(t)))(position / 19)
    np.testing.assert_allclose(level.log_snr, np.interp(position, np.arange(20), log_snr), rtol=1e-12)
    np.testing.assert_allclose(level.t, 1 + position, rtol=1e-14)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, rtol=1e-14)
    np.testing.assert_allclose(slopes[-2:], 19 * (log_snr[8] - log_snr[7]), rtol=1e-12)


def test_the_interpolation_of_a_subsequence_keeps_its_step_numbers():
    line = InterpolatedSchedule(linear_betas(20, 0.001, 0.3).subsequence([0, 1, 5, 11, 20]))
    np.testing.assert_allclose(_levels(line, np.array([0, 0.5, 1, 1.5, 3]) / 3)[4], [1, 3, 5, 8, 20])


def test_interpolated_drops_are_differences_within_a_cell_and_across():
    line = InterpolatedSchedule(linear_betas(20, 0.001, 0.3))
    log_snr = np.asarray(line.schedule.log_snr)[1:]
    s, t = np.array([(0.0, 1.0), (0.31, 0.32), (0.2, 0.9), (0.0, 1 / 19), (0.5, 1.0), (0.3, 0.3 + 1e-12)]).T
    drops = np.asarray(_steps(line, s, t).log_snr_drop)
    expected = (np.interp(19 * u, np.arange(20), log_snr) for u in (s, t))
    np.testing.assert_allclose(drops[:-1], -np.subtract(*reversed([*expected]))[:-1], rtol=1e-10)
    np.testing.assert_allclose(drops[-1] * 1e12, 19 * (log_snr[5] - log_snr[6]), rtol=1e-3)  # 0.3 is at 5.7


@parametrize("t", [-1, 11])
def test_step_out_of_range(t):
    schedule = linear_betas(10)
    with pytest.raises(ValueError, match=rf"t = {t} is out of range.*steps 0\.\.10"):
        schedule(t)
    with pytest.raises(ValueError, match="out of range"):
        schedule.step(0, t)
    assert np.all(np.isnan(np.stack(_levels(schedule, t))))
    assert np.isnan(_steps(schedule, 1, t).log_snr_drop)


def test_step_number_must_be_an_integer():
    schedule = linear_betas(10)
    for call in (lambda: schedule(jnp.asarray(0.5)), lambda: _levels(schedule, 3.0)):
        with pytest.raises(TypeError):
            call()


@parametrize("betas", [[], [0.1, 1.0], [0.0, 0.1], [[0.1]], [0.1, np.nan], [-0.1]])
def test_from_betas_refuses(betas):
    with pytest.raises(ValueError, match=r"betas .*(strictly between 0 and 1|one variance for each step)"):
        from_betas(np.array(betas))


@parametrize("gammas", [[], [1.0, 0.5], [0.0, 0.0], [[1.0]], [np.nan, 1.0]])
def test_from_gammas_refuses(gammas):
    with pytest.raises(ValueError, match=r"gammas .*(increasing|one gamma for each step)"):
        from_gammas(np.array(gammas))


def test_too_much_noise_for_float32():
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"alpha_T is e\^-.*float32.*smaller betas"),
    ):
        from_betas(np.full(1000, 0.5))


def test_too_much_noise_in_the_last_step_alone():
    with jax.enable_x64(False):
        betas = np.full(5, 1 - 1e-16)  # each leaves 1e-8 of alpha, and float32 ends at 1e-38
        assert from_betas(betas[:4]).num_steps == 4
        with pytest.raises(ValueError, match=r"alpha_T is e\^-92.*float32.*smaller betas"):
            from_betas(betas)


def test_discretize_needs_enough_steps():
    with pytest.raises(ValueError, match=r"num_steps is 0.*at least 1"):
        discretize(Cosine(), 0)
    with pytest.raises(ValueError, match=r"num_steps is 1.*at least 2"):
        discretize(LinearLogSNR(), 1)
    assert discretize(Cosine(), 1).num_steps == 1
    np.testing.assert_allclose(discretize(LinearLogSNR(), 2).log_snr, [np.inf, 13.3, -5.0], rtol=1e-12)


# Sub-schedules by level


@parametrize("count", [1, 2, 17, 900, 1000])
@parametrize("steps", [log_snr_uniform_steps, karras_steps])
def test_log_snr_uniform_steps_increase_from_clean_data_to_the_last_level(steps, count):
    for schedule in (linear_betas(1000), discretize(Cosine(), 1000)):
        found = steps(schedule, count)
        assert found.dtype == np.int32
        assert len(found) == count + 1
        assert np.all(np.diff(found) > 0)
        assert (found[0], found[-1]) == (0, 1000)
        assert count == 1 or found[1] == 1


def test_log_snr_uniform_steps_are_as_even_as_the_levels_allow():
    # no step is farther from its target than half the widest gap of the schedule there
    schedule = linear_betas(1000)
    log_snr = np.asarray(schedule.log_snr)
    found = log_snr_uniform_steps(schedule, 12)
    wanted = np.linspace(log_snr[1], log_snr[-1], 12)
    gaps = np.abs(np.diff(log_snr[1:]))
    assert np.all(np.abs(log_snr[found[1:]] - wanted) <= 0.5 * gaps.max())
    # for an evenly spaced schedule: every second, third, fourth level
    even = discretize(LinearLogSNR(6.0, -6.0), 13)
    for every in (1, 2, 3, 4, 6):
        np.testing.assert_array_equal(log_snr_uniform_steps(even, 12 // every + 1), [0, *range(1, 14, every)])


@parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_steps_have_the_published_spacing(rho):
    # sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, with many levels
    schedule = discretize(VarianceExploding(0.002, 80.0), 20_000)
    ours = np.asarray(schedule.levels.sigma)[karras_steps(schedule, 18, rho)[:0:-1]]
    expected = [(80.0 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho for i in range(18)]
    np.testing.assert_allclose(ours, expected, rtol=2e-3 if rho > 1 else 5e-4 * 80.0)
    # for rho = 1 the levels are evenly spaced in sigma, for large rho in its logarithm
    if rho == 1.0:
        assert np.std(np.diff(ours)) < 0.02  # the levels of the schedule are 0.04 apart at the end
        assert np.max(np.abs(karras_steps(schedule, 18, 1e5) - log_snr_uniform_steps(schedule, 18))) <= 1


def test_a_wrong_number_of_log_snr_uniform_steps_is_refused():
    schedule = linear_betas(10)
    for steps in (log_snr_uniform_steps, karras_steps):
        for count in (-1, 0, 11):
            with pytest.raises(ValueError, match=rf"count is {count}.*1\.\.10 steps"):
                steps(schedule, count)
    for rho in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"rho is {rho}.*positive"):
            karras_steps(schedule, 5, rho)
