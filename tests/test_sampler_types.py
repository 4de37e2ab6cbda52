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
X = jnp.asarray(np.random.RandomState(1).normal(size=(8, 3)), jnp.float32)


def _schedule():  # in the default dtypes at the time of the call
    return linear_betas(6, 0.01, 0.4)


def _levels():
    return level_from_log_snr(jnp.linspace(-5.0, 4.0, 3))


def _learned(net):
    return lambda x, level: (net(x, level), jnp.full_like(x, 0.5))


def _log_likelihood(x_hat, level):
    return 0.1 * jnp.sum(jnp.tanh(x_hat), axis=1)


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
    "twisted_smc": lambda net, x, schedule, **o: samplers.twisted_smc(net, KEY, x, schedule, _log_likelihood, **o).x_0,
}
OTHERS = {
    "ddim_inverse": lambda net, x, schedule: samplers.ddim_inverse(net, x, schedule),
    "adaptive": lambda net, x, schedule: (
        samplers.adaptive(net, None, x, InterpolatedSchedule(schedule), tolerance=1e-2).x_0
    ),
    "flow_sample": lambda net, x, schedule: probability_flow.sample(
        net, x, InterpolatedSchedule(schedule), tolerance=1e-2
    ),
    "flow_sample_with_log_prob": lambda net, x, schedule: (
        probability_flow.sample_with_log_prob(net, KEY, x, InterpolatedSchedule(schedule), tolerance=1e-2).x
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
FAST = ("ancestral",)
TRACED = {  # the solver of `flow_sample` takes long to trace: the others that use it are slow
    "quick": {name: function for name, function in ALL.items() if name not in ("adaptive", "flow_log_prob")},
    "all": ALL,
}
WHICH = pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
EACH = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


pytestmark = pytest.mark.usefixtures("without_checks_of_annotations")


@WHICH
def test_states_have_the_type_of_x(which):
    x = np.asarray(X, np.float64)
    for name, function in TRACED[which].items():
        with jax.numpy_dtype_promotion("standard"):
            assert jax.eval_shape(function, NET, X.astype(jnp.bfloat16), _schedule()).dtype == jnp.bfloat16, name
            with jax.enable_x64(True):  # float32 data with a float64 schedule
                assert jax.eval_shape(function, NET, X, _schedule()).dtype == jnp.float32, name
        assert jax.eval_shape(lambda f=function: f(NET, x, _schedule())).dtype == jnp.float32, name


@pytest.mark.parametrize("name", EACH)
def test_half_precision_gives_the_states_of_float32_rounded(name):
    function, data = ALL[name], (X, X.astype(jnp.bfloat16), X.astype(jnp.float16))
    with jax.numpy_dtype_promotion("standard"):
        expected, *rounded = jax.jit(lambda net, schedule, *data: [function(net, x, schedule) for x in data])(
            NET, _schedule(), *data
        )
    scale = np.max(np.abs(expected))
    for ours, atol in zip(rounded, (0.3, 0.05), strict=True):
        if name != "flow_log_prob":
            np.testing.assert_allclose(np.asarray(ours, np.float32) / scale, expected / scale, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_schedule_in_float64_gives_the_states_of_one_in_float32(name):
    with jax.numpy_dtype_promotion("standard"):
        expected = ALL[name](NET, X, _schedule())
        with jax.enable_x64(True):
            np.testing.assert_allclose(ALL[name](NET, X, _schedule()), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_numpy_s_float64_is_jax_s_float32(name):
    np.testing.assert_array_equal(
        ALL[name](NET, np.asarray(X, np.float64), _schedule()), ALL[name](NET, X, _schedule())
    )


@WHICH
def test_a_prediction_of_another_shape_or_kind_and_an_empty_batch_are_refused(which):
    for name, function in TRACED[which].items():

        def trace(net, x=X, function=function):
            jax.eval_shape(lambda: function(net, x, _schedule()))

        try:
            for wrong in (lambda x, level: x[:, :1], lambda x, level: x[:1]):
                with pytest.raises(ValueError, match=r"returned shape \((8, 1|1, 3)\).* of shape \(8, 3\)"):
                    trace(wrong)
            with pytest.raises(TypeError, match="returned int32"):
                trace(lambda x, level: jnp.ones(x.shape, jnp.int32))
            with pytest.raises(ValueError, match=r"has shape \(0, 3\): a batch has shape \(B, \*x\)"):
                trace(NET, X[:0])
        except BaseException as error:
            error.add_note(f"sampler: {name}")
            raise


def test_static_numbers_may_be_arrays():
    call = lambda clip, n: lambda: samplers.ddim(NET, None, X, _schedule(), clip=clip, snapshots=n)  # noqa: E731
    clip, snapshots = jnp.float32(1.0), jnp.int32(2)
    assert jax.eval_shape(call(clip, snapshots)) == jax.eval_shape(call(1.0, 2))


def test_a_key_is_needed_for_noise_alone():
    schedule = _schedule()
    for quiet in (samplers.ddim, samplers.euler, samplers.heun, samplers.dpmpp_2m):
        run = lambda key, f=quiet: f(NET, key, X, schedule).x_0  # noqa: E731
        assert jax.eval_shape(lambda run=run: run(None)).shape == X.shape
    both = jax.jit(lambda: [samplers.ddim(NET, key, X, schedule).x_0 for key in (None, KEY)])()
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)
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
    short = schedule.subsequence(uniform_steps(1000, 20))
    x_T = jnp.asarray(np.random.RandomState(0).normal(size=(1000, 2)), jnp.float32)
    for function in (samplers.ancestral, samplers.ddim, samplers.heun, samplers.dpmpp_2m):
        with pytest.warns(UserWarning, match=r"clip=1.0 .*predict x_0 or v.*log_snr_uniform_steps"):
            jax.eval_shape(lambda x, f=function: f(_off("eps"), KEY, x, short).x_0, x_T)
    with pytest.warns(UserWarning, match="clip=1.0"):
        assert _frechet(samplers.heun(_off("eps"), KEY, x_T, short).x_0) > 1e3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipped = samplers.heun(_off("eps"), KEY, x_T, short, clip=1.5).x_0
        assert _frechet(samplers.ddim(_off("v"), KEY, x_T, short, prediction_type="v").x_0) < 0.05
    assert np.max(np.abs(clipped)) <= 1.5
    assert _frechet(clipped) < 0.05


# Under shard_map


def sharded(name, check_vma):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    schedule = _schedule()
    function = lambda x: ALL[name](NET, x, schedule)  # noqa: E731
    return function, jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)


@WHICH
def test_every_sampler_is_traced_under_shard_map(which):
    for name in TRACED[which]:
        for check_vma in (True,) if which == "quick" else (True, False):
            _, shards = sharded(name, check_vma)
            try:
                assert jax.eval_shape(shards, X).shape == X.shape
            except Exception as error:
                raise AssertionError(f"{name} with check_vma={check_vma}") from error


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EACH)
def test_shards_of_a_mesh_sample_what_they_would_alone(name, check_vma):
    function, shards = sharded(name, check_vma)
    first, last = jax.jit(lambda *parts: [function(x) for x in parts])(X[:2], X[-2:])
    found = np.asarray(jax.jit(shards)(X))
    np.testing.assert_allclose(found[:2], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[-2:], last, rtol=1e-5, atol=1e-5)
