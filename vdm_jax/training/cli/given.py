"""What commands on given images share: RECIPE INPUT [options], and a run whose test examples are the given ones."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import tyro

from vdm_jax.training import registry
from vdm_jax.training.evaluation import scoring
from vdm_jax.training.experiment import DiffusionModel, Params
from vdm_jax.training.run import Run
from vdm_jax.training.runtime.errors import UserError

T = TypeVar("T")


def parse(arguments: Sequence[str], program: str, kind: type[T]) -> tuple[str, T]:
    """The input and the options of a command line, after the recipe.

    Raises:
        UserError: the recipe does not exist, or there is no input.
    """
    recipe = arguments[0]
    registry.find(recipe)
    given = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else ""
    options = tyro.cli(kind, args=arguments[2 if given else 1 :], prog=f"{program} {recipe} INPUT")
    if not given:
        raise UserError(f"usage: {program} {recipe} INPUT [options]: an image, a folder, an array file, or test.")
    return given, options


def check_at_least(options: Any, **least: int) -> None:
    """Refuse options that are too small; None is accepted.

    Raises:
        UserError: names the option, its value and the smallest valid one.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {smallest}.")


def with_images(run: Run, given: str, label: int | None = None) -> tuple[Run, list[str], np.ndarray | None, str]:
    """A run whose test examples are the given ones, their names, their labels or None, the probability that is scored.

    Args:
        run: the run.
        given: "test" for its own test examples, or a path.
        label: the label on which a class-conditional model is conditioned, in place of their own.

    Raises:
        UserError: the input cannot be read or does not fit the model.
    """
    from vdm_jax.training.data import given_images

    test: Any = run.data.test
    if given == "test":
        names, labeled = [str(i) for i in range(len(test))], run.data.spec.num_classes > 0
    else:
        size = getattr(run.config, "image_size", 0)
        names, test, labeled = given_images.read(given, run.data.spec, size)
    labels = test.take(np.arange(len(test)))["label"] if labeled else None
    other, what = scoring.conditional_labels(run, labeled, label)
    if other is not None:
        test = given_images.Relabeled(test, other)
    quantity = what if run.data.spec.levels else what.replace("P", "p")  # a density
    return run._replace(data=run.data._replace(test=test)), names, labels, quantity


def diffusion_model(run: Run, params: Params, label: int | None) -> DiffusionModel:
    """The diffusion model of a run for a label, or that of P(x).

    Raises:
        UserError: the run is of another kind of model or not of images, or the label does not fit.
    """
    if run.experiment.diffusion is None or not run.data.spec.levels:
        raise UserError(f"{run.name} is not a diffusion model of images: use a recipe such as ddpm_digits.")
    scoring.conditional_labels(run, False, label)
    return run.experiment.diffusion(params, None if label is None else jnp.int32(label))
