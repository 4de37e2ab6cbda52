"""The likelihood report of a diffusion model: bounds on and estimates of -log P(x), in nats of every test image.

The variational bound for several T and for T -> infinity, with its terms; the importance-weighted bound; and the
likelihood of the probability-flow ODE, with three ways to get from a density to a probability.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vdm_jax import dequantization, elbo, path_bounds, probability_flow
from vdm_jax.dequantization import TruncatedNormal, Uniform
from vdm_jax.discrete_schedules import DiscretizedSchedule
from vdm_jax.models.scaling import scaling
from vdm_jax.schedules import time_from_log_snr
from vdm_jax.training.experiment import DataSpec, DiffusionModel, LikelihoodCurve, LikelihoodRow

__all__ = ["LikelihoodReport", "likelihood_rows"]


@dataclass(frozen=True)
class LikelihoodReport:
    """Options of the likelihood report; training does not depend on them."""

    steps: tuple[int, ...] = (10, 100, 1_000, 10_000)
    """Numbers of timesteps T to evaluate the bound at."""
    terms: int = 100
    """Diffusion terms per image, at evenly spaced times."""
    importance_steps: int = 100
    """T of the importance-weighted bound."""
    importance_samples: int = 8
    """K of the importance-weighted bound: sampled paths per image."""
    trace: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    """Divergence along the ODE: Hutchinson's estimate with one random probe per image, or exact (D times the cost)."""
    tolerance: float = 1e-4
    """Tolerance of the ODE solver, relative and absolute."""

    def ode_cost(self, data: DataSpec) -> int:
        """Approximate number of network evaluations per image along the ODE, Jacobian products included."""
        products = math.prod(data.shape) if self.trace == "exact" else 1
        return 150 * (1 + 2 * products)


def likelihood_rows(
    diffusion: Callable[[Any], DiffusionModel], data: DataSpec, options: LikelihoodReport
) -> tuple[dict[str, LikelihoodRow], LikelihoodCurve]:
    """The rows and the curve of a model's likelihood report.

    Args:
        diffusion: params -> the model.
        data: the data set.
        options: which bounds to evaluate, and how.
    """

    def row(description, nats, cost):
        def evaluate(params, key, batch):
            return nats(diffusion(params), key, scaling(data).scale(batch["image"]))

        return LikelihoodRow(description, evaluate, cost)

    def bound(model, key, x_0):
        kind = {"prediction_type": model.prediction_type}
        return elbo.continuous_bound(
            model.denoiser, key, x_0, model.schedule, model.decoder, terms=options.terms, **kind
        )

    def discrete_bound(num_steps):
        terms = min(options.terms, num_steps)

        def nats(model, key, x_0):
            discrete, kind = DiscretizedSchedule(model.schedule, num_steps + 1), model.prediction_type
            return elbo.bound(
                model.denoiser, key, x_0, discrete, model.decoder, prediction_type=kind, terms=terms
            ).total

        return row(f"-log P(x) <= -ELBO with T = {num_steps:,} steps", nats, 1 + terms)

    def importance_weighted(model, key, x_0):
        discrete = DiscretizedSchedule(model.schedule, options.importance_steps + 1)
        how = {"samples": options.importance_samples, "prediction_type": model.prediction_type}
        return path_bounds.importance_weighted_bound(model.denoiser, key, x_0, discrete, model.decoder, **how)

    def term(name):
        return lambda *args: getattr(bound(*args), name)

    cost = 1 + options.terms
    rows = {
        "prior": row("KL(q(z_1|x) || N(0, I))", term("prior"), 0),
        "reconstruction": row("-E log P(x|z_0)", term("reconstruction"), 1),
        "diffusion": row("T -> infinity: 1/2 int gamma' E|eps - eps_hat|^2 dt", term("diffusion"), options.terms),
        **{f"bound, T = {num_steps:,}": discrete_bound(num_steps) for num_steps in options.steps},
        "bound, T = inf": row("-log P(x) <= -ELBO in continuous time", term("total"), cost),
        f"bound, K = {options.importance_samples}, T = {options.importance_steps}": row(
            "-log P(x) <= importance-weighted bound of K paths",
            importance_weighted,
            options.importance_samples * options.importance_steps,
        ),
    }
    rows |= _ode_rows(row, data, options)
    return rows, _diffusion_curve(diffusion, data, options)


def _ode_rows(row, data, options) -> dict[str, LikelihoodRow]:
    """The likelihood of the probability-flow ODE; for images, its density is made a probability by dequantization."""

    def density(model, key, t_0):
        how = {"prediction_type": model.prediction_type, "trace": options.trace, "tolerance": options.tolerance}
        solve = partial(probability_flow.log_likelihood, model.denoiser, key, schedule=model.schedule, t_0=t_0, **how)
        return lambda z: solve(z).log_prob

    def dequantized(model, key, x_0, t_0, distribution):
        key_u, key_probe = jax.random.split(key)
        level = model.schedule(t_0)
        log_prob = density(model, key_probe, t_0)
        shift = x_0[0].size * level.log_alpha  # Jacobian of x = z / alpha
        return dequantization.dequantized_bound(
            lambda y: log_prob(level.alpha * y) + shift, key_u, x_0, distribution(level)
        )

    def uniform(model, key, x_0):
        # start where the noise of the model has the standard deviation of uniform noise in a bin
        deviation = 2.0 / (data.levels - 1) / 12**0.5
        t_0 = time_from_log_snr(jnp.asarray(-2.0 * math.log(deviation)), model.schedule)
        return dequantized(model, key, x_0, t_0, lambda level: partial(Uniform, levels=data.levels))

    def truncated(model, key, x_0):
        def distribution(level):
            return lambda x: TruncatedNormal(x, levels=data.levels, mean=jnp.zeros(()), scale=level.sigma / level.alpha)

        return dequantized(model, key, x_0, jnp.zeros(()), distribution)

    def variational(model, key, x_0):
        key_z, key_probe = jax.random.split(key)
        log_prob, level = density(model, key_probe, 0.0), model.schedule(jnp.zeros(()))
        return dequantization.latent_dequantization_bound(
            log_prob, model.denoiser, key_z, x_0, level, model.decoder, prediction_type=model.prediction_type
        )

    def smoothed(model, key, x_0):
        level = model.schedule(jnp.zeros(()))
        return -density(model, key, 0.0)(level.alpha * x_0) - math.prod(data.shape) * level.log_alpha

    cost = options.ode_cost(data)
    if not data.levels:
        estimate = row("no bound: -log density of x plus noise of variance 1/SNR(0), at x", smoothed, cost)
        bound = row("-log p(x) <= E log[q(z_0|x) / (p(z_0) p(x|z_0))]", variational, cost)
        return {"ode, smoothed": estimate, "ode, variational": bound}
    return {
        "ode, uniform": row("-log P(x) <= E log[q(y|x) / p(y)], y uniform in the bin of x", uniform, cost),
        "ode, truncated normal": row("the same, y ~ N(x, (sigma_0/alpha_0)^2) truncated to the bin", truncated, cost),
        "ode, variational": row("-log P(x) <= E log[q(z_0|x) / (p(z_0) P(x|z_0))]", variational, cost),
    }


def _diffusion_curve(diffusion, data, options) -> LikelihoodCurve:
    """The diffusion term as a function of the log-SNR."""

    def points(params, key, batch):
        model, x_0 = diffusion(params), scaling(data).scale(batch["image"])
        how = {"prediction_type": model.prediction_type, "terms": options.terms}
        curve = elbo.diffusion_curve(model.denoiser, key, x_0, model.schedule, **how)
        return {"x": curve.log_snr.T, "y": curve.nats.T}

    return LikelihoodCurve(
        "log SNR", f"diffusion term, nats in each of {options.terms} slices of t", points, options.terms
    )
