"""Samplers, chains and flows: any floating type, wrong shapes, no key, numbers of NumPy and JAX, meshes, few steps.

The options and results of each are in the test of its file.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from vdm_jax import closed_form, guidance, langevin, probability_flow, samplers
from vdm_jax.discrete_schedules import InterpolatedSchedule, discretize, linear_betas, uniform_steps
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import Cosine, LinearLogSNR

KEY = jax.random.key(0)
SCHEDULE = LinearLogSNR(6.0, -6.0)
NET = Partial(lambda w, x, level: w * jnp.tanh(x), jnp.float32(0.5))
X = jax.random.normal(jax.random.key(1), (8, 3))


def _schedule():  # in the default dtypes at the time of the call
    return linear_betas(6, 0.01, 0.4)


def _levels():
    return level_from_log_snr(jnp.linspace(-5.0, 4.0, 3))


def _learned(net):
    return lambda x, level: (net(x, level), jnp.full_like(x, 0.5))


# name -> function of a network, x and a discrete schedule
SAMPLERS = {
    "ancestral": lambda net, x, schedule, **o: samplers.ancestral(net, KEY, x, schedule, **o).x_0,
    "ancestral_learned": lambda net, x, schedule, **o: (
        samplers.ancestral_learned(_learned(net), KEY, x, schedule, **o).x_0
    ),
    "ddim": lambda net, x, schedule, **o: samplers.ddim(net, KEY, x, schedule, eta=0.5, **o).x_0,
    "heun": lambda net, x, schedule, **o: samplers.heun(net, KEY, x, schedule, s_churn=2.0, **o).x_0,
    "euler": lambda net, x, schedule, **o: samplers.euler(net, KEY, x, schedule, **o).x_0,
    "dpmpp_2m": lambda net, x, schedule, **o: samplers.dpmpp_2m(net, KEY, x, schedule, **o).x_0,
    "dpmpp_2m_sde": lambda net, x, schedule, **o: samplers.dpmpp_2m_sde(net, KEY, x, schedule, **o).x_0,
    "predictor_corrector": lambda net, x, schedule, **o: samplers.predictor_corrector(net, KEY, x, schedule, **o).x_0,
    "replacement": lambda net, x, schedule, **o: (
        samplers.repaint(net, KEY, x, schedule, 0.5 * x, (x > 0).astype(x.dtype), resamplings=2, **o).x_0
    ),
}
OTHERS = {
    "ddim_inverse": lambda net, x, schedule: samplers.ddim_inverse(net, x, schedule),
    "adaptive": lambda net, x, schedule: (
        samplers.adaptive(net, None, x, InterpolatedSchedule(schedule), tolerance=1e-2).x_0
    ),
    "flow_sample": lambda net, x, schedule: probability_flow.sample(
        net, x, InterpolatedSchedule(schedule), tolerance=1e-2
    ),
    "flow_log_prob": lambda net, x, schedule: (
        probability_flow.log_likelihood(net, KEY, x, InterpolatedSchedule(schedule), tolerance=1e-2).x_1
    ),
    "annealed": lambda net, x, schedule: (
        langevin.annealed_langevin(net, KEY, x, _levels(), prediction_type="eps", steps=2).x
    ),
    "corrector": lambda net, x, schedule: langevin.langevin_corrector(net, KEY, x, schedule(3), prediction_type="eps"),
    "unadjusted": lambda net, x, schedule: langevin.ula(lambda x: net(x, None), KEY, x, 0.1, 2).x,
    "classifier": lambda net, x, schedule: (
        samplers.ddim(
            guidance.ClassifierGuidance(net, lambda x, _: -jnp.sum(x.astype(jnp.float32) ** 2, 1), 0.5),
            None,
            x,
            schedule,
        ).x_0
    ),
}
ALL = {**SAMPLERS, **OTHERS}
FAST = ("ancestral", "heun", "flow_sample", "unadjusted")
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


@pytest.mark.parametrize("name", EACH)
def test_states_have_the_type_of_x_beside_wider_levels(name):
    with jax.numpy_dtype_promotion("standard"):
        expected = ALL[name](NET, X, _schedule())
        for dtype, rtol in ((jnp.bfloat16, 0.3), (jnp.float16, 0.05)):
            ours = ALL[name](NET, X.astype(dtype), _schedule())
            assert ours.dtype == dtype
            if name != "flow_log_prob":
                scale = float(jnp.max(jnp.abs(expected)))
                np.testing.assert_allclose(np.asarray(ours, np.float32) / scale, expected / scale, atol=rtol)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        ours = ALL[name](NET, X, _schedule())  # float32 data with a float64 schedule
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", EACH)
def test_numpy_s_float64_is_jax_s_float32(name):
    np.testing.assert_array_equal(
        ALL[name](NET, np.asarray(X, np.float64), _schedule()), ALL[name](NET, X, _schedule())
    )


@pytest.mark.parametrize("name", EACH)
def test_a_prediction_of_another_shape_or_kind_and_an_empty_batch_are_refused(name):
    for wrong in (lambda x, level: x[:, :1], lambda x, level: x[:1]):
        with pytest.raises(ValueError, match=r"returned shape \((8, 1|1, 3)\).* of shape \(8, 3\)"):
            ALL[name](wrong, X, _schedule())
    with pytest.raises(TypeError, match="returned int32"):
        ALL[name](lambda x, level: jnp.ones(x.shape, jnp.int32), X, _schedule())
    with pytest.raises(ValueError, match=r"has shape \(0, 3\): a batch has shape \(B, \*x\)"):
        ALL[name](NET, X[:0], _schedule())


def test_static_numbers_may_be_arrays():
    plain = samplers.ddim(NET, None, X, _schedule(), clip=1.0, snapshots=2)
    given = samplers.ddim(NET, None, X, _schedule(), clip=jnp.float32(1.0), snapshots=jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, plain, given)


def test_a_key_is_needed_for_noise_alone():
    schedule = _schedule()
    for quiet in (samplers.ddim, samplers.euler, samplers.heun, samplers.dpmpp_2m):
        np.testing.assert_array_equal(quiet(NET, None, X, schedule).x_0, quiet(NET, KEY, X, schedule).x_0)
    for function, options in (
        (samplers.ddim, {"eta": 0.5}),
        (samplers.heun, {"s_churn": 1.0}),
        (samplers.dpmpp_2m_sde, {}),
    ):
        with pytest.raises(ValueError, match="key must not be None"):
            function(NET, None, X, schedule, **options)


# Few steps of a schedule that loses its signal

GAUSSIAN = closed_form.gaussian(np.zeros(2), 0.3 * np.eye(2))


def _off(prediction_type, error=3e-2):
    """A denoiser with an error that does not fall with the noise, as networks have it."""
    best = closed_form.OptimalDenoiser(GAUSSIAN, prediction_type)
    return lambda x, level: best(x, level) + error * jnp.sin(3.0 * x)


def _frechet(x):
    mean, variance = np.mean(x, 0), np.var(x, 0)
    return float(np.sum(mean**2) + np.sum((np.sqrt(variance) - np.sqrt(0.3)) ** 2))


def test_errors_are_multiplied_without_a_clip_and_the_samplers_warn():
    schedule = discretize(Cosine(), 1000)
    short, x_T = schedule.subsequence(uniform_steps(1000, 20)), jax.random.normal(KEY, (1000, 2))
    for function in (samplers.ancestral, samplers.ddim, samplers.heun, samplers.dpmpp_2m):
        with pytest.warns(UserWarning, match=r"clip=1.0 .*predict x_0 or v.*log_snr_uniform_steps"):
            wild = function(_off("eps"), KEY, x_T, short).x_0
        if function is samplers.heun:
            assert _frechet(wild) > 1e3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for denoiser, options in ((_off("eps"), {"clip": 1.5}), (_off("v"), {"prediction_type": "v"})):
            assert _frechet(samplers.ddim(denoiser, KEY, x_T, short, **options).x_0) < 0.05
        clipped = samplers.heun(_off("eps"), KEY, x_T, short, clip=1.5).x_0
        assert np.max(np.abs(clipped)) <= 1.5
        assert _frechet(clipped) < 0.05


# Under shard_map


@pytest.mark.parametrize("name", EACH)
def test_shards_of_a_mesh_sample_what_they_would_alone(name):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    schedule = _schedule()
    function = lambda x: ALL[name](NET, x, schedule)  # noqa: E731
    alone = np.concatenate([function(x) for x in np.split(X, 4)])
    for check_vma in (True, False):
        shards = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)
        for run in (shards, jax.jit(shards)):
            np.testing.assert_allclose(run(X), alone, rtol=1e-5, atol=1e-5)
