"""Noise levels: the signal and noise scales of x_t, and the pair of levels s < t of a reverse step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vdm_jax.gaussian import _root
from vdm_jax.types import Batch, Real

__all__ = [
    "NoiseLevel",
    "Step",
    "broadcast_to_batch",
    "check_positive",
    "level_from_log_snr",
    "step_from_log_snr",
]


class NoiseLevel(NamedTuple):
    """The noise level of x_t ~ N(alpha x_0, sigma^2 I).

    The fields are redundant on purpose. In float32 alpha and sigma are accurate at every level, but 1 - alpha at low
    noise, and 1 - sigma at high noise, are accurate only in the logarithms.

    Fields (scalars, or arrays of one shape for several levels):
        alpha, sigma: signal and noise scale.
        log_alpha, log_sigma: their logarithms; clean data has log_sigma = -inf.
        t: the time of the level, a step number or a number in [0, 1]; None if it was made without one.
    """

    alpha: Real
    sigma: Real
    log_alpha: Real
    log_sigma: Real
    t: Real | float | None = None

    @property
    def log_snr(self) -> Real:
        """lambda = log(alpha^2 / sigma^2) = -gamma; +inf for clean data."""
        return 2.0 * (self.log_alpha - self.log_sigma)

    @property
    def snr(self) -> Real:
        """alpha^2 / sigma^2."""
        return (self.alpha / self.sigma) ** 2


class Step(NamedTuple):
    """Two levels s < t and the drop of the log-SNR from s to t.

    The drop is a field of its own because the difference of two float32 log-SNRs loses its digits as s -> t.

    Fields:
        s, t: the less and the more noisy level; s may be clean data (sigma = 0).
        log_snr_drop: lambda_s - lambda_t > 0; inf if s is clean.
    """

    s: NoiseLevel
    t: NoiseLevel
    log_snr_drop: Real

    @property
    def snr_ratio(self) -> Real:
        """r = SNR(t) / SNR(s) in [0, 1): from the drop if that is small, else from the scales."""
        quotient = ((self.t.alpha / self.s.alpha) * (self.s.sigma / self.t.sigma)) ** 2
        return jnp.where(self.log_snr_drop < 1.0, jnp.exp(-self.log_snr_drop), quotient)

    @property
    def one_minus_ratio(self) -> Real:
        """1 - r, accurate as s -> t, where 1 - SNR(t)/SNR(s) would cancel."""
        return -jnp.expm1(-self.log_snr_drop)


def broadcast_to_batch(level: Any, x: Batch) -> Any:
    """A level or a step of scalars with its fields broadcast to shape (B,): the same for every example of x."""
    return jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:1]), level)


def check_positive(level: NoiseLevel, *fields: str) -> None:
    """Check that a level has noise (field "sigma") or signal ("alpha"). Traced values are not checked.

    Raises:
        ValueError: one of these fields is not positive.
    """
    for field in fields:
        value = getattr(level, field)
        if not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
            what = {"sigma": "noise", "alpha": "signal"}[field]
            found = np.asarray(value).tolist()
            raise ValueError(f"the level has {field} = {found}: use a level with {what}, {field} > 0")


def level_from_log_snr(log_snr: Real, t: Real | float | None = None) -> NoiseLevel:
    """The variance-preserving level of a log-SNR: alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda) (FWD-6).

    Args:
        log_snr: lambda = -gamma, any shape; its dtype is that of the result.
        t: the level's time.

    Source: Kingma et al. 2021, arXiv:2107.00630.
    """
    return NoiseLevel(
        alpha=_root(jax.nn.sigmoid(log_snr)),  # underflows to 0 below -104; `_root` keeps the gradient finite
        sigma=_root(jax.nn.sigmoid(-log_snr)),
        log_alpha=0.5 * jax.nn.log_sigmoid(log_snr),
        log_sigma=0.5 * jax.nn.log_sigmoid(-log_snr),
        t=t,
    )


def step_from_log_snr(log_snr_s: Real, log_snr_t: Real) -> Step:
    """The variance-preserving step between two log-SNRs lambda_s > lambda_t, whose difference is the drop."""
    return Step(level_from_log_snr(log_snr_s), level_from_log_snr(log_snr_t), log_snr_s - log_snr_t)
