"""The field's loss weights as functions of the log-SNR: each loss is a weighted bound.

    L_w = 1/2 int w(lambda) E ||eps - eps_hat||^2 dlambda     over lambda_min .. lambda_max                (WEIGHT-1)
        = w(0) L(0) + int_0^1 w'(t) L(t) dt - w(1) L(1),      w(t) = w(lambda(t))                          (WEIGHT-2)

L(t) = KL(q(z_t..1 | x) || p(z_t..1)) is the bound of data noised to t, minus their entropy. If w falls with lambda
(last column), all w'(t) are nonnegative and L_w is the bound of noise-augmented data. Otherwise some bounds have
negative weights.

The loss of each source, as published, is c L_w:

    function        w(lambda)                                       published loss                            c    falls
    likelihood      1                                               the bound's diffusion term                1    yes
    uniform_in_time p(lambda) = -dt/dlambda                         E_t ||eps - eps_hat||^2, any schedule     2
    cosine          sech(lambda / 2)                                the same, cosine schedule                 1/pi no
    v_prediction    e^(-lambda / 2)                                 E_t ||v - v_hat||^2, cosine schedule      2/pi yes
                                                                    E_t ||u - u_hat||^2, flow matching        1
    edm             N(lambda; -2 P_mean, 4 P_std^2)                 E_sigma w_sigma ||D(y + n) - y||^2,       2/s^2 no
                      (e^-lambda + s^2)                               s = sigma_data
    p2              sech(lambda / 2) / (k + SNR)^gamma              E_t ||eps - eps_hat||^2 / (k + SNR)^gamma 1/pi no
    min_snr         sech(lambda / 2) min(1, gamma / SNR)            E_t min(SNR, gamma) ||x_0 - x_hat||^2     1/pi no
    sigmoid         1 / (1 + e^(lambda - bias))                     E_t w ||eps - eps_hat||^2 / p             2    yes

t is uniform on [0, 1]; the cosine schedule here has no offset, alpha = cos(pi t / 2). For a schedule with finite end
points the integral stops there. Sums are over dimensions: a source that averages over dimensions has c / D.

Source: Kingma & Gao 2023, arXiv:2303.00848, table 1 and theorem 1; for each weight, that of its function.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.elbo import diffusion_curve
from vdm_jax.schedules import ContinuousSchedule, Schedule, time_from_log_snr
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    PerExample,
    PredictionType,
    Real,
    Scalar,
    check_weights,
)

__all__ = [
    "Weight",
    "as_elbo_mixture",
    "cosine",
    "edm",
    "likelihood",
    "min_snr",
    "p2",
    "sigmoid",
    "uniform_in_time",
    "v_prediction",
    "weighted_bound",
]

Weight = Callable[[Real], Real]


def likelihood(log_snr: Real) -> Real:
    """w = 1: the bound.

    Source: Kingma et al. 2021, arXiv:2107.00630.
    """
    return jnp.ones_like(log_snr)


def cosine(log_snr: Real) -> Real:
    """w = sech(lambda / 2): L_w is pi times L_simple with the cosine schedule, for which p(lambda) = w / (2 pi).

    Args:
        log_snr: lambda, any shape.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17 with s = 0.
    """
    return 2.0 * jnp.exp(-0.5 * jnp.abs(log_snr)) / (1.0 + jnp.exp(-jnp.abs(log_snr)))


def v_prediction(log_snr: Real) -> Real:
    """w = e^(-lambda / 2): v-prediction with the cosine schedule, and flow matching along straight lines.

    Args:
        log_snr: lambda, any shape.

    Source: Salimans & Ho 2022, arXiv:2202.00512 (v); Lipman et al. 2022, arXiv:2210.02747 (u = eps - x_0).
    """
    return jnp.exp(-0.5 * log_snr)


def edm(log_snr: Real, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5) -> Real:
    """w = N(lambda; -2 P_mean, (2 P_std)^2) (e^-lambda + sigma_data^2).

    Args:
        log_snr: lambda = -2 log sigma, any shape.
        mean, std: P_mean and P_std of the log-normal noise level: log sigma ~ N(P_mean, P_std^2).
        sigma_data: the paper's sigma_data, the standard deviation of the data.

    Source: Karras et al. 2022, arXiv:2206.00364, section 5 and table 1.
    """
    return _normal_density(log_snr, -2.0 * mean, 2.0 * std) * (jnp.exp(-log_snr) + sigma_data**2)


def p2(log_snr: Real, gamma: float = 1.0, k: float = 1.0) -> Real:
    """w = sech(lambda / 2) / (k + e^lambda)^gamma: perception-prioritized weighting with the cosine schedule.

    Args:
        log_snr: lambda, any shape.
        gamma, k: the paper's parameters; gamma = 0 is `cosine`.

    Source: Choi et al. 2022, arXiv:2204.00227, equation 8.
    """
    return cosine(log_snr) / (k + jnp.exp(log_snr)) ** gamma


def min_snr(log_snr: Real, gamma: float = 5.0) -> Real:
    """w = sech(lambda / 2) min(1, gamma e^-lambda): min-SNR-gamma with the cosine schedule.

    One loss for all prediction types: min(SNR, gamma) ||x_0 - x_hat||^2 = min(1, gamma / SNR) ||eps - eps_hat||^2
    = min(SNR, gamma) / (SNR + 1) ||v - v_hat||^2.

    Args:
        log_snr: lambda, any shape.
        gamma: the SNR at which the weight is clipped.

    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    at_least = jnp.maximum(log_snr, -60.0)  # below, the minimum is 1 and the exponential would overflow
    return cosine(log_snr) * jnp.minimum(1.0, gamma * jnp.exp(-at_least))


def sigmoid(log_snr: Real, bias: float = 2.0) -> Real:
    """w = sigmoid(bias - lambda), which decreases from 1 to 0.

    Args:
        log_snr: lambda, any shape.
        bias: the lambda at which it is 1/2.

    Source: Kingma & Gao 2023, arXiv:2303.00848.
    """
    loud, quiet = jnp.exp(jnp.minimum(log_snr, 0.0)), jnp.exp(-jnp.maximum(log_snr, 0.0))  # e^lambda is their ratio
    return quiet / (quiet + float(np.exp(-bias)) * loud)  # bias - lambda would round


@compiled()
def uniform_in_time(log_snr: Real, schedule: ContinuousSchedule) -> Real:
    """p(lambda) = -dt/dlambda: the density of lambda at a uniform time, and half the weight of L_simple.

    t comes from `schedules.time_from_log_snr`. Where few floating-point numbers t share an interval of lambda (near
    t = 1 of a schedule that ends without signal), the density is as coarse as they are.

    Args:
        log_snr: lambda, any shape; the density is 0 outside the schedule's range.
        schedule: continuous, lambda falling.

    Source: Kingma & Gao 2023, arXiv:2303.00848, section 2; Ho et al. 2020, arXiv:2006.11239, equation 14.
    """
    t = time_from_log_snr(log_snr, schedule)
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)
    return jnp.where(inside, -1.0 / jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))[1], 0.0)


def weighted_bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule | Schedule,
    weight: Weight,
    *,
    prediction_type: PredictionType = "eps",
    terms: int = 1,
    t_0: float = 0.0,
) -> PerExample:
    """One unbiased estimate per example of the weighted diffusion term (WEIGHT-1).

        L_w = 1/2 int_{t_0}^1 w(lambda(t)) gamma'(t) E ||eps - eps_hat||^2 dt,   or   sum_{t=2..T} w(lambda_t) KL_t

    Args:
        denoiser, key, x_0, schedule, prediction_type, terms, t_0: as in `elbo.diffusion_curve`. The integral is
            estimated at `terms` times per example, evenly spaced from a random start.
        weight: w(lambda), elementwise: a function of this module, or `functools.partial(min_snr, gamma=5.0)`.

    Returns:
        Shape (B,), nats where w = 1.

    Raises:
        ValueError: as `elbo.diffusion_curve`, or weights of another shape.

    Source: Kingma & Gao 2023, arXiv:2303.00848, equation 8.
    """
    curve = diffusion_curve(denoiser, key, x_0, schedule, prediction_type=prediction_type, terms=terms, t_0=t_0)
    return jnp.sum(check_weights(weight(curve.log_snr), curve.nats.shape) * curve.nats, axis=0)


def as_elbo_mixture(weight: Weight, schedule: ContinuousSchedule, t: Scalar) -> Scalar:
    """w'(t) = d/dt w(lambda(t)): the weight in L_w of the bound L(t) of data noised to t (WEIGHT-2).

    It is nonnegative if w decreases in lambda. Then L_w is, up to a factor and a constant, the expected bound of data
    noised to a random level.

    Args:
        weight: w(lambda).
        schedule: continuous.
        t: in [0, 1], a scalar. The result is NaN at an end where lambda is infinite (no noise or no signal).

    Source: Kingma & Gao 2023, arXiv:2303.00848, theorem 1.
    """
    return jax.grad(lambda time: weight(schedule.log_snr(time)))(t)


def _normal_density(x: Real, mean: float, std: float) -> Real:
    """N(x; mean, std^2) to the last digits, also where the exponent is large and its rounding would cost some.

    -(x - mean)^2 / (2 std^2) = a x^2 + b x + c. Its largest part has x, a and b rounded to few binary places and is
    therefore exact.
    """
    a, b = -0.5 / std**2, mean / std**2
    a_coarse, b_coarse, near = (
        float(np.round(a * 2**14) / 2**14),
        float(np.round(b * 2**16) / 2**16),
        jnp.round(4 * x) / 4,
    )
    far = x - near
    exact = a_coarse * near**2 + b_coarse * near
    rest = (a - a_coarse) * near**2 + (b - b_coarse) * near + far * (a * (x + near) + b) - 0.5 * (mean / std) ** 2
    return jnp.exp(exact) * (1.0 + jnp.expm1(rest)) / (std * np.sqrt(2 * np.pi))
