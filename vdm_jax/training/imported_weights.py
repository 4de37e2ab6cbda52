"""A run that starts from imported parameters."""

from pathlib import Path

import jax
import jax.numpy as jnp

from vdm_jax.training import optimizer
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.config import to_json
from vdm_jax.training.experiment import Params
from vdm_jax.training.loop import new_batches
from vdm_jax.training.run import Run, abstract_state, remove_run, state_sharding, write_config
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import LOCK, run_lock
from vdm_jax.training.state import TrainState

SHOWN = 10


def start(run: Run, params: Params, source: str, *, fresh: bool = False) -> Path:
    """Create a run's folder with one checkpoint, of step 0, whose parameters and EMA are the given ones.

    Args:
        run: the run to create.
        params: arrays with the structure of the recipe's `init`.
        source: where they come from, for the checkpoint's notes.
        fresh: delete an existing run first.

    Returns:
        the run's folder.

    Raises:
        UserError: the run exists already, or the parameters do not fit the recipe.
    """
    _check(run, params)
    if fresh:
        remove_run(run.folder)
    folder = run.folder
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise UserError(
            f"There is a run in {run.folder} already. Use another --workdir, or --fresh, which deletes that run."
        )
    write_config(run)
    with run_lock(run.folder), Checkpoints(run.folder / "checkpoints", run.config.keep) as checkpoints:
        checkpoints.save(0, _state(run, params), _notes(run, source), loss=float("inf"))  # unknown
        checkpoints.wait()
    return run.folder


def _state(run: Run, params: Params) -> TrainState:
    def initial(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.optimizer(run.config).init(params))

    return jax.jit(initial, out_shardings=state_sharding(run))(params)


def _notes(run: Run, source: str) -> dict:
    unknown = {"training_images_per_second": None, "pipeline_images_per_second": None}
    data = {"data": new_batches(run).get_state(), "data_files": run.data.spec.fingerprint}
    return {"step": 0, "config": to_json(run.config), **data, "seconds": 0.0, "source": source, **unknown}


def _check(run: Run, params: Params) -> None:
    got, wanted = _shapes(params), _shapes(abstract_state(run).params)
    names = sorted(name for name in got | wanted if got.get(name) != wanted.get(name))
    if names:
        lines = "\n  ".join(f"{name}: {got.get(name)}, not {wanted.get(name)}" for name in names[:SHOWN])
        raise UserError(
            f"{len(names)} parameters differ from those of the recipe {run.name}, such as:\n  {lines}\n"
            "Use a --recipe with the same network."
        )


def _shapes(params: Params) -> dict[str, tuple]:
    """Shape and dtype of every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}
