"""Every public function gives the same under jit, vmap and a real pmap as alone, and has the right gradient."""

import importlib
import inspect
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jax.tree_util import Partial

from vdm_jax import (
    autoencoder,
    dequantization,
    divergence,
    elbo,
    energy,
    exact,
    forward,
    gaussian,
    guidance,
    hvae,
    information,
    langevin,
    levels,
    likelihoods,
    linear,
    losses,
    parameterization,
    paths,
    reverse,
    samplers,
    schedules,
    score_matching,
    sure,
    tables,
    times,
    tweedie,
    vae,
    vdm,
    weightings,
)
from vdm_jax.gaussian import Normal
from vdm_jax.levels import Level, level_from_log_snr, step_from_log_snr

MODULES = [
    "gaussian", "levels", "schedules", "tables", "times", "forward", "parameterization", "likelihoods",
    "autoencoder", "vae", "hvae", "elbo", "paths", "losses", "vdm", "weightings", "reverse", "samplers", "guidance",
    "dequantization", "flow", "exact", "information", "linear",
    "divergence", "energy", "score_matching", "tweedie", "sure", "langevin",
]  # fmt: skip
DEVICES = 8
CONTINUOUS = schedules.LinearLogSNR(6.0, -4.0)
TABLE = tables.tabulate(CONTINUOUS, 10)
GRID = tables.Grid(CONTINUOUS, 10)


def numbers(seed: int, *shape: int, low: float = -0.9, high: float = 0.9) -> jax.Array:
    """One row a device."""
    return jnp.asarray(np.random.RandomState(seed).uniform(low, high, (DEVICES, *shape)), jnp.float32)


X, Y, P = numbers(0, 3, 2), numbers(1, 3, 2), numbers(2)
HIGH, LOW, VAR = numbers(3, low=1.0, high=6.0), numbers(4, low=-6.0, high=0.5), numbers(5, low=0.5, high=2.0)
KEYS, STEPS = jax.random.split(jax.random.key(0), DEVICES), jnp.arange(1, 1 + DEVICES)
BATCH = numbers(6, 5, 3)
DRAWN = likelihoods.to_unit(jnp.arange(DEVICES * 6).reshape(DEVICES, 3, 2) % 17, 17)


def at(function, *, pair: bool = False):
    """`function(*arrays, level)` as one of log-SNRs, so that gradients run through the level too."""
    if pair:
        return lambda *a: function(*a[:-2], step_from_log_snr(a[-2], a[-1]))
    return lambda *a: function(*a[:-1], level_from_log_snr(a[-1]))


def to_all(convert):
    return lambda value, x_t, lam: [convert(value, x_t, level_from_log_snr(lam), kind) for kind in KINDS]


KINDS = ("x_0", "eps", "v", "score")
WORLDS = {
    "exact.Gaussian": exact.gaussian([0.2, -0.3], [[0.5, 0.1], [0.1, 0.3]]),
    "exact.Mixture": exact.mixture([0.3, 0.7], [[0.5, -0.5], [-0.6, 0.2]], [0.1, 0.2]),
    "exact.Finite": exact.points([[0.5, -0.5], [-0.6, 0.2], [0.0, 1.0]]),
    "exact.Independent": exact.pixels([[0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]),
}
POINT = numbers(9, 2)


def in_world(name, function):
    """`function(world, *arrays, level)`, the world in the dtype of the level."""

    def ask(*arrays):
        *arrays, lam = arrays
        world = jax.tree.map(lambda leaf: leaf.astype(lam.dtype), WORLDS[name])
        return function(world, *arrays, level_from_log_snr(lam))

    return ask


def _questions(world, x, level):
    noisy = exact.marginal(world, level)
    given = world.given(x, level)
    return noisy.log_prob(x), noisy.score(x), noisy.score_jacobian(x), given.mean, given.variance, given.covariance()


def _law(mean, var):
    return Normal(mean, var=jnp.broadcast_to(var, mean.shape))


def _model(weights, shift, var):
    return linear.Linear(weights, shift, var)


def _pca(x):
    principal = linear.principal_components(x)
    return principal.variances, principal.decode(principal.encode(x, 1))  # directions may turn by pi


def _ppca(x):
    model = linear.probabilistic_pca(x, 1)
    return model.var, jnp.square(model.weights), jax.vmap(model.log_prob)(x)


def _fitted(x):
    start = _model(
        jnp.ones_like(x[0])[:, None] * jnp.arange(1.0, 4.0, dtype=x.dtype)[:, None], x[0], x[0, 0] ** 2 + 1.0
    )
    return vae.alternate(lambda m: m.encoder(x), lambda q: linear.likeliest_decoder(q, x), start, rounds=2)


def _field(x):
    """One of each example, whose Jacobian is neither diagonal nor symmetric."""
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
    "levels.Level": (lambda lam: (level_from_log_snr(lam).snr, level_from_log_snr(lam).log_snr), (P,)),
    "levels.Step": (
        lambda s, t: (step_from_log_snr(s, t).snr_ratio, step_from_log_snr(s, t).one_minus_ratio),
        (HIGH, LOW),
    ),
    "levels.level_from_log_snr": (levels.level_from_log_snr, (P,)),
    "levels.step_from_log_snr": (levels.step_from_log_snr, (HIGH, LOW)),
    **{
        f"schedules.{name}": (
            lambda s, d, schedule=schedule: schedule.step(s, s + d),
            (numbers(7, low=0.1, high=0.5), numbers(8, low=0.01, high=0.4)),
        )
        for name, schedule in {
            "LinearBeta": schedules.LinearBeta(),
            "Cosine": schedules.Cosine(),
            "Sigmoid": schedules.Sigmoid(),
            "LinearLogSNR": schedules.LinearLogSNR(),
            "VarianceExploding": schedules.VarianceExploding(),
            "Learned": schedules.Learned(-6.0, 4.0, Partial(lambda s, t: t * t * t - s * s * s + t - s)),
        }.items()
    },
    "tables.Interpolated": (
        lambda s, d: tables.Interpolated(table(s)).step(s, s + d),
        (numbers(7, low=0.1, high=0.5), numbers(8, low=0.01, high=0.4)),
    ),
    "forward.marginal": (at(forward.marginal), (X, P)),
    "forward.transition": (at(forward.transition, pair=True), (X, HIGH, LOW)),
    "forward.posterior": (at(forward.posterior, pair=True), (X, Y, HIGH, LOW)),
    "forward.posterior_from_eps": (at(forward.posterior_from_eps, pair=True), (X, Y, HIGH, LOW)),
    "forward.posterior_from_score": (at(forward.posterior_from_score, pair=True), (X, Y, HIGH, LOW)),
    "forward.posterior_variance": (at(forward.posterior_variance, pair=True), (HIGH, LOW)),
    "forward.posterior_coefficients": (at(forward.posterior_coefficients, pair=True), (HIGH, LOW)),
    "parameterization.target": (
        lambda x, e, lam: [parameterization.target(x, e, level_from_log_snr(lam), kind) for kind in KINDS],
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
        (X, VAR, DRAWN),
    ),
    "likelihoods.Categorical": (
        lambda z, lam, x: likelihoods.Categorical(z, level_from_log_snr(lam), 17).log_prob(jax.lax.stop_gradient(x)),
        (X, P, DRAWN),
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
        (X, DRAWN),
    ),
    "likelihoods.LogisticMixture": (
        lambda w, m, s, c, x: likelihoods.LogisticMixture(w, m, s, 17, c).log_prob(jax.lax.stop_gradient(x)),
        (numbers(13, 3, 2), numbers(14, 3, 2, 2), numbers(15, 3, 2, 2), numbers(16, 3, 1, 2), DRAWN),
    ),
    "autoencoder.nearest_distance": (
        lambda x, data: autoencoder.nearest_distance(x, data),
        (numbers(17, 4, 3), numbers(18, 5, 3)),
    ),
    "vae.kl_to_prior": (lambda m, v: vae.kl_to_prior(Normal(m, var=v)), (X, VAR)),
    "vae.kl_estimate": (lambda m, v, z: vae.kl_estimate(Normal(m, var=v), z), (X, VAR, Y)),
    "vae.importance_weighted": (vae.importance_weighted, (BATCH,)),
    "vae.aggregate_log_prob": (lambda m, v, z: vae.aggregate_log_prob(_law(m, v), z), (BATCH, VAR, BATCH[:, 0])),
    "vae.averaging_decoder": (
        lambda m, v, x, z: vae.averaging_decoder(_law(m, v), x, z),
        (BATCH, VAR, numbers(19, 5, 2), BATCH[:, 0]),
    ),
    "vae.alternate": (lambda x: _fitted(x), (numbers(20, 6, 3),)),
    "hvae.objective": (
        lambda r, d: hvae.objective(hvae.Bound(r, d), beta=0.5, free_nats=0.1),
        (numbers(21, 4), numbers(22, 2, 4)),
    ),
    "linear.principal_components": (lambda x: _pca(x), (numbers(20, 6, 3),)),
    "linear.probabilistic_pca": (lambda x: _ppca(x), (numbers(20, 6, 3),)),
    "linear.likeliest_decoder": (
        lambda m, v, x: linear.likeliest_decoder(_law(m, v), x),
        (numbers(23, 6, 2), VAR, numbers(20, 6, 3)),
    ),
    "linear.Linear": (
        lambda w, b, v, x: (_model(w, b, v).log_prob(x[0]), _model(w, b, v).posterior(x), _model(w, b, v).encoder(x)),
        (numbers(24, 3, 2), numbers(25, 3), VAR, numbers(20, 6, 3)),
    ),
    "elbo.prior_kl": (at(elbo.prior_kl), (X, P)),
    "elbo.diffusion_weight": (
        lambda s, t: [elbo.diffusion_weight(step_from_log_snr(s, t), kind) for kind in KINDS],
        (HIGH, LOW),
    ),
    "elbo.diffusion_kl": (
        lambda x, y, s, t: [elbo.diffusion_kl(x, y, step_from_log_snr(s, t), kind) for kind in KINDS],
        (X, Y, HIGH, LOW),
    ),
    "elbo.diffusion_rate": (
        lambda lam: [elbo.diffusion_rate(level_from_log_snr(lam), -2.0 * lam, kind) for kind in KINDS],
        (P,),
    ),
    "forward.bridge": (
        lambda x, y, s, u, t: forward.bridge(x, y, step_from_log_snr(s, u), step_from_log_snr(u, t)),
        (X, Y, HIGH + 8.0, HIGH, LOW),
    ),
    **{name: (in_world(name, _questions), (POINT, P)) for name in WORLDS},
    "exact.marginal": (in_world("exact.Finite", lambda w, level: exact.marginal(w, level)), (P,)),
    "exact.reverse": (
        lambda x, s, t: exact.reverse(
            jax.tree.map(lambda leaf: leaf.astype(x.dtype), WORLDS["exact.Mixture"]), x, step_from_log_snr(s, t)
        ),
        (POINT, HIGH, LOW),
    ),
    "exact.prediction": (
        in_world("exact.Mixture", lambda w, x, level: [exact.prediction(w, x, level, kind) for kind in KINDS]),
        (POINT, P),
    ),
    **{
        f"information.{name}": (
            in_world("exact.Mixture", lambda w, level, f=function: f(w, level, SMALL)),
            (P,),
        )
        for name, function in {
            "mmse": information.mmse,
            "mutual_information": information.mutual_information,
            "entropy": lambda w, level, expect: information.entropy(exact.marginal(w, level), expect),
        }.items()
    },
    "information.quadrature": (
        in_world("exact.Gaussian", lambda w, level: SMALL(lambda x: jnp.sum(x**2), exact.marginal(w, level))),
        (P,),
    ),
    "information.monte_carlo": (
        in_world(
            "exact.Gaussian",
            lambda w, level: information.monte_carlo(jnp.sum, exact.marginal(w, level), jax.random.key(0), draws=10),
        ),
        (P,),
    ),
    "information.optimal_bound": (
        in_world(
            "exact.Gaussian",
            lambda w, level: information.optimal_bound(w, table(w.mean), prior_log_var=level.log_alpha),
        ),
        (P,),
    ),
    "information.optimal_bound_limit": (
        in_world("exact.Gaussian", lambda w, level: information.optimal_bound_limit(w, table(w.mean)(1), level)),
        (LOW - 4.0,),
    ),
    "elbo.bits_per_dim": (lambda nats: elbo.bits_per_dim(nats, 7, 0.5), (P,)),
    "likelihoods.log_interval": (likelihoods.log_interval, (X, VAR)),
    "dequantization.TruncatedNormal": (
        lambda m, v, u, x: dequantization.TruncatedNormal(
            jax.lax.stop_gradient(x), levels=17, mean=0.05 * m, scale=v
        ).log_prob(x + 0.05 * u),
        (P, VAR, Y, DRAWN),
    ),
    "reverse.interpolated_variance": (
        lambda f, s, t: reverse.interpolated_variance(f, step_from_log_snr(s, t)),
        (X, HIGH, LOW),
    ),
    "reverse.variance_fraction": (
        lambda v, s, t: reverse.variance_fraction(v, step_from_log_snr(s, t)),
        (VAR, HIGH, LOW),
    ),
    "reverse.reverse_kl": (
        lambda x, y, r, s, t: [reverse.reverse_kl(x, y, r, step_from_log_snr(s, t), kind) for kind in KINDS],
        (X, Y, P, HIGH, LOW),
    ),
    "reverse.matched_variance": (at(lambda e, step: reverse.matched_variance(step, e), pair=True), (VAR, HIGH, LOW)),
    "reverse.analytic_variance": (
        at(lambda e, step: reverse.analytic_variance(step, 0.4 * e), pair=True),
        (VAR, HIGH, LOW),
    ),
    "reverse.variance_bounds": (at(lambda step: reverse.variance_bounds(step, 1.0), pair=True), (HIGH, LOW)),
    **{
        f"weightings.{name}": (getattr(weightings, name), (P,))
        for name in ("likelihood", "cosine", "velocity", "edm", "p2", "min_snr", "sigmoid")
    },
    "weightings.uniform_time": (lambda lam: weightings.uniform_time(lam, schedules.Cosine()), (P,)),
    "weightings.mixture": (
        lambda t: weightings.mixture(weightings.sigmoid, CONTINUOUS, t),
        (numbers(7, low=0.1, high=0.9),),
    ),
    "times.variance_proposal": (
        lambda lam: times.variance_proposal(level_from_log_snr(lam - jnp.arange(4, dtype=lam.dtype))),
        (P,),
    ),
    "times.step_proposal": (
        lambda lam: times.step_proposal(level_from_log_snr(lam - jnp.arange(4, dtype=lam.dtype))),
        (P,),
    ),
    "divergence.value_and_divergence": (
        lambda x, v: divergence.value_and_divergence(_field, x, v),
        (BATCH, numbers(26, 2, 5, 3)),
    ),
    "parameterization.ScoreOf": (
        lambda p, x, lam: [
            parameterization.ScoreOf(Partial(network, p), level_from_log_snr(lam), kind)(x) for kind in KINDS
        ],
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
    "sure.best_threshold": (lambda y: sure.best_threshold(y, 0.5)[1], (X,)),
    "langevin.kernel": (
        lambda x, s, eta, y: (langevin.kernel(x, s, eta), langevin.kernel(x, s, eta).log_prob(y)),
        (X, Y, VAR, X[::-1]),
    ),
    "energy.score": (lambda x: energy.score(_energy, x), (BATCH,)),
    "energy.log_density": (_constants, (BATCH,)),
    "energy.line_integral": (lambda x, y: energy.line_integral(_field, x, y, nodes=5), (BATCH, BATCH[::-1])),
}


def table(x):
    """TABLE in the dtype of x."""
    return jax.tree.map(lambda field: field.astype(x.dtype), TABLE)


def network(param, x_t, level):
    return param * x_t * level.sigma[:, None]


def _levels_of(x):
    """A level for each of a batch."""
    return table(x)(jnp.arange(1, 1 + x.shape[0]))


def _level_of(x):
    return jax.tree.map(lambda field: field[0], _levels_of(x))


def _falling(x):
    return jax.tree.map(lambda field: field[::-1], _levels_of(x))


def _score(net, x):
    """The network as a score."""
    return parameterization.ScoreOf(net, _level_of(x))


def _noise(x):
    return Normal(x, var=jnp.full((), 0.3, x.dtype))


def _network_energy(p, x):
    return jnp.sum(jnp.cos(p * x) + 0.5 * x[:, ::-1] ** 2, axis=1)


def _minus_energy(p, x):
    return -_network_energy(p, x)


def decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def _encode(p, *given):
    *_, x = given  # of a ladder: what lies above, and x
    return Normal(p * x[:, :2], var=jnp.exp(0.1 * x[:, 1:]))


def _decode(p, z):
    return jnp.concatenate([p * z, z[:, :1] ** 2], axis=1)


def _likelihood(mean):
    return Normal(mean, var=jnp.full((), 0.5, mean.dtype))


def _below(p, z):
    return Normal(p * z, var=jnp.ones_like(z))


def _vae(p):
    return Partial(_encode, p), Partial(_decode, p), _likelihood


def _ladder(p):
    return hvae.ladder((2,), [Partial(_encode, p)] * 2, [Partial(_below, p)], Partial(_decode, p))


def _bottom_up(p):
    return hvae.bottom_up((2,), [Partial(_encode, p), Partial(_below, p)], [Partial(_below, p)], Partial(_decode, p))


def with_variance(param, x_t, level):
    return network(param, x_t, level), jnp.cos(x_t)


def _class_log_prob(p, x_t, level):
    return jax.nn.log_sigmoid(p * jnp.sum(jnp.sin(x_t), axis=1) * level.alpha)


def _measured(x):
    return x[:, :2]


def _dequantized(net, k, x):
    x_0 = likelihoods.to_unit(likelihoods.from_unit(x, 17), 17).astype(x.dtype)
    return dequantization.dequantized_bound(
        lambda y: -jnp.sum(net(y, _levels_of(y)) ** 2, axis=1),
        k,
        x_0,
        lambda x: dequantization.Uniform(x, 17),
        samples=2,
    )


def _encoded(net, k, x):
    return dequantization.encoder_bound(lambda y: -jnp.sum(y**2, axis=1), net, k, x, _level_of(x), decoder)


def _learned_decoder(x_hat, fraction, x_1, level):
    return Normal(x_hat, var=level.sigma**2 * jnp.exp(fraction))


# Functions of a denoiser, a key and a batch.
ASKING: dict[str, Any] = {
    "elbo.bound": lambda net, k, x: elbo.bound(net, k, x, table(x), decoder),
    "paths.consistency_bound": lambda net, k, x: paths.consistency_bound(net, k, x, table(x), decoder),
    "elbo.diffusion_curve": lambda net, k, x: elbo.diffusion_curve(net, k, x, CONTINUOUS, terms=3),
    "paths.importance_bound": lambda net, k, x: paths.importance_bound(net, k, x, table(x), decoder, samples=2),
    "vdm.vdm_loss": lambda net, k, x: vdm.vdm_loss(net, k, x, CONTINUOUS, decoder),
    "elbo.continuous_bound": lambda net, k, x: elbo.continuous_bound(net, k, x, CONTINUOUS, decoder, terms=3),
    "paths.joint_log_ratio": lambda net, k, x: paths.joint_log_ratio(net, k, x, table(x), decoder),
    "losses.denoising_loss": lambda net, k, x: losses.denoising_loss(net, k, x, table(x), kind="v")[1:],
    "losses.simple_loss": lambda net, k, x: losses.simple_loss(net, k, x, table(x), spread=True),
    "losses.ddpm_loss": lambda net, k, x: losses.ddpm_loss(net, k, x, table(x), decoder),
    "weightings.weighted_bound": lambda net, k, x: weightings.weighted_bound(
        net, k, x, CONTINUOUS, weightings.sigmoid, terms=3
    ),
    "reverse.eps_power": lambda net, k, x: reverse.eps_power(net, k, x, table(x)),
    "samplers.ancestral": lambda net, k, x: samplers.ancestral(net, k, x, table(x), snapshots=3).x_0,
    "samplers.ddim": lambda net, k, x: samplers.ddim(net, k, x, table(x), eta=0.5, snapshots=3),
    "samplers.ddim_inverse": lambda net, k, x: samplers.ddim_inverse(net, x, table(x)),
    "samplers.heun": lambda net, k, x: samplers.heun(net, k, x, table(x), churn=2.0).x_0,
    "samplers.dpmpp": lambda net, k, x: samplers.dpmpp(net, k, x, table(x), kind="v", stochastic=True).x_0,
    "samplers.predictor_corrector": lambda net, k, x: samplers.predictor_corrector(net, k, x, table(x)).x_0,
    "samplers.replacement": lambda net, k, x: samplers.replacement(net, k, x, table(x), 0.5 * x, x, rounds=2).x_0,
    "score_matching.sliced": lambda net, k, x: score_matching.sliced(_score(net, x), k, x, trace="gaussian"),
    "score_matching.denoising": lambda net, k, x: score_matching.denoising(_score(net, x), k, x, _noise),
    "score_matching.denoising_at": lambda net, k, x: score_matching.denoising_at(net, k, x, _levels_of(x), kind="v"),
    "sure.sure": lambda net, k, x: sure.sure(_score(net, x), k, x, 0.4, trace="sphere"),
    "langevin.unadjusted": lambda net, k, x: langevin.unadjusted(_score(net, x), k, x, 0.05, 3),
    "langevin.annealed": lambda net, k, x: langevin.annealed(net, k, x, _falling(x), kind="eps", steps=2, path=True),
    "langevin.corrector": lambda net, k, x: langevin.corrector(net, k, x, _level_of(x), kind="eps", steps=2),
}
# Those whose denoiser gives a variance too.
LEARNING: dict[str, Any] = {
    "reverse.learned_bound": lambda net, k, x: reverse.learned_bound(net, k, x, table(x), _learned_decoder),
    "reverse.vlb_loss": lambda net, k, x: reverse.vlb_loss(net, k, x, table(x), _learned_decoder).loss,
    "reverse.hybrid_loss": lambda net, k, x: reverse.hybrid_loss(net, k, x, table(x), _learned_decoder).squared_error,
    "samplers.ancestral_learned": lambda net, k, x: samplers.ancestral_learned(net, k, x, table(x)).x_0,
}
# As functions of a row (key, the network's parameter, a batch).
BATCHED: dict[str, Any] = {
    **{name: lambda k, p, x, ask=ask: ask(Partial(with_variance, p), k, x) for name, ask in LEARNING.items()},
    **{name: lambda k, p, x, ask=ask: ask(Partial(network, p), k, x) for name, ask in ASKING.items()},
    "elbo.denoising_error": lambda k, p, x: elbo.denoising_error(Partial(network, p), k, x, _levels_of(x), "eps"),
    "dequantization.dequantized_bound": lambda k, p, x: _dequantized(Partial(network, p), k, x),
    "dequantization.encoder_bound": lambda k, p, x: _encoded(Partial(network, p), k, x),
    "autoencoder.reconstruction_error": lambda k, p, x: autoencoder.reconstruction_error(
        lambda x: jnp.tanh(p * x), lambda z: p + z, x
    ),
    "autoencoder.denoising_reconstruction_error": lambda k, p, x: autoencoder.denoising_reconstruction_error(
        lambda x: jnp.tanh(p * x), lambda z: p + z, k, x, 0.3
    ),
    "vae.bound": lambda k, p, x: vae.bound(*_vae(p), k, x),
    "vae.importance_bound": lambda k, p, x: vae.importance_bound(*_vae(p), k, x, samples=3),
    "vae.information_split": lambda k, p, x: vae.information_split(_encode(p, x), k, samples=2),
    "vae.decoding_cost": lambda k, p, x: vae.decoding_cost(Partial(_decode, p), _likelihood, x[:, 1:], x),
    "vae.draw": lambda k, p, x: vae.draw(_encode(p, x), k),
    "hvae.ladder": lambda k, p, x: hvae.bound(_ladder(p), _likelihood, k, x),
    "hvae.bottom_up": lambda k, p, x: hvae.bound(_bottom_up(p), _likelihood, k, x),
    "hvae.importance_bound": lambda k, p, x: hvae.importance_bound(_ladder(p), _likelihood, k, x, samples=2),
    "hvae.generate": lambda k, p, x: hvae.generate(_ladder(p), _likelihood, k, 3, temperature=0.7),
    "hvae.imagine": lambda k, p, x: hvae.imagine(_ladder(p), k, 3),
    "hvae.reconstruct": lambda k, p, x: hvae.reconstruct(_ladder(p), k, x, keep=1),
    "elbo.reconstruction": lambda k, p, x: elbo.reconstruction(
        Partial(network, p), k, x, _levels_of(x), decoder, "eps"
    ),
    "guidance.ClassifierFree": lambda k, p, x: guidance.ClassifierFree(
        Partial(network, p), Partial(network, 2 * p), 1.0 + p, -3.0, 3.0
    )(x, _levels_of(x)),
    "guidance.Classifier": lambda k, p, x: guidance.Classifier(
        Partial(network, p), Partial(_class_log_prob, p), 1.0 + p
    )(x, _levels_of(x)),
    "guidance.Reconstruction": lambda k, p, x: guidance.Reconstruction(
        Partial(network, p), _measured, 0.3 * x[:, :2], 0.1 + p**2, kind="v"
    )(x, _levels_of(x)),
    "score_matching.finite_difference": lambda k, p, x: score_matching.finite_difference(
        Partial(_network_energy, p), k, x, 0.1
    ),
}
# Integers in or out: no gradient.
DISCRETE: dict[str, tuple[Any, tuple]] = {
    "gaussian.Normal.sample": (lambda k, m, v: Normal(m, var=v).sample(k), (KEYS, X, VAR)),
    "tables.Table": (lambda t: (TABLE(t), TABLE.step(t - 1, t).log_snr_drop), (STEPS,)),
    "tables.Grid": (lambda t: (GRID(t), GRID.step(t - 1, t).log_snr_drop), (STEPS,)),
    "tables.to_betas": (lambda t: jax.tree.map(lambda b: b[t - 1], tables.to_betas(TABLE)), (STEPS,)),
    "tables.to_standard_deviations": (
        lambda t: jax.tree.map(lambda b: b[t - 1], tables.to_standard_deviations(TABLE)),
        (STEPS,),
    ),
    "tables.to_gammas": (lambda t: tables.to_gammas(TABLE)[t - 1], (STEPS,)),
    "likelihoods.to_unit": (lambda i: likelihoods.to_unit(i, 17), (STEPS,)),
    "likelihoods.from_unit": (lambda x: likelihoods.from_unit(x, 17), (X,)),
    "likelihoods.on_grid": (lambda x: likelihoods.on_grid(x, 17), (DRAWN,)),
    "dequantization.Uniform": (lambda x: dequantization.Uniform(x, 17).log_prob(x), (DRAWN,)),
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
            likelihoods.LogisticMixture(w, jnp.stack([m, -m], -1), jnp.stack([-m, m], -1), 17).sample(k),
        ),
        (KEYS, X, numbers(13, 3, 2)),
    ),
    "vae.score_function": (lambda c, q: vae.score_function(c, q), (P, VAR)),
    "hvae.diagnose": (lambda k, p, x: hvae.diagnose(_ladder(p), k, x), (KEYS, P, BATCH)),
    "hvae.warm_up": (lambda t: hvae.warm_up(t, 4), (STEPS,)),
    "times.uniforms": (
        lambda k: [times.uniforms(k, 5, how) for how in ("independent", "spread", "antithetic")],
        (KEYS,),
    ),
    "times.warp": (times.warp, (numbers(7, low=0.1, high=0.9), numbers(8, 4, low=0.1))),
    "times.to_steps": (lambda p: times.to_steps(jnp.abs(p), 7), (P,)),
    "times.SecondMoments": (
        lambda t, p: times.SecondMoments.init(9, 1).update(t[None], jnp.abs(p)[None]).probabilities(),
        (STEPS, P),
    ),
    "divergence.directions": (
        lambda k, x: [divergence.directions(k, x, how, 2) for how in ("exact", "rademacher", "gaussian", "sphere")],
        (KEYS, BATCH),
    ),
    "sure.best_threshold.threshold": (lambda y: sure.best_threshold(y, 0.5)[0], (X,)),
    # accepting is a jump
    "langevin.metropolis": (
        lambda k, p, x: langevin.metropolis(Partial(_minus_energy, p), k, x, 0.2, 3, path=True),
        (KEYS, P, BATCH),
    ),
    # the gradient of its loss is not the slope of its value: none runs through the chains
    "energy.contrast": (
        lambda k, p, x: energy.contrast(Partial(_network_energy, p), k, x, x[:4], 0.05, 2),
        (KEYS, P, BATCH),
    ),
    "times.draw_steps": (lambda k: (times.draw_steps(k, 4, 10), times.draw_steps(k, 4, 10, spread=True)), (KEYS,)),
}
# Made on the host from static numbers; here, that they can be made inside a compiled function.
HOST = {
    "tables.tabulate": lambda: tables.tabulate(schedules.Cosine(), 4),
    "tables.from_betas": lambda: tables.from_betas(np.array([0.1, 0.2])),
    "tables.from_standard_deviations": lambda: tables.from_standard_deviations(np.array([0.1, 0.2])),
    "tables.from_gammas": lambda: tables.from_gammas(np.array([-1.0, 2.0])),
    "tables.linear_betas": lambda: tables.linear_betas(10),
    "exact.gaussian": lambda: exact.gaussian([0.0, 1.0], np.eye(2)),
    "exact.low_rank": lambda: exact.low_rank([0.0, 1.0], np.ones((2, 1)), 0.1),
    "exact.mixture": lambda: exact.mixture([0.5, 0.5], [[0.0], [1.0]], [0.1, 0.2]),
    "exact.points": lambda: exact.points([[0.0], [1.0]]),
    "exact.pixels": lambda: exact.pixels([[0.2, 0.8]]),
    "tables.even_steps": lambda: jnp.asarray(tables.even_steps(10, 4)),
    "tables.even_log_snr_steps": lambda: jnp.asarray(tables.even_log_snr_steps(TABLE, 4)),
    "tables.karras_steps": lambda: jnp.asarray(tables.karras_steps(TABLE, 4)),
}
# Protocols, results and checks, which have no computation of their own; `flow` has its own test of this, and
# `samplers.adaptive` is it.
NAMED_ELSEWHERE = {
    "levels.check_positive", "levels.for_batch", "elbo.decoded_log_prob", "reverse.evaluate_variance",
    "flow.check_ends", "vae.encode", "vae.check_posterior", "vae.decoded_cost",
    "schedules.Continuous", "schedules.Schedule", "schedules.check_begins_noisy", "tables.Betas", "tables.Discrete",
    "times.Draw", "times.check_probabilities", "forward.PosteriorCoefficients", "elbo.Bound", "elbo.Curve",
    "elbo.Decoder", "likelihoods.Likelihood", "vae.Encoder", "vae.Decoder", "vae.Observation", "vae.Bound",
    "vae.InformationSplit", "hvae.Latent", "hvae.Draw", "hvae.Hierarchy", "hvae.Bound", "hvae.Diagnostics",
    "hvae.bound", "linear.Principal", "losses.DenoisingLoss", "reverse.HybridLoss", "reverse.InterpolatedDecoder",
    "reverse.VarianceBounds", "reverse.VarianceDecoder", "reverse.VarianceDenoiser", "reverse.VariationalLoss",
    "samplers.Samples", "samplers.Trajectory", "samplers.adaptive", "flow.FlowLikelihood",
    "flow.drift", "flow.flow_log_prob", "flow.flow_sample",
    "exact.Law", "exact.OptimalDecoder", "exact.OptimalDenoiser", "information.Estimate", "information.Expectation",
    "information.OptimalBound", "divergence.check_trace", "energy.Contrast", "langevin.Chain", "langevin.check_falling",
    "energy.log_partition", "tweedie.covariance_operator",
}  # fmt: skip
ROWS = {
    **SMOOTH,
    **DISCRETE,
    **{name: (function, (KEYS, P, BATCH)) for name, function in BATCHED.items()},
}


# Whole chains and their like, which take long to compile in every way there is.
HEAVY = {
    *LEARNING, "samplers.ddim", "samplers.ddim_inverse", "samplers.heun", "samplers.dpmpp",
    "samplers.predictor_corrector", "samplers.replacement", "guidance.Classifier", "guidance.Reconstruction",
    "information.mmse", "likelihoods.sample",
    "likelihoods.LogisticMixture", "vae.alternate", "hvae.generate", "hvae.importance_bound",
    "hvae.bottom_up", "hvae.diagnose", "likelihoods.sample_more", "vae.information_split", "hvae.reconstruct",
    "vae.aggregate_log_prob", "linear.Linear", "linear.likeliest_decoder", "linear.probabilistic_pca",
    "vae.kl_to_prior", "paths.consistency_bound", "paths.importance_bound", "weightings.weighted_bound",
    "reverse.eps_power", "dequantization.dequantized_bound", "dequantization.encoder_bound", "elbo.diffusion_curve",
    "exact.reverse", "exact.Independent", "exact.Finite", "exact.Mixture", "likelihoods.DiscretizedGaussian",
    "paths.joint_log_ratio", "information.mutual_information", "information.optimal_bound",
    "langevin.annealed", "langevin.corrector", "langevin.metropolis", "langevin.unadjusted", "energy.contrast",
    "energy.log_density", "energy.score", "score_matching.sliced", "score_matching.finite_difference",
    "score_matching.denoising", "score_matching.denoising_at", "sure.sure", "sure.best_threshold",
    "tweedie.posterior_covariance", "tweedie.posterior_variance", "tweedie.cumulants", "tweedie.normal_base",
    "tweedie.poisson_base", "tweedie.gamma_base", "tweedie.posterior_mean", "sure.best_threshold.threshold",
    "parameterization.ScoreOf", "divergence.value_and_divergence", "divergence.directions", "langevin.kernel",
}  # fmt: skip


def cases(names):
    """Names as a test's cases, the heavy ones marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in names]


def close(got, want):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-6, atol=3e-6), got, want)


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


@pytest.mark.parametrize("name", cases(ROWS))
def test_same_alone_jitted_mapped_and_on_many_devices(name):
    function, rows = ROWS[name]
    alone = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[function(*(row[i] for row in rows)) for i in range(DEVICES)]
    )
    close(jax.jit(function)(*(row[0] for row in rows)), jax.tree.map(lambda leaf: leaf[0], alone))
    close(jax.vmap(function)(*rows), alone)
    close(jax.pmap(function)(*rows), alone)


def check_slope(function, *args):
    """Forward and reverse gradients against central differences, in float64."""
    with jax.enable_x64(True):
        args = [jnp.asarray(arg, jnp.float64) for arg in args]
        wrapped = lambda *a: function(*map(jnp.asarray, a))  # noqa: E731  the differences come as NumPy scalars
        check_grads(wrapped, args, order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", cases(SMOOTH))
def test_gradient_is_the_slope(name):
    function, rows = SMOOTH[name]
    args = [row[0] for row in rows]
    if name.startswith(("likelihoods", "dequantization")):  # the data are on a grid
        check_slope(lambda *a: function(*a, args[-1].astype(jnp.float64)), *args[:-1])
    else:
        check_slope(function, *args)


@pytest.mark.parametrize("name", cases(BATCHED))
def test_gradient_by_the_network_is_the_slope(name):
    check_slope(lambda p, x: BATCHED[name](jax.random.key(1), p, x), P[0], BATCH[0])


@pytest.mark.parametrize("name", HOST)
def test_tables_can_be_made_while_tracing(name):
    jax.tree.map(np.testing.assert_array_equal, jax.jit(HOST[name])(), HOST[name]())


def test_table_is_an_argument_a_closure_and_a_scan_s_constant():
    t = jnp.arange(1, 11)
    want = TABLE.step(t - 1, t).one_minus_ratio
    close(jax.jit(lambda table, t: table.step(t - 1, t).one_minus_ratio)(TABLE, t), want)
    close(jax.jit(TABLE)(t), TABLE(t))
    close(jax.lax.scan(lambda c, i: (c, TABLE.step(i - 1, i).one_minus_ratio), 0, t)[1], want)


@pytest.mark.parametrize("name", ASKING)
def test_traced_once(name):
    traces = itertools.count()  # a list would be a variable of `counted` that changes

    def counted(param, x_t, level: Level):
        next(traces)
        return network(param, x_t, level)

    ASKING[name](Partial(counted, jnp.float32(0.1)), KEYS[0], BATCH[0])
    first = next(traces)
    assert 1 <= first <= 2  # once, or once in the scan and once for the reconstruction
    for i in range(1, 4):
        ASKING[name](Partial(counted, jnp.float32(0.1 * i)), KEYS[i], BATCH[0])
    assert next(traces) == first + 1  # by the `next` above
