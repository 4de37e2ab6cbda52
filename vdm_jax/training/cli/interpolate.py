"""`vdm-jax interpolate RECIPE INPUT [options]`: images between pairs of given images, through the ODE's latents."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdm_jax import models
from vdm_jax.training.cli.common import recipe_argument
from vdm_jax.training.cli.given import check_at_least, diffusion_model, parse, with_images
from vdm_jax.training.evaluation.plots import save_grid
from vdm_jax.training.run import Run, newest_checkpoint, open_run, stored_config
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Interpolate between pairs of images (the first and the second, the third and the fourth, ...) through the latents
    of the probability-flow ODE, along arcs; with the EMA parameters of a run's latest checkpoint.

    INPUT is a folder of images, an array file (.npy, .npz, .safetensors), or "test", the test set. Writes
    interpolation.png into the run's folder: a row for each pair, between its two images.
    """

    pairs: int = 8
    """Number of pairs."""
    columns: int = 9
    """Images of a row; the first and the last are the two given images after encoding and decoding."""
    label: int | None = None
    """Condition the model on this class (class-conditional models)."""
    tolerance: float = 1e-4
    """Tolerance of the ODE solver, relative and absolute."""
    workdir: str = "runs"
    """Folder of all runs."""


def main(arguments: Sequence[str], program: str = "vdm-jax interpolate") -> None:
    """The command."""
    recipe = recipe_argument(arguments, program)
    given, options = parse(arguments, program, Options)
    check_at_least(options, pairs=1, columns=2)
    if not options.tolerance > 0.0:
        raise UserError(f"--tolerance {options.tolerance:g}: it must be above 0.")
    run = open_run(recipe, stored_config(recipe, options.workdir))
    run = with_images(run, given, options.label)[0]
    count = min(len(run.data.test) // 2, options.pairs)
    if not count:
        raise UserError(f"{given} has a single image: give two or more.")
    saved = newest_checkpoint(run)
    print(write_interpolation(run, on_one_device(saved.state.ema), count, options))


def write_interpolation(run: Run, params: Any, pairs: int, options: Options) -> Path:
    """Write interpolation.png, and print by how much the ends of the rows differ from the given images."""
    from vdm_jax.likelihoods import normalize

    model, levels = diffusion_model(run, params, options.label), run.data.spec.levels
    images = run.data.test.take(np.arange(2 * pairs))["image"]
    x = normalize(jnp.asarray(images), levels)
    weights = jnp.linspace(0.0, 1.0, options.columns)
    between = models.interpolation.interpolate_images(model, x[::2], x[1::2], weights, tolerance=options.tolerance)
    pixels = np.asarray(models.images.to_pixels(jnp.swapaxes(between, 0, 1), levels))
    path = run.folder / "interpolation.png"
    save_grid(path, pixels, levels)
    off = np.abs(np.stack([pixels[:, 0], pixels[:, -1]], 1).astype(int).ravel() - images.astype(int).ravel())
    print(f"{run.name}: the ends of {pairs} rows equal the given images in {np.mean(off == 0):.1%} of the pixels.")
    return path
