"""A run: a recipe with its options, data, devices and folder."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vdm_jax.training import optimizer, registry, state
from vdm_jax.training.checkpoint import Checkpoints, Saved
from vdm_jax.training.config import TrainConfig, from_json, read_json, to_json, validate
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.data.series import SERIES
from vdm_jax.training.data.sources import Dataset, load
from vdm_jax.training.experiment import Experiment
from vdm_jax.training.runtime.devices import longest_axis_sharding, make_mesh, replicated
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.runtime.files import LOCK, process_lock, write_json
from vdm_jax.training.runtime.invocation import command_line
from vdm_jax.training.runtime.processes import on_first_process
from vdm_jax.training.state import TrainState

IMAGES = "digits, mnist, fashion_mnist, cifar10, an image set of TFDS, a folder of images or an array of integers"
ARRAY = "with the path of an array of floating-point numbers"


class Run(NamedTuple):
    """The constant parts of a run.

    name: of the run's folder in --workdir.
    recipe: name or path of the recipe, as on the command line.
    """

    name: str
    config: TrainConfig
    folder: Path
    data: Dataset
    experiment: Experiment
    mesh: Mesh
    recipe: str = ""


def open_run(recipe: str, config: TrainConfig, mesh: Mesh | None = None) -> Run:
    """Check the options, load the data and build the model; writes nothing.

    Args:
        recipe: name or path of the recipe; it also names the run's folder in `config.workdir`.
        config: the options.
        mesh: the devices; all devices by default.

    Raises:
        UserError: the options are invalid, the data are unavailable, or the model does not fit the data.
    """
    name, mesh = registry.run_name(recipe), mesh or make_mesh()
    validate(config, mesh.size)
    data = load(config.data, config.data_options())
    check_data_kind(name, config, data)
    try:
        experiment = config.build(data.spec)
    except Exception as error:  # building a model may raise any error
        what = f"The recipe {name} cannot be built for {config.data}: {registry.describe_error(error, recipe)}"
        raise UserError(what + registry.changed_options_hint(recipe, config)) from error
    experiment = experiment._replace(
        init=jax.jit(experiment.init, inline=True)
    )  # traced once, its shapes are used often
    return Run(name, config, Path(config.workdir) / name, data, experiment, mesh, recipe)


def check_data_kind(name: str, config: TrainConfig, data: Dataset) -> None:
    """Check that a recipe for images has images, a recipe for series has series, and so on.

    Raises:
        UserError: lists the data sets that fit.
    """
    spec = data.spec
    fits, needs, suitable = {
        "images": (spec.levels > 0, "images (integers)", IMAGES),
        "planes": (spec.name in PLANES and not spec.fingerprint, "points in the plane", ", ".join(PLANES)),
        "vectors": (not spec.levels and len(spec.shape) == 1, "vectors", f"{ARRAY} (N, D), or {', '.join(PLANES)}"),
        "series": (not spec.levels and len(spec.shape) == 2, "series", f"{ARRAY} (N, L, C), or {', '.join(SERIES)}"),
    }[config.data_kind]
    if not fits:
        what = f"--data {config.data} has {spec.noun} of shape {spec.shape}"
        raise UserError(f"{what}: the recipe {name} needs {needs}. Use --data {suitable}.")
    if not spec.levels and (config.flip or config.rotate or config.swap_channels):
        raise UserError(f"--flip, --rotate and --swap-channels apply to images, not to {spec.noun}: remove them.")
    if config.rotate and data.spec.shape[0] != data.spec.shape[1]:
        size = "x".join(map(str, data.spec.shape))
        raise UserError(f"--rotate needs square images, and those of {config.data} are {size}: remove it.")


def initial_state(run: Run) -> TrainState:
    """The run's state before the first update."""
    # Without optimization: XLA would take ten times longer to optimize hundreds of initializers than they take to run.
    create = jax.jit(
        lambda: _create(run),
        out_shardings=state_sharding(run),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return create()


def abstract_state(run: Run) -> TrainState:
    """Shapes, dtypes and shardings of the run's state."""
    everywhere, shapes = replicated(run.mesh), jax.eval_shape(lambda: _create(run))

    def placed(x):
        place = longest_axis_sharding(run.mesh, x.shape) if run.config.shard else everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, shapes)


def state_sharding(run: Run) -> TrainState:
    """The sharding of each array of the run's state."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(run))


def _create(run: Run) -> TrainState:
    return state.create(run.experiment, optimizer.optimizer(run.config), run.config.seed)


def write_config(run: Run) -> None:
    """Write the run's config.json: its recipe, its options and the fingerprint of a user's own data files."""
    recipe, files = registry.from_any_folder(run.recipe), run.data.spec.fingerprint
    stored = {"experiment": run.name, "recipe": recipe, "config": to_json(run.config), "data_files": files}
    write_json(run.folder / "config.json", stored)


def stored_config(recipe: str, workdir: str) -> TrainConfig:
    """The options of an existing run, from its config.json.

    Raises:
        UserError: the run does not exist, or its config.json cannot be read.
    """
    default = registry.find(recipe)
    path = Path(workdir) / registry.run_name(recipe) / "config.json"
    if not os.path.exists(path):  # accepts any characters in --workdir
        raise UserError(f"There is no run in {path.parent}. Train first: `{command_line('train', recipe)}`.")
    return from_json(default, read_json(path).get("config"))


def files_changed(run: Run, notes: dict[str, Any]) -> bool:
    """Whether a user's own data files have changed since a checkpoint or a config.json with these notes was written."""
    return notes.get("data_files", "") != run.data.spec.fingerprint


def newest_checkpoint(run: Run) -> Saved:
    """The newest readable checkpoint of a run.

    Raises:
        UserError: the run has no checkpoint, or none can be read.
    """
    with Checkpoints(run.folder / "checkpoints", run.config.keep) as checkpoints:
        saved = checkpoints.restore(abstract_state(run))
    if saved is None:
        command = command_line("train", run.recipe)
        raise UserError(f"The run in {run.folder} has no checkpoint yet. Continue training: `{command}`.")
    for step in saved.unreadable:
        print(f"The checkpoint of step {step} cannot be read; using that of step {int(saved.state.step)}.")
    if files_changed(run, saved.notes):
        print(f"The files of --data {run.config.data} have changed since this run was trained.")
    return saved


def remove_run(folder: Path) -> None:
    """Delete the contents of a run's folder, after checking that it is one.

    Raises:
        UserError: the folder is not that of a run, is a link or a file, or is in use by another run.
    """
    on_first_process(lambda: _empty(folder))


def _empty(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is a link or a file, not the folder of a run: delete it yourself.")
    if not folder.exists():
        return
    contents = [path for path in folder.iterdir() if path.name != LOCK]
    foreign = {path.name for path in contents} - {
        "checkpoints"
    }  # which a run may create again after its folder was removed
    if foreign and not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the folder of a run (it has no config.json): delete it yourself.")
    with process_lock(folder):
        for path in contents:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
