"""The options every experiment has, and their way to JSON and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from vdm_jax.training.experiment import DataSpec, Experiment
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.validation import flag, is_a, malformed, out_of_range, wrong_kind

FREE_TO_CHANGE = frozenset(
    "steps log_every checkpoint_every keep picture_every num_samples".split()
    + "eval_batch_size eval_examples ledger sampling shard workdir".split()
)
DEPTH = 3  # of lists in lists that an option may be
C = TypeVar("C", bound="TrainConfig")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; an experiment subclasses it, adds its own fields and implements `build`."""

    data: str = "digits"
    """"digits" (needs no download), "mnist", "fashion_mnist", "cifar10", or any TFDS image set by name; for recipes of
    points in a plane, "two_modes", "eight_modes", "moons" or "spiral"."""
    steps: int = 3000
    """Updates of the parameters."""
    batch_size: int = 64
    """Images an update, over all devices."""
    eval_batch_size: int = 120
    """Images evaluated at once, over all devices."""
    eval_examples: int = 0
    """Evaluate only the first so many test images (for a quick look); 0 is the whole test set."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Updates over which the learning rate grows linearly from zero."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine down to zero at the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); 0 is Adam."""
    b1: float = 0.9
    """Adam's decay of the gradients."""
    b2: float = 0.999
    """Adam's decay of the squared gradients."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    grad_skip: float = 0.0
    """Leave out updates whose gradient has a larger global norm than this; 0 leaves out none."""
    ema_decay: float = 0.999
    """Decay of the parameters' moving average, which is what is sampled from and evaluated; 0 is the parameters
    themselves. It is warmed up: update n = 0, 1, ... has the decay min(ema_decay, (1 + n) / (10 + n)), so that a short
    run does not report its initial parameters."""
    accumulate: int = 1
    """Micro-batches an update, whose gradients are averaged: as many times less memory for activations. Each draws its
    own noise and dropout, so a run differs from one with another number as it differs from one with another seed."""
    shard: bool = False
    """Spread parameters, average and optimiser over the devices, each a part, for models too large for one device."""
    flip: bool = False
    """Mirror training images left to right, each with probability 1/2."""
    rotate: bool = False
    """Turn training images, which are square, by 0, 90, 180 or 270 degrees."""
    swap_channels: bool = False
    """Put the channels of training images in a random order."""
    seed: int = 0
    """Seed of everything: initial parameters, order of the data, noise."""
    log_every: int = 100
    """Steps between lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep; the one with the lowest loss is kept as well."""
    picture_every: int = 1000
    """Steps between sample grids; 0 draws none while training."""
    num_samples: int = 64
    """Images in a sample grid; 0 draws none at all."""
    workdir: str = "runs"
    """Folder of all runs; this one goes into a folder with the experiment's name."""

    points: ClassVar[bool] = False  # whether it is made for points in a plane, or for images

    def build(self, data: DataSpec) -> Experiment:
        """The model for images of this kind, or points.

        Raises:
            ValueError: the model does not fit the data, such as a wrong image shape.
        """
        raise NotImplementedError("an experiment's CONFIG implements build(data)")


def validate(config: TrainConfig, devices: int) -> None:
    """Refuse what cannot work before anything is built or written.

    Args:
        config: the options.
        devices: number of local devices the batch is split over.

    Raises:
        UserError: names every option at fault and its remedy.
    """
    faults = malformed(config) or out_of_range(config) or _indivisible(config, devices)
    if faults:
        raise UserError("These options cannot work:\n" + "\n".join(f"  {fault}" for fault in faults))


def _indivisible(config: TrainConfig, devices: int) -> list[str]:
    faults, part = [], devices * config.accumulate
    if config.batch_size % part:
        faults.append(
            f"--batch-size {config.batch_size} does not split over {devices} device(s) x {config.accumulate} "
            f"micro-batch(es), --accumulate: take a multiple of {part}, such as {-(-config.batch_size // part) * part}"
        )
    if config.eval_batch_size % devices:
        faults.append(
            f"--eval-batch-size {config.eval_batch_size} does not split over {devices} device(s): take a multiple, "
            f"such as {-(-config.eval_batch_size // devices) * devices}"
        )
    return faults


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values (tuples become lists, nested dataclasses objects)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(default: C, values: Any) -> C:
    """The config with which a run was started, read again.

    Args:
        default: the experiment's CONFIG: its class, and the values of fields added since the run.
        values: what `to_json` gave.

    Raises:
        UserError: the run has options that the experiment no longer has, or values that are none of theirs.
    """
    gone: list[str] = []
    faults: list[str] = []
    restored = _like(default, values, "", gone, faults)
    if gone:
        raise UserError(
            f"This run was made with options that the experiment no longer has: {', '.join(sorted(gone))}. "
            "Check out the code that made it, or start anew with --fresh."
        )
    if faults:
        raise UserError(
            f"The run's config.json has values that are none of its options': {', '.join(faults)}. "
            "Put them right, or start anew with --fresh."
        )
    return restored


def _like(default: Any, values: Any, prefix: str, gone: list[str], faults: list[str]) -> Any:
    """A dataclass with values of JSON, those of nested ones included; notes what it does not know."""
    if not isinstance(values, dict):
        faults.append(f"{flag(prefix[:-1])} must be an object" if prefix else "it must be an object")
        return default
    hints, known, new = get_type_hints(type(default)), {field.name for field in dataclasses.fields(default)}, {}
    gone += [f"{prefix}{name}" for name in values.keys() - known]
    for name in values.keys() & known:
        value, old = _as_tuple(values[name], DEPTH), getattr(default, name)
        if dataclasses.is_dataclass(old):
            new[name] = _like(old, value, f"{prefix}{name}.", gone, faults)
        elif is_a(value, hints[name]):
            new[name] = value
        else:
            faults.append(wrong_kind(prefix + name, hints[name]))
    return dataclasses.replace(default, **new)


def _as_tuple(value: Any, depth: int) -> Any:
    return tuple(_as_tuple(part, depth - 1) for part in value) if depth and isinstance(value, list) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        UserError: no file, or none that can be read, or something else in it.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("it is no file")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error)[:200]}). Copy it again, or start anew with --fresh, which deletes the "
            "run."
        ) from error
    return value


def changed_options(default: Any, config: Any, prefix: str = "") -> list[str]:
    """The options whose values are not the default's, as a command line has them; the folder of all runs is left out.

    Args:
        default, config: dataclasses of one type.
        prefix: of their names, such as "network.".
    """
    changed = []
    for field in dataclasses.fields(default):
        name, old, new = prefix + field.name, getattr(default, field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(old):
            changed += changed_options(old, new, f"{name}.")
        elif old != new and name != "workdir":
            changed.append(_written(name, new))
    return changed


def _written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        group, dot, own = name.rpartition(".")
        return flag(name if value else f"{group}{dot}no_{own}")
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join([flag(name), *map(str, parts)])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two runs' options, one line each, but for those that a resumed run is free to change."""
    names = [name for name in old | new if name not in FREE_TO_CHANGE and old.get(name) != new.get(name)]
    return [f"{flag(name)}: {old.get(name)} -> {new.get(name)}" for name in names]
