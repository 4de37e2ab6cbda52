"""Every public function gives the same under jit, vmap and a real pmap as alone, and has the right gradient.

`test_precision` traces all of them under vmap.
"""

import importlib
import inspect
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.optimizations import unoptimized
from vdm_jax import (
    autoencoder,
    closed_form,
    dequantization,
    discrete_schedules,
    divergence,
    elbo,
    energy,
    forward,
    gaussian,
    guidance,
    hvae,
    information,
    langevin,
    likelihoods,
    linear_gaussian,
    losses,
    noise_levels,
    parameterization,
    path_bounds,
    reverse_variance,
    samplers,
    schedules,
    score_matching,
    sure,
    time_sampling,
    tweedie,
    vae,
    vdm,
    weightings,
)
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import NoiseLevel, level_from_log_snr, step_from_log_snr

MODULES = [
    "gaussian", "noise_levels", "schedules", "discrete_schedules", "time_sampling", "forward", "parameterization",
    "likelihoods", "autoencoder", "vae", "hvae", "elbo", "path_bounds", "losses", "vdm", "weightings",
    "reverse_variance", "samplers", "guidance", "dequantization", "probability_flow", "closed_form", "information",
    "linear_gaussian", "divergence", "energy", "score_matching", "tweedie", "sure", "langevin",
]  # fmt: skip
DEVICES = 8
CONTINUOUS = schedules.LinearLogSNR(6.0, -4.0)
SCHEDULE = discrete_schedules.discretize(CONTINUOUS, 10)
DISCRETIZED = discrete_schedules.DiscretizedSchedule(CONTINUOUS, 10)


def numbers(seed: int, *shape: int, low: float = -0.9, high: float = 0.9) -> jax.Array:
    """One row per device."""
    return jnp.asarray(np.random.RandomState(seed).uniform(low, high, (DEVICES, *shape)), jnp.float32)


X, Y, P = numbers(0, 3, 2), numbers(1, 3, 2), numbers(2)
HIGH, LOW, VAR = numbers(3, low=1.0, high=6.0), numbers(4, low=-6.0, high=0.5), numbers(5, low=0.5, high=2.0)
KEYS, STEPS = jax.random.split(jax.random.key(0), DEVICES), jnp.arange(1, 1 + DEVICES)
BATCH = numbers(6, 5, 3)
ON_GRID = likelihoods.normalize(jnp.arange(DEVICES * 6).reshape(DEVICES, 3, 2) % 17, 17)


def at(function, *, pair: bool = False):
    """`function(*arrays, level)` as one of log-SNRs, so that gradients run through the level too."""
    if pair:
        return lambda *a: function(*a[:-2], step_from_log_snr(a[-2], a[-1]))
    return lambda *a: function(*a[:-1], level_from_log_snr(a[-1]))


def to_all(convert):
    return lambda value, x_t, lam: [
        convert(value, x_t, level_from_log_snr(lam), prediction_type) for prediction_type in PREDICTION_TYPES
    ]


PREDICTION_TYPES = ("x_0", "eps", "v", "score")
DISTRIBUTIONS = {
    "closed_form.Gaussian": closed_form.gaussian([0.2, -0.3], [[0.5, 0.1], [0.1, 0.3]]),
    "closed_form.Mixture": closed_form.mixture([0.3, 0.7], [[0.5, -0.5], [-0.6, 0.2]], [0.1, 0.2]),
    "closed_form.Empirical": closed_form.empirical([[0.5, -0.5], [-0.6, 0.2], [0.0, 1.0]]),
    "closed_form.Independent": closed_form.independent_pixels([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]),
}
POINT = numbers(9, 2)
LINE = jnp.asarray([[0.6, 0.8]])


def of_distribution(name, function):
    """`function(distribution, *arrays, level)`, the distribution in the dtype of the level."""

    def call(*arrays):
        *arrays, lam = arrays
        distribution = jax.tree.map(lambda leaf: leaf.astype(lam.dtype), DISTRIBUTIONS[name])
        return function(distribution, *arrays, level_from_log_snr(lam))

    return call


def _density_and_posterior(distribution, x, level):
    noisy = closed_form.marginal(distribution, level)
    given = distribution.posterior(x, level)
    return noisy.log_prob(x), noisy.score(x), noisy.score_jacobian(x), given.mean, given.variance, given.covariance()


def _normal(mean, var):
    return Normal(mean, var=jnp.broadcast_to(var, mean.shape))


def _model(weights, shift, var):
    return linear_gaussian.LinearGaussianModel(weights, shift, var)


def _pca(x):
    principal = linear_gaussian.principal_components(x)
    return principal.variances, principal.decode(principal.encode(x, 1))  # directions may turn by pi


def _ppca(x):
    model = linear_gaussian.probabilistic_pca(x, 1)
    return model.var, jnp.square(model.weights), jax.vmap(model.log_prob)(x)


def _fitted(x):
    start = _model(
        jnp.ones_like(x[0])[:, None] * jnp.arange(1.0, 4.0, dtype=x.dtype)[:, None], x[0], x[0, 0] ** 2 + 1.0
    )
    return vae.variational_em(
        lambda m: m.encoder(x), lambda q: linear_gaussian.maximum_likelihood_decoder(q, x), start, iterations=2
    )


def _field(x):
    """A vector field per example whose Jacobian is neither diagonal nor symmetric."""
    return jnp.sin(x[:, ::-1]) + 0.3 * x**3


def _energy(x):
    return jnp.sum(0.25 * x**4 + x[:, ::-1] ** 2 * jnp.cos(x), axis=1)


def _counts(x):
    return jnp.sum(jnp.log1p(x) - 0.7 * x)


def _tweedie(x, lam):
    level = level_from_log_snr(lam)
    return tweedie.posterior_covariance(_field, x, level), tweedie.covariance_operator(_field, x, level)(x)


def _constants(x):
    """log Z by five nodes, and what it makes of the density."""
    log_z = energy.log_partition(_energy, x, x[:, 0])
    return log_z, energy.log_density(_energy, x, log_z)


SMALL = partial(information.quadrature, nodes=15)
# name -> (function of one row, rows). Random functions get their key first.
SMOOTH: dict[str, tuple[Any, tuple]] = {
    "gaussian.Normal": (lambda m, v, x: (Normal(m, var=v).log_prob(x), Normal(m, var=v).entropy()), (X, VAR, Y)),
    "gaussian.kl": (lambda m, v, n, w: gaussian.kl(Normal(m, var=v), Normal(n, var=w)), (X, VAR, Y, VAR[::-1])),
    "gaussian.variance_kl": (gaussian.variance_kl, (P,)),
    "noise_levels.NoiseLevel": (lambda lam: (level_from_log_snr(lam).snr, level_from_log_snr(lam).log_snr), (P,)),
    "noise_levels.Step": (
        lambda s, t: (step_from_log_snr(s, t).snr_ratio, step_from_log_snr(s, t).one_minus_ratio),
        (HIGH, LOW),
    ),
    "noise_levels.level_from_log_snr": (noise_levels.level_from_log_snr, (P,)),
    "noise_levels.step_from_log_snr": (noise_levels.step_from_log_snr, (HIGH, LOW)),
    **{
        f"schedules.{name}": (
            lambda s, d, continuous=continuous: continuous.step(s, s + d),
            (numbers(7, low=0.1, high=0.5), numbers(8, low=0.01, high=0.4)),
        )
        for name, continuous in {
            "LinearBeta": schedules.LinearBeta(),
            "Cosine": schedules.Cosine(),
            "Sigmoid": schedules.Sigmoid(),
            "LinearLogSNR": schedules.LinearLogSNR(),
            "VarianceExploding": schedules.VarianceExploding(),
            "LearnedSchedule": schedules.LearnedSchedule(
                -6.0, 4.0, Partial(lambda s, t: t * t * t - s * s * s + t - s)
            ),
        }.items()
    },
    "discrete_schedules.InterpolatedSchedule": (
        lambda s, d: discrete_schedules.InterpolatedSchedule(discrete(s)).step(s, s + d),
        (numbers(7, low=0.1, high=0.5), numbers(8, low=0.01, high=0.4)),
    ),
    "forward.marginal": (at(forward.marginal), (X, P)),
    "forward.add_noise": (at(forward.add_noise), (X, Y, P)),
    "forward.transition": (at(forward.transition, pair=True), (X, HIGH, LOW)),
    "forward.posterior": (at(forward.posterior, pair=True), (X, Y, HIGH, LOW)),
    "forward.posterior_from_eps": (at(forward.posterior_from_eps, pair=True), (X, Y, HIGH, LOW)),
    "forward.posterior_from_score": (at(forward.posterior_from_score, pair=True), (X, Y, HIGH, LOW)),
    "forward.posterior_variance": (at(forward.posterior_variance, pair=True), (HIGH, LOW)),
    "forward.posterior_coefficients": (at(forward.posterior_coefficients, pair=True), (HIGH, LOW)),
    "parameterization.prediction_target": (
        lambda x, e, lam: [
            parameterization.prediction_target(x, e, level_from_log_snr(lam), prediction_type)
            for prediction_type in PREDICTION_TYPES
        ],
        (X, Y, P),
    ),
    "parameterization.to_x_0": (to_all(parameterization.to_x_0), (X, Y, P)),
    "parameterization.to_eps": (to_all(parameterization.to_eps), (X, Y, P)),
    "parameterization.to_v": (to_all(parameterization.to_v), (X, Y, P)),
    "parameterization.to_score": (to_all(parameterization.to_score), (X, Y, P)),
    "parameterization.convert": (
        lambda value, x_t, lam: parameterization.convert(value, x_t, level_from_log_snr(lam), "v", "score"),
        (X, Y, P),
    ),
    "likelihoods.DiscretizedGaussian": (
        lambda m, s, x: likelihoods.DiscretizedGaussian(m, scale=s, levels=17).log_prob(jax.lax.stop_gradient(x)),
        (X, VAR, ON_GRID),
    ),
    "likelihoods.Categorical": (
        lambda z, lam, x: likelihoods.Categorical(z, level_from_log_snr(lam), 17).log_prob(jax.lax.stop_gradient(x)),
        (X, P, ON_GRID),
    ),
    "likelihoods.Categorical.mean": (
        lambda z, lam, logits: likelihoods.Categorical(z, level_from_log_snr(lam), 5, logits).mean(),
        (X, P, numbers(10, 3, 2, 5)),
    ),
    "likelihoods.Bernoulli": (
        lambda m, x: (
            likelihoods.Bernoulli(m).log_prob(jnp.sign(jax.lax.stop_gradient(x) - 0.01)),
            likelihoods.Bernoulli(m).mean(),
        ),
        (X, ON_GRID),
    ),
    "likelihoods.DiscretizedLogisticMixture": (
        lambda w, m, s, c, x: likelihoods.DiscretizedLogisticMixture(w, m, s, 17, c).log_prob(jax.lax.stop_gradient(x)),
        (numbers(13, 3, 2), numbers(14, 3, 2, 2), numbers(15, 3, 2, 2), numbers(16, 3, 1, 2), ON_GRID),
    ),
    "autoencoder.nearest_distance": (
        lambda x, data: autoencoder.nearest_distance(x, data),
        (numbers(17, 4, 3), numbers(18, 5, 3)),
    ),
    "vae.kl_to_prior": (lambda m, v: vae.kl_to_prior(Normal(m, var=v)), (X, VAR)),
    "vae.kl_monte_carlo": (lambda m, v, z: vae.kl_monte_carlo(Normal(m, var=v), z), (X, VAR, Y)),
    "vae.importance_weighted_average": (vae.importance_weighted_average, (BATCH,)),
    "vae.aggregated_posterior_log_prob": (
        lambda m, v, z: vae.aggregated_posterior_log_prob(_normal(m, v), z),
        (BATCH, VAR, BATCH[:, 0]),
    ),
    "vae.optimal_mean_decoder": (
        lambda m, v, x, z: vae.optimal_mean_decoder(_normal(m, v), x, z),
        (BATCH, VAR, numbers(19, 5, 2), BATCH[:, 0]),
    ),
    "vae.variational_em": (lambda x: _fitted(x), (numbers(20, 6, 3),)),
    "hvae.free_bits_objective": (
        lambda r, d: hvae.free_bits_objective(hvae.HierarchicalBound(r, d), beta=0.5, free_nats=0.1),
        (numbers(21, 4), numbers(23, 2, 4)),  # one level above the free bits and one below
    ),
    "linear_gaussian.principal_components": (lambda x: _pca(x), (numbers(20, 6, 3),)),
    "linear_gaussian.probabilistic_pca": (lambda x: _ppca(x), (numbers(20, 6, 3),)),
    "linear_gaussian.maximum_likelihood_decoder": (
        lambda m, v, x: linear_gaussian.maximum_likelihood_decoder(_normal(m, v), x),
        (numbers(23, 6, 2), VAR, numbers(20, 6, 3)),
    ),
    "linear_gaussian.LinearGaussianModel": (
        lambda w, b, v, x: (_model(w, b, v).log_prob(x[0]), _model(w, b, v).posterior(x), _model(w, b, v).encoder(x)),
        (numbers(24, 3, 2), numbers(25, 3), VAR, numbers(20, 6, 3)),
    ),
    "elbo.prior_kl": (at(elbo.prior_kl), (X, P)),
    "elbo.diffusion_weight": (
        lambda s, t: [
            elbo.diffusion_weight(step_from_log_snr(s, t), prediction_type) for prediction_type in PREDICTION_TYPES
        ],
        (HIGH, LOW),
    ),
    "elbo.diffusion_kl": (
        lambda x, y, s, t: [
            elbo.diffusion_kl(x, y, step_from_log_snr(s, t), prediction_type) for prediction_type in PREDICTION_TYPES
        ],
        (X, Y, HIGH, LOW),
    ),
    "elbo.continuous_diffusion_weight": (
        lambda lam: [
            elbo.continuous_diffusion_weight(level_from_log_snr(lam), -2.0 * lam, prediction_type)
            for prediction_type in PREDICTION_TYPES
        ],
        (P,),
    ),
    "forward.bridge": (
        lambda x, y, s, u, t: forward.bridge(x, y, step_from_log_snr(s, u), step_from_log_snr(u, t)),
        (X, Y, HIGH + 8.0, HIGH, LOW),
    ),
    **{name: (of_distribution(name, _density_and_posterior), (POINT, P)) for name in DISTRIBUTIONS},
    "closed_form.marginal": (
        of_distribution("closed_form.Empirical", lambda w, level: closed_form.marginal(w, level)),
        (P,),
    ),
    "closed_form.reverse_transition": (
        lambda x, s, t: closed_form.reverse_transition(
            jax.tree.map(lambda leaf: leaf.astype(x.dtype), DISTRIBUTIONS["closed_form.Mixture"]),
            x,
            step_from_log_snr(s, t),
        ),
        (POINT, HIGH, LOW),
    ),
    **{
        f"closed_form.{name}": (
            of_distribution("closed_form.Mixture", lambda w, y, level, f=function: f(w, LINE.astype(y.dtype), y[:1])),
            (POINT, P),
        )
        for name, function in {
            "linear_measurement": lambda w, line, y: closed_form.linear_measurement(w, line, 0.1).log_prob(y),
            "linear_posterior": lambda w, line, y: closed_form.linear_posterior(w, line, y, 0.1).score(2.0 * line[0]),
        }.items()
    },
    "closed_form.optimal_prediction": (
        of_distribution(
            "closed_form.Mixture",
            lambda w, x, level: [
                closed_form.optimal_prediction(w, x, level, prediction_type) for prediction_type in PREDICTION_TYPES
            ],
        ),
        (POINT, P),
    ),
    **{
        f"information.{name}": (
            of_distribution("closed_form.Mixture", lambda w, level, f=function: f(w, level, SMALL)),
            (P,),
        )
        for name, function in {
            "mmse": information.mmse,
            "mutual_information": information.mutual_information,
            "entropy": lambda w, level, expect: information.entropy(closed_form.marginal(w, level), expect),
        }.items()
    },
    "information.quadrature": (
        of_distribution(
            "closed_form.Gaussian", lambda w, level: SMALL(lambda x: jnp.sum(x**2), closed_form.marginal(w, level))
        ),
        (P,),
    ),
    "information.monte_carlo": (
        of_distribution(
            "closed_form.Gaussian",
            lambda w, level: information.monte_carlo(
                jnp.sum, closed_form.marginal(w, level), jax.random.key(0), num_samples=10
            ),
        ),
        (P,),
    ),
    "information.optimal_bound": (
        of_distribution(
            "closed_form.Gaussian",
            lambda w, level: information.optimal_bound(w, discrete(w.mean), prior=Normal(0.0, var=level.alpha)),
        ),
        (P,),
    ),
    "information.optimal_bound_limit": (
        of_distribution(
            "closed_form.Gaussian", lambda w, level: information.optimal_bound_limit(w, discrete(w.mean)(1), level)
        ),
        (LOW - 4.0,),
    ),
    "elbo.bits_per_dim": (lambda nats: elbo.bits_per_dim(nats, 7, 0.5), (P,)),
    "likelihoods.log_interval_probability": (likelihoods.log_interval_probability, (X, VAR)),
    "dequantization.TruncatedNormal": (
        lambda m, v, u, x: dequantization.TruncatedNormal(
            jax.lax.stop_gradient(x), levels=17, mean=0.05 * m, scale=v
        ).log_prob(x + 0.05 * u),
        (P, VAR, Y, ON_GRID),
    ),
    "reverse_variance.interpolated_variance": (
        lambda f, s, t: reverse_variance.interpolated_variance(f, step_from_log_snr(s, t)),
        (X, HIGH, LOW),
    ),
    "reverse_variance.variance_fraction": (
        lambda v, s, t: reverse_variance.variance_fraction(v, step_from_log_snr(s, t)),
        (VAR, HIGH, LOW),
    ),
    "reverse_variance.split_learned_range": (reverse_variance.split_learned_range, (X,)),
    "reverse_variance.reverse_step_kl": (
        lambda x, y, r, s, t: [
            reverse_variance.reverse_step_kl(x, y, r, step_from_log_snr(s, t), prediction_type)
            for prediction_type in PREDICTION_TYPES
        ],
        (X, Y, P, HIGH, LOW),
    ),
    "reverse_variance.optimal_variance": (
        at(lambda e, step: reverse_variance.optimal_variance(e, step), pair=True),
        (VAR, HIGH, LOW),
    ),
    "reverse_variance.analytic_dpm_variance": (
        at(lambda e, step: reverse_variance.analytic_dpm_variance(0.4 * e, step), pair=True),
        (VAR, HIGH, LOW),
    ),
    "reverse_variance.variance_bounds": (
        at(lambda step: reverse_variance.variance_bounds(step, 1.0), pair=True),
        (HIGH, LOW),
    ),
    **{
        f"weightings.{name}": (getattr(weightings, name), (P,))
        for name in ("likelihood", "cosine", "v_prediction", "edm", "p2", "min_snr", "sigmoid")
    },
    "schedules.time_from_log_snr": (lambda lam: schedules.time_from_log_snr(lam, schedules.Cosine()), (P,)),
    "weightings.uniform_in_time": (lambda lam: weightings.uniform_in_time(lam, schedules.Cosine()), (P,)),
    "weightings.as_elbo_mixture": (
        lambda t: weightings.as_elbo_mixture(weightings.sigmoid, CONTINUOUS, t),
        (numbers(7, low=0.1, high=0.9),),
    ),
    "time_sampling.geometric_variance_proposal": (
        lambda lam: time_sampling.geometric_variance_proposal(level_from_log_snr(lam - jnp.arange(4, dtype=lam.dtype))),
        (P,),
    ),
    "time_sampling.timestep_proposal": (
        lambda lam: time_sampling.timestep_proposal(level_from_log_snr(lam - jnp.arange(4, dtype=lam.dtype))),
        (P,),
    ),
    "divergence.value_and_divergence": (
        lambda x, v: divergence.value_and_divergence(_field, x, v),
        (BATCH, numbers(26, 2, 5, 3)),
    ),
    "parameterization.ScoreFromDenoiser": (
        lambda p, x, lam: [
            parameterization.ScoreFromDenoiser(Partial(network, p), level_from_log_snr(lam), prediction_type)(x)
            for prediction_type in PREDICTION_TYPES
        ],
        (P, BATCH, LOW),
    ),
    "parameterization.from_timesteps": (
        lambda p, x, lam: parameterization.from_timesteps(Partial(_at_timestep, p), discrete(x))(
            x, level_from_log_snr(lam + jnp.linspace(0.0, 5.0, 5, dtype=x.dtype))
        ),
        (P, BATCH, LOW),
    ),
    "score_matching.explicit": (lambda x: score_matching.explicit(_field, jnp.sin, x), (BATCH,)),
    "score_matching.implicit": (lambda x: score_matching.implicit(_field, x), (BATCH,)),
    "tweedie.posterior_mean": (at(lambda x, level: tweedie.posterior_mean(_field, x, level)), (BATCH, P)),
    "tweedie.posterior_covariance": (_tweedie, (BATCH, P)),
    "tweedie.posterior_variance": (
        at(lambda x, level: tweedie.posterior_variance(_field, None, x, level, trace="exact")),
        (BATCH, P),
    ),
    "tweedie.cumulants": (lambda x: tweedie.cumulants(_counts, tweedie.poisson_base, x, 2), (VAR,)),
    "tweedie.normal_base": (tweedie.normal_base, (X, VAR)),
    "tweedie.poisson_base": (tweedie.poisson_base, (X,)),
    "tweedie.gamma_base": (tweedie.gamma_base, (numbers(27, 3, 2, low=0.1), VAR)),
    "sure.soft_threshold": (lambda y, t: sure.soft_threshold(y, 0.1 * t), (BATCH, VAR)),
    "sure.sure_threshold": (lambda y: sure.sure_threshold(y, 0.5)[1], (X,)),
    "langevin.langevin_kernel": (
        lambda x, s, eta, y: (langevin.langevin_kernel(x, s, eta), langevin.langevin_kernel(x, s, eta).log_prob(y)),
        (X, Y, VAR, X[::-1]),
    ),
    "energy.score": (lambda x: energy.score(_energy, x), (BATCH,)),
    "energy.log_density": (_constants, (BATCH,)),
    "energy.line_integral": (lambda x, y: energy.line_integral(_field, x, y, nodes=5), (BATCH, BATCH[::-1])),
}


def discrete(x):
    """SCHEDULE in the dtype of x."""
    return jax.tree.map(lambda field: field.astype(x.dtype), SCHEDULE)


def network(param, x_t, level):
    return param * x_t * level.sigma[:, None]


def _at_timestep(param, x_t, timestep):
    return param * x_t * jnp.sin(timestep)[:, None]


def _levels_of(x):
    """A level for each of a batch."""
    return discrete(x)(jnp.arange(1, 1 + x.shape[0]))


def _level_of(x):
    return jax.tree.map(lambda field: field[0], _levels_of(x))


def _falling(x):
    return jax.tree.map(lambda field: field[::-1], _levels_of(x))


def _score(net, x):
    """The score computed from the network's output."""
    return parameterization.ScoreFromDenoiser(net, _level_of(x))


def _noise(x):
    return Normal(x, var=jnp.full((), 0.3, x.dtype))


def _network_energy(p, x):
    return jnp.sum(jnp.cos(p * x) + 0.5 * x[:, ::-1] ** 2, axis=1)


def _minus_energy(p, x):
    return -_network_energy(p, x)


def decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def _encode(p, *given):
    *_, x = given  # in a hierarchy: the latent above, and x
    return Normal(p * x[:, :2], var=jnp.exp(0.1 * x[:, 1:]))


def _decode(p, z):
    return jnp.concatenate([p * z, z[:, :1] ** 2], axis=1)


def _likelihood(mean):
    return Normal(mean, var=jnp.full((), 0.5, mean.dtype))


def _below(p, z):
    return Normal(p * z, var=jnp.ones_like(z))


def _vae(p):
    return Partial(_encode, p), Partial(_decode, p), _likelihood


def _top_down(p):
    return hvae.top_down((2,), [Partial(_encode, p)] * 2, [Partial(_below, p)], Partial(_decode, p))


def _bottom_up(p):
    return hvae.bottom_up((2,), [Partial(_encode, p), Partial(_below, p)], [Partial(_below, p)], Partial(_decode, p))


def with_variance(param, x_t, level):
    return network(param, x_t, level), jnp.cos(x_t)


def _class_log_prob(p, x_t, level):
    return jax.nn.log_sigmoid(p * jnp.sum(jnp.sin(x_t), axis=1) * level.alpha)


def _measured(x):
    return x[:, :2]


def _dequantized(net, k, x):
    x_0 = likelihoods.normalize(likelihoods.denormalize(x, 17), 17).astype(x.dtype)
    return dequantization.dequantized_bound(
        lambda y: -jnp.sum(net(y, _levels_of(y)) ** 2, axis=1),
        k,
        x_0,
        lambda x: dequantization.Uniform(x, 17),
        samples=2,
    )


def _encoded(net, k, x):
    return dequantization.latent_dequantization_bound(
        lambda y: -jnp.sum(y**2, axis=1), net, k, x, _level_of(x), decoder
    )


def _log_likelihood(x_hat, level):
    return 0.1 * jnp.sum(jnp.tanh(0.2 * x_hat), axis=1)


def _learned_decoder(x_hat, fraction, x_1, level):
    return Normal(x_hat, var=level.sigma**2 * jnp.exp(fraction))


# Functions of (denoiser, key, batch).
OF_DENOISER: dict[str, Any] = {
    "elbo.bound": lambda net, k, x: elbo.bound(net, k, x, discrete(x), decoder),
    "path_bounds.consistency_bound": lambda net, k, x: path_bounds.consistency_bound(net, k, x, discrete(x), decoder),
    "elbo.diffusion_curve": lambda net, k, x: elbo.diffusion_curve(net, k, x, CONTINUOUS, terms=3),
    "path_bounds.importance_weighted_bound": lambda net, k, x: path_bounds.importance_weighted_bound(
        net, k, x, discrete(x), decoder, samples=2
    ),
    "vdm.vdm_loss": lambda net, k, x: vdm.vdm_loss(net, k, x, CONTINUOUS, decoder),
    "elbo.continuous_bound": lambda net, k, x: elbo.continuous_bound(net, k, x, CONTINUOUS, decoder, terms=3),
    "path_bounds.joint_log_ratio": lambda net, k, x: path_bounds.joint_log_ratio(net, k, x, discrete(x), decoder),
    "losses.denoising_loss": lambda net, k, x: losses.denoising_loss(net, k, x, discrete(x), prediction_type="v")[1:],
    "losses.simple_loss": lambda net, k, x: losses.simple_loss(net, k, x, discrete(x), time_sampling="low_discrepancy"),
    "losses.ddpm_loss": lambda net, k, x: losses.ddpm_loss(net, k, x, discrete(x), decoder),
    "weightings.weighted_bound": lambda net, k, x: weightings.weighted_bound(
        net, k, x, CONTINUOUS, weightings.sigmoid, terms=3
    ),
    "reverse_variance.eps_second_moment": lambda net, k, x: reverse_variance.eps_second_moment(net, k, x, discrete(x)),
    "samplers.ancestral": lambda net, k, x: samplers.ancestral(net, k, x, discrete(x), snapshots=3).x_0,
    "samplers.ddim": lambda net, k, x: samplers.ddim(net, k, x, discrete(x), eta=0.5, snapshots=3),
    "samplers.ddim_inverse": lambda net, k, x: samplers.ddim_inverse(net, x, discrete(x)),
    "samplers.heun": lambda net, k, x: samplers.heun(net, k, x, discrete(x), s_churn=2.0).x_0,
    "samplers.euler": lambda net, k, x: samplers.euler(net, k, x, discrete(x)).x_0,
    "samplers.dpmpp_2m": lambda net, k, x: samplers.dpmpp_2m(net, k, x, discrete(x)).x_0,
    "samplers.dpmpp_2m_sde": lambda net, k, x: samplers.dpmpp_2m_sde(net, k, x, discrete(x), prediction_type="v").x_0,
    "samplers.predictor_corrector": lambda net, k, x: samplers.predictor_corrector(net, k, x, discrete(x)).x_0,
    "samplers.repaint": lambda net, k, x: samplers.repaint(net, k, x, discrete(x), 0.5 * x, x, resamplings=2).x_0,
    "samplers.twisted_smc": lambda net, k, x: samplers.twisted_smc(
        net, k, x, discrete(x), _log_likelihood, ess_threshold=0.0
    ),
    "score_matching.sliced": lambda net, k, x: score_matching.sliced(_score(net, x), k, x, trace="gaussian"),
    "score_matching.denoising": lambda net, k, x: score_matching.denoising(_score(net, x), k, x, _noise),
    "score_matching.denoising_at_level": lambda net, k, x: score_matching.denoising_at_level(
        net, k, x, _levels_of(x), prediction_type="v"
    ),
    "sure.sure": lambda net, k, x: sure.sure(_score(net, x), k, x, 0.4, trace="sphere"),
    "langevin.ula": lambda net, k, x: langevin.ula(_score(net, x), k, x, 0.05, 3),
    "langevin.annealed_langevin": lambda net, k, x: langevin.annealed_langevin(
        net, k, x, _falling(x), prediction_type="eps", steps=2, path=True
    ),
    "langevin.langevin_corrector": lambda net, k, x: langevin.langevin_corrector(
        net, k, x, _level_of(x), prediction_type="eps", steps=2
    ),
}
# The same for denoisers that also return a variance.
LEARNING: dict[str, Any] = {
    "reverse_variance.learned_variance_bound": lambda net, k, x: reverse_variance.learned_variance_bound(
        net, k, x, discrete(x), _learned_decoder
    ),
    "reverse_variance.vlb_loss": lambda net, k, x: (
        reverse_variance.vlb_loss(net, k, x, discrete(x), _learned_decoder).loss
    ),
    "reverse_variance.hybrid_loss": lambda net, k, x: (
        reverse_variance.hybrid_loss(net, k, x, discrete(x), _learned_decoder).squared_error
    ),
    "samplers.ancestral_learned": lambda net, k, x: samplers.ancestral_learned(net, k, x, discrete(x)).x_0,
}
# As functions of a row (key, the network's parameter, a batch).
BATCHED: dict[str, Any] = {
    **{name: lambda k, p, x, f=f: f(Partial(with_variance, p), k, x) for name, f in LEARNING.items()},
    **{name: lambda k, p, x, f=f: f(Partial(network, p), k, x) for name, f in OF_DENOISER.items()},
    "elbo.denoising_error": lambda k, p, x: elbo.denoising_error(Partial(network, p), k, x, _levels_of(x), "eps"),
    "dequantization.dequantized_bound": lambda k, p, x: _dequantized(Partial(network, p), k, x),
    "dequantization.latent_dequantization_bound": lambda k, p, x: _encoded(Partial(network, p), k, x),
    "autoencoder.reconstruction_error": lambda k, p, x: autoencoder.reconstruction_error(
        lambda x: jnp.tanh(p * x), lambda z: p + z, x
    ),
    "autoencoder.denoising_reconstruction_error": lambda k, p, x: autoencoder.denoising_reconstruction_error(
        lambda x: jnp.tanh(p * x), lambda z: p + z, k, x, 0.3
    ),
    "vae.bound": lambda k, p, x: vae.bound(*_vae(p), k, x),
    "vae.importance_weighted_bound": lambda k, p, x: vae.importance_weighted_bound(*_vae(p), k, x, samples=3),
    "vae.kl_decomposition": lambda k, p, x: vae.kl_decomposition(_encode(p, x), k, samples=2),
    "vae.reconstruction_nll": lambda k, p, x: vae.reconstruction_nll(Partial(_decode, p), _likelihood, x[:, 1:], x),
    "vae.reparameterized_sample": lambda k, p, x: vae.reparameterized_sample(_encode(p, x), k),
    "hvae.top_down": lambda k, p, x: hvae.bound(_top_down(p), _likelihood, k, x),
    "hvae.bottom_up": lambda k, p, x: hvae.bound(_bottom_up(p), _likelihood, k, x),
    "hvae.importance_weighted_bound": lambda k, p, x: hvae.importance_weighted_bound(
        _top_down(p), _likelihood, k, x, samples=2
    ),
    "hvae.sample": lambda k, p, x: hvae.sample(_top_down(p), _likelihood, k, 3, temperature=0.7),
    "hvae.sample_decoder_output": lambda k, p, x: hvae.sample_decoder_output(_top_down(p), k, 3),
    "hvae.reconstruct": lambda k, p, x: hvae.reconstruct(_top_down(p), k, x, keep=1),
    "elbo.reconstruction_nll": lambda k, p, x: elbo.reconstruction_nll(
        Partial(network, p), k, x, _levels_of(x), decoder, "eps"
    ),
    "guidance.ClassifierFreeGuidance": lambda k, p, x: guidance.ClassifierFreeGuidance(
        Partial(network, p), Partial(network, 2 * p), 1.0 + p, -3.0, 3.0
    )(x, _levels_of(x)),
    "guidance.ClassifierGuidance": lambda k, p, x: guidance.ClassifierGuidance(
        Partial(network, p), Partial(_class_log_prob, p), 1.0 + p
    )(x, _levels_of(x)),
    "guidance.ReconstructionGuidance": lambda k, p, x: guidance.ReconstructionGuidance(
        Partial(network, p), _measured, 0.3 * x[:, :2], 0.1 + p**2, prediction_type="v"
    )(x, _levels_of(x)),
    "guidance.LinearMeasurement": lambda k, p, x: guidance.LinearMeasurement(
        _measured, 0.3 * x[:, :2], 0.1 + p**2, data_variance=0.5
    )(p * x, _levels_of(x)),
    "score_matching.finite_difference": lambda k, p, x: score_matching.finite_difference(
        Partial(_network_energy, p), k, x, 0.1
    ),
}
# Integers in or out: no gradient.
DISCRETE: dict[str, tuple[Any, tuple]] = {
    "gaussian.Normal.sample": (lambda k, m, v: Normal(m, var=v).sample(k), (KEYS, X, VAR)),
    "discrete_schedules.TabulatedSchedule": (lambda t: (SCHEDULE(t), SCHEDULE.step(t - 1, t).log_snr_drop), (STEPS,)),
    "discrete_schedules.DiscretizedSchedule": (
        lambda t: (DISCRETIZED(t), DISCRETIZED.step(t - 1, t).log_snr_drop),
        (STEPS,),
    ),
    "discrete_schedules.to_betas": (
        lambda t: jax.tree.map(lambda b: b[t - 1], discrete_schedules.to_betas(SCHEDULE)),
        (STEPS,),
    ),
    "discrete_schedules.to_standard_deviations": (
        lambda t: jax.tree.map(lambda b: b[t - 1], discrete_schedules.to_standard_deviations(SCHEDULE)),
        (STEPS,),
    ),
    "discrete_schedules.to_gammas": (lambda t: discrete_schedules.to_gammas(SCHEDULE)[t - 1], (STEPS,)),
    "likelihoods.normalize": (lambda i: likelihoods.normalize(i, 17), (STEPS,)),
    "likelihoods.denormalize": (lambda x: likelihoods.denormalize(x, 17), (X,)),
    "likelihoods.on_grid": (lambda x: likelihoods.on_grid(x, 17), (ON_GRID,)),
    "dequantization.Uniform": (lambda x: dequantization.Uniform(x, 17).log_prob(x), (ON_GRID,)),
    "likelihoods.sample": (
        lambda k, m, lam: (
            likelihoods.DiscretizedGaussian(m, scale=lam**2, levels=17).sample(k),
            likelihoods.Categorical(m, level_from_log_snr(lam), 17).sample(k),
        ),
        (KEYS, X, P),
    ),
    "likelihoods.sample_more": (
        lambda k, m, w: (
            likelihoods.Bernoulli(m).sample(k),
            likelihoods.DiscretizedLogisticMixture(w, jnp.stack([m, -m], -1), jnp.stack([-m, m], -1), 17).sample(k),
        ),
        (KEYS, X, numbers(13, 3, 2)),
    ),
    "samplers.systematic_resampling": (samplers.systematic_resampling, (KEYS, numbers(14, 5))),
    "vae.reinforce_surrogate": (lambda c, q: vae.reinforce_surrogate(c, q), (P, VAR)),
    "hvae.collapse_diagnostics": (lambda k, p, x: hvae.collapse_diagnostics(_top_down(p), k, x), (KEYS, P, BATCH)),
    "hvae.kl_warm_up": (lambda t: hvae.kl_warm_up(t, 4), (STEPS,)),
    "time_sampling.sample_times": (lambda k: time_sampling.sample_times(k, 5), (KEYS,)),
    "time_sampling.independent_times": (lambda k: time_sampling.independent_times(k, 5), (KEYS,)),
    "time_sampling.low_discrepancy_times": (lambda k: time_sampling.low_discrepancy_times(k, 5), (KEYS,)),
    "time_sampling.antithetic_times": (lambda k: time_sampling.antithetic_times(k, 5), (KEYS,)),
    "time_sampling.importance_sample": (
        time_sampling.importance_sample,
        (numbers(7, low=0.1, high=0.9), numbers(8, 4, low=0.1)),
    ),
    "time_sampling.to_timesteps": (lambda p: time_sampling.to_timesteps(jnp.abs(p), 7), (P,)),
    "time_sampling.LossSecondMomentSampler": (
        lambda t, p: time_sampling.LossSecondMomentSampler.init(9, 1).update(t[None], jnp.abs(p)[None]).probabilities(),
        (STEPS, P),
    ),
    "divergence.hutchinson_probes": (
        lambda k, x: [
            divergence.hutchinson_probes(k, x, how, 2) for how in ("exact", "rademacher", "gaussian", "sphere")
        ],
        (KEYS, BATCH),
    ),
    "sure.sure_threshold.threshold": (lambda y: sure.sure_threshold(y, 0.5)[0], (X,)),
    # acceptance is discontinuous
    "langevin.mala": (
        lambda k, p, x: langevin.mala(Partial(_minus_energy, p), k, x, 0.2, 3, path=True),
        (KEYS, P, BATCH),
    ),
    # its gradient is not the slope of its value, since it does not flow through the chains
    "energy.contrastive_divergence": (
        lambda k, p, x: energy.contrastive_divergence(Partial(_network_energy, p), k, x, x[:4], 0.05, 2),
        (KEYS, P, BATCH),
    ),
    "time_sampling.sample_timesteps": (
        lambda k: (
            time_sampling.sample_timesteps(k, 4, 10),
            time_sampling.sample_timesteps(k, 4, 10, time_sampling="low_discrepancy"),
        ),
        (KEYS,),
    ),
}
# Made on the host from static numbers. The test makes them inside a compiled function.
HOST = {
    "discrete_schedules.discretize": lambda: discrete_schedules.discretize(schedules.Cosine(), 4),
    "discrete_schedules.from_betas": lambda: discrete_schedules.from_betas(np.array([0.1, 0.2])),
    "discrete_schedules.from_standard_deviations": lambda: discrete_schedules.from_standard_deviations(
        np.array([0.1, 0.2])
    ),
    "discrete_schedules.from_gammas": lambda: discrete_schedules.from_gammas(np.array([-1.0, 2.0])),
    "discrete_schedules.linear_betas": lambda: discrete_schedules.linear_betas(10),
    "closed_form.gaussian": lambda: closed_form.gaussian([0.0, 1.0], np.eye(2)),
    "closed_form.low_rank": lambda: closed_form.low_rank([0.0, 1.0], np.ones((2, 1)), 0.1),
    "closed_form.mixture": lambda: closed_form.mixture([0.5, 0.5], [[0.0], [1.0]], [0.1, 0.2]),
    "closed_form.empirical": lambda: closed_form.empirical([[0.0], [1.0]]),
    "closed_form.independent_pixels": lambda: closed_form.independent_pixels([[0.2, 0.8]]),
    "discrete_schedules.uniform_steps": lambda: jnp.asarray(discrete_schedules.uniform_steps(10, 4)),
    "discrete_schedules.log_snr_uniform_steps": lambda: jnp.asarray(
        discrete_schedules.log_snr_uniform_steps(SCHEDULE, 4)
    ),
    "discrete_schedules.karras_steps": lambda: jnp.asarray(discrete_schedules.karras_steps(SCHEDULE, 4)),
}
# Protocols, results and checks, which have no computation of their own; `probability_flow` has its own test of this,
# and `samplers.adaptive` calls it.
NAMED_ELSEWHERE = {
    "gaussian.check_prior", "noise_levels.check_positive", "noise_levels.broadcast_to_batch", "elbo.decoder_log_prob",
    "likelihoods.evaluate_log_prob", "reverse_variance.evaluate_variance", "probability_flow.check_nonsingular",
    "vae.encode", "vae.check_posterior", "vae.output_nll", "schedules.ContinuousSchedule", "schedules.Schedule",
    "schedules.check_noise_at_start", "discrete_schedules.Betas", "discrete_schedules.DiscreteSchedule",
    "time_sampling.WeightedTime", "time_sampling.check_probabilities", "forward.PosteriorCoefficients",
    "elbo.DiffusionBound", "elbo.DiffusionCurve", "elbo.DiffusionDecoder", "elbo.assemble_bound",
    "likelihoods.Likelihood", "vae.EncoderFn", "vae.DecoderFn", "vae.LikelihoodFn", "vae.VAEBound",
    "vae.KLDecomposition", "hvae.Latent", "hvae.ChooseLatent", "hvae.Hierarchy", "hvae.HierarchicalBound",
    "hvae.CollapseDiagnostics", "hvae.bound", "linear_gaussian.PrincipalComponents", "losses.DenoisingLoss",
    "reverse_variance.HybridLoss", "reverse_variance.InterpolatedDecoder", "reverse_variance.VarianceBounds",
    "reverse_variance.VarianceDecoder", "reverse_variance.VarianceDenoiser", "reverse_variance.VariationalLoss",
    "samplers.Particles", "samplers.Samples", "samplers.Trajectory", "samplers.adaptive",
    "probability_flow.FlowLogLikelihood",
    "probability_flow.drift", "probability_flow.log_likelihood", "probability_flow.sample",
    "probability_flow.sample_with_log_prob", "probability_flow.FlowSample", "probability_flow.encode",
    "probability_flow.interpolate", "probability_flow.spherical_interpolation",
    "closed_form.Distribution", "closed_form.OptimalDecoder", "closed_form.OptimalDenoiser", "information.Estimate",
    "information.Expectation", "information.OptimalBound", "divergence.check_trace", "energy.ContrastiveDivergence",
    "langevin.Chain", "langevin.check_decreasing_noise", "energy.log_partition", "tweedie.covariance_operator",
}  # fmt: skip
ROWS = {
    **SMOOTH,
    **DISCRETE,
    **{name: (function, (KEYS, P, BATCH)) for name, function in BATCHED.items()},
}


# Compared in numbers by `make test`: some of each kind, and those that treat concrete and traced values differently.
COMPARED = {
    "gaussian.Normal.sample", "noise_levels.Step", "forward.posterior", "schedules.LinearBeta",
    "discrete_schedules.TabulatedSchedule", "discrete_schedules.DiscretizedSchedule", "likelihoods.normalize",
    "likelihoods.on_grid", "likelihoods.Bernoulli", "dequantization.Uniform", "time_sampling.importance_sample",
    "elbo.prior_kl", "losses.simple_loss",
}  # fmt: skip
MAPPED = ("gaussian.Normal.sample", "forward.posterior", "schedules.Cosine", "losses.simple_loss", "samplers.ancestral")
# Functions with a custom gradient, `where`, `clip`, `maximum` or `stop_gradient`.
GUARDED = {
    "gaussian.kl", "gaussian.variance_kl", "noise_levels.Step", "discrete_schedules.InterpolatedSchedule",
    "schedules.time_from_log_snr", "likelihoods.Bernoulli",
    "likelihoods.log_interval_probability", "autoencoder.nearest_distance", "hvae.free_bits_objective",
    "dequantization.TruncatedNormal", "reverse_variance.interpolated_variance", "reverse_variance.variance_fraction",
    "reverse_variance.analytic_dpm_variance", "reverse_variance.variance_bounds", "weightings.min_snr",
    "weightings.edm", "weightings.uniform_in_time",
    "time_sampling.geometric_variance_proposal", "time_sampling.timestep_proposal", "sure.soft_threshold",
    "guidance.ClassifierFreeGuidance", "vdm.vdm_loss", "samplers.ancestral",
}  # fmt: skip


def cases(names, fast):
    """Names as a test's cases, all but the fast ones marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def close(got, want):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-6, atol=3e-6), got, want)


def of_row(i, rows):
    return [row[i] for row in rows]


def test_nothing_public_is_missing():
    public = set()
    for name in MODULES:
        module = importlib.import_module(f"vdm_jax.{name}")
        for key, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            own = home == module.__name__ or home.startswith(module.__name__ + ".")  # or, of a folder, in it
            if own and not key.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
                public.add(f"{name}.{key}")
    assert public <= {*ROWS, *HOST, *NAMED_ELSEWHERE}


@pytest.mark.parametrize("name", cases(ROWS, COMPARED))
def test_a_compiled_map_over_rows_gives_the_results_of_each_row(name):
    function, rows = ROWS[name]
    mapped = unoptimized(jax.vmap(function))(*rows)
    for i in (0, DEVICES - 1):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), function(*of_row(i, rows)))


def all_of(names):
    """One function of all rows of these functions, and the rows."""
    return lambda rows: {name: ROWS[name][0](*rows[name]) for name in names}, {name: ROWS[name][1] for name in names}


def test_many_devices_give_the_results_of_a_map():
    function, rows = all_of(MAPPED)
    close(jax.pmap(function)(rows), unoptimized(jax.vmap(function))(rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_one_device_alone_and_many_devices_give_the_results_of_a_map(name):
    function, rows = ROWS[name]
    mapped = jax.vmap(function)(*rows)
    close(jax.jit(function)(*of_row(0, rows)), jax.tree.map(lambda leaf: leaf[0], mapped))
    close(jax.pmap(function)(*rows), mapped)


def check_slope(function, *args, fixed=0):
    """The gradient against a central difference in a random direction, in float64; the last arguments may be fixed."""
    random = np.random.RandomState(0)
    with jax.enable_x64(True):
        args = [np.asarray(arg, np.float64) for arg in args]
        direction = [random.normal(size=arg.shape) * (i < len(args) - fixed) for i, arg in enumerate(args)]

        def smooth(result):  # without the times of a trajectory, which are integers
            return [leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        factors = [random.normal(size=leaf.shape) for leaf in smooth(jax.eval_shape(function, *args))]

        def total(args, factors):
            return sum(jnp.sum(f * leaf) for f, leaf in zip(factors, smooth(function(*args)), strict=True))

        @unoptimized
        def slopes(args, direction, factors, steps):
            moved = jax.vmap(lambda h: total([a + h * d for a, d in zip(args, direction, strict=True)], factors))
            gradient = jax.grad(total)(args, factors)
            return moved(steps), sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))

        step = 1e-4
        (ahead, behind), slope = slopes(args, direction, factors, step * np.array([1.0, -1.0]))
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_checks_of_annotations")
@pytest.mark.parametrize("name", cases(SMOOTH, GUARDED))
def test_gradient_is_the_slope(name):
    function, rows = SMOOTH[name]
    check_slope(function, *of_row(0, rows), fixed=int(rows[-1] is ON_GRID))


@pytest.mark.usefixtures("without_checks_of_annotations")
@pytest.mark.parametrize("name", cases(BATCHED, GUARDED))
def test_gradient_by_the_network_is_the_slope(name):
    check_slope(lambda p, x: BATCHED[name](jax.random.key(1), p, x), P[0], BATCH[0])


def test_schedules_can_be_made_while_tracing():
    traced = jax.jit(lambda: {name: make() for name, make in HOST.items()})()
    jax.tree.map(np.testing.assert_array_equal, traced, {name: make() for name, make in HOST.items()})


def test_a_schedule_is_an_argument_a_closure_and_a_scan_s_constant():
    t = jnp.arange(1, 11)
    want = SCHEDULE.step(t - 1, t).one_minus_ratio
    close(jax.jit(lambda schedule, t: schedule.step(t - 1, t).one_minus_ratio)(SCHEDULE, t), want)
    close(jax.jit(SCHEDULE)(t), SCHEDULE(t))
    close(jax.lax.scan(lambda c, i: (c, SCHEDULE.step(i - 1, i).one_minus_ratio), 0, t)[1], want)


def counting_network():
    """A network of one parameter, and the counter of its traces."""
    traces = itertools.count()  # a list would be a variable of the network that changes

    def counted(param, x_t, level: NoiseLevel):
        next(traces)
        return network(param, x_t, level)

    return counted, traces


def test_traced_once():
    for name, function in OF_DENOISER.items():
        counted, traces = counting_network()

        def trace(param, key, function=function, counted=counted):
            jax.eval_shape(lambda: function(Partial(counted, jnp.float32(param)), key, BATCH[0]))

        trace(0.1, KEYS[0])
        first = next(traces)
        assert 1 <= first <= 2, name  # once, or once in the scan and once for the reconstruction
        trace(0.2, KEYS[1])
        assert next(traces) == first + 1, f"{name} is traced again for other parameters"  # by the `next` above
