"""Bounds, losses and scores under `jax.shard_map`: each device's result is that of its own examples.

With `check_vma` and without; compiled as a whole and not. Without `check_vma` the gradient by replicated parameters is
each device's own, as of any function; with it, their sum.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.tree_util import Partial

from tests.optimizations import unoptimized
from tests.test_bound_types import (
    CASES,
    CONTINUOUS,
    KEY,
    NET,
    SCHEDULE,
    P,
    X,
    case,
    decoder,
    denoiser,
    learned,
    same,
)
from vdm_jax import closed_form, elbo, information, losses, path_bounds, sure, time_sampling, tweedie, vdm, weightings
from vdm_jax.gaussian import Normal
from vdm_jax.schedules import Cosine

MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
DATA, ALL = PartitionSpec("data"), PartitionSpec()
BATCH = jnp.concatenate([X, -0.5 * X[::-1]])
BATCH = jnp.round(BATCH * 4) / 4  # on the grid of `X`
GAUSSIAN = closed_form.gaussian([0.2, -0.3], [[0.5, 0.1], [0.1, 0.3]])

# name -> function of (p, key, x), p and key the same on all devices
FUNCTIONS = {
    **{name: partial(case, same) for name, case in CASES.items()},
    "elbo.denoising_error": lambda p, k, x: elbo.denoising_error(
        Partial(denoiser, same, p), k, x, SCHEDULE(jnp.arange(4) % 3 + 1), "eps"
    ),
    "elbo.reconstruction_nll": lambda p, k, x: elbo.reconstruction_nll(
        Partial(denoiser, same, p), k, x, SCHEDULE(jnp.ones(4, int)), decoder, "eps"
    ),
    "time_sampling.importance_sample": lambda p, k, x: time_sampling.importance_sample(
        jnp.abs(x[:, 0]) / 2, jnp.asarray([0.2, 0.8]) + 0 * p
    ),
    "time_sampling.LossSecondMomentSampler": lambda p, k, x: (
        time_sampling.LossSecondMomentSampler.init(3, 2).update(jnp.arange(4) % 3 + 1, x[:, 0]).probabilities()
    ),
    "sure.sure_threshold": lambda p, k, x: jax.vmap(lambda y: sure.sure_threshold(y, p))(x),
    "tweedie.cumulants": lambda p, k, x: jax.vmap(
        lambda x: tweedie.cumulants(lambda x: p * jnp.sum(jnp.log(x)), tweedie.poisson_base, x, 2)
    )(x**2 + 1.0),
    "weightings.uniform_in_time": lambda p, k, x: weightings.uniform_in_time(x, CONTINUOUS),
    "weightings.uniform_in_time, learned": lambda p, k, x: weightings.uniform_in_time(x, learned(p)),
    "information.optimal_bound": lambda p, k, x: information.optimal_bound(
        GAUSSIAN, SCHEDULE, prior=Normal(p, var=jnp.exp(p))
    ),
}
ONE_STEP = SCHEDULE.subsequence([0, 3])  # its bound has no diffusion term: an empty scan
FUNCTIONS["elbo.bound of one step"] = lambda p, k, x: elbo.bound(Partial(denoiser, same, p), k, x, ONE_STEP, decoder)
FUNCTIONS["path_bounds.consistency_bound of one step"] = lambda p, k, x: path_bounds.consistency_bound(
    Partial(denoiser, same, p), k, x, ONE_STEP, decoder
)
FAST = {"vdm.vdm_loss", "path_bounds.importance_weighted_bound"}  # of those with past failures
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FUNCTIONS]


def sharded(function, check_vma):
    """A function of (p, key, x), each device's results stacked along a new first axis."""

    def stacked(p, key, x):
        return jax.tree.map(lambda leaf: leaf[None], function(p, key, x))

    return jax.shard_map(stacked, mesh=MESH, in_specs=(ALL, ALL, DATA), out_specs=DATA, check_vma=check_vma)


def of_each_part(function):
    """The same function of (p, key, x) without a mesh."""

    def parts(p, key, x):
        results = [function(p, key, part) for part in jnp.split(x, 2)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return parts


def close(ours, theirs):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.mark.usefixtures("without_checks_of_annotations")
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_function_is_traced_in_a_compiled_shard_map(check_vma):
    for name, function in FUNCTIONS.items():
        with case(name):
            result = jax.eval_shape(sharded(function, check_vma), P, KEY, BATCH)
            assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("name", NAMES)
def test_every_device_has_the_result_of_its_own_examples(name):
    function = FUNCTIONS[name]
    expected = unoptimized(of_each_part(function))(P, KEY, BATCH)
    for check_vma in (True, False):
        close(unoptimized(sharded(function, check_vma))(P, KEY, BATCH), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_shard_map_that_is_not_compiled_gives_the_same(name):
    function = FUNCTIONS[name]
    for check_vma in (True, False):
        close(sharded(function, check_vma)(P, KEY, BATCH), of_each_part(function)(P, KEY, BATCH))


DIFFERENTIATED = {
    "losses.denoising_loss": lambda p, x: losses.denoising_loss(Partial(denoiser, same, p), KEY, x, SCHEDULE).loss,
    "elbo.bound": lambda p, x: elbo.bound(Partial(denoiser, same, p), KEY, x, SCHEDULE, decoder).total,
    "path_bounds.importance_weighted_bound": lambda p, x: path_bounds.importance_weighted_bound(
        Partial(denoiser, same, p), KEY, x, SCHEDULE, decoder, samples=2
    ),
    "vdm.vdm_loss": lambda p, x: vdm.vdm_loss(Partial(denoiser, same, p), KEY, x, CONTINUOUS, decoder).total,
    "vdm.vdm_loss, learned": lambda p, x: vdm.vdm_loss(NET, KEY, x, learned(p), decoder).total,
    "weightings.uniform_in_time": lambda p, x: weightings.uniform_in_time(x, learned(p)),
    **{
        name: lambda p, x, f=FUNCTIONS[name]: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(p, KEY, x)))
        for name in (
            "sure.sure", "score_matching.sliced", "score_matching.denoising", "tweedie.posterior_variance",
            "energy.contrastive_divergence", "energy.line_integral", "dequantization.dequantized_bound, truncated",
        )
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_gradient_of_a_sum_over_devices_is_the_sum_of_theirs(name):
    slope = jax.grad(lambda p, x: jnp.sum(DIFFERENTIATED[name](p, x)))
    expected = sum(slope(P, part) for part in jnp.split(BATCH, 2))
    for check_vma in (True, False):

        def summed(p, x, check_vma=check_vma):
            return slope(p, x) if check_vma else jax.lax.psum(slope(p, x), "data")

        function = jax.shard_map(summed, mesh=MESH, in_specs=(ALL, DATA), out_specs=ALL, check_vma=check_vma)
        np.testing.assert_allclose(function(P, BATCH), expected, rtol=2e-4, atol=1e-4)
        np.testing.assert_allclose(jax.jit(function)(P, BATCH), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.slow
def test_parameters_that_differ_from_device_to_device():
    def each(p, x):
        return vdm.vdm_loss(Partial(denoiser, same, p[0]), KEY, x, CONTINUOUS, decoder).total

    p = jnp.asarray([0.3, -0.2])
    ours = jax.shard_map(jax.grad(lambda p, x: each(p, x).sum()), mesh=MESH, in_specs=(DATA, ALL), out_specs=DATA)(p, X)
    close(ours, jnp.stack([jax.grad(lambda p: each(p[None], X).sum())(one) for one in p]))


def test_a_schedule_without_noise_at_t_0_is_refused_on_a_mesh():
    def loss(p, key, x):
        return vdm.vdm_loss(Partial(denoiser, same, p), key, x, Cosine(), decoder)

    for transform in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=r"Cosine.* has no noise at t = 0"):
            transform(sharded(loss, True))(P, KEY, BATCH)
