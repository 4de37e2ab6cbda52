"""Guidance: conditional generation. A guided denoiser is again a denoiser, for any sampler.

    classifier-free    D(x_t) + w (D(x_t, y) - D(x_t))
    classifier         score + w grad log p(y | x_t)
    reconstruction     score + w grad log N(y; A x_hat(x_t), var_y + var_t), by Tweedie's formula

With exact parts, w = 1 is Bayes' rule: the score of q(x_t | y) is the score of q(x_t) plus grad log p(y | x_t). A
larger w samples a more concentrated distribution than q(x_0 | y). The scale w is a scalar, or one value per example.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vdm_jax.gaussian import LOG_2PI
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.parameterization import convert, to_eps, to_x_0
from vdm_jax.types import (
    Batch,
    PerExample,
    PredictionType,
    Real,
    at_least_float32,
    check_scalar,
    evaluate,
    evaluate_scalars,
    per_example,
)

__all__ = ["ClassifierFreeGuidance", "ClassifierGuidance", "LinearMeasurement", "ReconstructionGuidance"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance, D(x_t) + w (D(x_t, y) - D(x_t)).

    w = 0 is the unconditional denoiser, 1 the conditional denoiser, and above 1 the guidance is stronger. Ho & Salimans
    write w for this w minus 1.

    Fields:
        conditional, unconditional: denoisers with the same prediction type, which may be any.
        scale: w.
        log_snr_min, log_snr_max: the interval of log-SNR with guidance. Outside of it the conditional denoiser is used.

    Source: Ho & Salimans 2022, arXiv:2207.12598; Kynkäänniemi et al. 2024, arXiv:2404.07724 (the interval).
    """

    conditional: Any
    unconditional: Any
    scale: Any
    log_snr_min: Any = -jnp.inf
    log_snr_max: Any = jnp.inf

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        conditional = evaluate(self.conditional, x_t, level, name="conditional denoiser")
        unconditional = evaluate(self.unconditional, x_t, level, name="unconditional denoiser")
        inside = (level.log_snr >= self.log_snr_min) & (level.log_snr <= self.log_snr_max)
        scale = jnp.where(inside, _per_example("scale", self.scale, x_t), 1.0)
        return jax.vmap(lambda c, u, w: u + w * (c - u))(conditional, unconditional, scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierGuidance:
    """Classifier guidance: w grad log p(y | x_t) is added to the score of a denoiser.

    Fields:
        denoiser: predicts `prediction_type`.
        log_prob: log p(y | x_t), (x_t, level) -> (B,), for each example independently; y is fixed in the function.
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
        gradient = jax.grad(lambda x: evaluate_scalars(self.log_prob, x, level, name="log-density").sum())(x_t)
        return _shifted(prediction, x_t, level, self.prediction_type, gradient, self.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearMeasurement:
    """The log-likelihood of linear measurements y = A x_0 + noise given a prediction x_hat of x_0.

        log N(y; A x_hat, (var_y + var_t) I)

    At a level without noise var_t is 0 and this is log p(y | x_0) at x_0 = x_hat. At noisy levels it approximates
    log p(y | x_t), as in `ReconstructionGuidance`. `samplers.twisted_smc` uses it as likelihood and twisting function.

    The entries that a mask sets to 0 count as measurements of 0: for p(y), select the measured entries instead.

    Fields: operator, y, noise_variance, posterior_variance and data_variance of `ReconstructionGuidance`.

    Raises (when called): as `ReconstructionGuidance`.
    """

    operator: Any
    y: Any
    noise_variance: Any
    posterior_variance: Any = None
    data_variance: Any = 1.0

    def __call__(self, x_hat: Batch, level: NoiseLevel) -> PerExample:
        """The log-density in nats for predictions of shape (B, *x) at levels of shape (B,): shape (B,)."""
        if self.posterior_variance is None:
            check_scalar("data_variance", self.data_variance)
            posterior_variance = _normal_posterior_variance(self.data_variance, level)
        else:
            posterior_variance = self.posterior_variance(level)
        var = _per_example("noise_variance", self.noise_variance, x_hat)
        var = var + _per_example("posterior_variance", posterior_variance, x_hat)
        expected = self.operator(x_hat)
        if jnp.shape(self.y) != expected.shape:  # they must not broadcast
            raise ValueError(
                f"y has shape {jnp.shape(self.y)}, but the operator returns {expected.shape}: pass y of that shape"
            )
        residual = jnp.asarray(self.y, expected.dtype) - expected
        count = math.prod(expected.shape[1:])
        return -0.5 * (per_example(jnp.square(residual)) / var + count * (jnp.log(var) + LOG_2PI))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReconstructionGuidance:
    """Reconstruction guidance (PiGDM), for linear inverse problems y = A x_0 + noise: inpainting, super-resolution.

        p(y | x_t) ~ N(y; A x_hat(x_t), var_y + var_t)

    p(x_0 | x_t) is approximated by a normal distribution around Tweedie's posterior mean, with variance var_t in every
    measured direction (A A^T = I). This is exact for normal data with such a posterior, and otherwise an approximation
    that improves as the noise decreases: samples of multimodal data choose the wrong mode too often.
    `samplers.twisted_smc` corrects for it.

    Fields:
        denoiser: predicts `prediction_type`; must be differentiable.
        operator: A, the measurement operator: a linear map (B, *x) -> (B, *y) with A A^T = I, such as a mask, a
            selection of entries, or a mean over n entries times sqrt(n).
        y: the measurements, shape (B, *y).
        noise_variance: var_y of the measurement noise, a scalar or shape (B,).
        posterior_variance: level -> var_t, the r_t^2 of PiGDM. None is v sigma^2 / (alpha^2 v + sigma^2), exact for
            data from N(mean, v I).
        scale: w; 1 is the formula above.
        prediction_type: what the denoiser predicts.
        data_variance: v, the variance of the data in a measured direction, averaged over the directions: for
            inpainting, the mean over the known entries of the variance of an entry. A scalar, 1 for standardized data.
            It matters most for data far from variance 1, such as images in [-1, 1] (docs/results.md).

    Raises (when called):
        ValueError: the shape of y differs from that of A x_hat, a variance or the scale is neither a scalar nor of
            shape (B,), data_variance is not a scalar, or unknown prediction_type.

    Source: Ho et al. 2022, arXiv:2204.03458, section 3.1; Chung et al. 2022, arXiv:2209.14687; Song et al. 2023,
        "Pseudoinverse-guided diffusion models for inverse problems" (var_t).
    """

    denoiser: Any
    operator: Any
    y: Any
    noise_variance: Any
    posterior_variance: Any = None
    scale: Any = 1.0
    prediction_type: PredictionType = field(default="eps", metadata={"static": True})
    data_variance: Any = 1.0

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        measurement = LinearMeasurement(
            self.operator, self.y, self.noise_variance, self.posterior_variance, self.data_variance
        )

        def log_prob(x_t):
            prediction = evaluate(self.denoiser, x_t, level)
            x_hat = jax.vmap(partial(to_x_0, prediction_type=self.prediction_type))(prediction, x_t, level)
            return measurement(x_hat, level).sum(), prediction

        gradient, prediction = jax.grad(log_prob, has_aux=True)(x_t)
        return _shifted(prediction, x_t, level, self.prediction_type, gradient, self.scale)


def _normal_posterior_variance(data_variance: Any, level: NoiseLevel) -> Real:
    """Var[x_0 | x_t] for data from N(mean, v I)."""
    v, noise = jnp.asarray(data_variance, level.sigma.dtype), level.sigma**2
    return v * noise / (level.alpha**2 * v + noise)


def _per_example(name: str, value: Any, x_t: Batch) -> PerExample:
    """A value for each example, from a scalar or from values for each."""
    value = jnp.asarray(value, at_least_float32(x_t.dtype))
    if value.shape not in ((), x_t.shape[:1]):
        raise ValueError(f"{name} has shape {value.shape}: pass a scalar, or {x_t.shape[0]} values, one per example")
    return jnp.broadcast_to(value, x_t.shape[:1])


def _shifted(prediction, x_t, level, prediction_type, gradient, scale):
    """The prediction after `scale * gradient` is added to its score."""

    def one(p, x, lv, g, w):
        return convert(to_eps(p, x, lv, prediction_type) - lv.sigma * (w * g), x, lv, "eps", prediction_type)

    return jax.vmap(one)(prediction, x_t, level, gradient.astype(prediction.dtype), _per_example("scale", scale, x_t))
