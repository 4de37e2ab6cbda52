"""Guidance: denoisers bent towards a condition, and again denoisers, for any sampler.

    classifier-free    D(x_t) + w (D(x_t, y) - D(x_t))
    classifier         score + w grad log p(y | x_t)
    reconstruction     score + grad log N(y; A x_hat(x_t), var_y + var_t), by Tweedie's formula

With exact parts, w = 1 is Bayes' rule: the score of q(x_t | y) is that of q(x_t) and grad log p(y | x_t). Another w is
another law, sharper than the condition's and not its marginals.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vdm_jax.levels import Level
from vdm_jax.parameterization import convert, to_eps, to_x_0
from vdm_jax.types import Batch, Parameterization, Real, per_example, pytree_callable


class _Guided:
    """Plain functions among the fields become Partials, so that a guided denoiser can go into a compiled sampler."""

    def __post_init__(self):
        for name, value in list(vars(self).items()):
            if callable(value):
                object.__setattr__(self, name, pytree_callable(value))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierFree(_Guided):
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

    def __call__(self, x_t: Batch, level: Level) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        with_y, without = self.conditional(x_t, level), self.unconditional(x_t, level)
        inside = (level.log_snr >= self.log_snr_min) & (level.log_snr <= self.log_snr_max)
        scale = jnp.where(inside, jnp.asarray(self.scale, x_t.dtype), 1.0)
        return jax.vmap(lambda c, u, w: u + w * (c - u))(with_y, without, scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Classifier(_Guided):
    """A denoiser with w grad log p(y | x_t) added to its score.

    Fields:
        denoiser: predicts `kind`.
        log_prob: log p(y | x_t), (x_t, level) -> (B,), of each example by itself, with its y closed over.
        scale: w.
        kind: what the denoiser predicts.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, section 4; Song et al. 2021, arXiv:2011.13456, section 5.
    """

    denoiser: Any
    log_prob: Any
    scale: Any = 1.0
    kind: Parameterization = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch, level: Level) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        slope = jax.grad(lambda x: self.log_prob(x, level).sum())(x_t)
        return _shifted(self.denoiser(x_t, level), x_t, level, self.kind, jnp.asarray(self.scale, x_t.dtype) * slope)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reconstruction(_Guided):
    """A denoiser drawn to x_0 that would have been measured as y = A x_0 + noise.

        p(y | x_t) ~ N(y; A x_hat(x_t), var_y + var_t)

    x_0 given x_t is taken as normal around Tweedie's mean, with var_t in every measured direction (A A^T = I). For
    normal data of which that is true it is exact; for others an approximation that is best at little noise.

    Fields:
        denoiser: predicts `kind`; differentiated.
        measure: A, a linear map (B, *x) -> (B, *y), with A A^T = I: a mask, a selection, a mean times sqrt(n).
        y: what was measured, shape (B, *y).
        variance: var_y of the measurement's noise, a scalar.
        spread: var_t of a level, a callable; None is sigma^2 / (alpha^2 + sigma^2), that of data N(0, I).
        scale: w, 1 for what the formula says.
        kind: what the denoiser predicts.

    Raises (when called):
        ValueError: y is not of the shape of what `measure` makes of x_hat, or unknown kind.

    Source: Ho et al. 2022, arXiv:2204.03458, section 3.1; Chung et al. 2022, arXiv:2209.14687; Song et al. 2023,
        "Pseudoinverse-guided diffusion models for inverse problems" (var_t).
    """

    denoiser: Any
    measure: Any
    y: Any
    variance: Any
    spread: Any = None
    scale: Any = 1.0
    kind: Parameterization = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch, level: Level) -> Batch:
        """The prediction of a batch, shape (B, *x)."""
        var = self.variance + (self.spread or _unit_spread)(level)

        def log_prob(x_t):
            prediction = self.denoiser(x_t, level)
            x_hat = jax.vmap(partial(to_x_0, kind=self.kind))(prediction, x_t, level)
            left = self._left(self.measure(x_hat))
            return -0.5 * jnp.sum(per_example(jnp.square(left)) / var), prediction

        slope, prediction = jax.grad(log_prob, has_aux=True)(x_t)
        return _shifted(prediction, x_t, level, self.kind, jnp.asarray(self.scale, x_t.dtype) * slope)

    def _left(self, expected: Batch) -> Batch:
        if jnp.shape(self.y) != expected.shape:  # else they would broadcast against each other
            raise ValueError(f"y has shape {jnp.shape(self.y)}, A x_hat {expected.shape}: give y that of A x_hat")
        return self.y - expected


def _unit_spread(level: Level) -> Real:
    return level.sigma**2 / (level.alpha**2 + level.sigma**2)


def _shifted(prediction, x_t, level, kind, slope):
    """The prediction whose score has `slope` added."""

    def one(p, x, lv, g):
        return convert(to_eps(p, x, lv, kind) - lv.sigma * g, x, lv, "eps", kind)

    return jax.vmap(one)(prediction, x_t, level, slope)
