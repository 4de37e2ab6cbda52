"""Sampling times: structure, rounding, errors. The derivations are tested in `derivations/test_times.py`."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.derivations.check import assert_close
from vdm_jax import time_sampling

TIME_SAMPLINGS = ("independent", "low_discrepancy", "antithetic")
SKEWED = jnp.asarray([0.0, 0.5, 0.1, 0.0, 0.25, 1e-3, 0.149, 0.0])  # sums to 1; the outer bins have mass 0


def _many(function, count=20_000, seed=0):
    return np.asarray(jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(seed), count)), np.float64)


def test_time_sampling_has_the_stated_structure():
    u = np.sort(_many(lambda k: time_sampling.sample_times(k, 8, "low_discrepancy"), 20))
    np.testing.assert_allclose(np.diff(u), 1 / 8, atol=2e-7)
    for batch in (6, 7):
        u = _many(lambda k, batch=batch: time_sampling.sample_times(k, batch, "antithetic"), 20).astype(np.float32)
        half = (batch + 1) // 2
        np.testing.assert_array_equal(u[:, : batch - half] + u[:, half:], 1.0)  # an odd batch has one unpaired time
    independent = _many(lambda k: time_sampling.sample_times(k, 2))
    assert abs(np.corrcoef(independent.T)[0, 1]) < 0.03


def test_times_stay_below_one_after_rounding(monkeypatch):
    # the largest and the smallest number that the generator can give
    largest = np.float32(1 - 2.0**-23)
    for value in (0.0, largest):
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(), v=value: jnp.full(shape, v, jnp.float32))
        for how in TIME_SAMPLINGS:
            for batch in (1, 3, 1000):
                sample = partial(time_sampling.sample_times, batch=batch, time_sampling=how)
                both = jax.jit(lambda key, sample=sample: (sample(key), time_sampling.to_timesteps(sample(key), 7)))
                u, steps = both(jax.random.key(0))
                assert np.all((np.asarray(u) >= 0) & (np.asarray(u) < 1))
                assert np.all(np.asarray(steps) <= 7)
        sampled = time_sampling.importance_sample(jnp.asarray(value), SKEWED)
        assert int(sampled.bin) == (1 if value == 0 else 6)
        assert 0 <= float(sampled.time) < 1


def test_unknown_time_sampling_is_refused():
    how: Any = "even"
    uniforms = inspect.unwrap(time_sampling.sample_times)  # without the tests' run-time type checker
    with pytest.raises(ValueError, match=r"time_sampling 'even'.*'low_discrepancy'"):
        uniforms(jax.random.key(0), 3, how)


@pytest.mark.parametrize("how", ["independent", "low_discrepancy"])
def test_steps_are_uniform_on_one_to_t(how):
    # counted per slot of the batch over many keys: each alone is uniform
    t = _many(lambda k: time_sampling.sample_timesteps(k, 3, 7, time_sampling=how)).astype(int)
    assert t.min() == 1
    assert t.max() == 7
    for slot in range(3):
        assert stats.chisquare(np.bincount(t[:, slot], minlength=8)[1:]).pvalue > 1e-4


def test_low_discrepancy_steps_cover_evenly():
    # 21 steps over T = 7: three of each for every key; independent samples are rarely so even
    t = _many(lambda k: time_sampling.sample_timesteps(k, 21, 7, time_sampling="low_discrepancy"), 20)
    for step in range(1, 8):
        counts = np.sum(t == step, axis=1)
        assert counts.min() >= 2
        assert counts.max() <= 4
    even, loose, unasked = (
        _many(lambda k, o=options: time_sampling.sample_timesteps(k, 16, 1000, **o).mean(), 500, seed=2)
        for options in ({"time_sampling": "low_discrepancy"}, {"time_sampling": "independent"}, {})
    )
    assert even.var() < loose.var() / 10  # by B = 16 in expectation
    assert np.array_equal(loose, unasked)


def test_steps_keep_their_bits():
    # the first formula of independent steps: training runs must resume with the same bits
    key = jax.random.key(3)
    even = (jax.random.uniform(key) + jnp.arange(11) / 11) % 1.0
    np.testing.assert_array_equal(
        time_sampling.sample_timesteps(key, 11, 9, time_sampling="low_discrepancy"), 1 + np.floor(np.asarray(even * 9))
    )
    loose = jax.random.uniform(key, (11,))
    np.testing.assert_array_equal(time_sampling.sample_timesteps(key, 11, 9), 1 + np.floor(np.asarray(loose * 9)))


def test_bins_are_sampled_with_their_probabilities():
    u = jnp.asarray(np.random.RandomState(0).uniform(size=100_000), jnp.float32)
    sampled = jax.tree.map(np.asarray, jax.jit(time_sampling.importance_sample)(u, SKEWED))
    counts = np.bincount(np.asarray(sampled.bin), minlength=8)
    p = np.asarray(SKEWED, np.float64) / np.sum(np.asarray(SKEWED, np.float64))
    assert np.all(counts[p == 0] == 0)
    assert stats.chisquare(counts[p > 0], p[p > 0] * 1e5).pvalue > 1e-3
    np.testing.assert_allclose(sampled.weight, 1 / (8 * p[sampled.bin]), rtol=1e-3)
    # times are uniform in their bins
    assert np.array_equal(np.floor(np.asarray(sampled.time) * 8), sampled.bin)
    part = np.asarray(sampled.time * 8) % 1.0
    for k in np.flatnonzero(counts > 1000):
        assert stats.kstest(part[np.asarray(sampled.bin) == k], "uniform").pvalue > 1e-3


def test_a_single_bin_is_uniform():
    u = jnp.asarray([0.0, 0.25, 1.0 - 2.0**-24], jnp.float32)
    sampled = time_sampling.importance_sample(u, jnp.ones(1))
    np.testing.assert_array_equal(sampled.time, u)
    np.testing.assert_array_equal(sampled.weight, 1.0)
    assert time_sampling.importance_sample(u, jnp.ones(8)).time.max() < 1.0  # also where it rounds to 1


@pytest.mark.parametrize("values", [[0.5, -0.1], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_invalid_probabilities_are_refused(values):
    p = jnp.asarray(values)
    with pytest.raises(ValueError, match=r"probabilities .*finite.*got"):
        time_sampling.importance_sample(jnp.asarray(0.3), p)
    assert np.isnan(jax.jit(time_sampling.importance_sample)(jnp.asarray(0.3), p).weight)


def test_second_moments_keep_the_last_of_each_step():
    # against a list per step, in the order of the losses; some batches have more of a step than the history keeps
    random = np.random.RandomState(0)
    seen = {t: [] for t in range(1, 5)}
    moments = time_sampling.LossSecondMomentSampler.init(4, history=3)
    update = jax.jit(lambda m, t, x: m.update(t, x))
    for batch in (1, 9, 2, 30, 5, 3):
        t, x = random.randint(0, 6, batch), random.uniform(0.1, 2.0, batch)  # 0 and 5 are outside 1..T
        for step, loss in zip(t, x, strict=True):
            if step in seen:
                seen[step].append(np.float32(loss))
        moments = update(moments, jnp.asarray(t), jnp.asarray(x, jnp.float32))
        assert np.array_equal(moments.counts, [len(seen[t]) for t in seen])
        for step, history in seen.items():
            kept = [value for value in moments.losses[step - 1].tolist() if value > 0]
            assert sorted(kept) == sorted(map(float, history[-3:]))
        if min(map(len, seen.values())) < 3:
            assert np.array_equal(moments.probabilities(), np.full(4, 0.25))
    root = np.array([np.sqrt(np.mean(np.square(seen[t][-3:]))) for t in seen])
    np.testing.assert_allclose(moments.probabilities(), 0.999 * root / root.sum() + 0.001 / 4, rtol=1e-6)
    np.testing.assert_allclose(moments.probabilities(0.5), 0.5 * root / root.sum() + 0.5 / 4, rtol=1e-6)


def test_second_moments_in_float64():
    with jax.enable_x64(True):

        @jax.jit
        def evaluate(t, losses, u):
            moments = time_sampling.LossSecondMomentSampler.init(3, history=4).update(t, losses)
            return moments.probabilities(0.0), time_sampling.importance_sample(u, jnp.ones(3, jnp.float32))

        t = np.arange(12) % 3 + 1
        probabilities, sampled = evaluate(t, 0.1 * t, np.linspace(0.0, 0.9, 5))
        assert_close(probabilities, np.arange(1, 4) / 6, rtol=1e-15)
        assert sampled.time.dtype == sampled.weight.dtype == np.float64  # of u


def test_second_moments_of_zero_and_of_large_losses():
    t = np.repeat(np.arange(1, 4), 10)
    update = jax.jit(lambda t, losses: time_sampling.LossSecondMomentSampler.init(3).update(t, losses))
    probabilities = jax.jit(lambda moments, uniform: moments.probabilities(uniform), static_argnums=1)
    nothing = update(t, np.zeros(30, np.float32))
    assert np.array_equal(probabilities(nothing, 1e-3), np.full(3, np.float32(1 / 3)))
    much = update(t, (1e25 * t).astype(np.float32))  # squares overflow
    np.testing.assert_allclose(probabilities(much, 0.0), np.arange(1, 4) / 6, rtol=1e-6)
