"""The prediction types x_0, eps, v and score, their conversions (PAR-1, PAR-2), and networks that take a timestep.

All follow from x_t = alpha x_0 + sigma eps, v = alpha eps - sigma x_0 and score = -eps / sigma, the score of the
*conditional* distribution q(x_t | x_0). An optimal prediction is the conditional expectation given x_t of each; for
the score that is the score of the marginal q(x_t). Functions of predictions act on one example, shape (*x), and a
scalar level.

Source: Ho et al. 2020, arXiv:2006.11239 (eps); Salimans & Ho 2022, arXiv:2202.00512 (v); Song & Ermon 2019,
arXiv:1907.05600 (score).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from vdm_jax.discrete_schedules import TabulatedSchedule
from vdm_jax.noise_levels import NoiseLevel, broadcast_to_batch
from vdm_jax.types import Batch, PredictionType, Real, X, evaluate, unknown_prediction_type

__all__ = [
    "ScoreFromDenoiser",
    "convert",
    "from_timesteps",
    "prediction_target",
    "to_eps",
    "to_score",
    "to_v",
    "to_x_0",
]


def _power(level: NoiseLevel) -> Real:
    """alpha^2 + sigma^2, which is 1 for a variance-preserving level."""
    return level.alpha**2 + level.sigma**2


def prediction_target(x_0: X, eps: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """The value that a network of a prediction type should predict for x_t = alpha x_0 + sigma eps.

    Args:
        x_0, eps: clean example and its noise, shape (*x).
        level: scalars.
        prediction_type: x_0, eps, v = alpha eps - sigma x_0, or score = -eps / sigma.

    Raises:
        ValueError: unknown prediction_type.
    """
    match prediction_type:
        case "x_0":
            return x_0
        case "eps":
            return eps
        case "v":
            return level.alpha * eps - level.sigma * x_0
        case "score":
            return -eps / level.sigma
    raise unknown_prediction_type(prediction_type)


def to_x_0(value: X, x_t: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """x_0 from a prediction of any type.

        eps: (x_t - sigma eps) / alpha     v: (alpha x_t - sigma v) / (alpha^2 + sigma^2)
        score: (x_t + sigma^2 score) / alpha                        (Tweedie's formula, TW-1)

    Args:
        value: the prediction, shape (*x).
        x_t: the noisy example, shape (*x).
        level: scalars. alpha must not be 0 if the prediction is eps or score.
        prediction_type: the type of the prediction.

    Raises:
        ValueError: unknown prediction_type.
    """
    alpha, sigma = level.alpha, level.sigma
    match prediction_type:
        case "x_0":
            return value
        case "eps":
            return (x_t - sigma * value) / alpha
        case "v":
            return (alpha * x_t - sigma * value) / _power(level)
        case "score":
            return (x_t + sigma**2 * value) / alpha
    raise unknown_prediction_type(prediction_type)


def to_eps(value: X, x_t: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """The noise eps from a prediction of any type.

        x_0: (x_t - alpha x_0) / sigma     v: (sigma x_t + alpha v) / (alpha^2 + sigma^2)     score: -sigma score

    Args and errors as in `to_x_0`. sigma must not be 0 if the prediction is x_0.
    """
    alpha, sigma = level.alpha, level.sigma
    match prediction_type:
        case "x_0":
            return (x_t - alpha * value) / sigma
        case "eps":
            return value
        case "v":
            return (sigma * x_t + alpha * value) / _power(level)
        case "score":
            return -sigma * value
    raise unknown_prediction_type(prediction_type)


def to_v(value: X, x_t: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """v = alpha eps - sigma x_0 from a prediction of any type.

        x_0: (alpha x_t - (alpha^2 + sigma^2) x_0) / sigma     eps: ((alpha^2 + sigma^2) eps - sigma x_t) / alpha

    Args and errors as in `to_x_0`. sigma must not be 0 for x_0, nor alpha for eps or score.
    """
    alpha, sigma = level.alpha, level.sigma
    match prediction_type:
        case "x_0":
            return (alpha * x_t - _power(level) * value) / sigma
        case "eps" | "score":
            return (_power(level) * to_eps(value, x_t, level, prediction_type) - sigma * x_t) / alpha
        case "v":
            return value
    raise unknown_prediction_type(prediction_type)


def to_score(value: X, x_t: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """The score -eps / sigma from a prediction of any type (PAR-2).

        x_0: -(x_t - alpha x_0) / sigma^2     eps: -eps / sigma

    Args and errors as in `to_x_0`. sigma must not be 0.
    """
    if prediction_type == "score":
        return value
    return -to_eps(value, x_t, level, prediction_type) / level.sigma


def convert(value: X, x_t: X, level: NoiseLevel, source: PredictionType, target: PredictionType) -> X:
    """Convert a prediction of type `source` to type `target` (PAR-1). Args and errors as in `to_x_0`."""
    converters = {"x_0": to_x_0, "eps": to_eps, "v": to_v, "score": to_score}
    if target not in converters:
        raise unknown_prediction_type(target)
    return converters[target](value, x_t, level, source)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreFromDenoiser:
    """The score of q(x_t) from a denoiser at one level, a callable (B, *x) -> (B, *x) (PAR-2).

    Fields:
        denoiser: a `types.Denoiser` that is a pytree, such as a `jax.tree_util.Partial`.
        level: scalars, sigma > 0.
        prediction_type: what the denoiser predicts.
    """

    denoiser: Any
    level: NoiseLevel
    prediction_type: PredictionType = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch) -> Batch:
        """The score of a batch, shape (B, *x)."""
        prediction = evaluate(self.denoiser, x_t, broadcast_to_batch(self.level, x_t))
        return to_score(prediction, x_t, self.level, self.prediction_type)


def from_timesteps(network: Callable, schedule: TabulatedSchedule, *, integer: bool = False) -> Partial:
    """The denoiser `(x_t, level) -> prediction` of a network that takes a timestep 0..T-1 instead of a noise level.

    Networks of Ho et al., of improved-diffusion and of diffusers are of this kind. Their timestep t is our t + 1, since
    our timestep 0 is clean data. The timestep of a level is found by its log-SNR in the schedule of the network's
    training: exactly for the levels of this schedule, also in a subsequence, and by linear interpolation, as a
    fraction, between them. The denoiser can thus be evaluated with any variance-preserving schedule, in continuous time
    too. Levels with less noise than the first one have timestep 0, levels with more noise than the last one T - 1.

    Args:
        network: `network(x_t, timestep)`, where x_t has shape (B, *x) and timestep has shape (B,), such as
            `jax.tree_util.Partial(apply, params)`. Its result is the denoiser's.
        schedule: of the network's training, with T steps.
        integer: whether the timesteps are int32, the nearest ones, for a network that looks them up in a table. They
            are floating-point numbers otherwise. A rounded timestep jumps in continuous time, where an adaptive solver
            takes many more steps.

    Returns:
        A `types.Denoiser`, a pytree with the leaves of the network and of the schedule. It predicts what the network
        predicts.

    Raises:
        TypeError: schedule is not a `TabulatedSchedule`.

    Source: Ho et al. 2020, arXiv:2006.11239, whose code counts timesteps from 0.
    """
    if not isinstance(schedule, TabulatedSchedule):
        raise TypeError(
            f"schedule is a {type(schedule).__name__}: it must be the discrete schedule of the network's training, "
            "such as discrete_schedules.linear_betas(1000)"
        )
    return Partial(_at_integer_timestep if integer else _at_timestep, network, schedule)


def _at_timestep(network, schedule, x_t, level):
    return network(x_t, _timestep(schedule, level))


def _at_integer_timestep(network, schedule, x_t, level):
    return network(x_t, jnp.round(_timestep(schedule, level)).astype(jnp.int32))


def _timestep(schedule: TabulatedSchedule, level: NoiseLevel) -> Real:
    """The 0-based timestep of a level, a fraction between two levels of the schedule."""
    noisy = jax.tree.map(lambda field: field[1:].astype(level.log_snr.dtype), schedule.levels)
    return jnp.interp(-level.log_snr, -noisy.log_snr, noisy.t - 1.0)
