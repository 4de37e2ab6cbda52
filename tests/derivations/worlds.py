"""Distributions with closed-form answers, and helpers that compare an estimate with its exact value."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sympy as sp

from vdm_jax import closed_form
from vdm_jax.noise_levels import NoiseLevel, Step
from vdm_jax.parameterization import prediction_target


class GaussianWorld(NamedTuple):
    """Data from N(mean, var), independent in each dimension: `closed_form.gaussian` in any shape and dtype."""

    mean: float
    var: float

    def distribution(self, shape):
        """The distribution of one example of this shape."""
        return closed_form.gaussian(np.full(shape, self.mean), self.var * np.eye(int(np.prod(shape))))

    def sample(self, key, shape):
        return draws(self.distribution(shape[1:]), key, shape[0])

    def log_prob(self, x_0):
        return jax.vmap(self.distribution(x_0.shape[1:]).log_prob)(x_0)

    def x_hat(self, x_t, level: NoiseLevel):
        """E[x_0 | x_t], by the regression of x_0 on x_t."""
        gain = level.alpha * self.var / (level.alpha**2 * self.var + level.sigma**2)
        return self.mean + gain * (x_t - level.alpha * self.mean)

    def var_x_0(self, level: NoiseLevel):
        """Var[x_0 | x_t], which does not depend on x_t."""
        return self.var * level.sigma**2 / (level.alpha**2 * self.var + level.sigma**2)


@partial(jax.jit, static_argnums=2)
def draws(distribution, key, count):
    """`count` samples of a distribution, stacked."""
    return jax.vmap(distribution.sample)(jax.random.split(key, count))


def denoiser(data, prediction_type="eps", shift=0.0):
    """The exact denoiser of a distribution, as a batched callable; `shift` is added to its x_hat."""

    def one(x_t, level):
        distribution = data.distribution(x_t.shape) if isinstance(data, GaussianWorld) else data
        x_hat = closed_form.optimal_prediction(distribution, x_t, level, "x_0") + shift
        return prediction_target(x_hat, (x_t - level.alpha * x_hat) / level.sigma, level, prediction_type)

    return jax.vmap(one)


def exact_step(alpha_s, sigma_s, alpha_t, sigma_t) -> Step:
    """A step between levels given as exact sympy numbers, every field rounded once. Call it with x64 enabled."""
    drop = sp.log((alpha_s / sigma_s) ** 2 / (alpha_t / sigma_t) ** 2)
    s, t = (
        NoiseLevel(*(number(f) for f in (a, g, sp.log(a), sp.log(g))))
        for a, g in ((alpha_s, sigma_s), (alpha_t, sigma_t))
    )
    return Step(s, t, number(drop))


def number(expression) -> jax.Array:
    """An exact sympy number as a jax scalar."""
    return jnp.asarray(float(sp.N(expression, 30)))
