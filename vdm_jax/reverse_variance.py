"""Reverse-process variance: p(x_s | x_t) = N(mu_theta, var) with a learned or an analytic variance.

Learned (Nichol & Dhariwal): the network returns, for every dimension, a position between the posterior's variance and
the forward step's. `learned_variance_bound` is the bound of such a model; `hybrid_loss` and `vlb_loss` train it.
Analytic (Bao et al.): `analytic_dpm_variance` is the closed form of the optimal variance for a given mean, in terms of
`eps_second_moment`, an average over data. `reverse_step_kl` is the bound's diffusion term for any variance.
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
from vdm_jax.elbo import DiffusionBound, assemble_bound, decoder_log_prob, diffusion_weight
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
    PerStep,
    PredictionType,
    Real,
    Scalar,
    X,
    at_least_float32,
    check_prediction,
    evaluate,
    per_example,
)

__all__ = [
    "HybridLoss",
    "InterpolatedDecoder",
    "VarianceBounds",
    "VarianceDecoder",
    "VarianceDenoiser",
    "VariationalLoss",
    "analytic_dpm_variance",
    "eps_second_moment",
    "evaluate_variance",
    "hybrid_loss",
    "interpolated_variance",
    "learned_variance_bound",
    "optimal_variance",
    "reverse_step_kl",
    "split_learned_range",
    "variance_bounds",
    "variance_fraction",
    "vlb_loss",
]

_Outputs = Float[Array, "b *y"]  # of a network, with more channels than x


@runtime_checkable
class VarianceDenoiser(Protocol):
    """`denoiser(x_t, level) -> (prediction, fraction)`: a `types.Denoiser` with a second output for the variance.

    Both have shape (B, *x): a prediction of one of the four types, and the fraction f of `interpolated_variance`. The
    fraction may be outside [0, 1].
    """

    def __call__(self, x_t: Batch, level: Any, /) -> tuple[Batch, Batch]: ...


def evaluate_variance(denoiser: VarianceDenoiser, x_t: Batch, level: NoiseLevel) -> tuple[Batch, Batch]:
    """The prediction and the variance fraction of a batch, both checked as in `types.evaluate`.

    Raises:
        TypeError: the denoiser does not return two arrays.
    """
    fractions = []

    def first(x_t, level):
        output = denoiser(x_t, level)
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(
                f"the denoiser returned a {type(output).__name__}: a denoiser with learned variances must return "
                "(prediction, fraction)"
            )
        fractions.append(output[1])
        return output[0]

    prediction = evaluate(first, x_t, level)
    return prediction, check_prediction(fractions[0], x_t, "denoiser's fraction")


@runtime_checkable
class VarianceDecoder(Protocol):
    """`decoder(x_hat, fraction, x_1, level)` returns the distribution p(x_0 | x_1) of one example.

    An `elbo.DiffusionDecoder` with the variance fraction f as an additional argument.
    """

    def __call__(self, x_hat: X, fraction: X, x_1: X, level: NoiseLevel, /) -> Likelihood: ...


def interpolated_variance(fraction: Real, step: Step) -> Real:
    """exp(f log beta_t + (1 - f) log beta~_t), the geometric interpolation between two extreme variances (VAR-1).

        beta~ = sigma_s^2 (1 - r)     the posterior's, f = 0: exact for data that is a single point
        beta  = sigma_t^2 (1 - r)     the forward step's, f = 1: exact for N(0, I) data and preserved variance

    Args:
        fraction: f, any shape; one number for every dimension, or one for all.
        step: the levels s < t, scalars. If s is clean, beta~ and the result are 0: the decoder replaces that step, see
            `InterpolatedDecoder`.

    Returns:
        The variance, of the fraction's shape.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """
    return forward.posterior_variance(step) * jnp.exp(fraction * _log_range(step))


def variance_fraction(var: Real, step: Step) -> Real:
    """The f whose `interpolated_variance` is var > 0, its inverse; 0 if s is clean.

    Use it to evaluate a fixed variance with functions that expect a learned one.
    """
    noisy = step.s.sigma > 0
    ratio = var / jnp.where(noisy, forward.posterior_variance(step), var)
    return jnp.log(ratio) / jnp.where(noisy, _log_range(step), 1.0)


def _log_range(step: Step) -> Real:
    """log(beta / beta~) = log(sigma_t^2 / sigma_s^2); 0 if s is clean."""
    return 2.0 * jnp.log(step.t.sigma / jnp.where(step.s.sigma > 0, step.s.sigma, step.t.sigma))


def split_learned_range(output: _Outputs, axis: int = -1) -> tuple[Batch, Batch]:
    """The prediction and the variance fraction, from the output of a network with twice the channels of x (VAR-1).

    The second half of the channels is v on [-1, 1], and f = (v + 1) / 2: the convention of improved-diffusion, and of
    diffusers with `variance_type="learned_range"`. Use both for a `VarianceDenoiser`, and the first for a
    `types.Denoiser`.

    Args:
        output: shape (B, *x) with 2 C channels.
        axis: of the channels; 1 for PyTorch's order.

    Returns:
        (prediction, fraction), with C channels each.

    Raises:
        ValueError: the number of channels is odd.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1, and its code.
    """
    if output.shape[axis] % 2:
        raise ValueError(
            f"the network's output of shape {output.shape} has {output.shape[axis]} channels in axis {axis}: a network "
            "with learned variances has an even number of them"
        )
    prediction, v = jnp.split(output, 2, axis=axis)
    return prediction, 0.5 * (v + 1.0)


def reverse_step_kl(target: X, prediction: X, log_ratio: Real, step: Step, prediction_type: PredictionType) -> Scalar:
    """KL(q(x_s | x_t, x_0) || N(mu_theta, var)) in nats, for any variance var = e^y sigma_q^2 (VAR-1).

        sum[ e^-y w (target - prediction)^2 + (e^-y - 1 + y) / 2 ],     w of `elbo.diffusion_weight`

    With y = 0 it is `elbo.diffusion_kl`. It subtracts no two means and no two variances, so it is accurate for small
    steps.

    Args:
        target, prediction: the true and the predicted x_0, eps, v or score, shape (*x).
        log_ratio: y = log(var / sigma_q^2), shape (*x) or a scalar.
        step: the levels s < t, scalars, s not clean.
        prediction_type: what the denoiser predicts.

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
    """Nichol & Dhariwal's p(x_0 | x_1), a `VarianceDecoder`: `DiscretizedGaussian` around x_hat with a learned scale.

        scale^2 = exp(f log beta_1 + (1 - f) log beta~_2),  beta_1 = sigma_1^2

    The upper end is the forward variance of step 1. The posterior variance of step 1 is 0, so that of step 2 is the
    lower end. Their code obtains the same by clipping the array of log-variances; here it is part of the decoder.

    Fields:
        schedule: a discrete schedule, T >= 2.
        levels: number of values on [-1, 1].

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, and its code.
    """

    schedule: Any
    levels: int = field(metadata={"static": True})

    def __call__(self, x_hat: X, fraction: X, x_1: X, level: NoiseLevel) -> DiscretizedGaussian:
        """The distribution of x_0 given x_1."""
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
    """`elbo.bound` for a model with a learned variance: one unbiased estimate per example (ELBO-3, VAR-1).

    With f = 0 everywhere it is `elbo.bound`, with the same noise.

    Args:
        denoiser: predicts `prediction_type` and f; evaluated once per term and for the decoder, on the whole batch.
        key: for the noise and the steps.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        decoder: p(x_0 | x_1) of one example.
        prediction_type, terms, prior: as in `elbo.bound`.

    Returns:
        `DiffusionBound`, each field (B,), nats.

    Raises:
        ValueError: unknown prediction_type, or terms below 1.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1.
    """

    def step_kl(key, step):
        x_t, target = _noisy_and_target(key, x_0, step.t, prediction_type)
        prediction, fraction = evaluate_variance(denoiser, x_t, step.t)
        return _reverse_step_kl(target, prediction, fraction, step, prediction_type)

    def reconstruction(x_1, level):
        prediction, fraction = evaluate_variance(denoiser, x_1, level)
        x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(prediction, x_1, level)
        return -decoder_log_prob(decoder, x_0, x_hat, fraction, x_1, level)

    return assemble_bound(step_kl, reconstruction, key, x_0, schedule, terms=terms, prior=prior)


def _noisy_and_target(key, x_0, level, prediction_type) -> tuple[Batch, Batch]:
    """x_t with fresh noise, and what the denoiser should predict for it."""
    eps = jax.random.normal(key, x_0.shape, x_0.dtype)
    target = jax.vmap(partial(prediction_target, prediction_type=prediction_type))(x_0, eps, level)
    return jax.vmap(forward.add_noise)(x_0, eps, level), target


def _reverse_step_kl(target, prediction, fraction, step, prediction_type) -> PerExample:
    return jax.vmap(lambda y, p, f, st: reverse_step_kl(y, p, f * _log_range(st), st, prediction_type))(
        target, prediction, fraction, step
    )


class VariationalLoss(NamedTuple):
    """One step's estimate of L_vlb, each field of shape (B,).

    Fields:
        t: the step, 1..T.
        vlb: T times the term of step t, in nats and summed over the example: -log p(x_0 | x_1) at t = 1, the KL
            elsewhere. Its mean over uniform t is the bound without the prior term, which has no parameters.
        importance: the importance weight 1 / (T p_t), which keeps the loss unbiased; 1 for uniform t.
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
        vlb: as in `VariationalLoss`; its gradient reaches only the variance.
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
    """L_vlb at one random step t in 1..T per example, with gradients for mean and variance (VAR-2).

    Args:
        denoiser: predicts `prediction_type` and f; evaluated once, on the whole batch.
        key: for the steps and the noise.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule, T >= 2.
        decoder: p(x_0 | x_1) of one example.
        prediction_type: what the denoiser predicts.
        time_sampling: how the steps of the batch are sampled, as in `time_sampling.sample_timesteps`.
        t: steps 1..T to use instead, shape (B,): 1 + bin of `time_sampling.importance_sample`. The result is NaN
            outside 1..T.
        importance: 1 / (T p_t), the weight of `time_sampling.importance_sample`; None is 1.

    Returns:
        `VariationalLoss`, each field (B,), nats.

    Raises:
        ValueError: unknown prediction_type, a schedule of one step, or t or importance not of shape (B,).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, sections 3.1 and 3.3.
    """
    importance = _importance(importance, x_0)
    t, _, vlb = _one_step(
        denoiser, key, x_0, schedule, decoder, t,
        prediction_type=prediction_type, time_sampling=time_sampling, fixed_prediction=False,
    )  # fmt: skip
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

    L_vlb stops the gradient of the prediction. L_simple is a sum of squares over the example and L_vlb is in nats per
    example. Nichol & Dhariwal divide both by D and measure L_vlb in bits: their lambda = 1e-3 is vlb_weight =
    1e-3 / log 2.

    Args:
        vlb_weight: lambda.
        denoiser, key, x_0, schedule, decoder, prediction_type, time_sampling, t, importance: as in `vlb_loss`.

    Returns:
        `HybridLoss`, each field (B,).

    Raises:
        ValueError: unknown prediction_type, a schedule of one step, or t or importance not of shape (B,).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 16.
    """
    importance = _importance(importance, x_0)
    t, squared_error, vlb = _one_step(
        denoiser, key, x_0, schedule, decoder, t,
        prediction_type=prediction_type, time_sampling=time_sampling, fixed_prediction=True,
    )  # fmt: skip
    return HybridLoss(t, squared_error, vlb, vlb_weight * jnp.ones_like(vlb), importance)


def _importance(importance, x_0) -> PerExample:
    """The importance weights in float32 or a wider type; 1 by default."""
    if importance is None:
        return jnp.ones(x_0.shape[:1], at_least_float32(x_0.dtype))
    if importance.shape != x_0.shape[:1]:
        raise ValueError(
            f"importance has shape {importance.shape}: it must be {x_0.shape[:1]}, one weight for each example"
        )
    return importance.astype(at_least_float32(importance.dtype))


def _one_step(denoiser, key, x_0, schedule, decoder, t, *, prediction_type, time_sampling, fixed_prediction):
    """The steps, the squared error and T times the bound's term at each."""
    if schedule.num_steps < 2:
        raise ValueError("the schedule has num_steps=1, whose only step is the decoder's: take num_steps=2 or more")
    if t is not None and t.shape != x_0.shape[:1]:
        raise ValueError(f"t has shape {t.shape}: it must be {x_0.shape[:1]}, one step for each example")
    key_t, key_eps = jax.random.split(key)
    t = sample_timesteps(key_t, x_0.shape[0], schedule.num_steps, time_sampling=time_sampling) if t is None else t
    level = schedule(t)
    x_t, target = _noisy_and_target(key_eps, x_0, level, prediction_type)
    prediction, fraction = evaluate_variance(denoiser, x_t, level)
    squared_error = per_example(jnp.square(target - prediction))
    prediction = jax.lax.stop_gradient(prediction) if fixed_prediction else prediction
    # Both forms of the term are evaluated for every example, each at a safe point where the other one applies.
    later = jnp.maximum(t, 2)
    kl = _reverse_step_kl(target, prediction, fraction, schedule.step(later - 1, later), prediction_type)
    x_hat = jax.vmap(partial(to_x_0, prediction_type=prediction_type))(prediction, x_t, level)
    x_hat = jax.vmap(lambda one, h, x: jnp.where(one, h, x))(t == 1, x_hat, x_0)
    nll = -decoder_log_prob(decoder, x_0, x_hat, fraction, x_t, schedule(jnp.ones_like(t)))
    term = jnp.where(t == 1, nll, jnp.where(t > 1, kl, jnp.nan))
    return t, squared_error, schedule.num_steps * term


def optimal_variance(error: Real, step: Step) -> Real:
    """sigma_q^2 + c_2^2 error: the variance for which N(mu_theta, var) is closest to the true reverse kernel (VAR-3).

    x_s = c_1 x_t + c_2 x_0 + sigma_q eps deviates from mu_theta = c_1 x_t + c_2 x_hat by its own noise and by the error
    of x_hat. This variance minimizes the bound, whose term becomes log(var / sigma_q^2) / 2 per dimension.

    Args:
        error: E (x_0 - x_hat)^2 of one dimension, or of each; E Var[x_0 | x_t] for the optimal x_hat.
        step: the levels s < t, scalars. If s is clean, the result is the optimal variance of a normal decoder around
            x_hat.

    Source: Bao et al. 2022, arXiv:2201.06503, theorem 1; with an imperfect x_hat, Bao et al. 2022, arXiv:2206.07309.
    """
    return forward.posterior_variance(step) + forward.posterior_coefficients(step).c_2 ** 2 * error


def analytic_dpm_variance(eps_second_moment: Real, step: Step) -> Real:
    """The optimal isotropic variance of the reverse step, from the second moment of the optimal eps_hat (VAR-3).

        sigma*^2 = sigma_q^2 + c_2^2 (sigma_t / alpha_t)^2 (1 - E||eps_hat||^2 / D)

    The unexplained part of eps is that of x_0: E Var[x_0 | x_t] = (sigma_t / alpha_t)^2 (1 - E eps_hat^2). So this is
    `optimal_variance` for the optimal denoiser. At high noise the second moment is close to 1, and 1 - E eps_hat^2
    cancels. For a network, `optimal_variance` of its measured error does not cancel and accounts for its imperfection.

    Args:
        eps_second_moment: E||eps_hat||^2 / D, or E eps_hat^2 of each dimension. Values above 1 count as 1.
        step: the levels s < t, scalars; s may be clean.

    Source: Bao et al. 2022, arXiv:2201.06503, theorem 1.
    """
    return optimal_variance(jnp.maximum(1.0 - eps_second_moment, 0.0) * (step.t.sigma / step.t.alpha) ** 2, step)


class VarianceBounds(NamedTuple):
    """A lower and an upper bound on `analytic_dpm_variance` for any data."""

    lower: Real
    upper: Real


def variance_bounds(step: Step, half_width: Real | float | None = None) -> VarianceBounds:
    """sigma_q^2 <= sigma*^2 <= sigma_q^2 + c_2^2 min(sigma_t / alpha_t, (b - a) / 2)^2 (VAR-4).

    Args:
        step: the levels s < t, scalars.
        half_width: (b - a) / 2 for data in [a, b], 1 for images on [-1, 1]; None for unbounded data.

    Source: Bao et al. 2022, arXiv:2201.06503, theorem 2.
    """
    widest = step.t.sigma / step.t.alpha
    widest = widest if half_width is None else jnp.minimum(widest, half_width)
    return VarianceBounds(forward.posterior_variance(step), optimal_variance(widest**2, step))


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
    """E ||eps_hat||^2 / D at every step 1..T, averaged over a batch of data with fresh noise (VAR-3).

    Args:
        denoiser: predicts `prediction_type`; evaluated once per step, on the whole batch.
        key: for the noise.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        prediction_type: what the denoiser predicts.
        per_dim: return E eps_hat^2 of each dimension instead.

    Returns:
        Shape (T,), with step t at index t - 1; or (T, *x). Results of several batches may be averaged.

    Raises:
        ValueError: unknown prediction_type.

    Source: Bao et al. 2022, arXiv:2201.06503, section 3 (Gamma_n, in terms of the score).
    """

    def visit(_, t):
        level = schedule(jnp.full(x_0.shape[:1], t))
        eps = jax.random.normal(jax.random.fold_in(key, t), x_0.shape, x_0.dtype)
        x_t = jax.vmap(forward.add_noise)(x_0, eps, level)
        eps_hat = jax.vmap(partial(to_eps, prediction_type=prediction_type))(evaluate(denoiser, x_t, level), x_t, level)
        power = jnp.square(eps_hat).mean(0)
        return None, power if per_dim else power.mean()

    return scan(visit, None, jnp.arange(1, schedule.num_steps + 1))[1]
