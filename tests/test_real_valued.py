"""DDPMs of real-valued data, with a network that is the exact denoiser of the data: every number has a closed form."""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.derivations.check import assert_mean
from tests.optimizations import unoptimized
from vdm_jax.models.likelihood_report import LikelihoodReport
from vdm_jax.models.real_valued import SeriesDDPM, VectorDDPM
from vdm_jax.models.sampling import Sampling
from vdm_jax.training.data import sources
from vdm_jax.training.data.series import LENGTH, SERIES
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.runtime.errors import UserError

MEAN, STD = np.array([3.0, -100.0]), np.array([0.5, 20.0])
SPEC = DataSpec("table", (2,), 0, 0, 1, 1, tuple(MEAN), tuple(STD))


class ExactDenoiser(nn.Module):
    """E[eps | x_t] = sigma x_t for data from N(0, I), times a parameter, which is one."""

    @nn.compact
    def __call__(self, x_t, log_snr, label=None, *, train=False):
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * jnp.sqrt(jax.nn.sigmoid(-log_snr))[:, None] * x_t


@dataclass(frozen=True)
class ExactDDPM(VectorDDPM):
    """A DDPM whose network is exact for normal data."""

    def module(self):
        return ExactDenoiser()


@pytest.fixture(scope="module")
def exact():
    """The experiment and its parameters, for data from N(MEAN, diag STD^2)."""
    experiment = ExactDDPM(
        noise_schedule="log_snr", log_snr_max=8.0, log_snr_min=-6.0, num_steps=100,
        sampling=Sampling(sampler="ddim", steps=100), likelihood_report=LikelihoodReport(terms=20, tolerance=1e-5),
    ).build(SPEC)  # fmt: skip
    return experiment, experiment.init(jax.random.key(0))


def data(count):
    x = MEAN + STD * np.random.RandomState(0).standard_normal((count, 2))
    exact = -scipy.stats.norm(MEAN, STD).logpdf(x).sum(1)
    return {"image": jnp.asarray(x, jnp.float32), "label": jnp.zeros(count, jnp.int32)}, exact


def test_the_bound_in_the_units_of_the_data_is_the_log_density(exact):
    """In continuous time the exact model's bound has no gap, for these data: decoder and prior are exact too."""
    experiment, params = exact
    batch, nats = data(20_000)
    standardized = unoptimized(experiment.likelihood_rows["bound, T = inf"].nats)(params, jax.random.key(1), batch)
    assert_mean(np.asarray(standardized, np.float64) + SPEC.log_volume - nats, 0.0)


def test_nats_of_the_report_are_those_per_dimension_and_the_jacobian_of_the_standardization(exact):
    experiment, params = exact
    batch, _ = data(4)
    values = unoptimized(experiment.evaluate)(params, jax.random.key(1), batch)
    np.testing.assert_allclose(values["nats"], 2 * values["nats_per_dim"] + math.log(0.5 * 20.0), rtol=1e-5)
    terms = values["prior"] + values["reconstruction"] + values["diffusion"]
    np.testing.assert_allclose(values["nats_per_dim"], terms, rtol=1e-5)


@pytest.mark.slow
def test_the_density_along_the_ode_is_that_of_slightly_noisy_data(exact):
    experiment, params = exact
    batch, _ = data(50)
    nats = jax.jit(experiment.likelihood_rows["ode, smoothed"].nats)(params, jax.random.key(1), batch)
    z, noisy = (np.asarray(batch["image"], np.float64) - MEAN) / STD, math.sqrt(1.0 + math.exp(-8.0))
    np.testing.assert_allclose(nats, -scipy.stats.norm(0.0, noisy).logpdf(z).sum(1), atol=2e-4)


def test_samples_are_in_the_units_of_the_data(exact):
    experiment, params = exact
    samples = unoptimized(experiment.sample, static_argnums=2)(params, jax.random.key(2), 4_000)
    x = (np.asarray(samples.images, np.float64) - MEAN) / STD
    assert_mean(x, 0.0)
    assert_mean(x**2, 1.0)
    assert samples.trajectory.shape[1:] == (40, 2)
    np.testing.assert_array_equal(samples.trajectory[-1], samples.images[:40])


def test_mean_and_deviation_of_each_entry_and_of_each_channel(tmp_path):
    random = np.random.RandomState(0)
    table, series = random.standard_normal((3_000, 4)) * 5 + 2, random.standard_normal((300, 8, 2)) * [1, 9] + [0, 3]
    for x, axes in ((table, 0), (series, (0, 1))):
        path = tmp_path / "x.npy"
        np.save(path, x.astype(np.float32))
        loaded = sources.load(str(path))
        train = loaded.train.take(np.arange(len(loaded.train)))["image"].astype(np.float64)
        np.testing.assert_allclose(loaded.spec.mean, train.mean(axes), rtol=1e-12)
        np.testing.assert_allclose(loaded.spec.std, train.std(axes), rtol=1e-12)
    volume = 8 * np.log(loaded.spec.std).sum()
    assert loaded.spec.log_volume == pytest.approx(volume)
    table[:, 2] = 7.0
    np.save(path, table.astype(np.float32))
    with pytest.raises(UserError, match="entry 2 is always 7 and has no density: remove it"):
        sources.load(str(path))


def test_the_oscillations_have_their_autocorrelation():
    x, _ = SERIES["oscillations"]().sample(20_000, 0)
    x = x[..., 0].astype(np.float64)
    assert_mean(x**2, np.ones(LENGTH))
    for lag in (1, 5, 10):
        want = 0.95 * math.exp(-lag / 12) * math.cos(2 * math.pi * lag / 10)
        assert_mean(x[:, lag:] * x[:, :-lag], np.full(LENGTH - lag, want))


def test_shapes_that_do_not_fit_are_refused():
    series = DataSpec("walk", (30, 1), 0, 0, 1, 1, (0.0,), (1.0,))
    with pytest.raises(ValueError, match="series of length 30 cannot be halved"):
        SeriesDDPM().build(series)
    with pytest.raises(ValueError, match="an MLP takes vectors"):
        VectorDDPM().build(series)
