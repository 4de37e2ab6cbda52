"""The reverse step p(x_s | x_t) = N(mu_theta, var) when its variance is *not* the posterior's: learned, or analytic.

Learned (Nichol & Dhariwal): a network says, number by number, where between the posterior's variance and the forward
step's the variance lies; `learned_bound` is the bound of such a model, `hybrid_loss` and `vlb_loss` train it. Analytic
(Bao et al.): the best variance of a given mean has a closed form, `analytic_variance`, in terms of `eps_power`, an
average over data. Whatever the variance, `reverse_kl` is its term of the bound.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.elbo import DiffusionBound, _spread_steps, decoder_log_prob, diffusion_weight, prior_kl
from vdm_jax.gaussian import STANDARD_NORMAL, Prior, variance_kl
from vdm_jax.likelihoods import DiscretizedGaussian, Likelihood
from vdm_jax.noise_levels import NoiseLevel, Step
from vdm_jax.parameterization import prediction_target, to_eps, to_x_0
from vdm_jax.time_sampling import TimeSampling, sample_timesteps
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
    check_prediction,
    evaluate,
    per_example,
)

PerStep = Float[Array, "T *y"]  # step t's at index t - 1: a number, or one for every dimension


@runtime_checkable
class VarianceDenoiser(Protocol):
    """`denoiser(x_t, level) -> (prediction, fraction)`: a `types.Denoiser` that gives a variance as well.

    Both are of shape (B, *x): the prediction in one of the four parameterisations, and the fraction f of
    `interpolated_variance`, which may leave [0, 1].
    """

    def __call__(self, x_t: Batch, level: Any, /) -> tuple[Batch, Batch]: ...


def evaluate_variance(denoiser: VarianceDenoiser, x_t: Batch, level: NoiseLevel) -> tuple[Batch, Batch]:
    """The prediction and the variance fraction of a batch, both checked as in `types.evaluate`.

    Raises:
        TypeError: the denoiser returned something else than two arrays.
    """
    fractions = []

    def first(x_t, level):
        output = denoiser(x_t, level)
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(
                f"the denoiser returned a {type(output).__name__}: with learned variances it returns "
                "(prediction, fraction)"
            )
        fractions.append(output[1])
        return output[0]

    prediction = evaluate(first, x_t, level)
    return prediction, check_prediction(fractions[0], x_t, "denoiser's fraction")


@runtime_checkable
class VarianceDecoder(Protocol):
    """`decoder(x_hat, fraction, x_1, level)`: the law p(x_0 | x_1) of one example; an `elbo.DiffusionDecoder` told f as well."""

    def __call__(self, x_hat: X, fraction: X, x_1: X, level: NoiseLevel, /) -> Likelihood: ...


def interpolated_variance(fraction: Real, step: Step) -> Real:
    """exp(f log beta_t + (1 - f) log beta~_t), geometric between the two extremes (VAR-1).

        beta~ = sigma_s^2 (1 - r)     the posterior's, f = 0: exact for data that is one point
        beta  = sigma_t^2 (1 - r)     the forward step's, f = 1: exact for data from N(0, I), variance preserved

    Args:
        fraction: f, any shape; one number for every dimension, or one for all.
        step: the levels s < t, scalars. Where s is clean there is nothing between (beta~ = 0), and the variance is 0:
            that step is the decoder's, see `InterpolatedDecoder`.

    Returns:
        The variance, of the fraction's shape.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """
    return forward.posterior_variance(step) * jnp.exp(fraction * _log_range(step))


def variance_fraction(var: Real, step: Step) -> Real:
    """The f whose `interpolated_variance` is var > 0: its inverse, by which a fixed variance poses as a learned one.

    Where s is clean it is 0.
    """
    noisy = step.s.sigma > 0
    ratio = var / jnp.where(noisy, forward.posterior_variance(step), var)
    return jnp.log(ratio) / jnp.where(noisy, _log_range(step), 1.0)


def _log_range(step: Step) -> Real:
    """log(beta / beta~) = log(sigma_t^2 / sigma_s^2); 0 where s is clean."""
    return 2.0 * jnp.log(step.t.sigma / jnp.where(step.s.sigma > 0, step.s.sigma, step.t.sigma))


def reverse_step_kl(target: X, prediction: X, log_ratio: Real, step: Step, prediction_type: PredictionType) -> Scalar:
    """KL(q(x_s | x_t, x_0) || N(mu_theta, var)) in nats, for any variance e^y sigma_q^2 (VAR-1).

        sum[ e^-y w (target - prediction)^2 + (e^-y - 1 + y) / 2 ],     w of `elbo.diffusion_weight`

    With y = 0 it is `elbo.diffusion_kl`. No mean or variance is subtracted from its like, so small steps lose nothing.

    Args:
        target, prediction: the true x_0, eps, v or score and the predicted one, shape (*x).
        log_ratio: y = log(var / sigma_q^2), shape (*x) or a scalar.
        step: the levels s < t, scalars, s not clean.
        prediction_type: what is predicted.

    Returns:
        A scalar.

    Raises:
        ValueError: unknown prediction_type.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1.
    """
    squares = diffusion_weight(step, prediction_type) * jnp.square(target - prediction)
    return jnp.sum(jnp.exp(-log_ratio) * squares + variance_kl(-log_ratio))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InterpolatedDecoder:
    """Nichol & Dhariwal's p(x_0 | x_1), a `VarianceDecoder`: `DiscretizedGaussian` around x_hat, its width learned.

        scale^2 = exp(f log beta_1 + (1 - f) log beta~_2),  beta_1 = sigma_1^2

    Above is the forward variance of step 1. Below should be its posterior's, which is a point: that of step 2 stands in
    for it. Their code does the same by "clipping" a table; here it is a choice of decoder, and not the kernel's.

    Fields:
        schedule: the schedule, T >= 2.
        levels: number of values on [-1, 1].

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, and its code.
    """

    schedule: Any
    levels: int = field(metadata={"static": True})

    def __call__(self, x_hat: X, fraction: X, x_1: X, level: NoiseLevel) -> DiscretizedGaussian:
        """The law of x_0 given x_1."""
        del x_1
        low = jnp.sqrt(forward.posterior_variance(self.schedule.step(1, 2)))
        return DiscretizedGaussian(
            x_hat, scale=low * jnp.exp(fraction * jnp.log(level.sigma / low)), levels=self.levels
        )


@compiled(static=("terms",))
def learned_variance_bound(
    denoiser: VarianceDenoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: VarianceDecoder,
    *,
    prediction_type: PredictionType = "eps",
    terms: int | None = None,
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """`elbo.bound` of a model with a learned variance: one unbiased estimate per example (ELBO-3, VAR-1).

    With f = 0 everywhere it is `elbo.bound`, noise for noise.

    Args:
        denoiser: predicts `prediction_type` and f; called once a term, with the whole batch.
        key: for the noises and steps.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        decoder: p(x_0 | x_1) of one example.
        prediction_type, terms, prior: as in `elbo.bound`.

    Returns:
        `Bound`, each field (B,), nats.

    Raises:
        ValueError: unknown prediction_type, or terms below 1.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1.
    """
    if terms is not None and terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term, or None for all")
    if terms is None or schedule.num_steps == 1:
        terms = schedule.num_steps - 1
    key_1, key_terms = jax.random.split(key)
    diffusion = _learned_terms(denoiser, key_terms, x_0, schedule, prediction_type, terms)
    at_end = jax.vmap(lambda x: prior_kl(x, schedule(schedule.num_steps), prior))(x_0)
    level = schedule(jnp.ones(x_0.shape[:1], jnp.int32))
    keys = jax.random.split(key_1, x_0.shape[0])
    x_1 = jax.vmap(lambda x, lv, k: forward.marginal(x, lv).sample(k))(x_0, level, keys).astype(x_0.dtype)
    prediction, fraction = evaluate_variance(denoiser, x_1, level)
    x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(prediction, x_1, level)
    return DiffusionBound(at_end, -decoder_log_prob(decoder, x_0, x_hat, fraction, x_1, level), diffusion)


def _learned_terms(denoiser, key, x_0, schedule, prediction_type, terms) -> PerExample:
    key_t, key_eps = jax.random.split(key)
    batch, num_steps = x_0.shape[0], schedule.num_steps

    def visit(total, index):
        step = _pair(schedule, _spread_steps(key_t, index, terms, num_steps, batch))
        eps = jax.random.normal(jax.random.fold_in(key_eps, index), x_0.shape, x_0.dtype)
        prediction, fraction = evaluate_variance(denoiser, _noisy(x_0, eps, step.t), step.t)
        return total + _variational(
            _target(x_0, eps, step.t, prediction_type), prediction, fraction, step, prediction_type
        ), None

    total = scan(visit, jnp.zeros(batch, at_least_float32(x_0.dtype)), jnp.arange(terms))[0]
    return (num_steps - 1) / terms * total if terms else total


def _pair(schedule, t) -> Step:
    return schedule.step(t - 1, t)


def _noisy(x_0, eps, level) -> Batch:
    """x_t in the type of x_0."""
    return jax.vmap(lambda x, e, lv: lv.alpha * x + lv.sigma * e)(x_0, eps, level).astype(x_0.dtype)


def _target(x_0, eps, level, prediction_type) -> Batch:
    return jax.vmap(partial(prediction_target, prediction_type=prediction_type))(x_0, eps, level)


def _variational(truth, prediction, fraction, step, prediction_type) -> PerExample:
    return jax.vmap(lambda y, p, f, st: reverse_step_kl(y, p, f * _log_range(st), st, prediction_type))(
        truth, prediction, fraction, step
    )


class VariationalLoss(NamedTuple):
    """One step's estimate of L_vlb, each field of shape (B,).

    Fields:
        t: the step, 1..T.
        vlb: T times its term, in nats and summed over the example: the decoder's -log p(x_0 | x_1) at t = 1, else
            the divergence. Over uniform t its mean is the bound less the prior's term, which has nothing to learn.
        importance: 1 / (T p_t), by which the loss stays unbiased; 1 where t is uniform.
    """

    t: Int[Array, " b"]
    vlb: PerExample
    importance: PerExample

    @property
    def loss(self) -> PerExample:
        """importance * vlb."""
        return self.importance * self.vlb


class HybridLoss(NamedTuple):
    """The parts of L_hybrid, each of shape (B,).

    Fields:
        t: the step, 1..T.
        squared_error: ||target - prediction||^2, summed over the example.
        vlb: as in `VariationalLoss`; its gradient reaches the variance alone.
        vlb_weight: lambda.
        importance: as in `VariationalLoss`.
    """

    t: Int[Array, " b"]
    squared_error: PerExample
    vlb: PerExample
    vlb_weight: PerExample
    importance: PerExample

    @property
    def loss(self) -> PerExample:
        """importance * (squared_error + vlb_weight * vlb)."""
        return self.importance * (self.squared_error + self.vlb_weight * self.vlb)


@compiled()
def vlb_loss(
    denoiser: VarianceDenoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: VarianceDecoder,
    *,
    prediction_type: PredictionType = "eps",
    time_sampling: TimeSampling = "independent",
    t: Int[Array, " b"] | None = None,
    importance: PerExample | None = None,
) -> VariationalLoss:
    """L_vlb at one random step t in 1..T per example, gradients through mean and variance (VAR-2).

    Args:
        denoiser: predicts `prediction_type` and f; called once, with the whole batch.
        key: for the steps and the noise.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule, T >= 2.
        decoder: p(x_0 | x_1) of one example.
        prediction_type: what the denoiser predicts.
        time_sampling: as in `time_sampling.sample_timesteps`.
        t: the steps 1..T, shape (B,), where the caller draws them: 1 + bin of `time_sampling.importance_sample`. NaN outside of 1..T.
        importance: 1 / (T p_t), the weight of `time_sampling.importance_sample`; None is 1.

    Returns:
        `VariationalLoss`, each field (B,), nats.

    Raises:
        ValueError: unknown prediction_type, a table of one step, or t or importance of another shape than (B,).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, sections 3.1 and 3.3.
    """
    importance = _importance(importance, x_0)
    t, _, vlb = _one_step(
        denoiser,
        key,
        x_0,
        schedule,
        decoder,
        t,
        prediction_type=prediction_type,
        time_sampling=time_sampling,
        held=False,
    )
    return VariationalLoss(t, vlb, importance)


@compiled()
def hybrid_loss(
    denoiser: VarianceDenoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: VarianceDecoder,
    *,
    prediction_type: PredictionType = "eps",
    vlb_weight: Scalar | float = 1e-3,
    time_sampling: TimeSampling = "independent",
    t: Int[Array, " b"] | None = None,
    importance: PerExample | None = None,
) -> HybridLoss:
    """L_hybrid = L_simple + lambda L_vlb at one random step: L_simple trains the mean, L_vlb the variance (VAR-2).

    Inside L_vlb the prediction is held fixed. L_simple is a sum of squares over the example, L_vlb nats of the example;
    both divided by D they are Nichol & Dhariwal's, but that their code counts L_vlb in bits: theirs is
    vlb_weight = 1e-3 / log 2.

    Args:
        vlb_weight: lambda.
        denoiser, key, x_0, schedule, decoder, prediction_type, time_sampling, t, importance: as in `vlb_loss`.

    Returns:
        `HybridLoss`, each field (B,).

    Raises:
        ValueError: unknown prediction_type, a table of one step, or t or importance of another shape than (B,).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 16.
    """
    importance = _importance(importance, x_0)
    t, squared_error, vlb = _one_step(
        denoiser,
        key,
        x_0,
        schedule,
        decoder,
        t,
        prediction_type=prediction_type,
        time_sampling=time_sampling,
        held=True,
    )
    return HybridLoss(t, squared_error, vlb, vlb_weight * jnp.ones_like(vlb), importance)


def _importance(given, x_0) -> PerExample:
    """The importance weights, 1 unless given, as float32 or a wider type."""
    if given is None:
        return jnp.ones(x_0.shape[:1], at_least_float32(x_0.dtype))
    if given.shape != x_0.shape[:1]:
        raise ValueError(f"importance has shape {given.shape}: it must be {x_0.shape[:1]}, one weight for each example")
    return given.astype(at_least_float32(given.dtype))


def _one_step(denoiser, key, x_0, schedule, decoder, t, *, prediction_type, time_sampling, held):
    if schedule.num_steps < 2:
        raise ValueError("a table of one step has a decoder and no variance to learn: take T >= 2")
    if t is not None and t.shape != x_0.shape[:1]:
        raise ValueError(f"t has shape {t.shape}: it must be {x_0.shape[:1]}, one step for each example")
    key_t, key_eps = jax.random.split(key)
    t = sample_timesteps(key_t, x_0.shape[0], schedule.num_steps, time_sampling=time_sampling) if t is None else t
    eps, level = jax.random.normal(key_eps, x_0.shape, x_0.dtype), schedule(t)
    x_t, truth = _noisy(x_0, eps, level), _target(x_0, eps, level, prediction_type)
    prediction, fraction = evaluate_variance(denoiser, x_t, level)
    squared_error = per_example(jnp.square(truth - prediction))
    seen = jax.lax.stop_gradient(prediction) if held else prediction
    # Each form of the term is evaluated where it is meant to be, and elsewhere at a safe point.
    divergence = _variational(truth, seen, fraction, _pair(schedule, jnp.maximum(t, 2)), prediction_type)
    x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(seen, x_t, level)
    x_hat = jax.vmap(lambda one, h, x: jnp.where(one, h, x))(t == 1, x_hat, x_0)
    cost = -decoder_log_prob(decoder, x_0, x_hat, fraction, x_t, schedule(jnp.ones_like(t)))
    term = jnp.where(t == 1, cost, jnp.where(t > 1, divergence, jnp.nan))
    return t, squared_error, schedule.num_steps * term


def optimal_variance(step: Step, error: Real) -> Real:
    """sigma_q^2 + c_2^2 error: the variance that makes N(mu_theta, var) closest to the data's reverse kernel (VAR-3).

    x_s = c_1 x_t + c_2 x_0 + sigma_q eps varies around mu_theta = c_1 x_t + c_2 x_hat by its own noise and by what is
    not known of x_0. It minimises the bound, whose term is then log(var / sigma_q^2) / 2 a dimension.

    Args:
        step: the levels s < t, scalars. s may be clean: then it is the best variance of a normal decoder around x_hat.
        error: E (x_0 - x_hat)^2 of one dimension, or of each; E Var[x_0 | x_t] where x_hat is the best there is.

    Source: Bao et al. 2022, arXiv:2201.06503, theorem 1; with an imperfect x_hat, Bao et al. 2022, arXiv:2206.07309.
    """
    return forward.posterior_variance(step) + forward.posterior_coefficients(step).c_2 ** 2 * error


def analytic_variance(step: Step, eps_power: Real) -> Real:
    """The best isotropic variance of the reverse step, from the size of the optimal eps_hat alone (VAR-3).

        sigma*^2 = sigma_q^2 + c_2^2 (sigma_t / alpha_t)^2 (1 - E||eps_hat||^2 / D)

    since the unexplained part of eps is that of x_0: E Var[x_0 | x_t] = (sigma_t / alpha_t)^2 (1 - E eps_hat^2). It is
    `matched_variance` for the best denoiser. At high noise the power is near 1, and 1 - power is as exact as that
    estimate; for a network `matched_variance` of its measured error does not cancel, and allows for its imperfection.

    Args:
        step: the levels s < t, scalars; s may be clean.
        eps_power: E||eps_hat||^2 / D, or E eps_hat^2 of each dimension. Above 1 it counts as 1.

    Source: Bao et al. 2022, arXiv:2201.06503, theorem 1.
    """
    return optimal_variance(step, jnp.maximum(1.0 - eps_power, 0.0) * (step.t.sigma / step.t.alpha) ** 2)


class VarianceBounds(NamedTuple):
    """Between these `analytic_variance` lies, whatever the data."""

    lower: Real
    upper: Real


def variance_bounds(step: Step, half_width: Real | float | None = None) -> VarianceBounds:
    """sigma_q^2 <= sigma*^2 <= sigma_q^2 + c_2^2 min(sigma_t / alpha_t, (b - a) / 2)^2 (VAR-4).

    Args:
        step: the levels s < t, scalars.
        half_width: (b - a) / 2 for data in [a, b], 1 for images on [-1, 1]; None for data without bounds.

    Source: Bao et al. 2022, arXiv:2201.06503, theorem 2.
    """
    widest = step.t.sigma / step.t.alpha
    widest = widest if half_width is None else jnp.minimum(widest, half_width)
    return VarianceBounds(forward.posterior_variance(step), optimal_variance(step, widest**2))


@compiled()
def eps_second_moment(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    per_dim: bool = False,
) -> PerStep:
    """E ||eps_hat||^2 / D at every step 1..T, the mean over a batch of data with fresh noise (VAR-3).

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        key: for the noise.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        prediction_type: what the denoiser predicts.
        per_dim: E eps_hat^2 of each dimension instead.

    Returns:
        Shape (T,), that of step t at index t - 1; or (T, *x). Means over several batches may be averaged.

    Raises:
        ValueError: unknown prediction_type.

    Source: Bao et al. 2022, arXiv:2201.06503, section 3 (Gamma_n, in terms of the score).
    """

    def visit(_, t):
        level = schedule(jnp.full(x_0.shape[:1], t))
        eps = jax.random.normal(jax.random.fold_in(key, t), x_0.shape, x_0.dtype)
        x_t = _noisy(x_0, eps, level)
        eps_hat = jax.vmap(partial(to_eps, prediction_type=prediction_type))(evaluate(denoiser, x_t, level), x_t, level)
        power = jnp.square(eps_hat).mean(0)
        return None, power if per_dim else power.mean()

    return scan(visit, None, jnp.arange(1, schedule.num_steps + 1))[1]
