"""What passes between an experiment and the loop."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float, Integer

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


class Row(NamedTuple):
    """A line of the ledger: a number of each test example.

    what: what the number is, or what it bounds, in a few words.
    nats: (params, key, batch) -> array (B,).
    cost: how often the network runs on each image.
    """

    what: str
    nats: Callable[[Params, Array, Batch], Array]
    cost: int = 1


class Curve(NamedTuple):
    """A quantity of each test example, spread out over another one: a picture beside the ledger.

    x_label, y_label: what the two are.
    points: (params, key, batch) -> {"x": array (B, K), "y": array (B, K)}, K parts whose y add up.
    cost: how often the network runs on each image.
    """

    x_label: str
    y_label: str
    points: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: int = 1


class Experiment(NamedTuple):
    """Four pure functions and what two of them cost; all that the loop knows of a model.

    init(key) -> params
    loss(params, key, batch, step) -> (scalar, {name: scalar}), step the number of updates made so far
    sample(params, key, n) -> Samples
    evaluate(params, key, batch) -> {name: array (B,)}, one number an example, such as its bits per dimension
    ledger: what else there is to say of each test example, by name; `make eval` says it
    curve: the picture that goes with it, or None
    pictures: what else to draw of test images, by name: (params, key, batch) -> values (rows, columns, H, W, C)
    codes: (params, key, batch) -> array (B, 2), where each image lies on a map of the latent; or None
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Array, Batch, Array], tuple[Array, dict[str, Array]]]
    sample: Callable[[Params, Array, int], Samples]
    evaluate: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: Cost = Cost()
    ledger: Mapping[str, Row] = MappingProxyType({})
    curve: Curve | None = None
    pictures: Mapping[str, Callable[[Params, Array, Batch], Integer[Array, "rows columns h w c"]]] = MappingProxyType(
        {}
    )
    codes: Callable[[Params, Array, Batch], Float[Array, "b 2"]] | None = None
