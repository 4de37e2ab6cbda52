"""VDM: a learned schedule, the gradient of its shape, and bounds of models in closed form."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from tests.derivations.check import assert_close, assert_mean
from tests.derivations.worlds import draws
from vdm_jax import closed_form, elbo, information, path_bounds, vdm
from vdm_jax.discrete_schedules import DiscretizedSchedule, discretize
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import Categorical
from vdm_jax.networks.schedule import MonotoneNetwork
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.schedules import LearnedSchedule, LinearLogSNR

PIXELS = [[0.1, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]


def _learned(gamma_0, gamma_1, dtype=jnp.float64, features=16, spoil=0.0):
    """A schedule between these end points; `spoil` > 0 perturbs its network's parameters at random."""
    network = MonotoneNetwork(features)
    zero = jnp.zeros((), dtype)
    params = jax.jit(network.init)(jax.random.key(0), zero, zero)
    noise = np.random.RandomState(0)
    params = jax.tree.map(lambda p: jnp.asarray(p + spoil * noise.standard_normal(p.shape), dtype), params)
    return LearnedSchedule(jnp.asarray(gamma_0, dtype), jnp.asarray(gamma_1, dtype), Partial(network.apply, params))


def _pixels(schedule):
    """Two pixels of four values, with the exact denoiser and decoder."""
    distribution = jax.tree.map(
        lambda leaf: leaf.astype(schedule.gamma_0.dtype), closed_form.independent_pixels(PIXELS)
    )
    return distribution, closed_form.OptimalDenoiser(distribution), closed_form.OptimalDecoder(distribution)


@pytest.mark.slow
def test_FWD_7_learned_end_points_are_pinned():
    with jax.enable_x64(True):

        @jax.jit
        def claims(schedule, t):
            slope = jax.vmap(jax.grad(schedule.log_snr))(t[:-1])
            short, long = (schedule.step(t[:-1], end).log_snr_drop for end in (t[:-1] + 1e-9, t[1:]))
            return schedule.log_snr(t), slope, short, long

        for spoil in (0.0, 0.5, 2.0):
            log_snr, slope, short, long = claims(_learned(-7.3, 4.1, spoil=spoil), jnp.linspace(0.0, 1.0, 101))
            assert_close([-log_snr[0], -log_snr[-1]], [-7.3, 4.1], rtol=1e-13)
            assert np.all(np.diff(log_snr) < 0)
            # the drop over a step too short for a difference is the derivative
            assert_close(short * 1e9, -slope, rtol=1e-6)
            assert_close(long, -np.diff(log_snr), rtol=1e-10)


@pytest.mark.slow
def test_ELBO_12_the_bound_depends_on_the_end_points_alone():
    with jax.enable_x64(True):
        schedule = _learned(-5.0, 3.0, spoil=1.0)
        distribution, denoiser, decoder = _pixels(schedule)
        x_0 = draws(distribution, jax.random.key(0), 20_000)
        truth = information.optimal_bound_limit(
            distribution, *(level_from_log_snr(jnp.asarray(v)) for v in (5.0, -3.0))
        )
        loss = jax.jit(lambda shape: vdm.vdm_loss(denoiser, jax.random.key(1), x_0, shape, decoder))
        for shape in (schedule, _learned(-5.0, 3.0)):
            ours = loss(shape)
            for name in ("prior", "reconstruction", "diffusion"):
                assert_mean(getattr(ours, name), getattr(truth, name).value, resolution=0.05)


@pytest.mark.slow
def test_ELBO_9_t_steps_of_a_learned_schedule():
    with jax.enable_x64(True):
        schedule = _learned(-5.0, 3.0, spoil=1.0)
        distribution, denoiser, decoder = _pixels(schedule)
        x_0 = draws(distribution, jax.random.key(0), 20_000)
        grid = DiscretizedSchedule(schedule, 6)
        truth = information.optimal_bound(distribution, grid)
        for ours in (
            vdm.vdm_loss(denoiser, jax.random.key(1), x_0, schedule, decoder, num_steps=5),
            elbo.bound(denoiser, jax.random.key(2), x_0, grid, decoder),
        ):
            for name in ("prior", "reconstruction", "diffusion"):
                assert_mean(getattr(ours, name), getattr(truth, name).value, resolution=0.1)


def test_VDM_1_gradients_of_ends_and_shape():
    # The gradient by the ends is the bound's, by the shape that of E[L^2] / 2D: each differentiated by itself.
    with jax.enable_x64(True):
        schedule = _learned(-5.0, 3.0, features=4, spoil=0.5)
        x_0 = jnp.asarray(np.random.RandomState(1).uniform(-1.0, 1.0, (64, 2)))

        def net(x_t, level):
            return jnp.tanh(x_t + level.sigma[:, None])

        def decoder(x_hat, z_0, level):
            return Normal(x_hat, var=0.1 + level.sigma**2)

        def loss(schedule, objective):
            return vdm.vdm_loss(net, jax.random.key(1), x_0, schedule, decoder, schedule_objective=objective).diffusion

        def bound_and_square(schedule):
            bound = loss(schedule, "bound")
            return jnp.stack([bound.mean(), jnp.mean(bound**2) / (2 * x_0[0].size)])

        @jax.jit
        def claims(schedule):
            value, ours = jax.value_and_grad(lambda s: loss(s, "variance").mean())(schedule)
            return value, bound_and_square(schedule)[0], ours, jax.jacrev(bound_and_square)(schedule)

        value, bound, ours, slopes = claims(schedule)
        assert_close([ours.gamma_0, ours.gamma_1], [slopes.gamma_0[0], slopes.gamma_1[0]], rtol=1e-10)
        for got, (other, want) in zip(*(jax.tree.leaves(slope.rise) for slope in (ours, slopes)), strict=True):
            assert_close(got, want, rtol=1e-8, atol=1e-10)
            assert np.abs(got - other).max() > 0.1 * np.abs(got).max()  # and not the bound's own
        assert_close(value, bound, rtol=1e-12)


def _moments(denoiser, x_0, grid):
    """E ||eps - eps_hat||^2 and its square at each of a grid of log-SNRs, over data and noise."""

    def at(index, log_snr):
        level = level_from_log_snr(jnp.full(x_0.shape[:1], log_snr))
        error = elbo.denoising_error(denoiser, jax.random.fold_in(jax.random.key(5), index), x_0, level, "eps")
        return error.mean(), jnp.square(error).mean()

    return jax.jit(lambda: jax.lax.map(lambda pair: at(*pair), (jnp.arange(grid.size), grid)))()


@pytest.mark.slow
def test_VDM_1_training_the_shape_reaches_the_least_variance():
    # One-sample E L^2 = 1/4 int gamma' m_2(gamma) dgamma is least where gamma' is proportional to m_2^(-1/2), where it
    # is (1/2 int m_2^(1/2) dgamma)^2; m_2(gamma) = E ||eps - eps_hat||^4.
    schedule = _learned(-4.0, 4.0, jnp.float32, features=32)
    distribution, denoiser, decoder = _pixels(schedule)
    x_0 = draws(distribution, jax.random.key(0), 20_000)
    gamma = jnp.linspace(-4.0, 4.0, 121)
    first, second = map(np.asarray, _moments(denoiser, x_0, -gamma))
    mean, least = 0.5 * np.trapezoid(first, gamma), (0.5 * np.trapezoid(np.sqrt(second), gamma)) ** 2

    @jax.jit
    def log_snr_and_slope(schedule, t):
        return jax.vmap(jax.value_and_grad(schedule.log_snr))(t)

    def variance(schedule):
        t = np.linspace(0.0, 1.0, 2001, dtype=np.float32)
        log_snr, slope = map(np.asarray, log_snr_and_slope(schedule, t))
        return np.trapezoid(0.25 * slope**2 * np.interp(-log_snr, gamma, second), t) - mean**2

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 400), b2=0.99)

    @jax.jit
    def train(schedule):
        def update(carry, key):
            schedule, state = carry
            batch = x_0[jax.random.randint(key, (256,), 0, len(x_0))]

            def loss(rise):
                return vdm.vdm_loss(denoiser, key, batch, replace(schedule, rise=rise), decoder).total.mean()

            with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
                change, state = optimizer.update(jax.grad(loss)(schedule.rise), state)
            return (replace(schedule, rise=optax.apply_updates(schedule.rise, change)), state), None

        keys = jax.random.split(jax.random.key(2), 400)
        return jax.lax.scan(update, (schedule, optimizer.init(schedule.rise)), keys)[0][0]

    trained = train(schedule)
    before, after, optimum = variance(schedule), variance(trained), least - mean**2
    print(f"variance of the estimate: ratio {after / before:.3f} after training, {optimum / before:.3f} at the optimum")
    assert optimum < after < 1.05 * optimum < 0.5 * before
    # and the estimates agree: the same mean, the smaller variance
    diffusion = jax.jit(lambda s: vdm.vdm_loss(denoiser, jax.random.key(3), x_0, s, decoder).diffusion)
    old, new = (np.asarray(diffusion(s), np.float64) for s in (schedule, trained))
    truth = information.optimal_bound_limit(distribution, level_from_log_snr(-gamma[0]), level_from_log_snr(-gamma[-1]))
    assert_mean(old, truth.diffusion.value)
    assert_mean(new, truth.diffusion.value)
    assert abs(new.var() / old.var() - after / before) < 0.1 * after / before


@pytest.mark.slow
def test_VDM_1_values_do_not_depend_on_the_rest_of_the_batch():
    schedule = _learned(-5.0, 3.0, jnp.float32)
    distribution, denoiser, decoder = _pixels(schedule)
    x_0 = draws(distribution, jax.random.key(0), 8)
    ours = vdm.vdm_loss(denoiser, jax.random.key(1), x_0, schedule, decoder).diffusion
    changed = vdm.vdm_loss(denoiser, jax.random.key(1), x_0.at[3].set(-x_0[3]), schedule, decoder).diffusion
    assert np.array_equal(np.delete(ours, 3), np.delete(changed, 3))
    assert ours[3] != changed[3]


def test_VDM_2_logits_of_the_pixel_distribution_are_the_exact_denoiser():
    with jax.enable_x64(True):
        distribution, z = closed_form.independent_pixels(PIXELS), jnp.asarray([0.3, -1.2])

        @jax.jit
        def claims(log_snr):
            level = level_from_log_snr(log_snr)
            ours = Categorical(z, level, 4, jnp.log(jnp.asarray(PIXELS)))
            posterior = distribution.posterior(z, level).distribution
            x_hat = closed_form.optimal_prediction(distribution, z, level, "x_0")
            return (ours.mean(), x_hat), (ours.log_masses(), posterior.log_weights)

        for log_snr in (-6.0, -1.0, 2.0, 9.0):
            (mean, x_hat), logs = claims(jnp.asarray(log_snr))
            assert_close(mean, x_hat, rtol=1e-12)
            assert_close(*map(np.exp, logs), rtol=1e-9)


def test_ELBO_12_each_slice_of_the_curve_is_a_difference_of_informations():
    # 1/2 int mmse dSNR over a slice = I(x_0; x_s) - I(x_0; x_t), I = 1/2 log(1 + v SNR) for N(m, v)
    with jax.enable_x64(True):
        schedule, edges = LinearLogSNR(6.0, -4.0), np.linspace(6.0, -4.0, 6)
        x_0 = jnp.asarray(0.4 + np.sqrt(0.5) * np.random.RandomState(0).randn(20_000, 1))
        denoiser = closed_form.OptimalDenoiser(closed_form.gaussian([0.4], [[0.5]]))
        curve = jax.jit(lambda x: elbo.diffusion_curve(denoiser, jax.random.key(1), x, schedule, terms=5))(x_0)
        assert_mean(curve.nats.T, -np.diff(0.5 * np.log1p(0.5 * np.exp(edges))), resolution=0.01)
        inside = np.asarray(curve.log_snr)
        assert np.all(inside <= edges[:-1, None])
        assert np.all(inside >= edges[1:, None])


def _chain(distribution, schedule, decoder_var):
    """-log p(x_0) of the model with the exact denoiser of scalar normal data: linear steps keep it normal."""
    m, v = float(distribution.mean[0]), float(distribution.variance[0])
    mean, var = 0.0, 1.0
    for t in range(schedule.num_steps, 0, -1):
        step = schedule.step(t - 1, t)
        alpha, sigma = float(step.t.alpha), float(step.t.sigma)
        gain = alpha * v / (alpha**2 * v + sigma**2)  # x_hat = m + gain (x - alpha m)
        r = float(step.snr_ratio)
        slope = float(step.s.alpha) * (r / alpha + (1 - r) * gain)
        shift = float(step.s.alpha) * (1 - r) * (m - gain * alpha * m)
        noise = float(step.s.sigma) ** 2 * (1 - r) if t > 1 else decoder_var
        mean, var = slope * mean + shift, slope**2 * var + noise
    return lambda x: 0.5 * ((x - mean) ** 2 / var + np.log(2 * np.pi * var))


def test_LIK_1_more_paths_tighten_the_bound():
    with jax.enable_x64(True):
        distribution, schedule = closed_form.gaussian([0.4], [[0.5]]), discretize(LinearLogSNR(3.0, -5.0), 4)

        @partial(jax.jit, static_argnums=1)
        def bound(key, samples):
            return path_bounds.importance_weighted_bound(
                closed_form.OptimalDenoiser(distribution), key, x_0, schedule, decoder, samples=samples
            )

        def decoder(x_hat, x_1, level):
            return Normal(x_hat, var=jnp.asarray(0.1))

        x_0 = jnp.full((4000, 1), 0.9)
        truth = _chain(distribution, schedule, 0.1)(0.9)
        one, many = (np.asarray(bound(jax.random.key(samples), samples)) for samples in (1, 32))
        assert one.mean() > many.mean() > truth - 4 * many.std() / len(x_0) ** 0.5
        for ours in (one, many):  # E e^-bound is p(x_0) for every K: unbiased, with its -log K
            assert_mean(np.exp(-ours), np.exp(-truth), resolution=0.02)
        ratio = path_bounds.joint_log_ratio(
            closed_form.OptimalDenoiser(distribution), jax.random.key(8), x_0, schedule, decoder
        )
        assert_mean(one + np.asarray(ratio), 0.0)
