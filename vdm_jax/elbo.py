"""The variational bound of a diffusion model, term by term.

    -log p(x_0) <=  - E log p(x_0 | x_1)                                              reconstruction
                    + KL(q(x_T | x_0) || p(x_T))                                      prior
                    + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))    diffusion             (ELBO-3)

Terms act on one example. `bound` (ELBO-3) and `continuous_bound` (ELBO-12, T -> infinity) take a batch and a
`Denoiser`. Everything is in nats and bounds the *negative* log-likelihood: lower is better.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.gaussian import STANDARD_NORMAL, Prior, check_prior, variance_kl
from vdm_jax.likelihoods import Likelihood, evaluate_log_prob
from vdm_jax.noise_levels import NoiseLevel, Step
from vdm_jax.parameterization import prediction_target, to_x_0
from vdm_jax.schedules import Schedule, check_noise_at_start
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    PerExample,
    PredictionType,
    Real,
    Scalar,
    X,
    at_least_float32,
    evaluate,
    per_example,
    unknown_prediction_type,
)

__all__ = [
    "DiffusionBound",
    "DiffusionCurve",
    "DiffusionDecoder",
    "assemble_bound",
    "bits_per_dim",
    "bound",
    "continuous_bound",
    "continuous_diffusion_weight",
    "decoder_log_prob",
    "denoising_error",
    "diffusion_curve",
    "diffusion_kl",
    "diffusion_weight",
    "prior_kl",
    "reconstruction_nll",
]


@runtime_checkable
class DiffusionDecoder(Protocol):
    """`decoder(x_hat, x_1, level)` returns the distribution p(x_0 | x_1) of one example.

    x_hat is the denoiser's prediction of x_0 from x_1. Ho et al.'s decoder uses x_hat, `DiscretizedGaussian(x_hat,
    scale=level.sigma, levels=levels)`; Kingma et al.'s uses x_1 alone, `Categorical(x_1, level, levels)`.
    """

    def __call__(self, x_hat: X, x_1: X, level: NoiseLevel, /) -> Likelihood: ...


def prior_kl(x_0: X, level: NoiseLevel, prior: Prior = STANDARD_NORMAL) -> Scalar:
    """KL(q(x_T | x_0) || p(x_T)) in nats, for p(x_T) = N(m, v I) (ELBO-4).

        1/2 sum[ (alpha_T x_0 - m)^2 / v + sigma_T^2 / v - 1 - log(sigma_T^2 / v) ]

    The ratio of variances is taken between logarithms, 2 log sigma_T - log v: sigma_T^2 itself rounds to 1.

    Args:
        x_0: clean example, shape (*x).
        level: the last level T, scalars.
        prior: p(x_T), with scalar fields: N(0, I), or Normal(0.0, var=sigma_max**2) for a variance-exploding schedule.

    Returns:
        A scalar.

    Raises:
        TypeError: the prior is not a `Normal`.
        ValueError: a field of the prior has a shape, or its variance is not positive.

    Source: Ho et al. 2020, arXiv:2006.11239, L_T; Kingma et al. 2021, arXiv:2107.00630, equation 7.
    """
    check_prior("prior", prior)
    prior = prior.astype(at_least_float32(x_0.dtype))
    signal = 0.5 * jnp.sum((level.alpha * x_0 - prior.mean) ** 2) / prior.var
    return signal + x_0.size * variance_kl(2.0 * level.log_sigma - jnp.log(prior.var))


def diffusion_weight(step: Step, prediction_type: PredictionType) -> Real:
    """The weight w in KL(q(x_s|x_t,x_0) || p(x_s|x_t)) = w ||target - prediction||^2 (ELBO-7, ELBO-8, ELBO-9).

        x_0: (SNR(s) - SNR(t)) / 2      v: sigma_t^2 (SNR(s) - SNR(t)) / 2     (alpha^2 + sigma^2 = 1)
        eps: (SNR(s)/SNR(t) - 1) / 2    score: sigma_t^2 (SNR(s)/SNR(t) - 1) / 2

    Args:
        step: the levels s < t, scalars. If s is clean, the weight is infinite: the decoder replaces this term.
        prediction_type: what the denoiser predicts.

    Raises:
        ValueError: unknown prediction_type.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 12; Kingma et al. 2021, arXiv:2107.00630, equation 13.
    """
    t = step.t
    lost = 0.5 * step.one_minus_ratio  # times SNR(s) or divided by r: neither form becomes 0 times infinity at an end
    match prediction_type:
        case "x_0":
            return lost * step.s.snr
        case "v":
            return lost * step.s.snr * (t.sigma / (t.alpha**2 + t.sigma**2)) ** 2
        case "eps":
            return lost / step.snr_ratio
        case "score":
            return lost / step.snr_ratio * t.sigma**2
    raise unknown_prediction_type(prediction_type)


def continuous_diffusion_weight(level: NoiseLevel, log_snr_slope: Real, prediction_type: PredictionType) -> Real:
    """`diffusion_weight` per unit of time, in the limit s -> t (ELBO-12).

        eps: -lambda'(t) / 2; times SNR for x_0, times sigma^2 for score, times alpha^2 for v (alpha^2 + sigma^2 = 1)

    Args:
        level: the level t, scalars, sigma > 0.
        log_snr_slope: lambda'(t) = -gamma'(t) < 0: `jax.grad(schedule.log_snr)(t)`.
        prediction_type: what the denoiser predicts.

    Raises:
        ValueError: unknown prediction_type.

    Source: Kingma et al. 2021, arXiv:2107.00630, equation 17.
    """
    rate = -0.5 * log_snr_slope
    match prediction_type:
        case "x_0":
            return rate * level.snr
        case "v":
            return rate * (level.alpha / (level.alpha**2 + level.sigma**2)) ** 2
        case "eps":
            return rate
        case "score":
            return rate * level.sigma**2
    raise unknown_prediction_type(prediction_type)


def diffusion_kl(target: X, prediction: X, step: Step, prediction_type: PredictionType) -> Scalar:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, from the target and the prediction (ELBO-6).

    The model's step has the variance of the posterior, so the KL is ||mu_q - mu_theta||^2 / (2 sigma_q^2).

    Args:
        target, prediction: the true and the predicted x_0, eps, v or score, shape (*x).
        step, prediction_type: as in `diffusion_weight`.

    Returns:
        A scalar.
    """
    return diffusion_weight(step, prediction_type) * jnp.sum((target - prediction) ** 2)


def denoising_error(
    denoiser: Denoiser, key: Key, x_0: Batch, level: NoiseLevel, prediction_type: PredictionType
) -> PerExample:
    """||target - prediction||^2 at x_t = alpha x_0 + sigma eps with fresh noise: the factor of every bound and loss.

    Args:
        denoiser: predicts `prediction_type`; evaluated once, on the whole batch.
        key: for the noise.
        x_0: clean batch, shape (B, *x).
        level: fields of shape (B,).
        prediction_type: what the denoiser predicts.

    Returns:
        Shape (B,), summed over the example.

    Raises:
        ValueError: unknown prediction_type.
    """
    eps = jax.random.normal(key, x_0.shape, x_0.dtype)
    x_t = jax.vmap(forward.add_noise)(x_0, eps, level)
    target = jax.vmap(partial(prediction_target, prediction_type=prediction_type))(x_0, eps, level)
    return per_example(jnp.square(target - evaluate(denoiser, x_t, level)))


def reconstruction_nll(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    level: NoiseLevel,
    decoder: DiffusionDecoder,
    prediction_type: PredictionType,
) -> PerExample:
    """-log p(x_0 | x_1) at one sample x_1 of q(x_1 | x_0) per example, in nats (ELBO-5).

    Args:
        denoiser: predicts `prediction_type`; evaluated once, on the whole batch.
        key: for x_1.
        x_0: clean batch, shape (B, *x).
        level: the first level, fields of shape (B,).
        decoder: p(x_0 | x_1) of one example.
        prediction_type: what the denoiser predicts.

    Returns:
        Shape (B,).

    Source: Ho et al. 2020, arXiv:2006.11239, L_0; Kingma et al. 2021, arXiv:2107.00630, appendix D.
    """
    return _decode(denoiser, x_0, decoder, prediction_type)(_sample_marginal(key, x_0, level), level)


def _sample_marginal(key, x_0, level) -> Batch:
    """A sample of q(x_t | x_0) for each example, in the dtype of x_0."""
    keys = jax.random.split(key, x_0.shape[0])
    return jax.vmap(lambda x, lv, k: forward.marginal(x, lv).sample(k))(x_0, level, keys).astype(x_0.dtype)


def _decode(denoiser, x_0, decoder, prediction_type) -> Callable[[Batch, NoiseLevel], PerExample]:
    """(x_1, level) -> -log p(x_0 | x_1)."""

    def reconstruction(x_1, level):
        prediction = evaluate(denoiser, x_1, level)
        x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(prediction, x_1, level)
        return -decoder_log_prob(decoder, x_0, x_hat, x_1, level)

    return reconstruction


def decoder_log_prob(decoder: Any, x_0: Batch, *given: Any) -> PerExample:
    """log p(x_0 | ...) of a batch, in nats.

    Args:
        decoder: a `DiffusionDecoder`, or a decoder with other arguments.
        x_0: shape (B, *x).
        given: the decoder's arguments, each with a leading axis B: x_hat, x_1 and the level of a `DiffusionDecoder`.

    Raises:
        TypeError: the decoder does not return a distribution.
        ValueError: its log-probability is not one number per example, or its mean has another shape than x_0.
    """

    return jax.vmap(lambda x, *given: evaluate_log_prob(decoder(*given), x, "decoder"))(x_0, *given)


class DiffusionBound(NamedTuple):
    """The three terms of the bound on -log p(x_0), in nats; each of shape (B,)."""

    prior: PerExample
    reconstruction: PerExample
    diffusion: PerExample

    @property
    def total(self) -> PerExample:
        """The bound: the sum of the three terms."""
        return self.prior + self.reconstruction + self.diffusion


class DiffusionCurve(NamedTuple):
    """The diffusion term as a function of the noise level, in K slices of time, the least noisy first.

    Fields:
        log_snr: the level sampled in each slice, shape (K, B).
        nats: the estimate of the slice's contribution, shape (K, B). The sum over K estimates the diffusion term.
    """

    log_snr: Float[Array, "K b"]
    nats: Float[Array, "K b"]


@compiled(static=("terms",))
def bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
    terms: int | None = None,
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """One unbiased estimate per example of the bound on -log p(x_0) (ELBO-3, ELBO-10).

    With `terms=None` every step 2..T is evaluated once, each with fresh noise: the sum L_DDPM. With `terms=K` the sum
    is estimated from K steps, evenly spaced over 2..T from a random start (low discrepancy), times (T - 1) / K.

    Args:
        denoiser: predicts `prediction_type`; evaluated once per term and once for the decoder, on the whole batch.
        key: for the noise and the steps.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        decoder: p(x_0 | x_1) of one example.
        prediction_type: what the denoiser predicts.
        terms: number of diffusion terms, None for all.
        prior: p(x_T), with scalar fields, as in `prior_kl`.

    Returns:
        `DiffusionBound`, each field (B,).

    Raises:
        ValueError: unknown prediction_type, or terms below 1.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 5; Kingma et al. 2021, arXiv:2107.00630 (low-discrepancy t).
    """
    step_kl = _step_kl(denoiser, x_0, prediction_type)
    reconstruction = _decode(denoiser, x_0, decoder, prediction_type)
    return assemble_bound(step_kl, reconstruction, key, x_0, schedule, terms=terms, prior=prior)


def assemble_bound(
    step_kl: Callable[[Key, Step], PerExample],
    reconstruction: Callable[[Batch, NoiseLevel], PerExample],
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    *,
    terms: int | None = None,
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """The bound of any reverse process, from its KL at one step and its reconstruction term (ELBO-3, ELBO-10).

    `bound` uses it with a fixed reverse variance, `reverse_variance.learned_variance_bound` with a learned one. For the
    bound of your own reverse process, pass an estimate of its KL.

    Args:
        step_kl: (key, step) -> an unbiased estimate of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of each example, shape
            (B,). The fields of `step` have shape (B,).
        reconstruction: (x_1, level) -> -log p(x_0 | x_1) of each example, shape (B,), for a sample x_1 of q(x_1 | x_0).
        key, x_0, schedule, terms, prior: as in `bound`.

    Returns:
        `DiffusionBound`, each field (B,).

    Raises:
        ValueError: terms below 1.
    """
    if terms is not None and terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term, or None for all")
    if terms is None or schedule.num_steps == 1:
        terms = schedule.num_steps - 1
    key_1, key_terms = jax.random.split(key)
    first, last = schedule(jnp.ones(x_0.shape[:1], jnp.int32)), schedule(schedule.num_steps)
    return DiffusionBound(
        prior=jax.vmap(lambda x: prior_kl(x, last, prior))(x_0),
        reconstruction=reconstruction(_sample_marginal(key_1, x_0, first), first),
        diffusion=_discrete_terms(step_kl, key_terms, x_0.shape[0], schedule, terms).nats.sum(0),
    )


def _step_kl(denoiser, x_0, prediction_type) -> Callable[[Key, Step], PerExample]:
    """(key, step) -> an estimate of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) whose variance is the posterior's."""

    def step_kl(key, step):
        error = denoising_error(denoiser, key, x_0, step.t, prediction_type)
        return jax.vmap(partial(diffusion_weight, prediction_type=prediction_type))(step) * error

    return step_kl


def _discrete_terms(step_kl, key, batch, schedule, terms) -> DiffusionCurve:
    key_t, key_eps = jax.random.split(key)
    num_steps = schedule.num_steps
    share = (num_steps - 1) / terms if terms else 0.0

    def visit(_, index):
        t = _evenly_spaced_step(key_t, index, terms, num_steps, batch)
        step = schedule.step(t - 1, t)
        return None, DiffusionCurve(step.t.log_snr, share * step_kl(jax.random.fold_in(key_eps, index), step))

    return scan(visit, None, jnp.arange(terms))[1]


def _evenly_spaced_step(key, index, terms, num_steps, batch):
    """Step `index` of `terms` evenly spaced steps in 2..T: all of them if terms = T - 1, else from a random start."""
    if terms == num_steps - 1:
        return jnp.full((batch,), index + 2)
    start = jax.random.uniform(key, (batch,))
    u = (start + index.astype(start.dtype)) / terms
    return jnp.minimum(2 + jnp.floor(u * (num_steps - 1)).astype(jnp.int32), num_steps)


def _check_start(schedule: Schedule, t_0: float) -> None:
    check_noise_at_start(schedule, t_0, jnp.float32)


@compiled(static=("terms", "t_0"), check=_check_start)
def continuous_bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: Schedule,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
    terms: int = 1,
    t_0: float = 0.0,
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """One unbiased estimate per example of the bound as T -> infinity (ELBO-12).

        diffusion = 1/2 int_{t_0}^1 gamma'(t) E ||eps - eps_hat||^2 dt

    The expectation depends on the schedule only through its levels at t_0 and 1, not through its shape between them;
    the variance depends on both. The decoder is evaluated at t_0. The integral is estimated at `terms` times per
    example, evenly spaced from a random start.

    Args:
        denoiser, key, x_0, decoder, prediction_type, prior: as in `bound`.
        schedule: continuous.
        terms: number of times per example, at least 1.
        t_0: start of the integral. 0 requires a schedule that has noise at t = 0.

    Returns:
        `DiffusionBound`, each field (B,).

    Raises:
        ValueError: unknown prediction_type, terms below 1, or a schedule without noise at t_0.

    Source: Kingma et al. 2021, arXiv:2107.00630, section 5.1.
    """
    if terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term")
    key_1, key_terms = jax.random.split(key)
    dtype = at_least_float32(x_0.dtype)
    first, last = schedule(jnp.full(x_0.shape[:1], t_0, dtype)), schedule(jnp.ones((), dtype))
    return DiffusionBound(
        prior=jax.vmap(lambda x: prior_kl(x, last, prior))(x_0),
        reconstruction=reconstruction_nll(denoiser, key_1, x_0, first, decoder, prediction_type),
        diffusion=_continuous_terms(denoiser, key_terms, x_0, schedule, prediction_type, terms, t_0).nats.sum(0),
    )


def _continuous_terms(denoiser, key, x_0, schedule, prediction_type, terms, t_0) -> DiffusionCurve:
    key_t, key_eps = jax.random.split(key)
    start = jax.random.uniform(key_t, x_0.shape[:1], at_least_float32(x_0.dtype))
    share = (1.0 - t_0) / terms

    def visit(_, index):
        t = t_0 + (1.0 - t_0) * (start + index.astype(start.dtype)) / terms
        level, slope = schedule(t), jax.vmap(jax.grad(schedule.log_snr))(t)
        error = denoising_error(denoiser, jax.random.fold_in(key_eps, index), x_0, level, prediction_type)
        rate = jax.vmap(partial(continuous_diffusion_weight, prediction_type=prediction_type))(level, slope)
        return None, DiffusionCurve(level.log_snr, share * rate * error)

    return scan(visit, None, jnp.arange(terms))[1]


def _check_curve(schedule: DiscreteSchedule | Schedule, t_0: float) -> None:
    if not isinstance(schedule, DiscreteSchedule):
        _check_start(schedule, t_0)


@compiled(static=("terms", "t_0"), check=_check_curve)
def diffusion_curve(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule | Schedule,
    *,
    prediction_type: PredictionType = "eps",
    terms: int,
    t_0: float = 0.0,
) -> DiffusionCurve:
    """The diffusion term of `bound` (discrete schedule) or `continuous_bound`, as a function of the noise level.

    Args:
        denoiser, key, x_0, prediction_type: as in `bound`.
        schedule: discrete or continuous.
        terms: K, the number of slices of time; at most T - 1 for a discrete schedule.
        t_0: as in `continuous_bound`.

    Returns:
        `DiffusionCurve`, each field (K, B).

    Raises:
        ValueError: terms is out of range, or as in `continuous_bound`.

    Source: Kingma et al. 2021, arXiv:2107.00630, section 5.
    """
    if isinstance(schedule, DiscreteSchedule):
        if not 1 <= terms <= schedule.num_steps - 1:
            raise ValueError(
                f"terms is {terms}: a schedule of {schedule.num_steps} steps has {schedule.num_steps - 1} diffusion "
                f"terms, choose 1..{schedule.num_steps - 1}"
            )
        return _discrete_terms(_step_kl(denoiser, x_0, prediction_type), key, x_0.shape[0], schedule, terms)
    if terms < 1:
        raise ValueError(f"terms is {terms}: the curve needs at least one slice")
    return _continuous_terms(denoiser, key, x_0, schedule, prediction_type, terms, t_0)


def bits_per_dim(nats: Real, num_dims: int, bin_width: float = 1.0) -> Real:
    """Nats per example converted to bits per dimension (ELBO-13).

        nats / (D log 2) - log2(bin_width)

    Args:
        nats: -log p of an example, or a bound on it; any shape.
        num_dims: D, the number of dimensions of an example.
        bin_width: 1 for the probability of discrete data. For a *density* of quantized data, the width of a bin:
            2 / 255 for 8 bits on [-1, 1].

    Source: Theis et al. 2016, arXiv:1511.01844.
    """
    return nats / (num_dims * jnp.log(2.0)) - jnp.log2(bin_width)
