"""What passes between an experiment and the loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Integer

Params = Any  # a pytree of arrays
Batch = dict[str, Array]  # {"image": integers (B, H, W, C), "label": int32 (B,)}


class DataSpec(NamedTuple):
    """What an experiment may know of a data set before it builds its model."""

    name: str
    shape: tuple[int, int, int]  # height, width, channels
    levels: int  # pixel values are 0 .. levels - 1
    num_classes: int  # 0 where the set has no labels
    num_train: int
    num_test: int


class Samples(NamedTuple):
    """Drawn images, and how they came to be.

    images: values 0 .. levels - 1, shape (n, H, W, C).
    trajectory: snapshots along the sampling chain, first row noise, last row clean, shape (K, m, H, W, C); or None.
    """

    images: Integer[Array, "n h w c"]
    trajectory: Integer[Array, "k m h w c"] | None = None


class Cost(NamedTuple):
    """How often the network runs on each image: to tell beforehand how long a report will take.

    evaluate: for an evaluated image.
    sample: for a drawn image.
    """

    evaluate: int = 1
    sample: int = 1


class Experiment(NamedTuple):
    """Four pure functions and what two of them cost; all that the loop knows of a model.

    init(key) -> params
    loss(params, key, batch) -> (scalar, {name: scalar})
    sample(params, key, n) -> Samples
    evaluate(params, key, batch) -> {name: array (B,)}, one number an example, such as its bits per dimension
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Array, Batch], tuple[Array, dict[str, Array]]]
    sample: Callable[[Params, Array, int], Samples]
    evaluate: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: Cost = Cost()
