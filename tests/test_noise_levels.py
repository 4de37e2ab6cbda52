"""Levels and steps: the redundant fields agree, and ratios follow their definitions."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from vdm_jax.noise_levels import NoiseLevel, Step, level_from_log_snr, step_from_log_snr

LOG_SNR = np.linspace(-20, 20, 41)


def test_a_log_snr_gives_the_variance_preserving_level():
    with jax.enable_x64(True):
        level = level_from_log_snr(jnp.asarray(LOG_SNR))
        np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, rtol=1e-15)
        np.testing.assert_allclose(level.log_snr, LOG_SNR, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(level.alpha**2 / level.sigma**2, np.exp(LOG_SNR), rtol=1e-13)
        np.testing.assert_allclose(level.snr, np.exp(LOG_SNR), rtol=1e-13)


def test_logarithms_are_those_of_the_scales():
    with jax.enable_x64(True), mpmath.workdps(50):
        level = level_from_log_snr(jnp.asarray(LOG_SNR))
        for i, lam in enumerate(LOG_SNR):
            alpha = mpmath.sqrt(1 / (1 + mpmath.exp(-mpmath.mpf(lam))))
            sigma = mpmath.sqrt(1 - alpha**2)
            for ours, expected in [(level.alpha, alpha), (level.sigma, sigma)]:
                assert float(ours[i]) == pytest.approx(float(expected), rel=1e-15)
            for ours, expected in [(level.log_alpha, mpmath.log(alpha)), (level.log_sigma, mpmath.log(sigma))]:
                assert float(ours[i]) == pytest.approx(float(expected), rel=1e-14)


def test_a_level_stores_its_time():
    assert level_from_log_snr(jnp.asarray(0.0)).t is None
    assert float(level_from_log_snr(jnp.asarray(0.0), t=jnp.asarray(0.25)).t) == 0.25


def test_clean_data_has_infinite_log_snr():
    clean = NoiseLevel(*(jnp.asarray(f) for f in (1.0, 0.0, 0.0, -jnp.inf)))
    assert float(clean.log_snr) == np.inf
    noisy = level_from_log_snr(jnp.asarray(1.0))
    step = Step(clean, noisy, clean.log_snr - noisy.log_snr)
    assert float(step.snr_ratio) == 0.0
    assert float(step.one_minus_ratio) == 1.0


@pytest.mark.parametrize(("log_snr_s", "log_snr_t"), [(20, -20), (3, 2.5), (0.1, -0.1), (-10, -10.001), (8, 8 - 1e-9)])
def test_ratio_is_the_quotient_of_the_snrs(log_snr_s, log_snr_t):
    with jax.enable_x64(True), mpmath.workdps(50):
        step = step_from_log_snr(jnp.asarray(float(log_snr_s)), jnp.asarray(float(log_snr_t)))
        ratio = mpmath.exp(log_snr_t) / mpmath.exp(log_snr_s)
        assert float(step.snr_ratio) == pytest.approx(float(ratio), rel=1e-13)
        assert float(step.one_minus_ratio) == pytest.approx(float(1 - ratio), rel=1e-6 if ratio > 0.99999 else 1e-12)
        assert float(step.snr_ratio + step.one_minus_ratio) == pytest.approx(1.0, rel=1e-14)
        assert float(step.s.log_snr) > float(step.t.log_snr)
        assert float(step.s.sigma) < float(step.t.sigma)


@pytest.mark.parametrize(("log_snr_s", "log_snr_t"), [(20.0, -19.9), (13.3, -5.1), (2.3, 0.1), (0.3, 0.1)])
def test_ratio_keeps_its_digits_in_float32(log_snr_s, log_snr_t):
    # of a large drop the rounding alone, 40 x 6e-8, would show: there the ratio is one of scales
    s, t = np.float32(log_snr_s), np.float32(log_snr_t)
    step = step_from_log_snr(jnp.asarray(s), jnp.asarray(t))
    expected = float(mpmath.exp(mpmath.mpf(float(t)) - mpmath.mpf(float(s))))
    assert float(step.snr_ratio) == pytest.approx(expected, rel=5e-7, abs=0)


def test_ratios_of_consecutive_steps_multiply():
    with jax.enable_x64(True):
        a, b, c = (jnp.asarray(x) for x in (4.0, 1.0, -3.0))
        whole = step_from_log_snr(a, c).snr_ratio
        assert float(step_from_log_snr(a, b).snr_ratio * step_from_log_snr(b, c).snr_ratio) == pytest.approx(
            float(whole)
        )
