"""The ODE as a function: float32, batches, steps that run out, one trace, every transformation, gradients, errors.

The theorems are in `derivations/test_likelihood.py`.
"""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from tests.derivations.worlds import draws
from vdm_jax import closed_form, probability_flow
from vdm_jax.schedules import Cosine, LearnedSchedule, LinearBeta, LinearLogSNR, Sigmoid

SCHEDULE = LinearLogSNR(6.0, -8.0)
MIXTURE = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
X = draws(closed_form.marginal(MIXTURE, SCHEDULE(jnp.float32(0.0))), jax.random.key(0), 8)
BEST = closed_form.OptimalDenoiser(MIXTURE)


def _net(w, x_t, level):
    """A nonlinear denoiser whose Jacobian is neither diagonal nor symmetric."""
    return w * level.sigma[:, None] * jnp.tanh(x_t + 0.5 * x_t[:, ::-1] ** 2)


def _log_likelihood(x=X, w=1.0, key=1, **options):
    return probability_flow.log_likelihood(
        Partial(_net, jnp.asarray(w, x.dtype)), jax.random.key(key), x, SCHEDULE, **options
    )


@pytest.mark.slow
def test_float32_has_the_documented_accuracy():
    x = draws(closed_form.marginal(MIXTURE, SCHEDULE(jnp.float32(0.0))), jax.random.key(3), 256)
    ours = probability_flow.log_likelihood(BEST, jax.random.key(1), x, SCHEDULE, trace="exact")
    with jax.enable_x64(True):
        distribution = closed_form.mixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.05, 0.2])
        best, x = closed_form.OptimalDenoiser(distribution), x.astype(jnp.float64)
        expected = probability_flow.log_likelihood(best, jax.random.key(1), x, SCHEDULE, trace="exact", tolerance=1e-9)
    error = np.abs(np.asarray(ours.log_prob, np.float64) - np.asarray(expected.log_prob)) / 2
    print(f"float32 log-density a dimension: mean error {error.mean():.1e}, worst {error.max():.1e} nats")
    assert error.max() < 2e-5
    assert np.abs(np.asarray(ours.x_1, np.float64) - np.asarray(expected.x_1)).max() < 1e-4


@pytest.mark.slow
def test_an_example_does_not_depend_on_the_others():
    # neither through the solver's steps nor through the probes
    alone, beside = (_log_likelihood(x, trace="gaussian", probes=2) for x in (X[:1], X))
    np.testing.assert_allclose(alone.log_prob[0], beside.log_prob[0], atol=2e-4)
    # examples far from the data need more steps, which the others share
    far = jnp.concatenate([X[:1], 30.0 * X[1:]])
    assert _log_likelihood(far, trace="exact").evaluations > _log_likelihood(trace="exact").evaluations
    np.testing.assert_allclose(
        _log_likelihood(far, trace="exact").log_prob[0], _log_likelihood(trace="exact").log_prob[0], atol=2e-4
    )
    # the tolerance applies to the worst example, not to the mean over the batch
    many = jnp.concatenate([30.0 * X[:1], jnp.broadcast_to(X[1:2], (500, 2))])
    np.testing.assert_allclose(
        _log_likelihood(many, trace="exact").log_prob[0],
        _log_likelihood(30.0 * X[:1], trace="exact").log_prob[0],
        rtol=1e-5,
    )


def test_steps_that_run_out_are_not_a_number():
    ours = _log_likelihood(max_steps=3)
    assert np.all(np.isnan(ours.log_prob))
    assert np.all(np.isnan(ours.x_1))
    assert np.all(np.isnan(probability_flow.sample(BEST, X, SCHEDULE, max_steps=3)))


def test_labels_stay_with_their_examples():
    # the network is evaluated on the whole batch at once, so a denoiser may close over one label per example
    shift = jnp.linspace(-1.0, 1.0, 8)[:, None]

    def labelled(x_t, level):  # data N(shift, 0.3): the flow is a scaling about the label
        var = level.alpha**2 * 0.3 + level.sigma**2
        return jax.vmap(lambda x, s, a, g, v: g * (x - a * s) / v)(x_t, shift, level.alpha, level.sigma, var)

    first, last = (SCHEDULE(jnp.float32(t)) for t in (0.0, 1.0))
    ratio = jnp.sqrt((0.3 * last.alpha**2 + last.sigma**2) / (0.3 * first.alpha**2 + first.sigma**2))
    ours = probability_flow.log_likelihood(labelled, jax.random.key(0), X, SCHEDULE)
    np.testing.assert_allclose(ours.x_1, last.alpha * shift + ratio * (X - first.alpha * shift), atol=2e-5)


def test_the_denoiser_is_evaluated_at_the_schedule_s_time():
    # a denoiser that depends on t alone: eps_hat = k(t) x, whose flow is a scaling by exp of an integral
    schedule = LinearLogSNR(4.0, -4.0)
    seen = probability_flow.log_likelihood(
        lambda x_t, level: jax.vmap(jnp.multiply)(level.t, x_t), jax.random.key(0), X, schedule
    )
    # dx/dt = (log alpha)' x + 4 sigma t x
    t = np.linspace(0.0, 1.0, 2001)
    with jax.enable_x64(True):
        level = schedule(jnp.asarray(t))
        growth = float(level.log_alpha[-1] - level.log_alpha[0]) + np.trapezoid(4 * np.asarray(level.sigma) * t, t)
    np.testing.assert_allclose(seen.x_1, X * float(np.exp(growth)), rtol=2e-5)
    prior = -0.5 * (np.asarray(seen.x_1) ** 2).sum(-1) - np.log(2 * np.pi)
    np.testing.assert_allclose(seen.log_prob, prior + 2 * growth, atol=1e-4)


def test_evaluations_are_counted_and_the_denoiser_is_traced_once():
    traces, calls = itertools.count(), itertools.count()  # which change without a change of what `counted` holds

    def counted(w, x_t, level):
        next(traces)
        jax.debug.callback(lambda: next(calls) and None)
        return _net(w, x_t, level)

    for key, (w, tolerance) in enumerate([(1.0, 1e-3), (1.1, 1e-5)]):
        before = next(calls)
        net = Partial(counted, jnp.float32(w))
        ours = probability_flow.log_likelihood(net, jax.random.key(key), X, SCHEDULE, tolerance=tolerance)
        jax.block_until_ready(ours)
        jax.effects_barrier()
        assert next(calls) - before - 1 == int(ours.evaluations)
    assert next(traces) <= 2  # in strict promotion, and in diffrax's own standard one


@pytest.mark.slow
def test_probes_are_averaged_and_depend_on_the_key():
    same, other = _log_likelihood(key=1), _log_likelihood(key=2)
    np.testing.assert_array_equal(same.log_prob, _log_likelihood(key=1).log_prob)
    assert np.all(same.log_prob != other.log_prob)
    spread = [
        np.std([_log_likelihood(key=k, probes=n, trace="gaussian").log_prob for k in range(8)], 0).mean()
        for n in (1, 16)
    ]
    assert spread[1] < spread[0] / 2


@pytest.mark.slow
def test_same_jitted_mapped_and_on_many_devices():
    keys, x, w = jax.random.split(jax.random.key(0), 8), jnp.stack([X + 0.1 * i for i in range(8)]), jnp.ones(8)

    def one(key, x, w):
        there = probability_flow.log_likelihood(Partial(_net, w), key, x, SCHEDULE)
        return there.log_prob, probability_flow.sample(Partial(_net, w), there.x_1, SCHEDULE)

    alone = one(keys[0], x[0], w[0])
    for many in (jax.vmap(one), jax.pmap(one)):
        ours = jax.tree.map(lambda leaf: leaf[0], many(keys, x, w))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), ours, alone)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["rademacher", "exact"])
def test_gradient_is_the_slope(trace):
    # by the denoiser's parameter and by x, in float64; of the density and of the latent
    with jax.enable_x64(True):
        x = X[:2].astype(jnp.float64)

        def total(w, x):
            ours = probability_flow.log_likelihood(
                Partial(_net, w), jax.random.key(1), x, SCHEDULE, trace=trace, tolerance=1e-9
            )
            return ours.log_prob.sum() + ours.x_1[0, 0]

        w, h, along = jnp.asarray(0.9), 1e-5, jnp.asarray([[0.0, 0.6], [-0.8, 0.0]])
        by_w, by_x = jax.grad(total, (0, 1))(w, x)
        np.testing.assert_allclose(by_w, (total(w + h, x) - total(w - h, x)) / (2 * h), rtol=1e-5)
        slope = (total(w, x + h * along) - total(w, x - h * along)) / (2 * h)
        np.testing.assert_allclose(jnp.sum(by_x * along), slope, rtol=1e-5)


def test_points_of_an_arc(monkeypatch):
    # of unequal lengths, at right angles, parallel, close to each other, and zero
    a = np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0, 4.0], [2.0, 2.0], [np.cos(0.4), np.sin(0.4)], [0.0, 0.0]], np.float32)
    w = np.array([0.0, 0.5, 0.75, 1.0], np.float32)
    ours = np.asarray(probability_flow.spherical_interpolation(jnp.asarray(a), jnp.asarray(b), jnp.asarray(w)))
    right = w * np.pi / 2
    np.testing.assert_allclose(ours[:, 0], np.stack([2.0 * np.cos(right), 4.0 * np.sin(right)], 1), atol=1e-6)
    np.testing.assert_allclose(ours[:, 1], (1.0 + w)[:, None] * [1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(ours[:, 2], np.stack([np.cos(0.4 * w), np.sin(0.4 * w)], 1), atol=1e-6)
    np.testing.assert_array_equal(ours[:, 3], 0.0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its error would come first
    with pytest.raises(ValueError, match=r"x_a has shape \(8, 2\) and x_b \(7, 2\)"):
        probability_flow.interpolate(BEST, X, X[:7], SCHEDULE, jnp.asarray(w))


@pytest.mark.slow
def test_gradient_of_a_sample_and_its_density_is_the_slope():
    # by the denoiser's parameter and by x_1, in float64; the sample moves with both
    with jax.enable_x64(True):
        x_1 = X[:2].astype(jnp.float64)

        def total(w, x_1):
            ours = probability_flow.sample_with_log_prob(
                Partial(_net, w), None, x_1, SCHEDULE, trace="exact", tolerance=1e-9
            )
            return ours.log_prob.sum() + ours.x[0, 0]

        w, h, along = jnp.asarray(0.9), 1e-5, jnp.asarray([[0.0, 0.6], [-0.8, 0.0]])
        by_w, by_x = jax.grad(total, (0, 1))(w, x_1)
        np.testing.assert_allclose(by_w, (total(w + h, x_1) - total(w - h, x_1)) / (2 * h), rtol=1e-5)
        slope = (total(w, x_1 + h * along) - total(w, x_1 - h * along)) / (2 * h)
        np.testing.assert_allclose(jnp.sum(by_x * along), slope, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("compile_", [jax.jit, lambda function: function])
def test_on_a_mesh_value_and_gradient_are_those_of_the_shards(check_vma, compile_):
    # each device's solver takes its own steps, and a parameter's gradient is the sum over devices
    x, w = 0.4 * jnp.concatenate([X, X[::-1]]), jnp.float32(0.9)
    schedule = LearnedSchedule(
        jnp.float32(-6.0), jnp.float32(5.0), Partial(lambda c, s, t: c * (t - s), jnp.float32(2.0))
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def evaluate(w, gamma_1, x):
        ours = probability_flow.log_likelihood(
            Partial(_net, w), jax.random.key(1), x, replace(schedule, gamma_1=gamma_1), trace="exact", tolerance=1e-4
        )
        return ours.log_prob, ours.x_1

    specs = (P(), P(), P("data")), P("data")
    shards = compile_(jax.shard_map(evaluate, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=check_vma))

    def alone(w, gamma_1, x):
        return jax.tree.map(
            lambda *parts: jnp.concatenate(parts), *[evaluate(w, gamma_1, x[i : i + 4]) for i in (0, 4, 8, 12)]
        )

    def total(function):
        return lambda *args: sum(part.sum() for part in function(*args))

    args = (w, jnp.float32(5.0), x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), shards(*args), alone(*args))
    slopes, expected = (jax.grad(total(function), (0, 1, 2))(*args) for function in (shards, alone))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), slopes, expected)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (SCHEDULE, {"trace": "all"}, "unknown trace 'all'"),
        (SCHEDULE, {"probes": 0}, "probes is 0"),
        (SCHEDULE, {"t_0": 1.0}, "t_0 is 1.0"),
        (LinearBeta(), {}, "LinearBeta.* has no noise at t = 0.0"),
        (Cosine(), {"t_0": 0.1, "prediction_type": "eps"}, "no signal at t = 1.*'eps'.*predict x_0 or v"),
        (Cosine(), {"t_0": 0.1, "prediction_type": "score"}, "singular .*'score'"),
        (Sigmoid(), {"t_0": 0.1, "prediction_type": "v"}, "singular .*'v'.*InterpolatedSchedule"),
    ],
)
def test_invalid_arguments_raise(schedule, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its error would come first
    with pytest.raises(ValueError, match=message):
        probability_flow.log_likelihood(BEST, jax.random.key(0), X, schedule, **options)
    with pytest.raises(ValueError, match=message):
        probability_flow.sample_with_log_prob(BEST, jax.random.key(0), X, schedule, **options)
    if not {"trace", "probes"} & set(options):
        with pytest.raises(ValueError, match=message):
            probability_flow.sample(BEST, X, schedule, **options)
