"""Round trips, limits and Bayes' rule at random levels, shapes and dtypes. The examples are the same in every run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdm_jax import discrete_schedules, forward
from vdm_jax.gaussian import Normal, kl
from vdm_jax.likelihoods import Categorical, DiscretizedGaussian, denormalize, normalize
from vdm_jax.noise_levels import level_from_log_snr, step_from_log_snr
from vdm_jax.parameterization import convert, prediction_target

PREDICTION_TYPES = ("x_0", "eps", "v", "score")
SHAPES = [(), (1, 2, 2)]

some = settings(derandomize=True, deadline=None, max_examples=12, database=None)
shapes, dtypes = st.sampled_from(SHAPES), st.sampled_from([np.float32, np.float64])
log_snrs, drops, seeds = st.floats(-20, 20), st.floats(1e-3, 15), st.integers(0, 2**16)
betas = st.lists(st.floats(1e-4, 0.7), min_size=4, max_size=4).map(np.array)  # programs of one shape


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


_kl = jax.jit(kl)


def _normals(seed, shape, dtype=np.float64, count=2):
    return [jnp.asarray(x) for x in np.random.RandomState(seed).standard_normal((count, *shape)).astype(dtype)]


def _steps(*log_snrs):
    """The steps between neighbors of some log-SNRs, and the one across; float64."""
    whole = [jnp.asarray(x, jnp.float64) for x in log_snrs]
    return [*map(step_from_log_snr, whole[:-1], whole[1:]), step_from_log_snr(whole[0], whole[-1])]


# -- the normal distribution ------------------------------------------------------------------------------------------


@some
@given(seeds, shapes, dtypes, st.floats(-3, 3), st.floats(-3, 3))
def test_kl_is_positive_and_zero_only_at_equality(seed, shape, dtype, log_var, log_ratio):
    (mean,) = _normals(seed, shape, dtype, 1)
    p = Normal(mean, var=jnp.asarray(np.exp(log_var), dtype))
    assert float(_kl(p, p)) == 0.0
    assert float(_kl(p, Normal(mean + 0.01, var=p.var))) > 0.0
    q = Normal(mean, var=p.var * jnp.asarray(np.exp(log_ratio), dtype))
    assert (float(_kl(p, q)) > 0.0) == bool(q.var != p.var)
    assert (float(_kl(q, p)) > 0.0) == bool(q.var != p.var)


# -- the forward process and its posterior ----------------------------------------------------------------------------


@some
@given(seeds, shapes, log_snrs, drops, drops)
def test_two_transitions_are_the_one_across(seed, shape, log_snr, drop, more):
    (x,) = _normals(seed, shape, count=1)
    first, second, across = _steps(log_snr, log_snr - drop, log_snr - drop - more)
    half, whole = forward.transition(x, first), forward.transition(x, across)
    rest = forward.transition(half.mean, second)
    np.testing.assert_allclose(rest.mean, whole.mean, rtol=1e-12)
    gain = second.t.alpha / second.s.alpha
    np.testing.assert_allclose(gain**2 * half.var + rest.var, whole.var, rtol=1e-11)


@some
@given(seeds, shapes, betas)
def test_the_transition_from_clean_data_is_the_marginal(seed, shape, betas):
    x_0, x_t = _normals(seed, shape)
    schedule = discrete_schedules.from_betas(betas)
    step = schedule.step(0, betas.size)
    ours, expected = forward.transition(x_0, step), forward.marginal(x_0, step.t)
    np.testing.assert_allclose(ours.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(ours.var, expected.var, rtol=1e-13)
    distribution = forward.posterior(x_t, x_0, step)  # and there the posterior is the point
    assert np.array_equal(distribution.mean, x_0)
    assert float(distribution.var) == 0.0


@some
@given(seeds, shapes, st.floats(-15, 15))
def test_the_posterior_tends_to_x_t_in_a_short_step(seed, shape, log_snr):
    x_t, x_0 = _normals(seed, shape)
    for drop in (1e-5, 1e-8):
        (step, _) = _steps(log_snr + drop, log_snr)
        distribution = forward.posterior(x_t, x_0, step)
        np.testing.assert_allclose(distribution.mean, x_t, atol=10 * drop)
        assert float(distribution.var) < 2 * drop


@some
@given(seeds, shapes, st.floats(-10, 10), drops)
def test_the_posterior_averaged_over_x_t_is_the_marginal(seed, shape, log_snr, drop):
    (x_0,) = _normals(seed, shape, count=1)
    step, _ = _steps(log_snr, log_snr - drop)
    later, earlier = forward.marginal(x_0, step.t), forward.marginal(x_0, step.s)
    distribution = forward.posterior(later.mean, x_0, step)
    np.testing.assert_allclose(distribution.mean, earlier.mean, rtol=1e-10)
    c_1, _, sigma = forward.posterior_coefficients(step)
    np.testing.assert_allclose(
        c_1**2 * later.var + distribution.var, earlier.var, rtol=1e-10
    )  # the law of total variance
    np.testing.assert_allclose(sigma**2, distribution.var, rtol=1e-12)


@some
@given(seeds, shapes, st.floats(-5, 5), drops)
def test_the_posterior_by_noise_and_by_score(seed, shape, log_snr, drop):
    x_0, eps = _normals(seed, shape)
    step, _ = _steps(log_snr, log_snr - drop)
    x_t = step.t.alpha * x_0 + step.t.sigma * eps
    expected = forward.posterior(x_t, x_0, step)
    for distribution in (
        forward.posterior_from_eps(x_t, eps, step),
        forward.posterior_from_score(x_t, -eps / step.t.sigma, step),
    ):
        np.testing.assert_allclose(distribution.mean, expected.mean, rtol=1e-8, atol=1e-10 / float(step.t.alpha))
        assert np.array_equal(distribution.var, expected.var)


@some
@given(seeds, shapes, st.floats(-5, 5), st.floats(0.01, 6), st.floats(0.01, 6))
def test_the_bridge_averaged_over_its_far_end_is_the_transition(seed, shape, log_snr, drop, more):
    x_r, x_t = _normals(seed, shape)
    first, second, across = _steps(log_snr, log_snr - drop, log_snr - drop - more)
    near, far = forward.transition(x_r, first), forward.transition(x_r, across)
    distribution = forward.bridge(x_r, far.mean, first, second)
    np.testing.assert_allclose(distribution.mean, near.mean, rtol=1e-9)
    moved = forward.bridge(x_r, far.mean + x_t, first, second)
    slope = (moved.mean - distribution.mean) / x_t
    np.testing.assert_allclose(slope**2 * far.var + distribution.var, np.broadcast_to(near.var, shape), rtol=1e-7)


@some
@given(seeds, shapes, betas)
def test_the_bridge_from_clean_data_is_the_posterior(seed, shape, betas):
    x_0, x_t = _normals(seed, shape)
    schedule = discrete_schedules.from_betas(np.append(betas, 0.3))
    first, second = schedule.step(0, betas.size), schedule.step(betas.size, betas.size + 1)
    ours, expected = forward.bridge(x_0, x_t, first, second), forward.posterior(x_t, x_0, second)
    np.testing.assert_allclose(ours.mean, expected.mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ours.var, expected.var, rtol=1e-10, atol=1e-12)


# -- parameterizations ------------------------------------------------------------------------------------------------


@some
@given(seeds, shapes, dtypes, log_snrs)
def test_every_prediction_type_there_and_back(seed, shape, dtype, log_snr):
    x_0, eps = _normals(seed, shape, dtype)
    level = level_from_log_snr(jnp.asarray(log_snr, dtype))
    x_t = level.alpha * x_0 + level.sigma * eps
    alpha, sigma = float(level.alpha), float(level.sigma)
    # how much a rounding of x_t moves each kind
    moves = {"x_0": 1 / alpha, "eps": 1 / sigma, "v": 1 / min(alpha, sigma), "score": 1 / sigma**2}
    for source in PREDICTION_TYPES:
        value = prediction_target(x_0, eps, level, source)
        for wanted in PREDICTION_TYPES:
            there = convert(value, x_t, level, source, wanted)
            back = convert(there, x_t, level, wanted, source)
            assert (there.dtype, there.shape) == (dtype, shape)
            rounding = 64 * np.finfo(dtype).eps
            np.testing.assert_allclose(there, prediction_target(x_0, eps, level, wanted), atol=rounding * moves[wanted])
            np.testing.assert_allclose(back, value, atol=rounding * moves[source])


# -- discrete schedules -----------------------------------------------------------------------------------------------


@jax.jit
def _to_both(schedule):
    return discrete_schedules.to_betas(schedule), discrete_schedules.to_standard_deviations(schedule)


@some
@given(betas)
def test_conventions_there_and_back(betas):
    schedule = discrete_schedules.from_betas(betas)
    ho, lai = jax.tree.map(np.asarray, _to_both(schedule))
    np.testing.assert_allclose(ho.beta, betas, rtol=1e-10)
    np.testing.assert_allclose(ho.alpha, 1 - betas, rtol=1e-12)
    np.testing.assert_allclose(ho.abar, np.cumprod(1 - betas), rtol=1e-12)
    for ours, theirs in zip(lai, ho, strict=True):  # each is the square root of the other's
        np.testing.assert_allclose(ours**2, theirs, rtol=1e-12)
    again = [
        discrete_schedules.from_standard_deviations(lai.beta),
        discrete_schedules.from_gammas(discrete_schedules.to_gammas(schedule)),
    ]
    for other in again:
        np.testing.assert_allclose(other.levels.log_alpha, schedule.levels.log_alpha, rtol=1e-9)
        np.testing.assert_allclose(other.levels.log_sigma, schedule.levels.log_sigma, rtol=1e-9)


@some
@given(st.sets(st.integers(1, 40), min_size=4, max_size=4))
def test_a_subsequence_keeps_levels_and_drops(steps):
    schedule, steps = discrete_schedules.linear_betas(40, 1e-3, 0.2), np.array([0, *sorted(steps)])
    short = schedule.subsequence(steps)
    for ours, theirs in zip(jax.tree.leaves(short), jax.tree.leaves(schedule), strict=True):
        assert np.array_equal(ours, theirs[steps])
    i = np.arange(1, steps.size)
    drop = short.step(jnp.asarray(i - 1), jnp.asarray(i)).log_snr_drop
    assert np.array_equal(drop, schedule.step(jnp.asarray(steps[i - 1]), jnp.asarray(steps[i])).log_snr_drop)


# -- decoders ---------------------------------------------------------------------------------------------------------


@some
@given(seeds, st.integers(2, 2**16), st.booleans())
def test_quantized_values_there_and_back(seed, levels, double):
    values = np.append(np.random.RandomState(seed).randint(0, levels, 6), [0, levels - 1]).astype(np.int32)
    with jax.enable_x64(double):
        unit = normalize(jnp.asarray(values), levels)
        assert np.array_equal(denormalize(unit, levels), values)
        np.testing.assert_allclose(unit[-2:], [-1.0, 1.0], atol=1e-6)


@some
@given(st.sampled_from([2, 17]), st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.floats(-7, 3), log_snrs)
def test_masses_of_decoders_sum_to_one(levels, center, log_scale, log_snr):
    center, scale = jnp.asarray(np.array(center)), jnp.asarray(np.exp(log_scale))
    for masses in _masses(center, scale, jnp.asarray(log_snr, jnp.float64), levels):
        np.testing.assert_allclose(np.exp(masses).sum(-1), 1.0, rtol=1e-9)


@jax.jit(static_argnames="levels")
def _masses(center, scale, log_snr, levels):
    categorical = Categorical(center, level_from_log_snr(log_snr), levels)
    return DiscretizedGaussian(center, scale=scale, levels=levels).log_masses(), categorical.log_masses()
