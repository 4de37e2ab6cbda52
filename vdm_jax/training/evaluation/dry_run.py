"""A dry run traces everything that a run will compute, so that errors appear before its first step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from vdm_jax.training import registry
from vdm_jax.training.data.sources import Images
from vdm_jax.training.evaluation.report import eval_block_size
from vdm_jax.training.evaluation.sampling import num_shown_images
from vdm_jax.training.experiment import LikelihoodRow
from vdm_jax.training.loop import compiled_step
from vdm_jax.training.run import Run, abstract_state
from vdm_jax.training.runtime.devices import batch_sharding
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.step import Step

KEY = jax.eval_shape(lambda: jax.random.key(0))
Shape = tuple[int, ...]


def check_training(run: Run, *, likelihood: bool = True) -> Step:
    """Trace the update, sampling, plots and evaluation of a run, and check that its state can be saved.

    Args:
        run: the run.
        likelihood: whether to trace the likelihood report too, which takes longest.

    Returns:
        the update, for `loop.train`, which need not trace it again.

    Raises:
        UserError: a part fails; names it, and the options that differ from the recipe.
    """
    check_state(run)
    step, batch = compiled_step(run), _batch(run.data.train, run.config.batch_size, batch_sharding(run.mesh))
    _, metrics = _traced(run, "Training", step, abstract_state(run), batch)
    _expect(run, "metrics of the loss", metrics, ())
    if run.config.num_samples:
        check_sampling(run, run.config.num_samples)
        check_plots(run)
    check_evaluation(run, run.experiment.likelihood_rows if likelihood else {})
    return step


def check_state(run: Run) -> None:
    """Check that a checkpoint can hold the state.

    Raises:
        UserError: the state cannot be created, or has an array that is empty or not numeric.
    """
    _traced(run, "The initial state", run.experiment.init, KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(run).params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not leaf.size:
            raise _fault(run, f"The parameter {name} has shape {leaf.shape}; a checkpoint cannot hold empty arrays")
        if not isinstance(leaf.dtype, np.dtype):
            raise _fault(run, f"The parameter {name} has type {leaf.dtype}; a checkpoint holds numbers only")


def check_sampling(run: Run, number: int) -> None:
    """Trace the sampling of this many samples.

    Raises:
        UserError: as in `check_training`.
    """
    params, sample = abstract_state(run).ema, run.experiment.sample
    samples = _traced(run, "Sampling", lambda params, key: sample(params, key, number), params, KEY)
    _expect(run, "samples", samples.images, (number, *run.data.spec.shape))


def check_plots(run: Run) -> None:
    """Trace the plots that are written besides the samples.

    Raises:
        UserError: as in `check_training`.
    """
    params, test = abstract_state(run).ema, _batch(run.data.test, num_shown_images(run))
    for name, show in run.experiment.image_grids.items():
        _traced(run, f"The plot {name!r}", show, params, KEY, test)
    for name, show in run.experiment.plane_plots.items():
        _traced(run, f"The plot {name!r}", show, params, KEY)
    if run.experiment.latent_codes is not None:
        codes = _traced(run, "The plot of latent codes", run.experiment.latent_codes, params, KEY, test)
        _expect(run, "latent codes", codes, (num_shown_images(run), 2))


def check_evaluation(run: Run, rows: Mapping[str, LikelihoodRow]) -> None:
    """Trace the evaluation, these rows of the likelihood report and, if there are any, its curve.

    Raises:
        UserError: as in `check_training`.
    """
    experiment, curve = run.experiment, run.experiment.likelihood_curve
    size = run.config.num_samples or eval_block_size(run)  # as for sampling, so that the network is traced once
    given = abstract_state(run).ema, KEY, _batch(run.data.test, size)
    _expect(run, "values of the evaluation", _traced(run, "Evaluation", experiment.evaluate, *given), (size,))
    for name, row in rows.items():
        _expect(run, f"row {name!r}", _traced(run, f"The likelihood row {name!r}", row.nats, *given), (size,))
    if rows and curve is not None:
        points = _traced(run, "The likelihood curve", curve.points, *given)
        _expect(run, "points of the likelihood curve", points, (size, points["x"].shape[-1]))


def _batch(images: Images, size: int, place: Sharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    one = images.take(np.arange(1))
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=place) for name, x in one.items()}


def _traced(run: Run, what: str, function: Callable, *given: Any) -> Any:
    """Shapes and dtypes of a function's result."""
    try:
        return jax.eval_shape(function, *given)
    except Exception as error:  # from the model, an equation or JAX
        raise _fault(run, f"{what} fails with these options: {registry.describe_error(error, run.recipe)}") from error


def _expect(run: Run, what: str, shapes: Any, wanted: Shape) -> None:
    """Check the shapes that a function of the experiment returns."""
    for leaf in jax.tree.leaves(shapes):
        if leaf.shape != wanted:
            raise _fault(run, f"The {what} must have shape {wanted}, but have {leaf.shape}")


def _fault(run: Run, what: str) -> UserError:
    """The error, with the options that differ from the recipe."""
    return UserError(f"{what.rstrip('.')}.{registry.changed_options_hint(run.recipe, run.config)}")
