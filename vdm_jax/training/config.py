"""The options every experiment has, and their way to JSON and back."""

import dataclasses
import json
from typing import Any, ClassVar, Literal, TypeVar

from vdm_jax.training.contract import DataSpec, Experiment
from vdm_jax.training.errors import UserError

FREE_TO_CHANGE = frozenset(
    "steps log_every checkpoint_every keep picture_every num_samples".split()
    + "eval_batch_size eval_examples ledger sampling shard workdir".split()
)
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
    schedule: Literal["constant", "cosine"] = "constant"
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
    """Decay of the parameters' moving average, which samples and evaluates; 0 is the parameters themselves."""
    accumulate: int = 1
    """Micro-batches an update: as many times less memory, the same result up to rounding."""
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
    faults = [*_out_of_range(config), *_indivisible(config, devices)]
    if faults:
        raise UserError("These options cannot work:\n" + "\n".join(f"  {fault}" for fault in faults))


def _out_of_range(config: TrainConfig) -> list[str]:
    at_least_1 = "steps batch_size eval_batch_size accumulate log_every checkpoint_every keep".split()
    at_least_0 = "eval_examples warmup_steps weight_decay grad_clip grad_skip seed picture_every num_samples".split()
    faults = [f"{flag(name)} must be at least 1" for name in at_least_1 if getattr(config, name) < 1]
    faults += [f"{flag(name)} must be at least 0" for name in at_least_0 if not getattr(config, name) >= 0]
    faults += [
        f"{flag(name)} must be in [0, 1)" for name in ("b1", "b2", "ema_decay") if not 0 <= getattr(config, name) < 1
    ]
    if not 0 < config.learning_rate < float("inf"):
        faults.append("--learning-rate must be positive and finite")
    if config.seed >= 2**32:
        faults.append("--seed must be below 2^32")
    return faults


def _indivisible(config: TrainConfig, devices: int) -> list[str]:
    if min(config.batch_size, config.eval_batch_size, config.accumulate) < 1:
        return []
    faults, part = [], devices * config.accumulate
    if config.batch_size % part:
        faults.append(
            f"--batch-size {config.batch_size} does not split over {devices} device(s) x {config.accumulate} "
            f"micro-batch(es): take a multiple of {part}, such as {-(-config.batch_size // part) * part}"
        )
    if config.eval_batch_size % devices:
        faults.append(
            f"--eval-batch-size {config.eval_batch_size} does not split over {devices} device(s): take a multiple, "
            f"such as {-(-config.eval_batch_size // devices) * devices}"
        )
    return faults


def flag(field: str) -> str:
    """The command-line option of a config field."""
    return "--" + field.replace("_", "-")


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values (tuples become lists, nested dataclasses objects)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(default: C, values: dict[str, Any]) -> C:
    """The config with which a run was started, read again.

    Args:
        default: the experiment's CONFIG: its class, and the values of fields added since the run.
        values: what `to_json` gave.

    Raises:
        UserError: the run has options that the experiment no longer has.
    """
    gone = sorted(values.keys() - {field.name for field in dataclasses.fields(default)})
    if gone:
        raise UserError(
            f"This run was made with options that the experiment no longer has: {', '.join(gone)}. "
            "Check out the code that made it, or start anew with --fresh."
        )
    return dataclasses.replace(default, **{name: _like(getattr(default, name), v) for name, v in values.items()})


def _like(default: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(default) and isinstance(value, dict):
        return dataclasses.replace(default, **{k: _like(getattr(default, k), v) for k, v in value.items()})  # pyright: ignore
    return _as_tuple(value) if isinstance(value, list) else value


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two runs' options, one line each, but for those that a resumed run is free to change."""
    names = [name for name in old | new if name not in FREE_TO_CHANGE and old.get(name) != new.get(name)]
    return [f"{flag(name)}: {old.get(name)} -> {new.get(name)}" for name in names]
