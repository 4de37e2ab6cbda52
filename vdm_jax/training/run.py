"""A run: an experiment with its options, data, devices and folder."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from vdm_jax.training import optimizer, registry, state
from vdm_jax.training.config import TrainConfig, from_json, read_json, validate
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.data.sources import Dataset, load
from vdm_jax.training.experiment import Experiment
from vdm_jax.training.runtime.devices import make_mesh, replicated, spread
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import LOCK, locked
from vdm_jax.training.runtime.processes import by_first
from vdm_jax.training.state import TrainState


class Run(NamedTuple):
    """Everything about a run that does not change while it goes."""

    name: str
    config: TrainConfig
    folder: Path
    data: Dataset
    experiment: Experiment
    mesh: Mesh


def open_run(name: str, config: TrainConfig, mesh: Mesh | None = None) -> Run:
    """Check the options, load the data, build the model; writes nothing.

    Args:
        name: of the experiment, and of the run's folder in `config.workdir`.
        config: its options.
        mesh: of devices; all there are by default.

    Raises:
        UserError: the options, the data or the model's fit to the data are at fault.
    """
    mesh = mesh or make_mesh()
    validate(config, mesh.size)
    data = load(config.data)
    check_kind(name, config, data)
    try:
        experiment = config.build(data.spec)
    except Exception as error:  # a recipe is a program: anything
        what = f"The experiment {name} cannot be built for {config.data}: {registry.explained(error)}"
        raise UserError(what + registry.suspects(name, config)) from error
    experiment = experiment._replace(init=jax.jit(experiment.init, inline=True))  # whose shapes are asked for often
    return Run(name, config, Path(config.workdir) / name, data, experiment, mesh)


def check_kind(name: str, config: TrainConfig, data: Dataset) -> None:
    """Refuse points where images are needed, and images where points are.

    Raises:
        UserError: says which data there are.
    """
    if config.points != (data.spec.levels == 0):
        good = ", ".join(PLANES) if config.points else "digits, mnist, fashion_mnist, cifar10, or an image set of TFDS"
        made = "points in a plane" if config.points else "images"
        raise UserError(f"The experiment {name} is made for {made}, and {config.data} are not: take --data {good}.")
    if config.points and (config.flip or config.rotate or config.swap_channels):
        raise UserError("--flip, --rotate and --swap-channels are for images, not for points.")
    if config.rotate and data.spec.shape[0] != data.spec.shape[1]:
        size = "x".join(map(str, data.spec.shape))
        raise UserError(f"--rotate is for square images, and those of {config.data} are {size}: leave it out.")


def first_state(run: Run) -> TrainState:
    """The run's state before its first update."""
    # Unoptimised: XLA takes ten times longer to compile hundreds of initialisers well than they take to run.
    create = jax.jit(
        lambda: _create(run),
        out_shardings=placement(run),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return create()


def abstract_state(run: Run) -> TrainState:
    """Shapes, dtypes and placement of the run's state."""
    whole, shapes = replicated(run.mesh), jax.eval_shape(lambda: _create(run))

    def placed(x):
        place = spread(run.mesh, x.shape) if run.config.shard else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, shapes)


def placement(run: Run) -> TrainState:
    """Where each array of the run's state lies."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(run))


def _create(run: Run) -> TrainState:
    return state.create(run.experiment, optimizer.optimizer(run.config), run.config.seed)


def stored_config(name: str, workdir: str) -> TrainConfig:
    """The options a run was started with, from its config.json.

    Raises:
        UserError: there is no such run, or its config.json cannot be read.
    """
    path = Path(workdir) / name / "config.json"
    default = registry.find(name)
    if not os.path.exists(path):  # whatever the letters in --workdir
        raise UserError(f"There is no run in {path.parent}. Train first: `make train EXP={name}`.")
    return from_json(default, read_json(path).get("config"))


def remove(folder: Path) -> None:
    """Empty a run's folder, and only if it is one.

    Raises:
        UserError: it holds something else, is a link or a file, or a run is going in it.
    """
    by_first(lambda: _empty(folder))


def _empty(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is a link or a file, not the folder of a run; delete it yourself.")
    if not folder.exists():
        return
    contents = [path for path in folder.iterdir() if path.name != LOCK]
    foreign = {path.name for path in contents} - {"checkpoints"}  # which a run leaves when its folder is removed
    if foreign and not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the folder of a run (no config.json in it); delete it yourself.")
    with locked(folder):
        for path in contents:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
