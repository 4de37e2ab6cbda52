"""Learned and analytic variances as functions: float32 accuracy, keys and shapes, clean s, what is refused.

Their expected_values are in `derivations/test_variance.py`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import forward, losses, reverse_variance
from vdm_jax.discrete_schedules import discretize, linear_betas
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import step_from_log_snr
from vdm_jax.schedules import Cosine

SCHEDULE = linear_betas(8, 0.01, 0.5)
GAUSSIAN = GaussianWorld(0.4, 0.6)
X_0 = GAUSSIAN.sample(jax.random.key(9), (4, 3))


def _model(f, x_t, level):
    return denoiser(GAUSSIAN, shift=0.1)(x_t, level), f * jnp.ones_like(x_t)


def _decoder(x_hat, fraction, x_1, level):
    return Normal(x_hat, var=level.sigma**2 * jnp.exp(fraction))


def _steps(dtype):
    """Short and long steps over the whole range of log-SNR; float32 represents the log-SNRs exactly."""
    lam_t = np.repeat(np.array([-20.0, -8.0, -1.0, 0.5, 6.0, 13.0, 19.0]), 4)
    lam_s = lam_t + np.tile(np.array([2.0**-10, 0.125, 0.5, 1.0]), 7)
    return jax.jit(jax.vmap(step_from_log_snr))(lam_s.astype(dtype), lam_t.astype(dtype))


@jax.jit
def _everything(steps, numbers):
    target, prediction, fraction, error = numbers
    ratio = fraction[:, None] * jnp.ones_like(target)
    return {
        "interpolated_variance": jax.vmap(reverse_variance.interpolated_variance)(fraction, steps),
        "reverse_kl": jax.vmap(lambda a, b, c, s: reverse_variance.reverse_step_kl(a, b, c, s, "eps"))(
            target, prediction, ratio, steps
        ),
        "optimal_variance": jax.vmap(reverse_variance.optimal_variance)(error, steps),
        "analytic_dpm_variance": jax.vmap(
            lambda s: reverse_variance.analytic_dpm_variance(jnp.asarray(0.75, target.dtype), s)
        )(steps),
        "variance_bounds": jax.vmap(lambda s: reverse_variance.variance_bounds(s, 1.0))(steps),
    }


def test_float32_keeps_six_digits():
    rng = np.random.RandomState(0)
    numbers = [rng.uniform(-1, 1, (28, 3)), rng.uniform(-1, 1, (28, 3)), rng.rand(28), rng.rand(28)]
    numbers = [number.astype(np.float32) for number in numbers]
    ours = _everything(_steps(jnp.float32), [jnp.asarray(n) for n in numbers])
    with jax.enable_x64(True):
        expected = _everything(_steps(jnp.float64), [jnp.asarray(n, jnp.float64) for n in numbers])
    for name in ours:
        for mine, exact in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(expected[name]), strict=True):
            worst = np.max(np.abs(np.asarray(mine, np.float64) / np.asarray(exact) - 1))
            assert worst < 1e-6, (name, worst)


def test_steps_to_clean_data():
    step, f = SCHEDULE.step(0, 1), jnp.asarray([-0.3, 0.4, 1.0])
    assert np.array_equal(reverse_variance.interpolated_variance(f, step), np.zeros(3))
    assert np.array_equal(reverse_variance.variance_fraction(jnp.asarray([0.1, 2.0]), step), np.zeros(2))
    # the analytic variance there is that of a normal decoder: the remaining variance of x_0
    assert float(reverse_variance.optimal_variance(jnp.asarray(0.3), step)) == pytest.approx(0.3)
    bounds = reverse_variance.variance_bounds(step)
    assert (float(bounds.lower), float(bounds.upper)) == pytest.approx((0.0, 1 / float(step.t.snr)))

    # and no gradient is NaN
    def both(f, step):
        fraction = reverse_variance.variance_fraction(f + 1.0, step)
        return jnp.stack([reverse_variance.interpolated_variance(f, step), fraction])

    slopes = jax.jit(jax.jacrev(both, (0, 1)))
    for t in (1, 2):
        by_f, by_step = slopes(jnp.asarray(0.4), SCHEDULE.step(t - 1, t))
        assert np.all(np.isfinite([by_f, by_step.s.sigma, by_step.t.sigma, by_step.log_snr_drop]))


def test_a_second_moment_above_one_counts_as_one():
    # an estimate may exceed what it estimates
    step = SCHEDULE.step(3, 4)
    for power in (1.0, 1.3):
        var = reverse_variance.analytic_dpm_variance(jnp.asarray(power), step)
        assert float(var) == pytest.approx(float(forward.posterior_variance(step)))


def test_per_dimension_second_moments_average_to_the_second_moment():
    arguments = denoiser(GAUSSIAN), jax.random.key(0), X_0, SCHEDULE
    each, whole = (
        reverse_variance.eps_second_moment(*arguments, per_dim=True),
        reverse_variance.eps_second_moment(*arguments),
    )
    assert each.shape == (8, 3)
    assert whole.shape == (8,)
    np.testing.assert_allclose(each.mean(1), whole, rtol=1e-6)


def test_fresh_noise_at_every_step():
    # a denoiser that returns x_t, with data 0: the second moment is (sigma_t eps)^2
    power = reverse_variance.eps_second_moment(lambda x, _: x, jax.random.key(0), jnp.zeros((1, 1)), SCHEDULE)
    assert len(np.unique(np.round(power / SCHEDULE(jnp.arange(1, 9)).sigma ** 2, 4))) == 8


def test_steps_given_by_the_caller():
    t, weight = jnp.asarray([1, 8, 3, 2]), jnp.asarray([0.5, 1.0, 2.0, 4.0])
    options = {"t": t, "importance": weight}
    vlb = reverse_variance.vlb_loss(Partial(_model, 0.3), jax.random.key(0), X_0, SCHEDULE, _decoder, **options)
    assert np.array_equal(vlb.t, t)
    np.testing.assert_allclose(vlb.loss, weight * vlb.vlb, rtol=1e-6)
    hybrid = reverse_variance.hybrid_loss(
        Partial(_model, 0.3), jax.random.key(0), X_0, SCHEDULE, _decoder, vlb_weight=2.0, **options
    )
    np.testing.assert_allclose(hybrid.loss, weight * (hybrid.squared_error + 2.0 * hybrid.vlb), rtol=1e-6)
    np.testing.assert_allclose(hybrid.vlb, vlb.vlb, rtol=1e-6)
    # T times the decoder's cost at t = 1, T times the divergence elsewhere
    noise = jax.random.split(jax.random.key(0))[1]
    eps, x_0 = np.asarray(jax.random.normal(noise, X_0.shape)), np.asarray(X_0)
    kl = jax.jit(lambda *numbers: reverse_variance.reverse_step_kl(*numbers, "x_0"))
    for i in range(4):
        level = jax.tree.map(np.asarray, SCHEDULE(int(t[i])))
        x_t = level.alpha * x_0[i] + level.sigma * eps[i]
        x_hat = (GAUSSIAN.x_hat(x_t, level) + 0.1).astype(np.float32)
        if i == 0:
            expected = -stats.norm(x_hat, level.sigma * np.exp(0.15)).logpdf(x_0[i]).sum()
        else:
            step = SCHEDULE.step(int(t[i]) - 1, int(t[i]))
            ratio = np.float32(0.6 * np.log(float(step.t.sigma) / float(step.s.sigma)))
            expected = kl(X_0[i], x_hat, ratio, step)
        assert float(vlb.vlb[i]) == pytest.approx(8 * float(expected), rel=1e-3)


def test_a_step_outside_gives_nan():
    t = jnp.asarray([0, -1, 9, 2])
    vlb = reverse_variance.vlb_loss(Partial(_model, 0.3), jax.random.key(0), X_0, SCHEDULE, _decoder, t=t).vlb
    assert np.array_equal(np.isnan(vlb), [True, True, True, False])


@pytest.mark.parametrize("time_sampling", ["independent", "low_discrepancy"])
def test_hybrid_loss_samples_the_steps_of_the_simple_loss(time_sampling):
    ours = reverse_variance.hybrid_loss(
        Partial(_model, 0.3), jax.random.key(5), X_0, SCHEDULE, _decoder, time_sampling=time_sampling
    )
    expected = losses.denoising_loss(
        denoiser(GAUSSIAN, shift=0.1), jax.random.key(5), X_0, SCHEDULE, time_sampling=time_sampling
    )
    assert np.array_equal(ours.t, expected.t)
    np.testing.assert_allclose(ours.squared_error, expected.squared_error, rtol=1e-5)
    assert np.array_equal(ours.importance, np.ones(4))


def test_a_schedule_of_one_step_is_refused():
    schedule = SCHEDULE.subsequence(np.array([0, 8]))
    bound = reverse_variance.learned_variance_bound(Partial(_model, 0.3), jax.random.key(0), X_0, schedule, _decoder)
    assert np.array_equal(bound.diffusion, np.zeros(4))
    assert np.all(np.isfinite(bound.total))
    for loss in (reverse_variance.vlb_loss, reverse_variance.hybrid_loss):
        with pytest.raises(ValueError, match=r"num_steps=1.*num_steps=2"):
            loss(Partial(_model, 0.3), jax.random.key(0), X_0, schedule, _decoder)


def test_two_steps_are_enough_and_a_model_returns_two_arrays():
    schedule = SCHEDULE.subsequence(np.array([0, 4, 8]))
    for loss in (reverse_variance.vlb_loss, reverse_variance.hybrid_loss):
        assert np.all(np.isfinite(loss(Partial(_model, 0.3), jax.random.key(0), X_0, schedule, _decoder)[0]))
        for output in (lambda x_t: x_t, lambda x_t: (x_t, x_t, x_t)):
            with pytest.raises(TypeError, match="must return"):
                loss(lambda x_t, level, output=output: output(x_t), jax.random.key(0), X_0, schedule, _decoder)


@pytest.mark.parametrize("terms", [0, -1])
def test_zero_terms_are_refused(terms):
    with pytest.raises(ValueError, match=f"terms is {terms}.*at least one"):
        reverse_variance.learned_variance_bound(
            Partial(_model, 0.3), jax.random.key(0), X_0, SCHEDULE, _decoder, terms=terms
        )


def test_gradients_are_finite_at_the_noisiest_step():
    # almost no signal is left at T: x_hat is off by thousands there, and the decoder must not use it
    schedule = discretize(Cosine(), 6)
    decoder, t = reverse_variance.InterpolatedDecoder(schedule, 17), jnp.arange(1, 7)

    def model(w, x_t, level):
        return w * x_t, w * jnp.sin(x_t)

    @jax.jit
    @jax.value_and_grad
    def cost(w):
        return reverse_variance.vlb_loss(
            Partial(model, w), jax.random.key(0), jnp.zeros((6, 1)), schedule, decoder, t=t
        ).loss.sum()

    assert np.all(np.isfinite(cost(0.9)))


def test_one_trace_for_all_fractions_and_keys():
    model = chex.assert_max_traces(lambda f, x_t, level: (x_t, f * x_t), n=1)
    decoder = reverse_variance.InterpolatedDecoder(SCHEDULE, 17)
    for i in range(3):
        reverse_variance.hybrid_loss(
            Partial(model, jnp.asarray(0.1 * i)), jax.random.key(i), jnp.zeros((4, 3)), SCHEDULE, decoder
        )
