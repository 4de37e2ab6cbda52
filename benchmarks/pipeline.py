"""Images a second of the data pipeline, with decoding and without, against the fastest training step of each data set.

    TFDS_DATA_DIR=... python -m benchmarks.pipeline [digits mnist cifar10]

In the first epoch PNGs are decoded, afterwards images come from RAM. The step is that of the quickest recipe that the
machine can run: where the pipeline is faster than that one, it is faster than all.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.clock import in_turns, ratio
from benchmarks.overhead import narrow_cifar, whole_steps
from vdm_jax.training import registry
from vdm_jax.training.data import sources
from vdm_jax.training.data.augmentation import augmentations
from vdm_jax.training.data.batches import train_iterator
from vdm_jax.training.data.sources import Images

SETS = ("digits", "mnist", "cifar10")
FIRST, LATER, STEPS = 20, 200, 1  # batches that a round reads of the first epoch, and of later ones; training steps


def recipe(name: str) -> Any:
    """The quickest recipe of a data set that two cores can run."""
    return narrow_cifar() if name == "cifar10" else registry.find({"digits": "ae_digits", "mnist": "ae_mnist"}[name])


def batches(images: Images, config: Any, count: int) -> Callable[[], None]:
    """Read this many batches from a new iterator."""

    def read() -> None:
        augment = augmentations(flip=config.flip, rotation=config.rotate, channels=config.swap_channels)
        iterator = train_iterator(images, config.batch_size, 0, augment)
        for _ in range(count):
            next(iterator)
        iterator.close()

    return read


def undecoded(images: Images, config: Any) -> Callable[[], None]:
    """The same before any image has been decoded."""
    return lambda: batches(Images(images._records, images.shape), config, FIRST)()


def rates(name: str) -> None:
    """A line of the table."""
    loaded, quick = sources.load(name), recipe(name)
    config = dataclasses.replace(quick, batch_size=128)
    loaded.train.take(np.arange(len(loaded.train)))
    functions = {
        "decoded": undecoded(loaded.train, config),
        "remembered": batches(loaded.train, config, LATER),
        "step": whole_steps(quick, loaded.spec, STEPS),
    }
    images = {"decoded": 128 * FIRST, "remembered": 128 * LATER, "step": quick.batch_size * STEPS}
    each = {way: seconds / images[way] for way, seconds in in_turns(functions, rounds=9).items()}
    speeds = [f"{1 / np.median(seconds):,.0f}" for seconds in each.values()]
    ratios = [ratio(each["step"], each[way], 0) for way in ("decoded", "remembered")]
    print(f"| {name} | {' | '.join([*speeds, *ratios])} |", flush=True)


def main(*names: str) -> None:
    """Print the table."""
    print("| images/s | first epoch | later | fastest step | first epoch over step | later over step |\n|" + "---|" * 6)
    for name in names or SETS:
        rates(name)


if __name__ == "__main__":
    from vdm_jax.training.cli.common import execute

    execute(lambda: main(*sys.argv[1:]))
