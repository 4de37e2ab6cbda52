"""A dry run: all that a run will compute is traced, and nothing computed, so that what cannot work is known at once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from vdm_jax.training import registry
from vdm_jax.training.data.sources import Images
from vdm_jax.training.evaluation.report import block_size
from vdm_jax.training.evaluation.sampling import shown
from vdm_jax.training.experiment import LikelihoodRow
from vdm_jax.training.loop import compiled_step
from vdm_jax.training.run import Run, abstract_state
from vdm_jax.training.runtime.devices import split
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.step import Step

KEY = jax.eval_shape(lambda: jax.random.key(0))
Shape = tuple[int, ...]


def check_training(run: Run, *, ledger: bool = True) -> Step:
    """Trace the update of a run, all that its trained parameters are used for, and see that its state can be saved.

    Args:
        run: the run.
        ledger: whether the ledger, which takes longest, is traced too.

    Returns:
        the update, for `loop.train`, which need not trace it again.

    Raises:
        UserError: something cannot work; names it, and the options that are not the recipe's own.
    """
    check_state(run)
    step, batch = compiled_step(run), _batch(run.data.train, run.config.batch_size, split(run.mesh))
    _, metrics = _traced(run, "Training", step, abstract_state(run), batch)
    _expect(run, "metrics of the loss", metrics, ())
    if run.config.num_samples:
        check_sampling(run, run.config.num_samples)
        check_pictures(run)
    check_evaluation(run, run.experiment.ledger if ledger else {})
    return step


def check_state(run: Run) -> None:
    """See that a checkpoint can hold the state.

    Raises:
        UserError: it cannot be made; an array of it has no numbers, or is of a type that is none of numbers.
    """
    _traced(run, "The initial state", run.experiment.init, KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(run).params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not leaf.size:
            raise _fault(run, f"The parameter {name} has shape {leaf.shape}, and a checkpoint holds no empty arrays")
        if not isinstance(leaf.dtype, np.dtype):
            raise _fault(run, f"The parameter {name} is of type {leaf.dtype}, and a checkpoint holds numbers alone")


def check_sampling(run: Run, number: int) -> None:
    """Trace the drawing of so many samples.

    Raises:
        UserError: as `check_training`.
    """
    params, sample = abstract_state(run).ema, run.experiment.sample
    samples = _traced(run, "Sampling", lambda params, key: sample(params, key, number), params, KEY)
    _expect(run, "samples", samples.images, (number, *run.data.spec.shape))


def check_pictures(run: Run) -> None:
    """Trace what is drawn beside the samples.

    Raises:
        UserError: as `check_training`.
    """
    params, test = abstract_state(run).ema, _batch(run.data.test, shown(run))
    for name, show in run.experiment.pictures.items():
        _traced(run, f"The picture {name!r}", show, params, KEY, test)
    for name, show in run.experiment.planes.items():
        _traced(run, f"The picture {name!r}", show, params, KEY)
    if run.experiment.codes is not None:
        codes = _traced(run, "The map of codes", run.experiment.codes, params, KEY, test)
        _expect(run, "codes", codes, (shown(run), 2))


def check_evaluation(run: Run, rows: Mapping[str, LikelihoodRow]) -> None:
    """Trace what is evaluated on the test set, these rows of the ledger, and its curve where there are any.

    Raises:
        UserError: as `check_training`.
    """
    experiment, curve = run.experiment, run.experiment.curve
    size = run.config.num_samples or block_size(run)  # as many as are drawn: the network is traced once for both
    given = abstract_state(run).ema, KEY, _batch(run.data.test, size)
    _expect(run, "numbers of an evaluation", _traced(run, "Evaluation", experiment.evaluate, *given), (size,))
    for name, row in rows.items():
        _expect(run, f"row {name!r}", _traced(run, f"The ledger's row {name!r}", row.nats, *given), (size,))
    if rows and curve is not None:
        points = _traced(run, "The ledger's curve", curve.points, *given)
        _expect(run, "points of the curve", points, (size, points["x"].shape[-1]))


def _batch(images: Images, size: int, place: Sharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    one = images.take(np.arange(1))
    return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=place) for name, x in one.items()}


def _traced(run: Run, what: str, function: Callable, *given: Any) -> Any:
    """Shapes and dtypes of what a function returns."""
    try:
        return jax.eval_shape(function, *given)
    except Exception as error:  # of the recipe, of an equation, of JAX
        raise _fault(run, f"{what} cannot work with these options: {registry.explained(error)}") from error


def _expect(run: Run, what: str, shapes: Any, wanted: Shape) -> None:
    """Refuse a recipe whose functions return other shapes than the contract's."""
    for leaf in jax.tree.leaves(shapes):
        if leaf.shape != wanted:
            raise _fault(run, f"The {what} must have shape {wanted}, and have {leaf.shape}")


def _fault(run: Run, what: str) -> UserError:
    """What cannot work, and the options that may be to blame."""
    return UserError(f"{what.rstrip('.')}.{registry.suspects(run.name, run.config)}")
