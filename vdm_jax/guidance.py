"""Guidance: denoisers bent towards a condition, and again denoisers, for any sampler.

    classifier-free    D(x_t) + w (D(x_t, y) - D(x_t))
    classifier         score + w grad log p(y | x_t)
    reconstruction     score + grad log N(y; A x_hat(x_t), var_y + var_t), by Tweedie's formula

With exact parts, w = 1 is Bayes' rule: the score of q(x_t | y) is that of q(x_t) and grad log p(y | x_t). Another w is
another law, sharper than the condition's and not its marginals. A scale w is one number, or one for each example.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.parameterization import convert, to_eps, to_x_0
from vdm_jax.types import (
    Batch,
    PerExample,
    PredictionType,
    Real,
    at_least_float32,
    evaluate,
    evaluate_scalars,
    per_example,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """D(x_t) + w (D(x_t, y) - D(x_t)), where the log-SNR is in an interval; else the conditional denoiser.

    w = 0 is the unconditional denoiser, 1 the conditional one, above 1 more than that. In Ho & Salimans' own words it
    is 1 + their w.

    Fields:
        conditional, unconditional: denoisers of one parameterisation, whichever it is.
        scale: w.
        log_snr_min, log_snr_max: the interval.

    Source: Ho & Salimans 2022, arXiv:2207.12598; Kynkäänniemi et al. 2024, arXiv:2404.07724 (the interval).
    """

    conditional: Any
    unconditional: Any
    scale: Any
    log_snr_min: Any = -jnp.inf
    log_snr_max: Any = jnp.inf

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        with_y = evaluate(self.conditional, x_t, level, name="conditional denoiser")
        without = evaluate(self.unconditional, x_t, level, name="unconditional denoiser")
        inside = (level.log_snr >= self.log_snr_min) & (level.log_snr <= self.log_snr_max)
        scale = jnp.where(inside, _each("scale", self.scale, x_t), 1.0)
        return jax.vmap(lambda c, u, w: u + w * (c - u))(with_y, without, scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierGuidance:
    """A denoiser with w grad log p(y | x_t) added to its score.

    Fields:
        denoiser: predicts `prediction_type`.
        log_prob: log p(y | x_t), (x_t, level) -> (B,), of each example by itself, with its y closed over.
        scale: w.
        prediction_type: what the denoiser predicts.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, section 4; Song et al. 2021, arXiv:2011.13456, section 5.
    """

    denoiser: Any
    log_prob: Any
    scale: Any = 1.0
    prediction_type: PredictionType = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        prediction = evaluate(self.denoiser, x_t, level)
        slope = jax.grad(lambda x: evaluate_scalars(self.log_prob, x, level, name="log-density").sum())(x_t)
        return _shifted(prediction, x_t, level, self.prediction_type, slope, self.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReconstructionGuidance:
    """A denoiser drawn to x_0 that would have been measured as y = A x_0 + noise.

        p(y | x_t) ~ N(y; A x_hat(x_t), var_y + var_t)

    x_0 given x_t is taken as normal around Tweedie's mean, with var_t in every measured direction (A A^T = I). For
    normal data of which that is true it is exact; for others an approximation that is best at little noise.

    Fields:
        denoiser: predicts `prediction_type`; differentiated.
        measure: A, a linear map (B, *x) -> (B, *y), with A A^T = I: a mask, a selection, a mean times sqrt(n).
        y: what was measured, shape (B, *y).
        variance: var_y of the measurement's noise, one number or one for each example.
        spread: var_t of a level, a callable; None is sigma^2 / (alpha^2 + sigma^2), that of data N(0, I).
        scale: w, 1 for what the formula says.
        prediction_type: what the denoiser predicts.

    Raises (when called):
        ValueError: y is not of the shape of what `measure` makes of x_hat, a variance or scale is neither one number
            nor one for each example, or unknown prediction_type.

    Source: Ho et al. 2022, arXiv:2204.03458, section 3.1; Chung et al. 2022, arXiv:2209.14687; Song et al. 2023,
        "Pseudoinverse-guided diffusion models for inverse problems" (var_t).
    """

    denoiser: Any
    measure: Any
    y: Any
    variance: Any
    spread: Any = None
    scale: Any = 1.0
    prediction_type: PredictionType = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        spread = (_unit_spread if self.spread is None else self.spread)(level)
        var = _each("variance", self.variance, x_t) + _each("spread", spread, x_t)

        def log_prob(x_t):
            prediction = evaluate(self.denoiser, x_t, level)
            x_hat = jax.vmap(partial(to_x_0, prediction_type=self.prediction_type))(prediction, x_t, level)
            left = self._left(self.measure(x_hat))
            return -0.5 * jnp.sum(per_example(jnp.square(left)) / var), prediction

        slope, prediction = jax.grad(log_prob, has_aux=True)(x_t)
        return _shifted(prediction, x_t, level, self.prediction_type, slope, self.scale)

    def _left(self, expected: Batch) -> Batch:
        if jnp.shape(self.y) != expected.shape:  # else they would broadcast against each other
            raise ValueError(f"y has shape {jnp.shape(self.y)}, A x_hat {expected.shape}: give y that of A x_hat")
        return jnp.asarray(self.y, expected.dtype) - expected


def _unit_spread(level: NoiseLevel) -> Real:
    return level.sigma**2 / (level.alpha**2 + level.sigma**2)


def _each(name: str, value: Any, x_t: Batch) -> PerExample:
    """One number for each example, from one for all or for each."""
    value = jnp.asarray(value, at_least_float32(x_t.dtype))
    if value.shape not in ((), x_t.shape[:1]):
        raise ValueError(f"{name} has shape {value.shape}: give one number, or one for each of {x_t.shape[0]} examples")
    return jnp.broadcast_to(value, x_t.shape[:1])


def _shifted(prediction, x_t, level, prediction_type, slope, scale):
    """The prediction whose score has `scale * slope` added."""

    def one(p, x, lv, g, w):
        return convert(to_eps(p, x, lv, prediction_type) - lv.sigma * (w * g), x, lv, "eps", prediction_type)

    return jax.vmap(one)(prediction, x_t, level, slope.astype(prediction.dtype), _each("scale", scale, x_t))
