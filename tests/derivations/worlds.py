"""Worlds small enough that everything about them is known, and the tools that hold an estimate against a truth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sympy as sp

from vdm_jax.levels import Level, Step
from vdm_jax.parameterization import target


class GaussianWorld(NamedTuple):
    """Data from N(mean, var), independent in each dimension."""

    mean: float
    var: float

    def sample(self, key, shape):
        return self.mean + self.var**0.5 * jax.random.normal(key, shape)

    def log_prob(self, x_0):
        return -0.5 * jnp.sum((x_0 - self.mean) ** 2 / self.var + np.log(2 * np.pi * self.var), axis=-1)

    def x_hat(self, x_t, level: Level):
        """E[x_0 | x_t], by the regression of x_0 on x_t."""
        gain = level.alpha * self.var / (level.alpha**2 * self.var + level.sigma**2)
        return self.mean + gain * (x_t - level.alpha * self.mean)

    def var_x_0(self, level: Level):
        """Var[x_0 | x_t], which does not depend on x_t."""
        return self.var * level.sigma**2 / (level.alpha**2 * self.var + level.sigma**2)


class PointWorld(NamedTuple):
    """Data among finitely many points, shape (N, D), with weights (N,)."""

    points: jax.Array
    weights: jax.Array

    def sample(self, key, count):
        return self.points[jax.random.choice(key, self.points.shape[0], (count,), p=self.weights)]

    def log_terms(self, x_t, level: Level):
        """log of weight_i N(x_t; alpha x_i, sigma^2 I), for each point."""
        squares = jnp.sum((x_t[None] - level.alpha * self.points) ** 2, axis=-1) / level.sigma**2
        dims = self.points.shape[-1]
        return jnp.log(self.weights) - 0.5 * squares - 0.5 * dims * jnp.log(2 * jnp.pi * level.sigma**2)

    def log_marginal(self, x_t, level: Level):
        """log q(x_t)."""
        return jax.nn.logsumexp(self.log_terms(x_t, level))

    def x_hat(self, x_t, level: Level):
        """E[x_0 | x_t], an average of the points."""
        return jax.nn.softmax(self.log_terms(x_t, level)) @ self.points


def denoiser(world, kind="eps", shift=0.0):
    """The exact denoiser of a world, as a batched callable; `shift` spoils its x_hat."""

    def one(x_t, level):
        x_hat = world.x_hat(x_t, level) + shift
        return target(x_hat, (x_t - level.alpha * x_hat) / level.sigma, level, kind)

    return jax.vmap(one)


def exact_step(alpha_s, sigma_s, alpha_t, sigma_t) -> Step:
    """A step between levels given as exact sympy numbers, every field rounded once. Call it with x64 enabled."""
    drop = sp.log((alpha_s / sigma_s) ** 2 / (alpha_t / sigma_t) ** 2)
    s, t = (
        Level(*(number(f) for f in (a, g, sp.log(a), sp.log(g)))) for a, g in ((alpha_s, sigma_s), (alpha_t, sigma_t))
    )
    return Step(s, t, number(drop))


def number(expression) -> jax.Array:
    """An exact sympy number as a jax scalar."""
    return jnp.asarray(float(sp.N(expression, 30)))


def assert_mean(samples, truth, *, resolution=None):
    """The mean of independent samples is the truth, within four of its own standard errors.

    `resolution` bounds the standard error: a test whose error bar is too wide to see a wrong formula is none.
    """
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(samples.shape[0])
    z = (samples.mean(axis=0) - np.asarray(truth, np.float64)) / error
    assert np.all(np.abs(z) < 4), f"mean {samples.mean(axis=0)} is {z} standard errors from {truth}"
    assert resolution is None or np.all(error < resolution), f"standard error {error} resolves less than {resolution}"


def assert_moments(samples, mean, var):
    """Independent normal samples have this mean and variance."""
    assert_mean(samples, mean)
    assert_mean((np.asarray(samples, np.float64) - np.asarray(mean, np.float64)) ** 2, var)
