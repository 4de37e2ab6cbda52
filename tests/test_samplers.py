"""The ancestral chain as a program: what it is told, clips, keeps and returns.

Its law is in `derivations/test_sampling.py`.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.derivations.worlds import GaussianWorld, denoiser
from vdm_jax import forward
from vdm_jax.samplers import ancestral, ancestral_learned
from vdm_jax.tables import even_steps, from_betas, linear_betas

TABLE = linear_betas(12, 0.01, 0.4)
WORLD = GaussianWorld(0.4, 0.6)
X_T = jax.random.normal(jax.random.key(7), (5, 3))


def _sample(table=TABLE, kind="eps", key=0, **options):
    return ancestral(denoiser(WORLD, kind), jax.random.key(key), X_T, table, kind=kind, **options)


def test_trajectory_is_the_chain():
    chain = _sample(snapshots=12).trajectory
    assert np.array_equal(chain.t, np.arange(12, 0, -1))
    assert np.array_equal(chain.x_t[0], X_T)
    assert chain.x_t.shape == chain.x_hat.shape == (12, 5, 3)
    # each x_hat is the denoiser's of its x_t, and each next state the posterior's mean plus a standard normal
    noises = []
    for i, t in enumerate(range(12, 1, -1)):
        x_hat = WORLD.x_hat(chain.x_t[i], TABLE(t))
        np.testing.assert_allclose(chain.x_hat[i], x_hat, rtol=2e-4, atol=1e-5)
        law = forward.posterior(chain.x_t[i], x_hat, TABLE.step(t - 1, t))
        noises.append((chain.x_t[i + 1] - law.mean) / jnp.sqrt(law.var))
    noise = np.stack(noises).reshape(-1)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert 0.6 < noise.var() < 1.5
    assert len(np.unique(noise.round(4))) > 0.95 * noise.size  # fresh for every step, example and dimension


@pytest.mark.parametrize("snapshots", [0, 1, 2, 5, 12])
def test_snapshots_are_states_of_the_chain(snapshots):
    full, some = _sample(snapshots=12), _sample(snapshots=snapshots)
    np.testing.assert_allclose(some.x_0, full.x_0, rtol=1e-4, atol=1e-5)  # compiled apart, so rounded apart
    t = np.asarray(some.trajectory.t)
    assert len(t) == snapshots
    assert np.all(np.diff(t) < 0)
    assert snapshots < 2 or (t[0], t[-1]) == (12, 1)
    np.testing.assert_allclose(some.trajectory.x_t, full.trajectory.x_t[12 - t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(some.trajectory.x_hat, full.trajectory.x_hat[12 - t], rtol=1e-4, atol=1e-5)


def test_the_last_step_has_no_noise():
    for variance in ("lower", "upper"):
        samples = _sample(snapshots=12, variance=variance)
        assert int(samples.trajectory.t[-1]) == 1
        np.testing.assert_array_equal(samples.x_0, samples.trajectory.x_hat[-1])


def test_the_noise_of_a_step_has_the_variance_asked_for():
    # from x_2 = 0 and predictions of 0, x_1 is the noise of its step alone; abar_1 = 0.7, abar_2 = 0.28
    table, nothing = from_betas(np.array([0.3, 0.6])), jnp.zeros((1000, 50))
    for variance, truth in (("lower", 0.6 * 0.3 / 0.72), ("upper", 0.6)):
        chain = ancestral(
            lambda x_t, level: jnp.zeros_like(x_t), jax.random.key(3), nothing, table,
            kind="x_0", variance=variance, snapshots=2,
        ).trajectory  # fmt: skip
        assert stats.kstest(chain.x_t[1].reshape(-1), stats.norm(0.0, np.sqrt(truth)).cdf).pvalue > 1e-3


def test_no_snapshots_unless_asked_for():
    trajectory = _sample().trajectory
    assert trajectory.t.shape == (0,)
    assert trajectory.x_t.shape == trajectory.x_hat.shape == (0, 5, 3)


def test_clip_bounds_every_prediction():
    free, clipped, wide = _sample(snapshots=12), _sample(snapshots=12, clip=0.3), _sample(snapshots=12, clip=100.0)
    assert np.max(np.abs(free.trajectory.x_hat)) > 0.31
    assert np.max(np.abs(clipped.trajectory.x_hat)) <= np.float32(0.3)
    assert np.max(np.abs(clipped.x_0)) <= np.float32(0.3)
    np.testing.assert_allclose(wide.x_0, free.x_0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clipped.trajectory.x_hat[0], jnp.clip(free.trajectory.x_hat[0], -0.3, 0.3), rtol=1e-6)


@pytest.mark.parametrize("kind", ["x_0", "v", "score"])
def test_kinds_draw_the_same_samples(kind):
    np.testing.assert_allclose(_sample(kind=kind).x_0, _sample(kind="eps").x_0, rtol=1e-3, atol=1e-4)


def test_keys():
    np.testing.assert_array_equal(_sample(key=1).x_0, _sample(key=1).x_0)
    assert np.all(_sample(key=1).x_0 != _sample(key=2).x_0)


def test_strided_chain_is_told_the_original_times():
    told = []

    def spy(x_t, level):
        jax.debug.callback(lambda t: told.append(np.asarray(t)), level.t, ordered=True)
        return jnp.zeros_like(x_t)

    short = TABLE.strided(even_steps(12, 4))
    samples = ancestral(spy, jax.random.key(0), X_T, short, snapshots=4)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.stack(told)[:, 0], [12, 9, 6, 3])
    np.testing.assert_array_equal(samples.trajectory.t, [4, 3, 2, 1])  # positions in the table that was given


def test_refusals():
    # unwrapped, since the tests' run-time type checker would speak first
    with pytest.raises(ValueError, match="unknown variance 'middle': choose 'lower' or 'upper', or give an array"):
        inspect.unwrap(ancestral)(denoiser(WORLD), jax.random.key(0), X_T, TABLE, variance="middle")
    for snapshots in (-1, 13):
        with pytest.raises(ValueError, match=f"snapshots is {snapshots}: this chain has 12 states to return"):
            _sample(snapshots=snapshots)
    for shape in ((11,), (12, 2), (12, 5, 3)):
        with pytest.raises(ValueError, match=r"a chain of T = 12 takes \(T,\) or \(T, \*x\)"):
            _sample(variance=jnp.ones(shape))
    with pytest.raises(ValueError, match="snapshots is 13: this chain has 12 states to return"):
        _learned(0.0, snapshots=13)


# Variances given, and learned


def _learned(fraction, key=0, **options):
    def model(x_t, level):
        return denoiser(WORLD)(x_t, level), jnp.broadcast_to(fraction, x_t.shape)

    return ancestral_learned(model, jax.random.key(key), X_T, TABLE, **options)


def _beta(lower):
    step = TABLE.step(jnp.arange(12), jnp.arange(1, 13))
    beta = step.t.sigma**2 * step.one_minus_ratio
    return jax.vmap(forward.posterior_variance)(step) if lower else beta


@pytest.mark.parametrize("name", ["lower", "upper"])
def test_variances_given_or_learned_are_those_of_the_name(name):
    truth = _sample(variance=name, snapshots=12)
    given = _beta(name == "lower")
    for chain in (
        _sample(variance=given, snapshots=12),
        _sample(variance=jnp.broadcast_to(given[:, None], (12, 3)), snapshots=12),
        _learned(jnp.asarray(0.0 if name == "lower" else 1.0), snapshots=12),
    ):
        np.testing.assert_allclose(chain.x_0, truth.x_0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(chain.trajectory.x_t, truth.trajectory.x_t, rtol=1e-4, atol=1e-5)
        assert np.array_equal(chain.x_0, chain.trajectory.x_hat[-1])  # no noise in the last step, whatever is given


def test_each_dimension_has_its_own_variance():
    # from x_2 = 0 and predictions of 0, x_1 is the noise of its step alone; abar_1 = 0.7, abar_2 = 0.28
    table, nothing = from_betas(np.array([0.3, 0.6])), jnp.zeros((20_000, 3))
    given = jnp.asarray([[9.0, 9.0, 9.0], [0.2, 0.5, 2.0]])
    options = {"kind": "x_0", "snapshots": 2}
    chain = ancestral(lambda x, _: 0 * x, jax.random.key(3), nothing, table, variance=given, **options).trajectory
    np.testing.assert_allclose(np.var(chain.x_t[1], axis=0), [0.2, 0.5, 2.0], rtol=0.05)
    fractions = jnp.asarray([0.0, 0.5, 1.0])

    def model(x_t, level):
        return 0 * x_t, jnp.broadcast_to(fractions, x_t.shape)

    chain = ancestral_learned(model, jax.random.key(3), nothing, table, **options).trajectory
    low, high = 0.6 * 0.3 / 0.72, 0.6
    np.testing.assert_allclose(np.var(chain.x_t[1], axis=0), [low, np.sqrt(low * high), high], rtol=0.05)


def test_a_learned_chain_clips_and_takes_any_kind():
    assert np.max(np.abs(_learned(0.4, clip=0.3, snapshots=3).trajectory.x_hat)) <= np.float32(0.3)

    def as_v(x_t, level):
        return denoiser(WORLD, "v")(x_t, level), jnp.full_like(x_t, 0.4)

    other = ancestral_learned(as_v, jax.random.key(0), X_T, TABLE, kind="v")
    np.testing.assert_allclose(other.x_0, _learned(0.4).x_0, rtol=1e-3, atol=1e-4)
