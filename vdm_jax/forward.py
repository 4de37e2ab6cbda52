"""The forward process and its posterior: the fixed linear-Gaussian encoder of a diffusion model.

Every kernel acts on ONE example of any shape and scalar levels and returns a `Normal`. Use `jax.vmap` for batches.
"""

from typing import NamedTuple

from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import NoiseLevel, Step
from vdm_jax.types import Real, X

__all__ = [
    "PosteriorCoefficients",
    "add_noise",
    "bridge",
    "marginal",
    "posterior",
    "posterior_coefficients",
    "posterior_from_eps",
    "posterior_from_score",
    "posterior_variance",
    "transition",
]


def marginal(x_0: X, level: NoiseLevel) -> Normal:
    """q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) (FWD-2).

    Args:
        x_0: clean example, shape (*x).
        level: the level t, scalars.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
    """
    return Normal(level.alpha * x_0, var=level.sigma**2)


def add_noise(x_0: X, eps: X, level: NoiseLevel) -> X:
    """x_t = alpha_t x_0 + sigma_t eps, in the dtype of x_0: a sample of q(x_t | x_0) for eps ~ N(0, I) (FWD-2).

    Args:
        x_0, eps: clean example and its noise, shape (*x).
        level: the level t, scalars.
    """
    return (level.alpha * x_0 + level.sigma * eps).astype(x_0.dtype)


def transition(x_s: X, step: Step) -> Normal:
    """q(x_t | x_s) for any s < t (FWD-1, FWD-3).

        N( (alpha_t / alpha_s) x_s,  (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) I ),   variance = sigma_t^2 (1 - r)

    For adjacent steps of a variance-preserving schedule the variance is beta_t.

    Args:
        x_s: example at level s, shape (*x).
        step: the levels s < t, scalars.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 2; Kingma et al. 2021, arXiv:2107.00630, equation 2.
    """
    return Normal(step.t.alpha / step.s.alpha * x_s, var=step.t.sigma**2 * step.one_minus_ratio)


def bridge(x_r: X, x_t: X, first: Step, second: Step) -> Normal:
    """q(x_s | x_r, x_t) for r < s < t: the posterior given a noisier x_r instead of clean data (ELBO-2).

        precision = 1 / v_1 + a^2 / v_2,   mean = (m / v_1 + a x_t / v_2) / precision,

    where q(x_s | x_r) = N(m, v_1 I) and q(x_t | x_s) = N(a x_s, v_2 I).

    Args:
        x_r, x_t: the examples at both end levels, shape (*x).
        first, second: the steps r < s and s < t, scalars.

    Source: Luo 2022, arXiv:2208.11970, in the first decomposition of the bound.
    """
    before = transition(x_r, first)
    gain = second.t.alpha / second.s.alpha
    after = second.t.sigma**2 * second.one_minus_ratio
    total = after + gain**2 * before.var
    return Normal((after * before.mean + gain * before.var * x_t) / total, var=before.var * after / total)


class PosteriorCoefficients(NamedTuple):
    """x_s = c_1 x_t + c_2 x_0 + sigma eps (POST-6); scalars."""

    c_1: Real
    c_2: Real
    sigma: Real


def posterior_coefficients(step: Step) -> PosteriorCoefficients:
    """The interpolation form of the posterior (POST-6).

        c_1 = alpha_t sigma_s^2 / (alpha_s sigma_t^2)      (= alpha_s r / alpha_t)
        c_2 = alpha_s (1 - r)
        sigma = sigma_s sqrt(1 - r)

    Args:
        step: the levels s < t, scalars; if s is clean, the result is (0, alpha_s, 0).

    Source: Ho et al. 2020, arXiv:2006.11239, equation 7.
    """
    s, t = step.s, step.t
    return PosteriorCoefficients(
        c_1=(t.alpha / s.alpha) * (s.sigma / t.sigma) ** 2,
        c_2=s.alpha * step.one_minus_ratio,
        sigma=s.sigma * step.one_minus_ratio**0.5,
    )


def posterior(x_t: X, x_0: X, step: Step) -> Normal:
    """q(x_s | x_t, x_0), the target of every diffusion term of the bound (POST-2, POST-3).

        r         = SNR(t) / SNR(s)                          in [0, 1)
        mu_q      = alpha_s (r x_t / alpha_t + (1 - r) x_0)
        sigma_q^2 = sigma_s^2 (1 - r)

    With a prediction x_hat instead of x_0 it is the model's reverse step p(x_s | x_t).

    Args:
        x_t, x_0: noisy and clean example, shape (*x).
        step: the levels s < t, scalars. If s is clean, the posterior is a point mass at x_0.

    Returns:
        Normal with mean (*x) and scalar variance.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 7; Kingma et al. 2021, arXiv:2107.00630, appendix A.
    """
    c_1, c_2, _ = posterior_coefficients(step)
    return Normal(c_1 * x_t + c_2 * x_0, var=posterior_variance(step))


def posterior_from_eps(x_t: X, eps: X, step: Step) -> Normal:
    """q(x_s | x_t, x_0) in terms of the noise eps in x_t (POST-4).

        mu_q = (alpha_s / alpha_t) (x_t - sigma_t (1 - r) eps)

    For adjacent steps: (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t).

    Args:
        x_t, eps: noisy example and its noise, shape (*x).
        step: the levels s < t, scalars.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 10.
    """
    s, t = step.s, step.t
    mean = s.alpha / t.alpha * (x_t - t.sigma * step.one_minus_ratio * eps)
    return Normal(mean, var=posterior_variance(step))


def posterior_from_score(x_t: X, score: X, step: Step) -> Normal:
    """q(x_s | x_t, x_0) in terms of the conditional score grad log q(x_t | x_0) (POST-5).

        mu_q = (alpha_s / alpha_t) (x_t + sigma_t^2 (1 - r) score)

    For adjacent steps: (x_t + beta_t score) / sqrt(1 - beta_t).

    Args:
        x_t, score: noisy example and score, shape (*x).
        step: the levels s < t, scalars.

    Source: Luo 2022, arXiv:2208.11970, section on three interpretations.
    """
    s, t = step.s, step.t
    mean = s.alpha / t.alpha * (x_t + t.sigma**2 * step.one_minus_ratio * score)
    return Normal(mean, var=posterior_variance(step))


def posterior_variance(step: Step) -> Real:
    """sigma_q^2 = sigma_s^2 (1 - r) (POST-3): beta_t (1 - abar_{t-1}) / (1 - abar_t) for adjacent steps."""
    return step.s.sigma**2 * step.one_minus_ratio
