"""Roots, logarithms and quotients where their argument reaches 0: gradients that have a finite limit have its value.

A root's slope at 0 is infinite, and so is a logarithm's: times a change of 0 both are NaN, where the limit is finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax import autoencoder, closed_form, hvae, information, linear_gaussian, schedules
from vdm_jax.gaussian import Normal
from vdm_jax.noise_levels import level_from_log_snr
from vdm_jax.time_sampling import LossSecondMomentSampler

parametrize = pytest.mark.parametrize


def test_the_distance_to_the_data_has_slope_0_on_them_and_1_elsewhere():
    data = jnp.asarray([[0.0, 1.0], [2.0, 3.0]])
    x = jnp.asarray([[2.0, 3.0], [2.3, 3.4]])
    distance, slopes = jax.jit(jax.value_and_grad(lambda x: autoencoder.nearest_distance(x, data).sum()))(x)
    assert float(distance) == pytest.approx(0.5, rel=1e-6)
    np.testing.assert_allclose(slopes, [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6)


def _sigmoid(t):
    return 1 / (1 + np.exp(-t))


# d log alpha / dt where data are clean, and d log sigma / dt where no signal is left, by hand.
SLOPES = {
    "linear": (schedules.LinearBeta(0.1, 20.0), -0.05, None),
    "cosine": (schedules.Cosine(0.008), -np.tan(0.5 * np.pi * 0.008 / 1.008) * 0.5 * np.pi / 1.008, 0.0),
    "sigmoid": (
        schedules.Sigmoid(-3.0, 2.0, 0.8),
        -0.5 * 6.25 * _sigmoid(-3.75) * _sigmoid(3.75) / (_sigmoid(2.5) - _sigmoid(-3.75)),
        0.5 * 6.25 * _sigmoid(2.5) * _sigmoid(-2.5) / (_sigmoid(2.5) - _sigmoid(-3.75)),
    ),
}


@parametrize("name", SLOPES)
def test_schedules_have_the_slopes_of_their_ends(name):
    schedule, clean, noise = SLOPES[name]

    @jax.jit
    def slopes(start, end, t):
        levels = [jax.jacfwd(lambda t: tuple(schedule(t)))(t)[2:4] for t in (start, end)]
        steps = (lambda t: schedule.step(start, t)), (lambda t: schedule.step(t, end))
        drops = [jax.value_and_grad(lambda t, of=of: of(t).log_snr_drop)(t) for of in steps]
        ratios = [jax.jacfwd(lambda t, of=of: (of(t).one_minus_ratio, of(t).snr_ratio))(t) for of in steps]
        return levels, drops, ratios, jax.grad(schedule.log_snr)(t)

    ((at_clean, _), (_, at_noise)), drops, ratios, falling = slopes(0.0, 1.0, 0.4)
    assert float(at_clean) == pytest.approx(clean, rel=1e-5)
    if noise is not None:
        assert float(at_noise) == pytest.approx(noise, rel=1e-5, abs=1e-6)
    # the drop from clean data, or to pure noise, is infinite; it falls with the log-SNR of the other end
    for sign, (drop, slope), ratio in zip((-1.0, 1.0), drops, ratios, strict=True):
        if name == "linear" and sign > 0:
            continue
        assert float(drop) == np.inf
        assert float(slope) == pytest.approx(sign * float(falling), rel=1e-5)
        assert ratio == (0.0, 0.0)


def test_levels_beyond_float32_have_gradients():
    log_snr = np.array([-200.0, -95.0, 95.0, 200.0], np.float32)
    slopes = jax.jit(jax.vmap(jax.jacrev(lambda lam: tuple(level_from_log_snr(lam))[:4])))(log_snr)
    np.testing.assert_allclose(slopes[:2], 0.0, atol=1e-19)  # alpha and sigma are constant there
    np.testing.assert_allclose(slopes[2:], [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, -0.5, -0.5]], atol=1e-19)


def test_a_sample_without_variance_has_the_gradient_of_its_mean():
    def sample(s):
        return Normal(3.0 * s * jnp.ones(2), var=s**2 * jnp.zeros(())).sample(jax.random.key(0)).sum()

    assert float(jax.jit(jax.grad(sample))(0.7)) == pytest.approx(6.0)
    below = lambda z: Normal(0.5 * z, var=jnp.exp(z))  # noqa: E731
    model = hvae.top_down((2,), [lambda *_: None, lambda *_: None], [below], lambda z: z)

    def mode(shift):
        shifted = lambda n, chosen: (model(n, chosen)[0], model(n, chosen)[1] + shift)  # noqa: E731
        return hvae.sample_decoder_output(shifted, jax.random.key(0), 1, temperature=0.0).sum()

    assert float(jax.jit(jax.grad(mode))(0.3)) == pytest.approx(2.0)


def test_directions_without_variance_are_left_out_of_gradients():
    # data on a line: given x_t the variance orthogonal to the line is 0 at any level
    distribution, x_t = closed_form.low_rank([0.0, 0.0], [[1.0], [0.0]]), jnp.asarray([0.4, 0.1])

    def second_moment(lam, expect):
        return expect(lambda x: jnp.sum(x**2), distribution.posterior(x_t, level_from_log_snr(lam))).value

    with jax.enable_x64(True):
        distribution, x_t, lam = (
            *jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (distribution, x_t)),
            jnp.asarray(0.5),
        )
        slope = jax.jit(lambda lam: jax.grad(second_moment)(lam, information.quadrature))(lam)
        alpha, power = np.sqrt(_sigmoid(0.5)), _sigmoid(-0.5)  # E x^2 = (0.4 alpha)^2 + sigma^2
        assert float(slope) == pytest.approx(0.16 * alpha**2 * power - alpha**2 * power, rel=1e-6)


def test_impossible_values_are_left_out_of_an_entropys_gradient():
    # by mass 0, and by a mass that underflows at little noise
    def entropy(lam, distribution, x_t):
        return distribution.posterior(x_t, level_from_log_snr(lam)).entropy()

    @jax.jit
    def slopes(lam, distribution, x_t):
        return jax.vmap(lambda h: entropy(lam + h, distribution, x_t))(np.array([1e-5, -1e-5])), jax.grad(entropy)(
            lam, distribution, x_t
        )

    with jax.enable_x64(True):
        pixel = closed_form.independent_pixels([0.0, 0.3, 0.7]).distribution
        points = closed_form.empirical([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
        for distribution, x_t, lam in ((pixel, 0.2, 1.0), (points, [0.1, 0.9], 2.0), (points, [0.45, 0.55], 9.0)):
            (ahead, behind), slope = map(np.asarray, slopes(np.asarray(lam), distribution, np.asarray(x_t)))
            assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6, abs=1e-9)
    slopes = jax.jit(jax.grad(lambda w: closed_form.Empirical(w, np.zeros((3, 1), np.float32)).entropy()))(
        np.array([-np.inf, -200.0, 0.0], np.float32)
    )
    np.testing.assert_allclose(slopes, [0.0, 0.0, -1.0])


def test_the_mean_of_a_constant_is_without_error_and_its_gradient():
    expect = lambda m: information.monte_carlo(lambda x: m + 0.0 * x.sum(), Normal(jnp.zeros(1), var=1.0), key, 10)  # noqa: E731
    key = jax.random.key(0)
    value, slope = jax.jit(lambda m: (expect(m), jax.jacrev(expect)(m)))(np.float32(2.0))
    assert value == (2.0, 0.0)
    assert slope == (pytest.approx(1.0), 0.0)


@parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_probabilistic_pca_of_data_alike_in_all_directions_finds_noise_alone(k):
    x = np.float32(0.7) * np.concatenate([np.eye(5, dtype=np.float32), -np.eye(5, dtype=np.float32)])
    model = jax.jit(linear_gaussian.probabilistic_pca, static_argnums=1)(x, k)
    np.testing.assert_allclose(model.weights, 0.0, atol=1e-3)
    assert float(model.var) == pytest.approx(0.49 / 5, rel=1e-5)


def test_steps_without_loss_have_a_gradient():
    moments = LossSecondMomentSampler(jnp.asarray([[0.0, 0.0], [1.0, 1.0]]), jnp.asarray([2, 2], jnp.int32))
    slopes = jax.jit(jax.jacrev(lambda losses: moments._replace(losses=losses).probabilities()))(moments.losses)
    assert np.all(np.isfinite(slopes))
