"""The options that all recipes share, and their conversion to and from JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from vdm_jax.training.data.spec import DataOptions
from vdm_jax.training.experiment import DataSpec, Experiment
from vdm_jax.training.runtime.errors import UserError
from vdm_jax.training.validation import flag, malformed, matches_type, out_of_range, type_fault

CHANGEABLE = frozenset(
    "steps log_every checkpoint_every keep picture_every num_samples".split()
    + "eval_batch_size eval_examples likelihood_report sampling shard workdir skip_unreadable trust_data_code".split()
)
DataKind = Literal["images", "planes", "vectors", "series"]  # what a recipe models; see `run.check_data_kind`
MAX_NESTING = 3  # of lists in an option
C = TypeVar("C", bound="TrainConfig")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. A model subclasses it, adds its own fields and implements `build`."""

    data: str = "digits"
    """Data set: digits (needs no download), mnist, fashion_mnist, cifar10 or any TFDS image set; the path of your own
    folder of images or array file (.npy, .npz, .safetensors); for recipes of points in the plane, two_modes,
    eight_modes, moons or spiral."""
    test_share: float = 0.1
    """Your own data without test examples: this share is held out for testing, at random but the same in every run."""
    image_size: int = 0
    """Your own folder of images: crop each to its central square and resize it to this side; 0 keeps the size."""
    channels: Literal[1, 3] | None = None
    """Your own folder of images: 1 converts them to gray, 3 to RGB; None is 1 if all files are gray, and else 3."""
    levels: int = 0
    """Your own images: number of gray levels, pixel values are 0 .. levels - 1; 0 is 256 for image files, and the
    largest value plus 1 for arrays."""
    skip_unreadable: bool = False
    """Your own folder of images: leave out files that cannot be read, for which every file is decoded at the start."""
    trust_data_code: bool = False
    """Run the code that a TFDS data set names, if it was prepared by a builder of your own."""
    steps: int = 3000
    """Number of parameter updates."""
    batch_size: int = 64
    """Global batch size: examples per update, summed over all devices."""
    eval_batch_size: int = 120
    """Global evaluation batch size, summed over all devices."""
    eval_examples: int = 0
    """Evaluate only this many test images, for a quick look; 0 evaluates the whole test set."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from zero."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine decay to zero at the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); 0 selects Adam."""
    b1: float = 0.9
    """Adam's beta_1: decay rate of the first-moment estimate."""
    b2: float = 0.999
    """Adam's beta_2: decay rate of the second-moment estimate."""
    grad_clip: float = 1.0
    """Clip the gradient to this global norm; 0 disables clipping."""
    grad_skip: float = 0.0
    """Skip updates whose gradient has a global norm above this; 0 skips none."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average (EMA) of the parameters, which sampling and evaluation use; 0 uses the
    parameters themselves. The decay is warmed up: update n = 0, 1, ... uses min(ema_decay, (1 + n) / (10 + n)), so that
    a short run does not report its initial parameters."""
    accumulate: int = 1
    """Gradient accumulation: number of micro-batches per update, whose gradients are averaged; divides the memory for
    activations by this number. Each micro-batch has its own noise and dropout, so changing it has the same effect as
    changing the seed."""
    shard: bool = False
    """Shard parameters, EMA and optimizer state over the devices, for models too large for one device."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    rotate: bool = False
    """Rotate each (square) training image by 0, 90, 180 or 270 degrees."""
    swap_channels: bool = False
    """Permute the channels of each training image at random."""
    seed: int = 0
    """Random seed of the initial parameters, the order of the data and the noise."""
    log_every: int = 100
    """Training steps between log lines of metrics."""
    checkpoint_every: int = 1000
    """Training steps between checkpoints."""
    keep: int = 2
    """Number of recent checkpoints to keep, in addition to the one with the lowest loss."""
    picture_every: int = 1000
    """Training steps between sample grids; 0 writes no grids during training."""
    num_samples: int = 64
    """Images in a sample grid; 0 disables sampling."""
    workdir: str = "runs"
    """Folder of all runs; each run is stored in a subfolder named after its recipe."""

    data_kind: ClassVar[DataKind] = "images"

    def data_options(self) -> DataOptions:
        """How the data set is read."""
        return DataOptions(*(getattr(self, name) for name in DataOptions._fields))

    def build(self, data: DataSpec) -> Experiment:
        """The model for this data set.

        Raises:
            ValueError: the options do not fit the data, such as a wrong image shape.
        """
        raise NotImplementedError("a subclass of TrainConfig must implement build(data)")


def validate(config: TrainConfig, devices: int) -> None:
    """Reject invalid options before anything is built or written.

    Args:
        config: the options.
        devices: number of devices over which a batch is split.

    Raises:
        UserError: names every invalid option and its remedy.
    """
    faults = malformed(config) or out_of_range(config) or _indivisible(config, devices)
    if faults:
        raise UserError("Invalid options:\n" + "\n".join(f"  {fault}" for fault in faults))


def _indivisible(config: TrainConfig, devices: int) -> list[str]:
    faults, part = [], devices * config.accumulate
    if config.batch_size % part:
        faults.append(
            f"--batch-size {config.batch_size} is not divisible by {devices} device(s) x {config.accumulate} "
            f"micro-batch(es) of --accumulate: use a multiple of {part}, such as {-(-config.batch_size // part) * part}"
        )
    if config.eval_batch_size % devices:
        faults.append(
            f"--eval-batch-size {config.eval_batch_size} is not divisible by {devices} device(s): use a multiple, "
            f"such as {-(-config.eval_batch_size // devices) * devices}"
        )
    return faults


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values: tuples become lists, nested dataclasses objects."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(default: C, values: Any) -> C:
    """The config of a run from its JSON values.

    Args:
        default: the recipe's CONFIG, for the class and for the values of fields added since the run.
        values: the result of `to_json`.

    Raises:
        UserError: the run has unknown options, or values of the wrong type.
    """
    gone: list[str] = []
    faults: list[str] = []
    restored = _like(default, values, "", gone, faults)
    if gone:
        raise UserError(
            f"The run's config.json contains unknown options: {', '.join(sorted(gone))}. Use the version of vdm_jax "
            "that created the run, or start over with --fresh."
        )
    if faults:
        raise UserError(
            f"The run's config.json has invalid values: {', '.join(faults)}. Correct them, or start over with --fresh."
        )
    return restored


def _like(default: Any, values: Any, prefix: str, gone: list[str], faults: list[str]) -> Any:
    """A dataclass, with nested ones, from JSON values; appends unknown options and faults to the lists."""
    if not isinstance(values, dict):
        faults.append(f"{flag(prefix[:-1])} must be an object" if prefix else "it must be an object")
        return default
    hints, known, new = get_type_hints(type(default)), {field.name for field in dataclasses.fields(default)}, {}
    gone += [f"{prefix}{name}" for name in values.keys() - known]
    for name in values.keys() & known:
        value, old = _as_tuple(values[name], MAX_NESTING), getattr(default, name)
        if dataclasses.is_dataclass(old):
            new[name] = _like(old, value, f"{prefix}{name}.", gone, faults)
        elif matches_type(value, hints[name]):
            new[name] = value
        else:
            faults.append(type_fault(prefix + name, hints[name]))
    return dataclasses.replace(default, **new)


def _as_tuple(value: Any, depth: int) -> Any:
    return tuple(_as_tuple(part, depth - 1) for part in value) if depth and isinstance(value, list) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        UserError: the file is missing or unreadable, or holds no JSON object.
    """
    try:
        if not path.is_file():  # reading a pipe could block for ever
            raise ValueError("it is not a file")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {path} ({str(error)[:200]}). Restore it from a backup, or start over with --fresh, which "
            "deletes the run."
        ) from error
    return value


def changed_options(default: Any, config: Any, prefix: str = "") -> list[str]:
    """The options that differ from the default, as command-line arguments; without --workdir.

    Args:
        default, config: dataclasses of the same type.
        prefix: prefix of the option names, such as "network.".
    """
    changed = []
    for field in dataclasses.fields(default):
        name, old, new = prefix + field.name, getattr(default, field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(old):
            changed += changed_options(old, new, f"{name}.")
        elif old != new and name != "workdir":
            changed.append(_as_argument(name, new))
    return changed


def _as_argument(name: str, value: Any) -> str:
    if isinstance(value, bool):
        group, dot, own = name.rpartition(".")
        return flag(name if value else f"{group}{dot}no_{own}")
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join([flag(name), *map(str, parts)])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two runs' options, one line each, except options that a resumed run may change."""
    names = [name for name in old | new if name not in CHANGEABLE and old.get(name) != new.get(name)]
    return [f"{flag(name)}: {old.get(name)} -> {new.get(name)}" for name in names]
