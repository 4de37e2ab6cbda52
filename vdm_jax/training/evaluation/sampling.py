"""Samples of a run's averaged parameters, and the other plots of its model."""

from pathlib import Path

import jax
import numpy as np

from vdm_jax.training.evaluation import plots
from vdm_jax.training.evaluation.report import evaluate_examples
from vdm_jax.training.experiment import Params, SampleBatch
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.invocation import command_line
from vdm_jax.training.runtime.metrics_writer import print_line

MAX_SHOWN = 10  # test images in a plot
REMEDY = (
    "Use more sampling steps, another sampler, a larger tolerance or a smaller step size; `{command}` lists the "
    "options of this model."
)


class Sampler:
    """A run's compiled sampler. It always starts from the same noise, so that sample grids are comparable."""

    def __init__(self, run: Run, seed: int | None = None):
        self._sample = jax.jit(run.experiment.sample, static_argnums=2)
        self._key = stream(run.config.seed if seed is None else seed, "sample")
        self._run = run

    def __call__(self, params: Params) -> SampleBatch:
        """Samples of the parameters, which are on one device; as many as the run's `num_samples`.

        Raises:
            NotFinite: some samples are not finite.
        """
        samples = jax.device_get(self._sample(params, self._key, self._run.config.num_samples))
        check_samples(self._run, np.asarray(samples.images))
        return samples

    def write(self, params: Params, path: Path, trajectory: Path | None = None) -> list[Path]:
        """Write a sample grid, and the sampling chain if a path is given and the experiment returns one.

        Returns:
            the paths of the files.

        Raises:
            NotFinite: some samples or states of the chain are not finite; these are not plotted.
        """
        samples, levels = self(params), self._run.data.spec.levels
        images, chain = np.asarray(samples.images), samples.trajectory
        if levels:
            plots.save_grid(path, plots.arrange_in_square(images), levels)
        elif images.shape[1:] == (2,):
            plots.plot_points(path, images, None, self._run.name)
        else:
            data = self._run.data.test.take(np.arange(min(len(images), len(self._run.data.test))))["image"]
            plot = plots.plot_pairs if images.ndim == 2 else plots.plot_series
            plot(path, images, data, self._run.name)
        if trajectory is None or chain is None:
            return [path]
        if not levels:
            plots.plot_paths(trajectory, np.asarray(chain), self._run.name)
        else:
            plots.save_grid(trajectory, np.asarray(chain).swapaxes(0, 1), levels)  # sampling proceeds to the right
        return [path, trajectory]

    def write_or_warn(self, params: Params, path: Path) -> None:
        """Write a sample grid during training; if samples are not finite, print a warning instead."""
        try:
            self.write(params, path)
        except plots.NotFinite as error:
            print_line(f"{path} is not written: {error}")


def check_samples(run: Run, samples: np.ndarray) -> None:
    """Check that samples (N, ...) are finite.

    Raises:
        NotFinite: says how many are not, and what to do.
    """
    plots.check_finite(samples, "samples", REMEDY.format(command=command_line("sample", run.recipe, "--help")))


def write_samples_and_plots(run: Run, params: Params, seed: int | None = None) -> list[Path]:
    """Write samples.png, trajectory.png and the experiment's own plots; returns the paths of the files."""
    if not run.config.num_samples:
        return []
    one = on_one_device(params)
    paths = Sampler(run, seed).write(one, run.folder / "samples.png", run.folder / "trajectory.png")
    return [*paths, *write_image_grids(run, one), *write_latent_codes(run, params), *write_plane_plots(run, one)]


def write_image_grids(run: Run, params: Params) -> list[Path]:
    """Write the experiment's `image_grids` of the first test images, one PNG each."""
    key, batch, paths = stream(run.config.seed, "sample"), run.data.test.take(np.arange(num_shown_images(run))), []
    for name, show in run.experiment.image_grids.items():
        paths.append(run.folder / f"{name}.png")
        plots.save_grid(paths[-1], np.asarray(jax.jit(show)(params, key, batch)), run.data.spec.levels)
    return paths


def num_shown_images(run: Run) -> int:
    """The number of test images in a plot."""
    return min(MAX_SHOWN, len(run.data.test))


def write_latent_codes(run: Run, params: Params) -> list[Path]:
    """Plot the two-dimensional latent codes of the test images, colored by label."""
    codes = run.experiment.latent_codes
    if codes is None:
        return []
    points = evaluate_examples(run, params, stream(run.config.seed, "sample"), lambda *given: {"codes": codes(*given)})
    labels = run.data.test.take(np.arange(len(points["codes"])))["label"]
    return [plots.plot_points(run.folder / "codes.png", points["codes"], labels, run.name)]


def write_plane_plots(run: Run, params: Params) -> list[Path]:
    """Write the experiment's `plane_plots`, one PNG each."""
    key, paths = stream(run.config.seed, "sample"), []
    for name, show in run.experiment.plane_plots.items():
        paths.append(plots.plot_panels(run.folder / f"{name}.png", jax.device_get(jax.jit(show)(params, key))))
    return paths
