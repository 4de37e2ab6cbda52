"""Images restored from measurements and images between images, where the posterior or the path is known.

Data are N(m, v I): what a measurement leaves open has the prior's distribution, and the ODE is a scaling about m.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.derivations.check import assert_mean
from vdm_jax import closed_form
from vdm_jax.models.interpolation import interpolate_images
from vdm_jax.models.restoration import measurement, restore
from vdm_jax.schedules import LinearLogSNR
from vdm_jax.training.experiment import DiffusionModel

SHAPE, MEAN, V = (2, 4, 1), 0.2, 0.3
DATA = closed_form.gaussian(np.full(SHAPE, MEAN), V * np.eye(8))
MODEL = DiffusionModel(
    closed_form.OptimalDenoiser(DATA), LinearLogSNR(9.0, -9.0), closed_form.OptimalDecoder(DATA), "eps", None
)
X = np.random.RandomState(0).normal(size=SHAPE).astype(np.float32)


def test_measurements():
    x = jnp.asarray(np.random.RandomState(1).normal(size=(3, 4, 8, 2)), jnp.float32)
    half, box = measurement("right_half", (4, 8, 2)), measurement("box", (4, 8, 2))
    np.testing.assert_array_equal(half.operator(x)[:, :, :4], x[:, :, :4])
    np.testing.assert_array_equal(half.operator(x)[:, :, 4:], 0.0)
    assert half.unknown[:, 4:].all()
    assert not half.unknown[:, :4].any()
    assert box.unknown[1:3, 2:6].all()
    assert int(box.unknown.sum()) == 2 * 4 * 2
    blocks = measurement("super_resolution", (4, 8, 2))
    y = blocks.operator(x)
    np.testing.assert_allclose(y[1, 0, 3], 2 * x[1, :2, 6:].mean((0, 1)), rtol=1e-5)  # A A^T = I
    picture = blocks.picture(y)
    np.testing.assert_allclose(picture[1, 1, 7], x[1, :2, 6:].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(blocks.operator(picture), y, rtol=1e-5)
    assert blocks.unknown.all()
    with pytest.raises(ValueError, match="super_resolution needs images with even sides, and these are 3x8"):
        measurement("super_resolution", (3, 8, 1))


@pytest.mark.parametrize("name", ["right_half", pytest.param("super_resolution", marks=pytest.mark.slow)])
def test_reconstruction_guidance_samples_the_posterior(name):
    measured, noise = measurement(name, SHAPE), 0.05
    y = measured.operator(jnp.asarray(X)[None])
    restored = restore(
        MODEL, jax.random.key(0), y.repeat(2000, 0), measured,
        steps=400, noise_variance=noise, data_variance=V, clip=None,
    )  # fmt: skip
    # along the measured directions the posterior has these moments, and across them the prior's
    gain = V / (V + noise)
    mean = MEAN + gain * measured.picture(y - measured.operator(jnp.full((1, *SHAPE), MEAN)))
    assert_mean(np.asarray(restored), np.asarray(mean[0]), resolution=0.03)
    known = np.asarray(measured.operator(restored - mean))[:, : SHAPE[0], : SHAPE[1] // 2]
    assert_mean(known**2, np.full(known.shape[1:], gain * noise), resolution=0.005)
    open_part = np.asarray(restored - mean - measured.picture(measured.operator(restored - mean)))
    share = 0.75 if name == "super_resolution" else 1.0  # of a pixel's variance that is open
    columns = slice(0, None) if name == "super_resolution" else slice(SHAPE[1] // 2, None)
    spread = open_part[:, :, columns]
    assert_mean(spread**2, np.full(spread.shape[1:], share * V), resolution=0.02)


@pytest.mark.slow
def test_repaint_keeps_what_is_known_and_samples_the_rest():
    measured = measurement("right_half", SHAPE)
    y = measured.operator(jnp.asarray(X)[None]).repeat(2000, 0)
    restored = np.asarray(
        restore(MODEL, jax.random.key(0), y, measured, method="repaint", steps=400, resamplings=1, clip=None)
    )
    np.testing.assert_array_equal(restored[:, :, :2], y[:, :, :2])
    assert_mean(restored[:, :, 2:], np.full((2, 2, 1), MEAN), resolution=0.03)
    assert_mean((restored[:, :, 2:] - MEAN) ** 2, np.full((2, 2, 1), V), resolution=0.02)
    with pytest.raises(ValueError, match="repaint is for missing pixels"):
        restore(MODEL, jax.random.key(0), y, measurement("super_resolution", SHAPE), method="repaint")


@pytest.mark.slow
def test_images_between_images():
    model = MODEL._replace(schedule=LinearLogSNR(3.0, -9.0))  # at t = 0 the mean of z is 0.98 of the image
    a, b = np.random.RandomState(0).normal(size=(2, 3, *SHAPE)).astype(np.float32)
    weights = jnp.asarray([0.0, 0.5, 1.0])
    ours = np.asarray(interpolate_images(model, jnp.asarray(a), jnp.asarray(b), weights, tolerance=1e-6))
    first, last = (model.schedule(jnp.float32(t)) for t in (0.0, 1.0))
    alpha_0, alpha_1 = float(first.alpha), float(last.alpha)
    sd_0, sd_1 = (float(jnp.sqrt(level.alpha**2 * V + level.sigma**2)) for level in (first, last))
    latents = [alpha_1 * MEAN + sd_1 / sd_0 * alpha_0 * (x - MEAN) for x in (a, b)]
    angle = [np.arccos(np.sum(p * q) / np.linalg.norm(p) / np.linalg.norm(q)) for p, q in zip(*latents, strict=True)]
    middle = np.stack([(p + q) / (2 * np.cos(t / 2)) for p, q, t in zip(*latents, angle, strict=True)])
    path = np.stack([latents[0], middle, latents[1]])
    z = alpha_0 * MEAN + sd_0 / sd_1 * (path - alpha_1 * MEAN)
    np.testing.assert_allclose(ours, MEAN + alpha_0 * V / sd_0**2 * (z - alpha_0 * MEAN), atol=1e-4)
