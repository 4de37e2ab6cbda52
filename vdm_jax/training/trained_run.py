"""A trained run as a Python object: its averaged parameters as a denoiser, its schedule, decoder, data and options."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax import Array
from jax.typing import ArrayLike

from vdm_jax.training import registry
from vdm_jax.training.config import TrainConfig, from_json, read_json
from vdm_jax.training.data.sources import Dataset
from vdm_jax.training.experiment import DiffusionModel, Experiment, Params, SampleBatch
from vdm_jax.training.run import Run, newest_checkpoint, open_run
from vdm_jax.training.runtime.devices import make_mesh
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.invocation import command_line


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedRun:
    """A run with the averaged parameters of its newest checkpoint, on one device. `load_run` makes it.

    Every kind of model has `params`, `experiment`, `sample` and `evaluate`. A diffusion model (the recipes ddpm_*,
    iddpm_* and vdm_*) also has `denoiser`, `schedule`, `discrete_schedule`, `decoder` and `prediction_type`, all of
    P(x); `conditional` returns those of P(x | label).

    Fields:
        run: the recipe with its options, data, model and folder.
        params: the averaged parameters.
        step: number of updates that made them.
    """

    run: Run
    params: Params
    step: int

    def __repr__(self) -> str:
        return f"TrainedRun({self.name}, step {self.step:,}, {self.run.folder})"

    @property
    def name(self) -> str:
        """The name of its recipe."""
        return self.run.name

    @property
    def config(self) -> TrainConfig:
        """Its options."""
        return self.run.config

    @property
    def data(self) -> Dataset:
        """Its data: `data.train` and `data.test`, with `take(indices)`, and their description `data.spec`."""
        return self.run.data

    @property
    def experiment(self) -> Experiment:
        """The model's functions of parameters."""
        return self.run.experiment

    @property
    def model(self) -> DiffusionModel:
        """The unconditional diffusion model, P(x).

        Raises:
            UserError: the run is not a diffusion model, or has no unconditional prediction.
        """
        if self.experiment.num_classes and not getattr(self.config, "label_dropout", 1.0):
            raise UserError(
                f"{self.name} was trained with --label-dropout 0 and has no unconditional prediction: use "
                "conditional(label)."
            )
        return self._diffusion(None)

    def conditional(self, label: ArrayLike | Sequence[int]) -> DiffusionModel:
        """The diffusion model given a label, P(x | label).

        Args:
            label: one label for all examples, or labels of shape (B,), each in 0..num_classes - 1.

        Raises:
            UserError: the model is not a diffusion model, or has no labels or not this one.
        """
        classes, labels = self.experiment.num_classes, jax.numpy.asarray(label)
        if not classes:
            raise UserError(f"{self.name} is not class-conditional: use a recipe such as ddpm_digits_cond.")
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise UserError(f"label {label}: {self.name} has {classes} classes (0..{classes - 1}).")
        return self._diffusion(labels)

    def _diffusion(self, label: Array | None) -> DiffusionModel:
        if self.experiment.diffusion is None:
            raise UserError(
                f"{self.name} is not a diffusion model with a denoiser for every noise level: use its params, "
                "experiment, sample and evaluate."
            )
        return self.experiment.diffusion(self.params, label)

    @property
    def denoiser(self) -> Any:
        """The denoiser, x_t, level -> prediction, for batches of images on [-1, 1]."""
        return self.model.denoiser

    @property
    def schedule(self) -> Any:
        """The noise schedule in continuous time."""
        return self.model.schedule

    @property
    def discrete_schedule(self) -> Any:
        """The timesteps 0..T, or the default sampling steps of a model in continuous time."""
        return self.model.discrete_schedule

    @property
    def decoder(self) -> Any:
        """p(x_0 | z_0), z_0 at t = 0 of `schedule`."""
        return self.model.decoder

    @property
    def prediction_type(self) -> Literal["x_0", "eps", "v", "score"]:
        """What the denoiser predicts."""
        return self.model.prediction_type

    def sample(self, key: Array, n: int) -> SampleBatch:
        """n samples by the run's sampling options."""
        return jax.jit(self.experiment.sample, static_argnums=2)(self.params, key, n)

    def evaluate(self, key: Array, batch: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """The numbers of the report for each example, such as its bits per dimension.

        Args:
            key: randomness.
            batch: as from `data.test.take(indices)`.
        """
        return jax.jit(self.experiment.evaluate)(self.params, key, dict(batch))


def load_run(name_or_folder: str | Path, *, workdir: str | Path = "runs", recipe: str | None = None) -> TrainedRun:
    """A trained run, with the averaged parameters of its newest readable checkpoint.

    Args:
        name_or_folder: the folder of the run; or its recipe, whose run is in `workdir`.
        workdir: folder of all runs.
        recipe: path of the recipe, for the folder of a run of your own recipe; by default the project's recipe that
            the run's config.json names.

    Raises:
        UserError: there is no such run or no readable checkpoint, the recipe or the data are not found.
    """
    folder, recipe = _find(name_or_folder, Path(workdir), recipe)
    stored = from_json(registry.find(recipe), read_json(folder / "config.json").get("config"))
    run = open_run(recipe, dataclasses.replace(stored, workdir=str(folder.parent)), make_mesh(1))
    run = run._replace(name=folder.name, folder=folder)
    saved = newest_checkpoint(run)
    return TrainedRun(run, saved.state.ema, int(saved.state.step))


def _find(name_or_folder: str | Path, workdir: Path, recipe: str | None) -> tuple[Path, str]:
    """The folder of a run and its recipe."""
    text = str(name_or_folder)
    if (folder := Path(text)).joinpath("config.json").is_file():
        return folder, recipe or _stored_recipe(folder)
    folder = workdir / registry.run_name(text)
    if (folder / "config.json").is_file():
        return folder, recipe or text
    raise UserError(
        f"There is no run in {text} or {folder} (no config.json). Train it first: `{command_line('train', text)}`; or "
        "give the folder of a run."
    )


def _stored_recipe(folder: Path) -> str:
    """The recipe of the project that a run's config.json names; a file that it names is not run unasked."""
    stored = read_json(folder / "config.json")
    recipe = stored.get("recipe", stored.get("experiment"))  # older runs have the latter alone
    if isinstance(recipe, str) and recipe in registry.recipe_names():
        return recipe
    shown = f"the recipe {recipe[:200]!r}" if isinstance(recipe, str) else "no recipe"
    raise UserError(
        f"{folder}/config.json names {shown}, which is none of the project's. A recipe file is code, which is run only "
        "if you give its path: load_run(..., recipe=PATH)."
    )
