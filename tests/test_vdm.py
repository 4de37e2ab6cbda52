"""The loss of variational diffusion models as a function; its theorems are in `derivations/test_vdm.py`."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, vdm
from vdm_jax.gaussian import Normal
from vdm_jax.networks.schedule import MonotoneNetwork
from vdm_jax.schedules import LearnedSchedule, LinearLogSNR, VarianceExploding

GAUSSIAN = GaussianWorld(0.4, 0.6)
X_0 = jnp.asarray(np.random.RandomState(0).randn(64, 2), jnp.float32)


def _decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def test_prediction_types_agree():
    @jax.jit
    def totals(x_0):
        loss = partial(vdm.vdm_loss, key=jax.random.key(0), x_0=x_0, schedule=LinearLogSNR(5.0, -4.0), decoder=_decoder)
        types = ("x_0", "eps", "v", "score")
        return [loss(denoiser(GAUSSIAN, each, 0.1), prediction_type=each).total for each in types]

    x_0, *others = totals(X_0)
    for other in others:
        np.testing.assert_allclose(other, x_0, rtol=2e-5, atol=2e-6)


def test_a_learned_line_is_the_fixed_one():
    with jax.enable_x64(True):  # the decoder divides by a small variance, which costs float32 two digits
        line, zero = MonotoneNetwork(0), jnp.zeros((), jnp.float64)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), line.init(jax.random.key(0), zero, zero + 1.0))
        learned = LearnedSchedule(zero - 5.0, zero + 4.0, Partial(line.apply, params))
        ours, fixed = (
            vdm.vdm_loss(denoiser(GAUSSIAN, "eps", 0.1), jax.random.key(0), X_0.astype(jnp.float64), s, _decoder)
            for s in (learned, LinearLogSNR(5.0, -4.0))
        )
        for name in elbo.DiffusionBound._fields:
            np.testing.assert_allclose(getattr(ours, name), getattr(fixed, name), rtol=1e-10, atol=1e-10)


def test_a_schedule_that_does_not_preserve_variance():
    schedule, prior = VarianceExploding(0.1, 5.0), Normal(0.0, var=25.0)
    options = {"prior": prior, "prediction_type": "x_0"}
    x_0 = jnp.broadcast_to(X_0[:1], (8000, 2))
    ours = vdm.vdm_loss(denoiser(GAUSSIAN, "x_0", 0.1), jax.random.key(0), x_0, schedule, _decoder, **options)
    theirs = elbo.continuous_bound(
        denoiser(GAUSSIAN, "x_0", 0.1), jax.random.key(1), x_0, schedule, _decoder, terms=50, **options
    )
    for name in elbo.DiffusionBound._fields:
        a, b = (np.asarray(getattr(bound, name), np.float64) for bound in (ours, theirs))
        assert abs(a.mean() - b.mean()) <= 4 * np.hypot(a.std(), b.std()) / len(a) ** 0.5 + 1e-6


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_t_steps_are_differences_of_the_signal_to_noise_ratio(num_steps):
    """T/2 (SNR(s) - SNR(t)) |x_0|^2 for a denoiser that predicts x_0 = 0; a batch of T has every step once."""
    x_0 = np.float32([0.5, -2.0, 1.0])
    batch = jnp.broadcast_to(jnp.asarray(x_0), (num_steps, 3))
    ours = vdm.vdm_loss(
        lambda x_t, level: 0.0 * x_t, jax.random.key(0), batch, LinearLogSNR(3.0, -4.0), _decoder,
        prediction_type="x_0", num_steps=num_steps,
    ).diffusion  # fmt: skip
    snr = np.exp(np.linspace(3.0, -4.0, num_steps + 1))
    np.testing.assert_allclose(np.sort(ours)[::-1], -0.5 * num_steps * np.diff(snr) * np.sum(x_0**2), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0.*at least one step"),
        ({"schedule_objective": "flat"}, "schedule_objective 'flat'.*'variance' or 'bound'"),
    ],
)
def test_refusals(options, message):
    # unwrapped, since the tests' run-time type checker would raise first
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(vdm.vdm_loss)(
            denoiser(GAUSSIAN), jax.random.key(0), X_0, LinearLogSNR(5.0, -4.0), _decoder, **options
        )
