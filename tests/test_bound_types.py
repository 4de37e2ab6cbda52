"""Bounds, losses and scores for every floating type and with wrong shapes; most tests trace, and compile nothing.

States are in the type of x; levels, predictions, sums and log-densities are float32 or wider.
"""

import contextlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.optimizations import unoptimized
from vdm_jax import (
    dequantization,
    discrete_schedules,
    divergence,
    elbo,
    energy,
    losses,
    path_bounds,
    reverse_variance,
    schedules,
    score_matching,
    sure,
    time_sampling,
    tweedie,
    vdm,
    weightings,
)
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import normalize
from vdm_jax.noise_levels import level_from_log_snr


@contextlib.contextmanager
def case(name):
    """Names the case in the error of a loop over many."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {name}")
        raise


pytestmark = pytest.mark.usefixtures("without_checks_of_annotations")
KEY = jax.random.key(0)
X = jnp.asarray(np.random.RandomState(0).randint(0, 9, (4, 3)) / 4.0 - 1.0, jnp.float32)  # on a grid of 9 values
P = jnp.float32(0.3)
SCHEDULE = discrete_schedules.linear_betas(3, 0.05, 0.4)
CONTINUOUS = schedules.LinearLogSNR(5.0, -4.0)
LEVEL = level_from_log_snr(jnp.float32(0.5))


def same(y):
    return y


def denoiser(wrap, p, x, level):
    return wrap(p * jnp.sin(x))


def with_variance(wrap, p, x, level):
    return wrap(p * jnp.sin(x)), jnp.cos(x)


def with_wrong_variance(wrap, p, x, level):
    return p * jnp.sin(x), wrap(jnp.cos(x))


def field(wrap, p, x):
    return wrap(jnp.sin(x[:, ::-1]) - p * x)


def numbers(wrap, p, x):
    return wrap(jnp.sum(p * x**4 + jnp.cos(x[:, ::-1]), axis=1))


def decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def variance_decoder(x_hat, fraction, x_1, level):
    return Normal(x_hat, var=level.sigma**2 * jnp.exp(fraction))


def learned(p):
    return schedules.LearnedSchedule(-5.0 + p, 4.0, Partial(lambda q, s, t: q * (t * t - s * s) + t - s, p))


def score_of(wrap, p):
    return Partial(partial(field, wrap), p)


def energy_of(wrap, p):
    return Partial(partial(numbers, wrap), p)


def _truncated(x):
    return dequantization.TruncatedNormal(x, levels=9, mean=jnp.float32(0.01), scale=jnp.float32(0.05))


def _wide(x, levels):
    return dequantization.TruncatedNormal(x, levels=levels, mean=jnp.float32(0.0), scale=jnp.float32(0.1))


# name -> function of a network, a key and a batch
DENOISERS: dict[str, Callable[..., Any]] = {
    "losses.denoising_loss": lambda net, k, x: losses.denoising_loss(
        net, k, x, SCHEDULE, prediction_type="v", weight=lambda s: s.t.alpha, probabilities=jnp.arange(1.0, 4.0)
    ),
    "losses.simple_loss": lambda net, k, x: losses.simple_loss(net, k, x, SCHEDULE),
    "losses.ddpm_loss": lambda net, k, x: losses.ddpm_loss(net, k, x, SCHEDULE, decoder),
    "elbo.bound": lambda net, k, x: elbo.bound(net, k, x, SCHEDULE, decoder),
    "elbo.continuous_bound": lambda net, k, x: elbo.continuous_bound(net, k, x, CONTINUOUS, decoder, terms=2),
    "elbo.diffusion_curve": lambda net, k, x: elbo.diffusion_curve(net, k, x, SCHEDULE, terms=2),
    "elbo.diffusion_curve, continuous": lambda net, k, x: elbo.diffusion_curve(net, k, x, CONTINUOUS, terms=2),
    "path_bounds.consistency_bound": lambda net, k, x: path_bounds.consistency_bound(net, k, x, SCHEDULE, decoder),
    "path_bounds.joint_log_ratio": lambda net, k, x: path_bounds.joint_log_ratio(net, k, x, SCHEDULE, decoder),
    "path_bounds.importance_weighted_bound": lambda net, k, x: path_bounds.importance_weighted_bound(
        net, k, x, SCHEDULE, decoder, samples=2
    ),
    "vdm.vdm_loss": lambda net, k, x: vdm.vdm_loss(net, k, x, CONTINUOUS, decoder),
    "vdm.vdm_loss, T steps": lambda net, k, x: vdm.vdm_loss(net, k, x, CONTINUOUS, decoder, num_steps=5),
    "vdm.vdm_loss, learned": lambda net, k, x: vdm.vdm_loss(net, k, x, learned(P), decoder),
    "reverse_variance.eps_second_moment": lambda net, k, x: reverse_variance.eps_second_moment(net, k, x, SCHEDULE),
    "weightings.weighted_bound": lambda net, k, x: weightings.weighted_bound(
        net, k, x, CONTINUOUS, weightings.sigmoid, terms=2
    ),
    "score_matching.denoising_at_level": lambda net, k, x: score_matching.denoising_at_level(
        net, k, x, LEVEL, prediction_type="eps"
    ),
    "dequantization.latent_dequantization_bound": lambda net, k, x: dequantization.latent_dequantization_bound(
        Partial(numbers, same, P), net, k, x, LEVEL, decoder
    ),
}
VARIANCES: dict[str, Callable[..., Any]] = {
    "reverse_variance.learned_variance_bound": lambda net, k, x: reverse_variance.learned_variance_bound(
        net, k, x, SCHEDULE, variance_decoder
    ),
    "reverse_variance.vlb_loss": lambda net, k, x: reverse_variance.vlb_loss(net, k, x, SCHEDULE, variance_decoder),
    "reverse_variance.hybrid_loss": lambda net, k, x: reverse_variance.hybrid_loss(
        net, k, x, SCHEDULE, variance_decoder
    ),
}
SCORES: dict[str, Callable[..., Any]] = {
    "score_matching.explicit": lambda s, k, x: score_matching.explicit(s, lambda x: jnp.sin(x), x),
    "score_matching.implicit": lambda s, k, x: score_matching.implicit(s, x),
    "score_matching.sliced": lambda s, k, x: score_matching.sliced(s, k, x, trace="sphere", probes=2),
    "score_matching.denoising": lambda s, k, x: score_matching.denoising(s, k, x, lambda x: Normal(x, var=0.3 * P)),
    "sure.sure": lambda s, k, x: sure.sure(s, k, x, 0.4),
    "tweedie.posterior_mean": lambda s, k, x: tweedie.posterior_mean(s, x, LEVEL),
    "tweedie.covariance_operator": lambda s, k, x: tweedie.covariance_operator(s, x, LEVEL)(x),
    "tweedie.posterior_covariance": lambda s, k, x: tweedie.posterior_covariance(s, x, LEVEL),
    "tweedie.posterior_variance": lambda s, k, x: tweedie.posterior_variance(s, k, x, LEVEL, probes=2),
    "energy.line_integral": lambda s, k, x: energy.line_integral(s, x, x[::-1], nodes=3),
    "divergence.value_and_divergence": lambda s, k, x: divergence.value_and_divergence(
        s, x, divergence.hutchinson_probes(k, x, "gaussian", 2)
    ),
}
ENERGIES: dict[str, Callable[..., Any]] = {
    "energy.log_density": lambda e, k, x: energy.log_density(e, x, 0.3),
    "energy.log_partition": lambda e, k, x: energy.log_partition(e, x, jnp.zeros(x.shape[:1])),
    "energy.score": lambda e, k, x: energy.score(e, x),
    "energy.contrastive_divergence": lambda e, k, x: energy.contrastive_divergence(e, k, x, x[:2], 0.05, 2)[:2],
    "score_matching.finite_difference": lambda e, k, x: score_matching.finite_difference(e, k, x, 0.1),
    "dequantization.dequantized_bound": lambda e, k, x: dequantization.dequantized_bound(
        e, k, x, lambda x: dequantization.Uniform(x, 9), samples=2
    ),
    "dequantization.dequantized_bound, truncated": lambda e, k, x: dequantization.dequantized_bound(
        e, k, x, _truncated
    ),
}
# name -> function of (wrap, p, key, x), where wrap changes what the network returns
PREDICTIONS: dict[str, Callable[..., Any]] = {
    **{name: lambda w, p, k, x, f=f: f(Partial(partial(denoiser, w), p), k, x) for name, f in DENOISERS.items()},
    **{name: lambda w, p, k, x, f=f: f(Partial(partial(with_variance, w), p), k, x) for name, f in VARIANCES.items()},
    **{name: lambda w, p, k, x, f=f: f(score_of(w, p), k, x) for name, f in SCORES.items()},
}
CASES: dict[str, Callable[..., Any]] = {
    **PREDICTIONS,
    **{name: lambda w, p, k, x, f=f: f(energy_of(w, p), k, x) for name, f in ENERGIES.items()},
}
EAGER = {  # not compiled as a whole: with no examples the result is empty
    "tweedie.posterior_mean", "tweedie.covariance_operator", "energy.log_density", "energy.log_partition",
    "energy.score", "energy.contrastive_divergence", "divergence.value_and_divergence",
}  # fmt: skip


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_results_for_half_precision_are_float32():
    x = X.astype(jnp.bfloat16)
    for name, function in CASES.items():
        with case(name), jax.numpy_dtype_promotion("standard"):
            result = jax.eval_shape(partial(function, lambda y: y.astype(jnp.bfloat16), P), KEY, x)
            assert {leaf.dtype for leaf in floats(result)} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_results_for_half_precision_are_finite(name, dtype):
    with jax.numpy_dtype_promotion("standard"):
        result = CASES[name](same, P, KEY, X.astype(dtype))
    assert all(np.all(np.isfinite(leaf)) for leaf in floats(result))


@pytest.mark.parametrize("name", ["vdm.vdm_loss", pytest.param("elbo.continuous_bound", marks=pytest.mark.slow)])
def test_times_of_float16_data_are_those_of_float32(name):
    with jax.numpy_dtype_promotion("standard"):
        both = unoptimized(lambda *data: [CASES[name](same, P, KEY, x) for x in data])
        half, full = both(X.astype(jnp.float16), X)
    np.testing.assert_allclose(half.prior, full.prior, rtol=1e-6)
    assert np.all(np.isfinite(half.total))


@pytest.mark.slow
@pytest.mark.parametrize("function", [path_bounds.joint_log_ratio, path_bounds.consistency_bound])
def test_paths_of_bfloat16_data_are_those_of_float32(function):
    # the network predicts x_0 from nothing, so that only the path itself could differ
    def constant(x, level):
        return jnp.full_like(x, 0.25)

    with jax.numpy_dtype_promotion("standard"):
        half, full = (
            function(constant, KEY, X.astype(dtype), SCHEDULE, decoder, prediction_type="x_0")
            for dtype in (jnp.bfloat16, jnp.float32)
        )
    if isinstance(half, elbo.DiffusionBound):  # its decoder's x_1 is a state, and rounded
        half, full = half[::2], full[::2]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), half, full)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [dequantization.Uniform, _wide])
def test_samples_within_a_bin_of_bfloat16_data_stay_within_the_true_bin(distribution):
    values = normalize(jnp.arange(256), 256)
    with jax.numpy_dtype_promotion("standard"):
        narrow, full = distribution(values.astype(jnp.bfloat16), 256), distribution(values, 256)
        y = narrow.sample(KEY)
        np.testing.assert_array_equal(y, full.sample(KEY))
        np.testing.assert_array_equal(narrow.log_prob(y), full.log_prob(y))
    off = np.abs(np.asarray(y, np.float64) - np.linspace(-1, 1, 256)) * 255
    assert 0.9 < off.max() < 1 + 1e-4


def test_an_exact_trace_of_bfloat16_data_is_summed_in_float32():
    # the Jacobian of -x is -1 on its diagonal, 1024 times; a sum in bfloat16 stays at 256
    x = jnp.zeros((2, 1024), jnp.bfloat16)
    _, trace = jax.jit(
        lambda x: divergence.value_and_divergence(lambda x: -x, x, divergence.hutchinson_probes(None, x, "exact"))
    )(x)
    np.testing.assert_array_equal(trace, [-1024.0, -1024.0])


def _as(dtype, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), tree)


WITH_TABLE = {
    "losses.denoising_loss": lambda x, t: losses.denoising_loss(Partial(denoiser, same, P), KEY, x, t),
    "elbo.bound": lambda x, t: elbo.bound(Partial(denoiser, same, P), KEY, x, t, decoder),
    "elbo.diffusion_curve": lambda x, t: elbo.diffusion_curve(Partial(denoiser, same, P), KEY, x, t, terms=2),
    "path_bounds.consistency_bound": lambda x, t: path_bounds.consistency_bound(
        Partial(denoiser, same, P), KEY, x, t, decoder
    ),
    "path_bounds.joint_log_ratio": lambda x, t: path_bounds.joint_log_ratio(
        Partial(denoiser, same, P), KEY, x, t, decoder
    ),
    "path_bounds.importance_weighted_bound": lambda x, t: path_bounds.importance_weighted_bound(
        Partial(denoiser, same, P), KEY, x, t, decoder, samples=2
    ),
    "reverse_variance.learned_variance_bound": lambda x, t: reverse_variance.learned_variance_bound(
        Partial(with_variance, same, P), KEY, x, t, variance_decoder
    ),
    "reverse_variance.vlb_loss": lambda x, t: reverse_variance.vlb_loss(
        Partial(with_variance, same, P), KEY, x, t, variance_decoder
    ),
    "reverse_variance.hybrid_loss": lambda x, t: reverse_variance.hybrid_loss(
        Partial(with_variance, same, P), KEY, x, t, variance_decoder
    ),
    "reverse_variance.eps_second_moment": lambda x, t: reverse_variance.eps_second_moment(
        Partial(denoiser, same, P), KEY, x, t
    ),
    "score_matching.denoising_at_level": lambda x, t: score_matching.denoising_at_level(
        Partial(denoiser, same, P), KEY, x, t(2)
    ),
    "tweedie.posterior_variance": lambda x, t: tweedie.posterior_variance(Partial(field, same, P), KEY, x, t(2)),
    "dequantization.latent_dequantization_bound": lambda x, t: dequantization.latent_dequantization_bound(
        Partial(numbers, same, P), Partial(denoiser, same, P), KEY, x, t(2), decoder
    ),
}

SAMPLED_IN_FLOAT64 = {  # samples of a normal distribution whose mean is float64 are other random numbers
    "elbo.bound", "path_bounds.consistency_bound", "path_bounds.joint_log_ratio",
    "path_bounds.importance_weighted_bound", "reverse_variance.learned_variance_bound",
    "dequantization.latent_dequantization_bound",
}  # fmt: skip


def test_float32_data_with_a_schedule_in_float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for name, function in WITH_TABLE.items():
            with case(name):
                result = jax.eval_shape(function, _as(jnp.float32, X), _as(jnp.float64, SCHEDULE))
                assert {leaf.dtype for leaf in floats(result)} <= {np.dtype(np.float32), np.dtype(np.float64)}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TABLE)
def test_a_schedule_in_float64_gives_the_numbers_of_one_in_float32(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double, single = (
            WITH_TABLE[name](_as(jnp.float32, X), _as(dtype, SCHEDULE)) for dtype in (jnp.float64, jnp.float32)
        )
        if name in SAMPLED_IN_FLOAT64:
            assert all(np.all(np.isfinite(leaf)) for leaf in floats(double))
        else:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), double, single)


def test_float64_numpy_arrays_are_accepted_without_a_warning():
    x = np.asarray(X, np.float64)
    for name, function in CASES.items():
        with case(name):
            result = jax.eval_shape(lambda f=function: f(same, np.float64(0.3), KEY, x))
            assert {leaf.dtype for leaf in floats(result)} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_float64_arrays_of_numpy_are_as_float32(name):
    ours, theirs = CASES[name](same, np.float64(0.3), KEY, np.asarray(X, np.float64)), CASES[name](same, P, KEY, X)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), ours, theirs)


def test_numpy_scalars_are_accepted_without_a_warning():
    x, u, distribution = np.asarray(X, np.float64), np.linspace(0.0, 0.9, 5), dequantization.Uniform
    results = jax.eval_shape(
        lambda: (
            time_sampling.importance_sample(u, np.array([0.25, 0.75]))[::2],
            sure.sure_threshold(x, np.float64(0.5)),
            (tweedie.poisson_base(x), tweedie.normal_base(x, np.float64(0.5)), tweedie.gamma_base(x, np.float64(2.0))),
            weightings.uniform_in_time(x, CONTINUOUS),
            (distribution(x[0], 9).sample(KEY), distribution(x[0], 9).log_prob(x[0])),
            (_truncated(x[0]).sample(KEY), _truncated(x[0]).log_prob(x[0])),
        )
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_probabilities_of_numpy_are_as_float32():
    u, p = np.linspace(0.0, 0.9, 5), np.array([0.25, 0.75])
    jax.tree.map(
        np.testing.assert_array_equal,
        time_sampling.importance_sample(u, p),
        time_sampling.importance_sample(jnp.asarray(u), jnp.asarray(p)),
    )


@pytest.mark.slow
def test_bfloat16_times_are_float32():
    sampled = time_sampling.importance_sample(
        jnp.asarray([0.25, 0.5], jnp.bfloat16), jnp.asarray([0.3, 0.7], jnp.bfloat16)
    )
    exact = time_sampling.importance_sample(
        jnp.asarray([0.25, 0.5]), jnp.asarray([0.3, 0.7], jnp.bfloat16).astype(jnp.float32)
    )
    jax.tree.map(np.testing.assert_array_equal, sampled, exact)
    assert weightings.uniform_in_time(jnp.ones(2, jnp.bfloat16), CONTINUOUS).dtype == np.float32


def test_no_examples_are_refused_or_give_an_empty_result():
    for name, function in CASES.items():
        with case(name):
            evaluate = partial(jax.eval_shape, lambda f=function: f(same, P, KEY, X[:0]))
            if name in EAGER and name != "energy.contrastive_divergence":  # whose chains are compiled
                assert all(0 in leaf.shape or leaf.shape == () for leaf in jax.tree.leaves(evaluate()))
            else:
                with pytest.raises(ValueError, match="at least one example"):
                    evaluate()


WRONG = {
    "(4, 1)": lambda y: y[:, :1],
    "(1, 3)": lambda y: y[:1],
}


@pytest.mark.parametrize("shape", ["(4, 1)", pytest.param("(1, 3)", marks=pytest.mark.slow)])
def test_predictions_of_another_shape_are_refused(shape):
    for name, function in PREDICTIONS.items():
        with case(name):
            with pytest.raises(ValueError, match="returned shape") as caught:
                jax.eval_shape(lambda f=function: f(WRONG[shape], P, KEY, X))
            assert shape in str(caught.value)
            assert "(4, 3)" in str(caught.value)


def test_fractions_of_another_shape_are_refused():
    network = Partial(with_wrong_variance, WRONG["(4, 1)"], P)
    for name, function in VARIANCES.items():
        with case(name), pytest.raises(ValueError, match=r"fraction returned shape \(4, 1\)"):
            jax.eval_shape(lambda f=function: f(network, KEY, X))


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y[:1], *(pytest.param(f, marks=pytest.mark.slow) for f in (lambda y: y[:, None], lambda y: y.sum()))],
)
def test_energies_of_another_shape_are_refused(wrap):
    for name in ENERGIES:
        with case(name), pytest.raises(ValueError, match=r"it must return shape \(.,\)"):
            jax.eval_shape(lambda f=CASES[name]: f(wrap, P, KEY, X))


def test_integer_predictions_are_refused():
    for name, function in CASES.items():
        with case(name), pytest.raises(TypeError, match="returned int32"):
            jax.eval_shape(lambda f=function: f(lambda y: y.astype(jnp.int32), P, KEY, X))


def test_images_of_bytes_are_refused():
    x = jnp.zeros((4, 3), jnp.uint8)
    for name, function in CASES.items():
        with case(name):
            with pytest.raises((TypeError, ValueError)) as caught:
                jax.eval_shape(lambda f=function: f(same, P, KEY, x))
            assert name in EAGER or "likelihoods.normalize" in str(caught.value)


NET = Partial(denoiser, same, P)
VARIANCE_NET = Partial(with_variance, same, P)
SCORE = Partial(field, same, P)
ENERGY = Partial(numbers, same, P)
COLUMN = jnp.ones((4, 1))


def _dequantized(**methods):
    distribution = type("Distribution", (), methods)()
    return dequantization.dequantized_bound(ENERGY, KEY, X, lambda x: distribution)


SHAPES = {
    "weight returned shape (4, 1)": lambda: losses.denoising_loss(
        NET, KEY, X, SCHEDULE, weight=lambda s: s.t.alpha[None]
    ),
    "weight returned shape (2, 1)": lambda: weightings.weighted_bound(
        NET, KEY, X, CONTINUOUS, lambda lam: lam[:, :1], terms=2
    ),
    "weight returned shape (3,)": lambda: score_matching.denoising_at_level(
        NET, KEY, X, LEVEL, weight=lambda lv: lv.alpha[1:]
    ),
    "probabilities has shape (2,): it must be (3,)": lambda: losses.denoising_loss(
        NET, KEY, X, SCHEDULE, probabilities=jnp.ones(2)
    ),
    "probabilities has shape (2, 1)": lambda: time_sampling.importance_sample(P, jnp.ones((2, 1))),
    "probabilities has shape (0,)": lambda: time_sampling.importance_sample(P, jnp.ones(0)),
    "t has shape (3,) and losses (3, 1)": lambda: time_sampling.LossSecondMomentSampler.init(4).update(
        jnp.asarray([1, 2, 3]), jnp.ones((3, 1))
    ),
    "t has shape (3,): it must be (4,)": lambda: reverse_variance.vlb_loss(
        VARIANCE_NET, KEY, X, SCHEDULE, variance_decoder, t=jnp.ones(3, int)
    ),
    "importance has shape (4, 1): it must be (4,)": lambda: reverse_variance.hybrid_loss(
        VARIANCE_NET, KEY, X, SCHEDULE, variance_decoder, importance=COLUMN
    ),
    "vlb_weight has shape (4,): it must be one number": lambda: reverse_variance.hybrid_loss(
        VARIANCE_NET, KEY, X, SCHEDULE, variance_decoder, vlb_weight=jnp.ones(4)
    ),
    "prior.var has shape (4,): it must be one number": lambda: elbo.bound(
        NET, KEY, X, SCHEDULE, decoder, prior=Normal(0.0, var=jnp.ones(4))
    ),
    "sigma has shape (4, 1): it must be one number": lambda: sure.sure(SCORE, KEY, X, COLUMN),
    "log_partition has shape (4, 1): it must be one number": lambda: energy.log_density(ENERGY, X, COLUMN),
    "log_weights has shape (4, 1): it must be (4,)": lambda: energy.log_partition(ENERGY, X, COLUMN),
    "directions of shape (2, 4, 1) for x of shape (4, 3)": lambda: divergence.value_and_divergence(
        SCORE, X, jnp.ones((2, 4, 1))
    ),
    "start has shape (4, 3) and end (4, 1)": lambda: energy.line_integral(SCORE, X, COLUMN),
    "path returned shape (1, 3)": lambda: energy.line_integral(SCORE, X, X, path=lambda u, a, b: a[:1] + u),
    "of shape (1,) for x of shape (3,)": lambda: elbo.bound(
        NET, KEY, X, SCHEDULE, lambda h, z, lv: Normal(h[:1], var=lv.sigma)
    ),
    "log_prob of the decoder returned shape (3,)": lambda: elbo.bound(
        NET, KEY, X, SCHEDULE, lambda h, z, lv: _PerDimension()
    ),
    "log_prob of the noise returned shape (3,)": lambda: score_matching.denoising(
        SCORE, KEY, X, lambda x: _PerDimension()
    ),
    "sample of the dequantizer returned shape (1,)": lambda: dequantization.dequantized_bound(
        ENERGY, KEY, X, lambda x: Normal(x[:1], var=P)
    ),
    "log_prob of the dequantizer returned shape (3,)": lambda: dequantization.dequantized_bound(
        ENERGY, KEY, X, lambda x: _PerDimension()
    ),
    "log_prob returned shape (3,): it must return shape ()": lambda: tweedie.cumulants(
        lambda x: x**2, tweedie.poisson_base, X[0], 1
    ),
}


class _PerDimension:
    """A distribution whose log_prob is not summed over the example."""

    def sample(self, key):
        return jnp.zeros(3)

    def log_prob(self, x):
        return -(x**2)


def test_other_shapes_that_would_broadcast_are_refused():
    for message, call in SHAPES.items():
        with case(message), pytest.raises(ValueError, match=re.escape(message)):
            jax.eval_shape(call)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("decoder", lambda array: elbo.bound(NET, KEY, X, SCHEDULE, array)),
        ("decoder", lambda array: path_bounds.joint_log_ratio(NET, KEY, X, SCHEDULE, array)),
        ("decoder", lambda array: reverse_variance.learned_variance_bound(VARIANCE_NET, KEY, X, SCHEDULE, array)),
        ("decoder", lambda array: dequantization.latent_dequantization_bound(ENERGY, NET, KEY, X, LEVEL, array)),
        ("dequantizer", lambda array: dequantization.dequantized_bound(ENERGY, KEY, X, array)),
        ("noise", lambda array: score_matching.denoising(SCORE, KEY, X, array)),
    ],
)
def test_an_array_instead_of_a_distribution_is_refused(name, call):
    with pytest.raises(TypeError, match=rf"the {name} returned .*: it must return a distribution with"):
        jax.eval_shape(lambda: call(lambda x, *_: x))


@pytest.mark.slow
def test_a_constant_weight_is_one_for_all():
    ours = score_matching.denoising_at_level(NET, KEY, X, LEVEL, weight=lambda level: jnp.float32(2.0))
    np.testing.assert_allclose(
        ours, score_matching.denoising_at_level(NET, KEY, X, LEVEL, weight=lambda level: 2.0 * jnp.ones(4))
    )


CLEAN = level_from_log_snr(jnp.float32(np.inf))
NO_SIGNAL = level_from_log_snr(jnp.float32(-np.inf))


@pytest.mark.parametrize(
    "call",
    [
        lambda s: vdm.vdm_loss(NET, KEY, X, s, decoder),
        lambda s: elbo.continuous_bound(NET, KEY, X, s, decoder),
        lambda s: elbo.diffusion_curve(NET, KEY, X, s, terms=2),
        lambda s: weightings.weighted_bound(NET, KEY, X, s, weightings.sigmoid),
        lambda s: elbo.bound(NET, KEY, X, discrete_schedules.DiscretizedSchedule(s, 4), decoder),
        lambda s: reverse_variance.learned_variance_bound(
            VARIANCE_NET, KEY, X, discrete_schedules.DiscretizedSchedule(s, 4), variance_decoder
        ),
    ],
)
def test_a_schedule_without_noise_at_t_0_is_refused(call):
    for schedule in (schedules.Cosine(), schedules.LinearBeta(), schedules.Sigmoid()):
        name = type(schedule).__name__
        with case(name), pytest.raises(ValueError, match=rf"{name}\(.* has no noise at t = 0.0: .*discretize"):
            jax.eval_shape(lambda s=schedule: call(s))


@pytest.mark.slow
def test_the_remedy_for_a_schedule_without_noise_at_t_0():
    schedule = discrete_schedules.InterpolatedSchedule(discrete_schedules.discretize(schedules.Cosine(), 10))
    assert np.all(np.isfinite(vdm.vdm_loss(NET, KEY, X, schedule, decoder).total))


@pytest.mark.parametrize(
    ("level", "what", "call"),
    [
        (CLEAN, "sigma", lambda level: score_matching.denoising_at_level(NET, KEY, X, level)),
        (CLEAN, "sigma", lambda level: dequantization.latent_dequantization_bound(ENERGY, NET, KEY, X, level, decoder)),
        (NO_SIGNAL, "alpha", lambda level: tweedie.posterior_mean(SCORE, X, level)),
        (NO_SIGNAL, "alpha", lambda level: tweedie.covariance_operator(SCORE, X, level)),
        (NO_SIGNAL, "alpha", lambda level: tweedie.posterior_covariance(SCORE, X, level)),
        (NO_SIGNAL, "alpha", lambda level: tweedie.posterior_variance(SCORE, KEY, X, level)),
    ],
)
def test_a_level_that_a_formula_divides_by_is_refused_where_it_is_zero(level, what, call):
    with pytest.raises(ValueError, match=rf"level has {what} = 0.0"):
        call(level)


STATIC: dict[str, tuple[Callable[..., Any], int | float]] = {
    "t_0": (lambda n: elbo.continuous_bound(NET, KEY, X, CONTINUOUS, decoder, t_0=n).total, 0.25),
    "t_0 of a weighted bound": (
        lambda n: weightings.weighted_bound(NET, KEY, X, CONTINUOUS, weightings.sigmoid, t_0=n),
        0.25,
    ),
    "terms": (lambda n: elbo.bound(NET, KEY, X, SCHEDULE, decoder, terms=n).total, 2),
    "terms of a learned bound": (
        lambda n: (
            reverse_variance.learned_variance_bound(VARIANCE_NET, KEY, X, SCHEDULE, variance_decoder, terms=n).total
        ),
        2,
    ),
    "samples": (lambda n: path_bounds.importance_weighted_bound(NET, KEY, X, SCHEDULE, decoder, samples=n), 2),
    "samples of y": (
        lambda n: dequantization.dequantized_bound(ENERGY, KEY, X, lambda x: dequantization.Uniform(x, 9), samples=n),
        2,
    ),
    "num_steps": (lambda n: vdm.vdm_loss(NET, KEY, X, CONTINUOUS, decoder, num_steps=n).total, 4),
    "probes": (lambda n: sure.sure(SCORE, KEY, X, 0.4, probes=n), 2),
    "probes of a sliced score": (lambda n: score_matching.sliced(SCORE, KEY, X, probes=n), 2),
    "nodes": (lambda n: energy.line_integral(SCORE, X, X[::-1], nodes=n), 3),
}


def test_zero_dimensional_arrays_are_accepted_as_numbers():
    for name, (call, number) in STATIC.items():
        with case(name):
            shapes = jax.eval_shape(lambda c=call, n=number: c(n))
            for array in (np.asarray, jnp.asarray):
                given = array(number)
                assert jax.eval_shape(lambda c=call, g=given: c(g)) == shapes


@pytest.mark.slow
def test_tangents_of_another_type_are_converted():
    v = jnp.ones((2, 4, 3), jnp.bfloat16)
    exact = divergence.value_and_divergence(SCORE, X, jnp.ones((2, 4, 3)))
    jax.tree.map(np.testing.assert_array_equal, divergence.value_and_divergence(SCORE, X, v), exact)
    times = tweedie.covariance_operator(SCORE, X, LEVEL)
    np.testing.assert_array_equal(times(v[0]), times(jnp.ones((4, 3))))


@pytest.mark.slow
def test_two_batches_of_different_types():
    with jax.numpy_dtype_promotion("standard"):
        ends = energy.line_integral(SCORE, X, X[::-1].astype(jnp.bfloat16))
        chains = energy.contrastive_divergence(ENERGY, KEY, X, X[:2].astype(jnp.bfloat16), 0.05, 2)
    np.testing.assert_allclose(ends, energy.line_integral(SCORE, X, X[::-1]), rtol=1e-5)  # X is bfloat16's
    assert (chains.data.dtype, chains.negatives.dtype) == (np.float32, jnp.bfloat16)
