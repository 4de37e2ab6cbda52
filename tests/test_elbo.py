"""The bound's parts as functions: agreement with `gaussian.kl`, their arguments, edge cases, errors.

The theorems are in `derivations/test_elbo.py`.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.derivations.check import assert_mean
from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import elbo, forward
from vdm_jax.discrete_schedules import discretize, linear_betas
from vdm_jax.gaussian import Normal, kl
from vdm_jax.schedules import Cosine, LinearBeta, LinearLogSNR, VarianceExploding

SCHEDULE = linear_betas(8, 0.01, 0.5)
MAKE_SCHEDULE = {  # to be called with x64 enabled, for float64 schedules
    "preserving": lambda: linear_betas(8, 0.01, 0.5),
    "exploding": lambda: discretize(VarianceExploding(0.1, 5.0), 8),
}
GAUSSIAN, LINE = GaussianWorld(0.4, 0.6), LinearLogSNR(5.0, -4.0)
PREDICTION_TYPES = ("x_0", "eps", "v", "score")


def _decoder(x_hat, x_1, level):
    return Normal(x_hat, var=level.sigma**2)


def _bound(prediction_type="eps", schedule=SCHEDULE, key=0, batch=4, **options):
    x_0 = GAUSSIAN.sample(jax.random.key(9), (batch, 3))
    return elbo.bound(
        denoiser(GAUSSIAN, prediction_type, 0.3),
        jax.random.key(key),
        x_0,
        schedule,
        _decoder,
        prediction_type=prediction_type,
        **options,
    )


def test_prior_kl_is_the_kl_of_the_last_marginal():
    with jax.enable_x64(True):
        x_0 = jnp.asarray([[0.3, -1.0], [0.9, 0.0]])
        preserving, exploding = (make() for make in MAKE_SCHEDULE.values())
        for schedule, mean, var in [(preserving, 0.0, 1.0), (exploding, 0.0, 25.0), (preserving, -0.4, 3.7)]:
            level = schedule(schedule.num_steps)
            exact = kl(forward.marginal(x_0, level), Normal(jnp.full_like(x_0, mean), var=jnp.asarray(var)))
            assert float(elbo.prior_kl(x_0, level, Normal(mean, var=var))) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (0.0, TypeError, "prior is a float.*gaussian.Normal"),
        (Normal(0.0, var=0.0), ValueError, "prior.var is 0.0.*positive"),
        (Normal(0.0, var=-1.0), ValueError, "prior.var is -1.0.*positive"),
        (Normal(jnp.zeros(3), var=1.0), ValueError, r"prior.mean has shape \(3,\).*one number"),
    ],
)
def test_a_prior_that_is_not_a_scalar_normal_is_refused(prior, error, message):
    x_0 = jnp.zeros((2, 3))
    with pytest.raises(error, match=message):
        inspect.unwrap(elbo.prior_kl)(x_0[0], SCHEDULE(SCHEDULE.num_steps), prior)
    if not isinstance(prior, float):  # the tests' run-time type checker refuses it first
        with pytest.raises(error, match=message):
            elbo.bound(denoiser(GAUSSIAN), jax.random.key(0), x_0, SCHEDULE, _decoder, prior=prior)


@jax.jit
def _bounds(schedule, key):
    return [_bound(prediction_type, schedule, key) for prediction_type in PREDICTION_TYPES]


@pytest.mark.parametrize("name", MAKE_SCHEDULE)
def test_the_bound_does_not_depend_on_the_prediction_type(name):
    with jax.enable_x64(True):
        schedule = MAKE_SCHEDULE[name]()
        x_0, *others = _bounds(schedule, 0)
        for other in others:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), other, x_0)
        np.testing.assert_allclose(x_0.total, np.sum(tuple(x_0), axis=0), rtol=1e-12)


def test_a_given_number_of_terms_is_unbiased():
    # each of T - 1 = 7 terms once, against combs of 1 and 3, over many keys
    def diffusion(key, terms):
        x_0 = jnp.full((1, 1), 0.9)
        return elbo.bound(denoiser(GAUSSIAN, shift=0.3), key, x_0, SCHEDULE, _decoder, terms=terms).diffusion[0]

    all_terms = jax.jit(jax.vmap(lambda key: jnp.stack([diffusion(key, terms) for terms in (None, 1, 3)])))
    full, one, three = np.asarray(all_terms(jax.random.split(jax.random.key(1), 20_000)), np.float64).T
    assert_mean(one - full, 0.0)
    assert_mean(three - full, 0.0)
    assert one.var() > three.var() > full.var()


def test_one_term_less_than_steps_adds_up_to_all_of_them():
    """1/2 (SNR(1) - SNR(T)) x_0^2 for a denoiser that predicts x_0 = 0, whatever the noise."""
    x_0 = jnp.full((20_000, 1), 1.5)
    bound = elbo.bound(
        lambda x_t, level: 0.0 * x_t, jax.random.key(0), x_0, SCHEDULE, _decoder, prediction_type="x_0", terms=6
    )
    snr = (SCHEDULE.levels.alpha / SCHEDULE.levels.sigma) ** 2
    assert_mean(bound.diffusion, 0.5 * float(snr[1] - snr[8]) * 1.5**2)


def test_as_many_terms_as_steps_visits_each_once():
    for ours, theirs in zip(_bound(terms=7), _bound(terms=None), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_schedule_of_one_step_has_no_diffusion_term():
    for terms in (None, 1, 5):
        bound = _bound(schedule=SCHEDULE.subsequence(np.array([0, 8])), terms=terms)
        assert np.array_equal(bound.diffusion, np.zeros(4))
        assert np.all(np.isfinite(bound.total))


@pytest.mark.parametrize("terms", [0, -1])
def test_zero_terms_are_refused(terms):
    with pytest.raises(ValueError, match=f"terms is {terms}.*at least one.*None"):
        _bound(terms=terms)


def test_diffusion_weight_of_a_clean_s_is_infinite():
    for prediction_type in PREDICTION_TYPES:
        assert float(elbo.diffusion_weight(SCHEDULE.step(0, 1), prediction_type)) == np.inf


def test_reconstruction_is_the_decoders_at_step_one():
    # a decoder whose log_prob is the sum of its mean, which shows the arguments it was given
    class SumOfMean(Normal):
        def log_prob(self, x):
            return jnp.sum(self.mean) + 0.0 * jnp.sum(x)

    decoders = (
        lambda h, z, lv: SumOfMean(h - z, var=lv.t),
        lambda h, z, lv: SumOfMean(h, var=lv.t),
        lambda h, z, lv: SumOfMean(jnp.reshape(lv.t, (1,)), var=lv.t),
    )

    @jax.jit
    def bounds(x_0):
        half = partial(elbo.bound, lambda x, _: 0.5 * x, jax.random.key(0), x_0, SCHEDULE, prediction_type="x_0")
        return [half(decoder) for decoder in decoders]

    with_x_hat, with_x_1, times = bounds(np.linspace(-1.0, 1.0, 3, dtype=np.float32)[:, None])
    negative = -np.asarray(with_x_1.reconstruction)
    np.testing.assert_allclose(with_x_hat.reconstruction, negative, rtol=1e-6)  # x_hat - x_1 = -x_1 / 2
    np.testing.assert_array_equal(times.reconstruction, -np.ones(3))  # the decoder's level is that of step 1


def test_gradients_are_finite():
    x_0 = GAUSSIAN.sample(jax.random.key(2), (4, 3))
    schedule = discretize(Cosine(), 6)

    def scaled(w, x_t, level):
        return w * denoiser(GAUSSIAN)(x_t, level)

    loss = lambda w: elbo.bound(Partial(scaled, w), jax.random.key(0), x_0, schedule, _decoder).total.sum()  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(loss))(0.9))


@pytest.mark.slow
def test_the_curve_adds_up_to_the_bound():
    x_0 = GAUSSIAN.sample(jax.random.key(2), (4, 3))
    _, key = jax.random.split(jax.random.key(0))  # the bound keeps the other half for its decoder
    for schedule, whole in (
        (SCHEDULE, elbo.bound(denoiser(GAUSSIAN), jax.random.key(0), x_0, SCHEDULE, _decoder, terms=5)),
        (LINE, elbo.continuous_bound(denoiser(GAUSSIAN), jax.random.key(0), x_0, LINE, _decoder, terms=5)),
    ):
        curve = elbo.diffusion_curve(denoiser(GAUSSIAN), key, x_0, schedule, terms=5)
        np.testing.assert_allclose(curve.nats.sum(0), whole.diffusion, rtol=1e-6)
        assert np.all(np.diff(curve.log_snr, axis=0) < 0)
        assert curve.log_snr.shape == (5, 4)


def test_a_curve_has_no_more_slices_than_the_schedule_has_terms():
    x_0 = GAUSSIAN.sample(jax.random.key(2), (4, 3))
    for terms in (0, 8):
        with pytest.raises(ValueError, match=f"terms is {terms}.*choose 1..7"):
            elbo.diffusion_curve(denoiser(GAUSSIAN), jax.random.key(0), x_0, SCHEDULE, terms=terms)


def test_bits_per_dim():
    with jax.enable_x64(True):
        assert float(elbo.bits_per_dim(jnp.asarray(3 * np.log(2)), 3)) == pytest.approx(1.0)
        np.testing.assert_allclose(elbo.bits_per_dim(jnp.asarray([np.log(2), np.log(16)]), 2), [0.5, 2.0])


def _continuous(schedule, **options):
    x_0 = GAUSSIAN.sample(jax.random.key(9), (4, 3))
    return elbo.continuous_bound(denoiser(GAUSSIAN), jax.random.key(0), x_0, schedule, _decoder, **options)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (LinearLogSNR(), {"terms": 0}, "terms is 0.*at least one"),
        (LinearLogSNR(), {"t_0": 1.0}, "t_0 is 1.0"),
        (LinearLogSNR(), {"t_0": -0.1}, "t_0 is -0.1"),
        (LinearBeta(), {}, "LinearBeta.* has no noise at t = 0.0"),
    ],
)
def test_invalid_arguments_of_the_continuous_bound_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        _continuous(schedule, **options)


@pytest.mark.slow
def test_continuous_bound_has_the_terms_of_its_ends():
    # prior and decoder are those of the levels t_0 and 1
    for schedule, t_0, var in ((LinearLogSNR(4.0, -3.0), 0.0, 1.0), (VarianceExploding(0.1, 5.0), 0.5, 25.0)):
        prior = Normal(0.0, var=var)
        ours = _continuous(schedule, t_0=t_0, terms=4, prior=prior)
        x_0 = GAUSSIAN.sample(jax.random.key(9), (4, 3))
        expected = jax.vmap(lambda x, s=schedule, p=prior: elbo.prior_kl(x, s(1.0), p))(x_0)
        np.testing.assert_allclose(ours.prior, expected, rtol=1e-6)
        level = schedule(jnp.full(4, t_0))
        far = elbo.continuous_bound(
            lambda x, lv: 0.0 * x,
            jax.random.key(0),
            x_0,
            schedule,
            lambda h, z, lv: Normal(0 * h, var=lv.sigma),
            t_0=t_0,
        ).reconstruction
        expected = -jax.vmap(lambda x, s: Normal(0 * x, var=s).log_prob(x))(x_0, level.sigma)
        np.testing.assert_allclose(far, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", [Cosine(), VarianceExploding(0.1, 5.0)], ids=repr)
def test_rate_is_the_weight_of_a_short_step(schedule):
    # also where variance is not preserved: the error of the limit falls with the step
    with jax.enable_x64(True):

        @jax.jit
        @partial(jax.vmap, in_axes=(None, 0))
        def ratios(t, length):
            level, slope, step = schedule(t), jax.grad(schedule.log_snr)(t), schedule.step(t - length, t)
            return [
                elbo.diffusion_weight(step, each) / length / elbo.continuous_diffusion_weight(level, slope, each)
                for each in PREDICTION_TYPES
            ]

        for ratio in ratios(0.6, np.array([1e-3, 1e-4])):
            errors = np.abs(np.asarray(ratio) - 1)
            assert errors[1] < 1e-3
            assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.05)
