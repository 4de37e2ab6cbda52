"""Training losses: one-step estimates of the bound and of its reweightings, per example.

Each loss samples one step t per example, computes x_t, evaluates the denoiser, and returns terms of shape (B,), which
the caller averages. Losses are compiled once per shape and can be differentiated with respect to any array inside the
denoiser, such as the parameters of `jax.tree_util.Partial(net.apply, params)`. A plain function that closes over the
parameters gives the same values, but is compiled again whenever they change.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.elbo import DiffusionBound, DiffusionDecoder, bound, denoising_error
from vdm_jax.gaussian import STANDARD_NORMAL, Prior
from vdm_jax.noise_levels import Step
from vdm_jax.time_sampling import TimeSampling, importance_sample, sample_times, to_timesteps
from vdm_jax.types import Batch, Denoiser, Key, PerExample, PredictionType, Real, check_weights

__all__ = [
    "DenoisingLoss",
    "ddpm_loss",
    "denoising_loss",
    "simple_loss",
]


class DenoisingLoss(NamedTuple):
    """The parts of a denoising loss, each of shape (B,).

    Fields:
        t: the step, 1..T.
        squared_error: ||target - prediction||^2, summed over the example.
        weight: the weight of that step.
        importance: the importance weight 1 / (T p_t), which keeps the loss unbiased; 1 for uniform t.
    """

    t: Int[Array, " b"]
    squared_error: PerExample
    weight: PerExample
    importance: PerExample

    @property
    def term(self) -> PerExample:
        """L_t = weight * squared_error, the input of `time_sampling.LossSecondMomentSampler`."""
        return self.weight * self.squared_error

    @property
    def loss(self) -> PerExample:
        """importance * weight * squared_error."""
        return self.importance * self.term


@compiled()
def denoising_loss(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    weight: Callable[[Step], Real] | None = None,
    time_sampling: TimeSampling = "independent",
    probabilities: Float[Array, " T"] | None = None,
) -> DenoisingLoss:
    """w_t ||target - prediction||^2 at one random step t in 1..T per example (ELBO-11, SAM-1).

    Its mean is (1/T) sum_t of the terms, for every way to sample the steps.

    Args:
        denoiser: predicts `prediction_type`; evaluated once, on the whole batch.
        key: for the steps and the noise.
        x_0: clean batch, shape (B, *x).
        schedule: the discrete schedule.
        prediction_type: what the denoiser predicts: "x_0", "eps", "v" or "score".
        weight: w_t as a function of the scalar `Step` from t - 1 to t; None is 1. `elbo.diffusion_weight` is the weight
            of the bound, for t >= 2.
        time_sampling: how the timesteps of a batch are sampled, as in `time_sampling.sample_times`.
        probabilities: p_t of each step 1..T, shape (T,), as in `time_sampling.importance_sample`; None is uniform.

    Returns:
        `DenoisingLoss`, each field (B,).

    Raises:
        ValueError: unknown prediction_type or time_sampling, or probabilities or weights of another shape. Negative
            probabilities make the loss NaN.

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 1 and equation 14.
    """
    if probabilities is not None and probabilities.shape != (schedule.num_steps,):
        raise ValueError(
            f"probabilities has shape {probabilities.shape}: it must be ({schedule.num_steps},), one for each step"
        )
    key_t, key_eps = jax.random.split(key)
    u = sample_times(key_t, x_0.shape[0], time_sampling)
    if probabilities is None:
        t, importance = to_timesteps(u, schedule.num_steps), jnp.ones_like(u)
    else:
        _, index, importance = importance_sample(u, probabilities)
        t = index + 1
    step = schedule.step(t - 1, t)
    error = denoising_error(denoiser, key_eps, x_0, step.t, prediction_type)
    weights = jnp.ones_like(error) if weight is None else check_weights(jax.vmap(weight)(step), error.shape)
    return DenoisingLoss(t, error, weights, importance.astype(error.dtype))


def simple_loss(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    time_sampling: TimeSampling = "independent",
) -> PerExample:
    """L_simple = ||eps - eps_hat||^2 at one random step, or ||target - prediction||^2 of another type (ELBO-11).

    Args and errors as in `denoising_loss`. Returns shape (B,), summed over the example.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 14.
    """
    return denoising_loss(
        denoiser, key, x_0, schedule, prediction_type=prediction_type, time_sampling=time_sampling
    ).loss


def ddpm_loss(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """L_DDPM, the bound, with its diffusion sum estimated by T - 1 times one random term (ELBO-6, ELBO-10).

    Args, result and errors as in `elbo.bound`, which evaluates every step with `terms=None`.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 5.
    """
    return bound(denoiser, key, x_0, schedule, decoder, prediction_type=prediction_type, terms=1, prior=prior)
