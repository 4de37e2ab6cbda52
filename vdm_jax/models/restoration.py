"""Images restored from linear measurements by a diffusion model: inpainting and super-resolution.

Source: Lugmayr et al. 2022, arXiv:2201.09865 (RePaint); Ho et al. 2022, arXiv:2204.03458; Song et al. 2023,
"Pseudoinverse-guided diffusion models for inverse problems" (reconstruction guidance).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vdm_jax import samplers
from vdm_jax.discrete_schedules import DiscretizedSchedule
from vdm_jax.guidance import ReconstructionGuidance
from vdm_jax.training.experiment import DiffusionModel

__all__ = ["Measurement", "MeasurementName", "Method", "measurement", "restore"]

MeasurementName = Literal["right_half", "box", "super_resolution"]
Method = Literal["repaint", "reconstruction"]
FACTOR = 2  # of the super-resolution


@dataclass(frozen=True)
class Measurement:
    """A linear measurement y = A x of images, A A^T = I.

    Fields:
        operator: A, (B, H, W, C) -> (B, *y).
        picture: y -> images (B, H, W, C), as far as y determines them, for a figure.
        mask: where pixels are known, shape (H, W, C), for inpainting; None for other measurements.
    """

    operator: Callable[[Array], Array]
    picture: Callable[[Array], Array]
    mask: Array | None = None

    @property
    def unknown(self) -> Array:
        """Where errors are measured: the missing pixels, or all of them."""
        return jnp.ones((1, 1, 1), bool) if self.mask is None else self.mask == 0.0


def measurement(name: MeasurementName, shape: tuple[int, ...]) -> Measurement:
    """A measurement of images of shape (H, W, C).

    Args:
        name: "right_half": the right half is missing. "box": the central half of the rows and of the columns is
            missing. "super_resolution": only the means of blocks of 2 x 2 pixels are known.
        shape: of an image.

    Raises:
        ValueError: super-resolution of images with an odd side.
    """
    height, width, channels = shape
    if name == "super_resolution":
        if height % FACTOR or width % FACTOR:
            raise ValueError(f"super_resolution needs images with even sides, and these are {height}x{width}")
        blocks = (-1, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)

        def means(x):  # times sqrt(4), so that A A^T = I
            return FACTOR * x.reshape(blocks).mean((2, 4))

        return Measurement(means, lambda y: (y / FACTOR).repeat(FACTOR, 1).repeat(FACTOR, 2))
    mask = np.ones(shape, np.float32)
    if name == "right_half":
        mask[:, width // 2 :] = 0.0
    else:
        mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = 0.0
    known = jnp.asarray(mask)
    return Measurement(lambda x: x * known[None], lambda y: y, known)


def restore(
    model: DiffusionModel,
    key: Array,
    y: Array,
    measured: Measurement,
    *,
    method: Method = "reconstruction",
    steps: int = 250,
    noise_variance: float | Array = 0.0,
    data_variance: float | Array = 1.0,
    resamplings: int = 5,
    clip: float | None = 1.0,
) -> Array:
    """A sample of the image for each measurement, approximately of p(x | y), shape (B, H, W, C) on [-1, 1].

    Args:
        model: the diffusion model, p(x).
        key: randomness.
        y: the measurements, shape (B, *y).
        measured: what they are.
        method: "repaint" (`samplers.repaint`, inpainting only), or "reconstruction" (`guidance.ReconstructionGuidance`
            with `samplers.ancestral`).
        steps: sampling steps, uniform in the model's time.
        noise_variance: of y; reconstruction guidance only.
        data_variance: of A x, averaged over its entries; reconstruction guidance only.
        resamplings: how often RePaint takes each step.
        clip: bound on the predicted image, or None.

    Raises:
        ValueError: RePaint of a measurement that is not a mask.
    """
    key_T, key_chain = jax.random.split(key)
    schedule, kind = DiscretizedSchedule(model.schedule, steps), model.prediction_type
    shape = jax.eval_shape(measured.picture, y).shape
    x_T = jax.random.normal(key_T, shape)
    if method == "repaint":
        if measured.mask is None:
            raise ValueError("repaint is for missing pixels: use method reconstruction for other measurements")
        mask = jnp.broadcast_to(measured.mask, shape)
        options = {"resamplings": resamplings, "prediction_type": kind, "clip": clip}
        return samplers.repaint(model.denoiser, key_chain, x_T, schedule, y, mask, **options).x_0
    guided = ReconstructionGuidance(
        model.denoiser,
        measured.operator,
        y,
        noise_variance,
        prediction_type=kind,
        data_variance=data_variance,
    )
    return samplers.ancestral(guided, key_chain, x_T, schedule, prediction_type=kind, clip=clip).x_0
