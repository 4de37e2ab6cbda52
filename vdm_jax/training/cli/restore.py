"""`vdm-jax restore RECIPE INPUT [options]`: given images restored from a part of them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vdm_jax import models
from vdm_jax.training.cli.common import recipe_argument
from vdm_jax.training.cli.given import check_at_least, diffusion_model, parse, with_images
from vdm_jax.training.evaluation.plots import check_finite, save_grid
from vdm_jax.training.evaluation.report import format_mean_and_error, mean_and_error
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run, newest_checkpoint, open_run, stored_config
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import write_json

TRAINING_IMAGES = 1_000  # from which mean and variance are estimated


@dataclasses.dataclass(frozen=True)
class Options:
    """Restore images of which a part is known, by sampling p(image | known part) with the EMA parameters of a run's
    latest checkpoint: inpainting and super-resolution.

    INPUT is an image file, a folder of images, an array file (.npy, .npz, .safetensors), or "test", the test set.
    Writes restored.png and restored.json into the run's folder: each row is an image, what is known of it, its
    samples, and their mean.
    """

    measurement: Literal["right_half", "box", "super_resolution"] = "right_half"
    """What is known: all but the right half, all but the central box, or the means of 2 x 2 pixels."""
    method: Literal["repaint", "reconstruction"] = "reconstruction"
    """RePaint (missing pixels only) or reconstruction guidance. Both approximate p(image | known part)."""
    images: int = 10
    """Number of images."""
    samples: int = 4
    """Samples of each image."""
    steps: int = 250
    """Sampling steps."""
    resamplings: int = 5
    """How often RePaint takes each step; multiplies its duration."""
    label: int | None = None
    """Condition the model on this class (class-conditional models)."""
    seed: int | None = None
    """Random seed; defaults to the run's."""
    workdir: str = "runs"
    """Folder of all runs."""


def main(arguments: Sequence[str], program: str = "vdm-jax restore") -> None:
    """The command."""
    recipe = recipe_argument(arguments, program)
    given, options = parse(arguments, program, Options)
    check_at_least(options, images=1, samples=1, steps=2, resamplings=1, seed=0)
    run = open_run(recipe, stored_config(recipe, options.workdir))
    run = with_images(run, given, options.label)[0]
    saved = newest_checkpoint(run)
    result = write_restored(run, on_one_device(saved.state.ema), options)
    print(f"{run.name}, {options.measurement} by {options.method}: root mean square error of {result['where']}")
    print(f"  one sample                {format_mean_and_error(result['sample'])}")
    print(f"  mean of {options.samples:2} samples        {format_mean_and_error(result['mean'])}")
    print(f"  mean of training images   {format_mean_and_error(result['training_mean'])}")
    for name in ("restored.png", "restored.json"):
        print(f"  {run.folder / name}")


def write_restored(run: Run, params: Any, options: Options) -> dict[str, Any]:
    """Write restored.png and restored.json; returns the contents of the latter, errors in units of pixel values.

    Raises:
        UserError: the model or the measurement does not fit, or samples are not finite.
    """
    from vdm_jax.likelihoods import normalize

    model, levels = diffusion_model(run, params, options.label), run.data.spec.levels
    try:
        measured = models.restoration.measurement(options.measurement, run.data.spec.shape)
    except ValueError as error:
        raise UserError(f"--measurement {error}.") from error
    if options.method == "repaint" and measured.mask is None:
        raise UserError(f"--method repaint is for missing pixels: use reconstruction for {options.measurement}.")
    images = run.data.test.take(np.arange(min(options.images, len(run.data.test))))["image"]
    training = normalize(
        jnp.asarray(run.data.train.take(np.arange(min(TRAINING_IMAGES, len(run.data.train))))["image"]), levels
    )
    x = normalize(jnp.asarray(images), levels)
    y = measured.operator(x)
    known = measured.operator(training)
    count = known[0].size if measured.mask is None else measured.mask.sum()
    data_variance = known.var(0).sum() / count
    seed = run.config.seed if options.seed is None else options.seed
    many = models.restoration.restore(
        model,
        stream(seed, "sample"),
        y.repeat(options.samples, 0),
        measured,
        method=options.method,
        steps=options.steps,
        noise_variance=(2.0 / (levels - 1)) ** 2 / 12.0,  # of rounding
        data_variance=data_variance,
        resamplings=options.resamplings,
    )
    samples = many.reshape(len(images), options.samples, *x.shape[1:])
    check_finite(np.asarray(samples).reshape(len(images), -1), "restored images", "Use more --steps.")
    shown = jnp.concatenate([x[:, None], measured.picture(y)[:, None], samples, samples.mean(1, keepdims=True)], 1)
    save_grid(run.folder / "restored.png", np.asarray(models.images.to_pixels(jnp.clip(shown, -1, 1), levels)), levels)
    unknown = np.broadcast_to(np.asarray(measured.unknown), x.shape[1:])

    def rmse(restored: Any) -> np.ndarray:
        """Root mean square errors of the images, in units of pixel values."""
        squares = np.square(np.asarray(restored - x))[:, unknown]
        return np.sqrt(squares.mean(-1)) * (levels - 1) / 2

    result = {
        "measurement": options.measurement,
        "method": options.method,
        "n_images": len(images),
        "samples": options.samples,
        "steps": options.steps,
        "data_variance": float(data_variance),
        "where": f"{len(images)} images, {'all' if measured.mask is None else 'missing'} pixels, of 0..{levels - 1}",
        "sample": mean_and_error(rmse(samples[:, 0])),
        "mean": mean_and_error(rmse(samples.mean(1))),
        "training_mean": mean_and_error(rmse(jnp.broadcast_to(training.mean(0), x.shape))),
        "known_pixels_off": float(jnp.sqrt(jnp.square(measured.operator(samples[:, 0]) - y).sum() / (count * len(y))))
        * (levels - 1)
        / 2,
    }
    if not all(math.isfinite(result[name]["mean"]) for name in ("sample", "mean")):
        raise UserError("Errors of restored images are not finite. Use more --steps.")
    write_json(run.folder / "restored.json", result)
    return result
