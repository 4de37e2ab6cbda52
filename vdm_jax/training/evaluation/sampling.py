"""Draw images with a run's averaged parameters: `python -m vdm_jax.training.evaluation.sampling EXPERIMENT`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from vdm_jax.training.config import TrainConfig
from vdm_jax.training.evaluation import plots
from vdm_jax.training.evaluation.report import per_example
from vdm_jax.training.experiment import Params, SampleBatch
from vdm_jax.training.keys import stream
from vdm_jax.training.run import Run, open_run, stored_config
from vdm_jax.training.runtime.devices import on_one_device
from vdm_jax.training.runtime.metrics_writer import say

SHOWN = 10  # test images in a picture of them
REMEDY = (
    "Take more sampling steps, another sampler, a larger tolerance or a smaller step size: `make sample EXP={name} "
    'ARGS="--help"` lists what this model has.'
)


class Sampler:
    """A run's compiled sampler. It always starts from the same noise, so that grids of different steps compare."""

    def __init__(self, run: Run, seed: int | None = None):
        self._sample = jax.jit(run.experiment.sample, static_argnums=2)
        self._key = stream(run.config.seed if seed is None else seed, "sample")
        self._run = run

    def __call__(self, params: Params) -> SampleBatch:
        """Draw the run's number of samples with parameters on one device.

        Raises:
            NotFinite: says how many of them are not finite.
        """
        samples = jax.device_get(self._sample(params, self._key, self._run.config.num_samples))
        check_samples(self._run, np.asarray(samples.images))
        return samples

    def draw(self, params: Params, path: Path, trajectory: Path | None = None) -> list[Path]:
        """Write a grid of samples, and the chain where a path is given and the experiment returns one.

        Returns:
            the paths written.

        Raises:
            NotFinite: samples, or states of the chain, are not finite. No picture is drawn of these.
        """
        samples, levels = self(params), self._run.data.spec.levels
        images, chain = np.asarray(samples.images), samples.trajectory
        if not levels:
            plots.scatter(path, images, None, self._run.name)
        else:
            plots.save(path, plots.square(images), levels)
        if trajectory is None or chain is None:
            return [path]
        if not levels:
            plots.paths(trajectory, np.asarray(chain), self._run.name)
        else:
            plots.save(trajectory, np.asarray(chain).swapaxes(0, 1), levels)  # time runs to the right
        return [path, trajectory]

    def glimpse(self, params: Params, path: Path) -> None:
        """Write a grid of samples while training goes on; where they are not finite, only say so."""
        try:
            self.draw(params, path)
        except plots.NotFinite as error:
            say(f"{path} is not drawn: {error}")


def check_samples(run: Run, samples: np.ndarray) -> None:
    """Refuse samples (N, ...) that are not finite.

    Raises:
        NotFinite: says how many of them, and what to do.
    """
    plots.check_finite(samples, "samples", REMEDY.format(name=run.name))


def draw_final(run: Run, params: Params, seed: int | None = None) -> list[Path]:
    """Write samples.png, trajectory.png and the experiment's own pictures; returns what was written."""
    if not run.config.num_samples:
        return []
    one = on_one_device(params)
    drawn = Sampler(run, seed).draw(one, run.folder / "samples.png", run.folder / "trajectory.png")
    return [*drawn, *draw_test_images(run, one), *draw_codes(run, params), *draw_planes(run, one)]


def draw_test_images(run: Run, params: Params) -> list[Path]:
    """What the experiment shows of the first test images, one PNG a picture, by its name."""
    key, batch, paths = stream(run.config.seed, "sample"), run.data.test.take(np.arange(shown(run))), []
    for name, show in run.experiment.pictures.items():
        paths.append(run.folder / f"{name}.png")
        plots.save(paths[-1], np.asarray(jax.jit(show)(params, key, batch)), run.data.spec.levels)
    return paths


def shown(run: Run) -> int:
    """How many test images a picture of them has."""
    return min(SHOWN, len(run.data.test))


def draw_codes(run: Run, params: Params) -> list[Path]:
    """Where the test images lie in a latent of two numbers, in the colours of their labels."""
    codes = run.experiment.codes
    if codes is None:
        return []
    points = per_example(run, params, stream(run.config.seed, "sample"), lambda *given: {"codes": codes(*given)})
    labels = run.data.test.take(np.arange(len(points["codes"])))["label"]
    return [plots.scatter(run.folder / "codes.png", points["codes"], labels, run.name)]


def draw_planes(run: Run, params: Params) -> list[Path]:
    """What the experiment shows of its plane, one PNG a picture, by its name."""
    key, paths = stream(run.config.seed, "sample"), []
    for name, show in run.experiment.planes.items():
        paths.append(plots.panels(run.folder / f"{name}.png", jax.device_get(jax.jit(show)(params, key))))
    return paths


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw images with the averaged parameters of a run's newest checkpoint into samples.png and trajectory.png.

    Options of how they are drawn are the run's own by default, and differ from one kind of model to another.
    """

    num_samples: int | None = None
    """Images in the grid; the run's own number by default."""
    seed: int | None = None
    """Seed of the noise; the run's own by default."""
    workdir: str = "runs"
    """Folder of all runs."""


def parse(name: str, config: TrainConfig) -> tuple[Options, Any]:
    """The options of the command line, and those of how a model of this kind is drawn from, if it has any."""
    import tyro

    from vdm_jax.training.cli import command

    way = getattr(config, "sampling", None)
    fields: list[Any] = [("options", Annotated[Options, tyro.conf.arg(name="")], Options())]
    if way is not None:
        fields.append(("sampling", Annotated[type(way), tyro.conf.arg(name="")], way))
    both = dataclasses.make_dataclass("Options", fields, frozen=True)
    both.__doc__ = Options.__doc__
    given = tyro.cli(both, args=sys.argv[2:], prog=f"{command.program('sample')} {name}")
    return given.options, getattr(given, "sampling", None)


def main() -> None:
    """The command."""
    from vdm_jax.training import dry_run, registry
    from vdm_jax.training.cli import command

    name = command.experiment_name("sample")
    first, _ = parse(name, registry.find(name))  # where the run is, whose own way of drawing is the default
    config = stored_config(name, first.workdir)
    options, way = parse(name, config)
    number = config.num_samples or 64 if options.num_samples is None else options.num_samples
    given = {"workdir": options.workdir, "num_samples": number} | ({} if way is None else {"sampling": way})
    run = open_run(name, dataclasses.replace(config, **given))
    if number:
        dry_run.check_sampling(run, number)
        dry_run.check_pictures(run)
    saved = command.newest(run)
    for path in draw_final(run, saved.state.ema, options.seed):
        print(path)


if __name__ == "__main__":
    from vdm_jax.training.cli.command import execute

    execute(main)
