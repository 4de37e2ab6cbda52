"""The variational bound of a diffusion model, term by term.

    -log p(x_0) <=  - E log p(x_0 | x_1)                                              reconstruction
                    + KL(q(x_T | x_0) || p(x_T))                                      prior
                    + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))    diffusion             (ELBO-3)

Terms act on one example; `bound` (ELBO-3) and `continuous_bound` (ELBO-12, T -> infinity) take a batch and a
`Denoiser`. All are in nats, and costs: the bound on the *negative* log-likelihood.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.gaussian import STANDARD_NORMAL, Prior, check_prior, variance_kl
from vdm_jax.likelihoods import Likelihood
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
    check_distribution,
    check_values,
    evaluate,
    per_example,
    unknown_prediction_type,
)


@runtime_checkable
class DiffusionDecoder(Protocol):
    """`decoder(x_hat, x_1, level)`: the law p(x_0 | x_1) of one example.

    x_hat is the denoiser's prediction of x_0 from x_1. Ho et al.'s decoder reads it, `DiscretizedGaussian(x_hat,
    level.sigma, levels)`; Kingma et al.'s reads x_1 alone, `Categorical(x_1, level, levels)`.
    """

    def __call__(self, x_hat: X, x_1: X, level: NoiseLevel, /) -> Likelihood: ...


def prior_kl(x_0: X, level: NoiseLevel, prior: Prior = STANDARD_NORMAL) -> Scalar:
    """KL(q(x_T | x_0) || p(x_T)) in nats (ELBO-4).

        1/2 sum[ (alpha_T x_0 - m)^2 / v + sigma_T^2 / v - 1 - log(sigma_T^2 / v) ],    p(x_T) = N(m, v I)

    The variances enter by their logarithms, 2 log sigma_T - log v, so the result is exact for v = 1 as well.

    Args:
        x_0: clean example, shape (*x).
        level: the last level T, scalars.
        prior: p(x_T), with scalar fields: N(0, I), or Normal(0.0, var=sigma_max**2) for a variance-exploding schedule.

    Returns:
        A scalar.

    Raises:
        ValueError: a field of the prior has a shape, or its variance is not positive.

    Source: Ho et al. 2020, arXiv:2006.11239, L_T; Kingma et al. 2021, arXiv:2107.00630, equation 7.
    """
    check_prior("prior", prior)
    prior = prior.astype(at_least_float32(x_0.dtype))
    signal = 0.5 * jnp.sum((level.alpha * x_0 - prior.mean) ** 2) / prior.var
    return signal + x_0.size * variance_kl(2.0 * level.log_sigma - jnp.log(prior.var))


def diffusion_weight(step: Step, prediction_type: PredictionType) -> Real:
    """The w in KL(q(x_s|x_t,x_0) || p(x_s|x_t)) = w ||target - prediction||^2 (ELBO-7, ELBO-8, ELBO-9).

        x_0: (SNR(s) - SNR(t)) / 2      v: sigma_t^2 (SNR(s) - SNR(t)) / 2     (alpha^2 + sigma^2 = 1)
        eps: (SNR(s)/SNR(t) - 1) / 2    score: sigma_t^2 (SNR(s)/SNR(t) - 1) / 2

    Args:
        step: the levels s < t, scalars; the weight is infinite where s is clean, whose term is the decoder's.
        prediction_type: what is predicted.

    Raises:
        ValueError: unknown prediction_type.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 12; Kingma et al. 2021, arXiv:2107.00630, equation 13.
    """
    t = step.t
    lost = 0.5 * step.one_minus_ratio  # times SNR(s), or over r: two forms, so that no end makes 0 times infinity
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


def diffusion_rate(level: NoiseLevel, log_snr_slope: Real, prediction_type: PredictionType) -> Real:
    """What `diffusion_weight` becomes per unit of time as s -> t (ELBO-12).

        eps: -lambda'(t) / 2; times SNR by x_0, times sigma^2 by score, times alpha^2 by v (alpha^2 + sigma^2 = 1)

    Args:
        level: the level t, scalars, sigma > 0.
        log_snr_slope: lambda'(t) = -gamma'(t) < 0: `jax.grad(schedule.log_snr)(t)`.
        prediction_type: what is predicted.

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
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, from target and prediction of the same kind (ELBO-6).

    The model's step has the posterior's variance, so this is ||mu_q - mu_theta||^2 / (2 sigma_q^2).

    Args:
        target, prediction: the true x_0, eps, v or score and the predicted one, shape (*x).
        step, prediction_type: as in `diffusion_weight`.

    Returns:
        A scalar.
    """
    return diffusion_weight(step, prediction_type) * jnp.sum((target - prediction) ** 2)


def denoising_error(
    denoiser: Denoiser, key: Key, x_0: Batch, level: NoiseLevel, prediction_type: PredictionType
) -> PerExample:
    """||target - prediction||^2 at x_t = alpha x_0 + sigma eps, with fresh noise: what every bound and loss weights.

    Args:
        denoiser: predicts `prediction_type`; called once, with the whole batch.
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
    x_t = jax.vmap(lambda x, e, lv: lv.alpha * x + lv.sigma * e)(x_0, eps, level).astype(x_0.dtype)
    truth = jax.vmap(partial(prediction_target, prediction_type=prediction_type))(x_0, eps, level)
    return per_example(jnp.square(truth - evaluate(denoiser, x_t, level)))


def reconstruction_nll(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    level: NoiseLevel,
    decoder: DiffusionDecoder,
    prediction_type: PredictionType,
) -> PerExample:
    """-log p(x_0 | x_1) at one x_1 drawn from q(x_1 | x_0), in nats (ELBO-5).

    Args:
        denoiser: predicts `prediction_type`; called once, with the whole batch.
        key: for x_1.
        x_0: clean batch, shape (B, *x).
        level: the first level, fields of shape (B,).
        decoder: p(x_0 | x_1) of one example.
        prediction_type: what the denoiser predicts.

    Returns:
        Shape (B,).

    Source: Ho et al. 2020, arXiv:2006.11239, L_0; Kingma et al. 2021, arXiv:2107.00630, appendix D.
    """
    x_1 = jax.vmap(lambda x, lv, k: forward.marginal(x, lv).sample(k))(x_0, level, jax.random.split(key, x_0.shape[0]))
    x_1 = x_1.astype(x_0.dtype)
    x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(evaluate(denoiser, x_1, level), x_1, level)
    return -decoder_log_prob(decoder, x_0, x_hat, x_1, level)


def decoder_log_prob(decoder: Any, x_0: Batch, *given: Any) -> PerExample:
    """log p(x_0 | ...) of a batch, in nats.

    Args:
        decoder: a `Decoder`, or one that takes other arguments.
        x_0: shape (B, *x).
        given: what the decoder takes, each with a leading axis B: x_hat, x_1 and the level of a `Decoder`.

    Raises:
        TypeError: the decoder returns no distribution. ValueError: its log-probability is not one number an example, or
            its mean has another shape than x_0.
    """

    def log_prob(x, *given):
        distribution = check_distribution(decoder(*given), "decoder", "log_prob")
        shape = getattr(getattr(distribution, "mean", x), "shape", x.shape)
        if shape != x.shape:  # they would broadcast
            raise ValueError(f"the decoder's distribution has a mean of shape {shape} for x_0 of shape {x.shape}")
        return check_values(distribution.log_prob(x), (), "log_prob of the decoder's distribution")

    return jax.vmap(log_prob)(x_0, *given)


class DiffusionBound(NamedTuple):
    """The three terms of the bound on -log p(x_0), in nats; each shape (B,)."""

    prior: PerExample
    reconstruction: PerExample
    diffusion: PerExample

    @property
    def total(self) -> PerExample:
        """The bound itself."""
        return self.prior + self.reconstruction + self.diffusion


class DiffusionCurve(NamedTuple):
    """The diffusion term spread out over the noise levels, the least noisy first.

    Fields:
        log_snr: the level looked at in each of K slices of time, shape (K, B).
        nats: the estimate of that slice's share of the term, shape (K, B); summed over K it is the term.
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

    With `terms` None every step 2..T is visited once, each with fresh noise: the sum L_DDPM. With `terms` = K, K steps
    spread evenly over 2..T from a random start (low discrepancy) stand for all, times (T - 1) / K.

    Args:
        denoiser: predicts `prediction_type`; called once a term, with the whole batch.
        key: for the noises and steps.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        decoder: p(x_0 | x_1) of one example.
        prediction_type: what the denoiser predicts.
        terms: number of diffusion terms, None for all.
        prior: p(x_T), with scalar fields, as in `prior_kl`.

    Returns:
        `Bound`, each field (B,).

    Raises:
        ValueError: unknown prediction_type, or terms below 1.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 5; Kingma et al. 2021, arXiv:2107.00630 (low-discrepancy t).
    """
    if terms is not None and terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term, or None for all")
    if terms is None or schedule.num_steps == 1:
        terms = schedule.num_steps - 1
    key_1, key_terms = jax.random.split(key)
    diffusion = _discrete_terms(denoiser, key_terms, x_0, schedule, prediction_type, terms).nats.sum(0)
    at_end = jax.vmap(lambda x: prior_kl(x, schedule(schedule.num_steps), prior))(x_0)
    level = schedule(jnp.ones(x_0.shape[0], jnp.int32))
    return DiffusionBound(at_end, reconstruction_nll(denoiser, key_1, x_0, level, decoder, prediction_type), diffusion)


def _discrete_terms(denoiser, key, x_0, schedule, prediction_type, terms) -> DiffusionCurve:
    key_t, key_eps = jax.random.split(key)
    num_steps = schedule.num_steps
    share = (num_steps - 1) / terms if terms else 0.0

    def visit(_, index):
        t = _spread_steps(key_t, index, terms, num_steps, x_0.shape[0])
        step = schedule.step(t - 1, t)
        error = denoising_error(denoiser, jax.random.fold_in(key_eps, index), x_0, step.t, prediction_type)
        nats = share * jax.vmap(partial(diffusion_weight, prediction_type=prediction_type))(step) * error
        return None, DiffusionCurve(step.t.log_snr, nats)

    return scan(visit, None, jnp.arange(terms))[1]


def _spread_steps(key, index, terms, num_steps, batch):
    """Step number `index` of `terms` spread over 2..T: exactly all of them when terms = T - 1, else a random comb."""
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

    The expectation depends on the schedule by its levels at t_0 and 1 alone, not by its shape between them; the
    variance does. The decoder stands at t_0. The integral is estimated at `terms` times an example, spread evenly from
    a random start.

    Args:
        denoiser, key, x_0, decoder, prediction_type, prior: as in `bound`.
        schedule: continuous.
        terms: how many times an example, at least 1.
        t_0: where the schedule is cut; 0 for one that begins with noise.

    Returns:
        `Bound`, each field (B,).

    Raises:
        ValueError: unknown prediction_type, terms below 1, or a schedule without noise at t_0.

    Source: Kingma et al. 2021, arXiv:2107.00630, section 5.1.
    """
    if terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term")
    key_1, key_terms = jax.random.split(key)
    diffusion = _continuous_terms(denoiser, key_terms, x_0, schedule, prediction_type, terms, t_0).nats.sum(0)
    at_end = jax.vmap(lambda x: prior_kl(x, schedule(jnp.ones((), at_least_float32(x.dtype))), prior))(x_0)
    level = schedule(jnp.full(x_0.shape[:1], t_0, at_least_float32(x_0.dtype)))
    return DiffusionBound(at_end, reconstruction_nll(denoiser, key_1, x_0, level, decoder, prediction_type), diffusion)


def _continuous_terms(denoiser, key, x_0, schedule, prediction_type, terms, t_0) -> DiffusionCurve:
    key_t, key_eps = jax.random.split(key)
    start = jax.random.uniform(key_t, x_0.shape[:1], at_least_float32(x_0.dtype))

    def visit(_, index):
        t = t_0 + (1.0 - t_0) * (start + index.astype(start.dtype)) / terms
        level, slope = schedule(t), jax.vmap(jax.grad(schedule.log_snr))(t)
        error = denoising_error(denoiser, jax.random.fold_in(key_eps, index), x_0, level, prediction_type)
        nats = (
            (1.0 - t_0)
            / terms
            * jax.vmap(partial(diffusion_rate, prediction_type=prediction_type))(level, slope)
            * error
        )
        return None, DiffusionCurve(level.log_snr, nats)

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
    """The diffusion term of `bound` (a discrete schedule) or of `continuous_bound`, slice by slice of time.

    Args:
        denoiser, key, x_0, prediction_type: as in `bound`.
        schedule: discrete, or continuous from t_0 on.
        terms: K, the number of slices; at most T - 1 of a discrete schedule.
        t_0: as in `continuous_bound`.

    Returns:
        `Curve`, each field (K, B).

    Raises:
        ValueError: unknown prediction_type, or as `continuous_bound`.

    Source: Kingma et al. 2021, arXiv:2107.00630, section 5.
    """
    if isinstance(schedule, DiscreteSchedule):
        if not 1 <= terms <= schedule.num_steps - 1:
            raise ValueError(f"terms is {terms}: this schedule has {schedule.num_steps - 1} diffusion terms")
        return _discrete_terms(denoiser, key, x_0, schedule, prediction_type, terms)
    if terms < 1:
        raise ValueError(f"terms is {terms}: the curve needs at least one slice")
    return _continuous_terms(denoiser, key, x_0, schedule, prediction_type, terms, t_0)


def bits_per_dim(nats: Real, num_dims: int, bin_width: float = 1.0) -> Real:
    """Nats of one example as bits per dimension (ELBO-13).

        nats / (D log 2) - log2(bin_width)

    Args:
        nats: -log p of an example, or a bound on it; any shape.
        num_dims: D, its number of dimensions.
        bin_width: 1 for the probability of discrete data; for a *density* of quantised data the width of a bin,
            2 / 255 for 8 bits on [-1, 1].

    Source: Theis et al. 2016, arXiv:1511.01844.
    """
    return nats / (num_dims * jnp.log(2.0)) - jnp.log2(bin_width)
