"""What passes between an experiment and the loop."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float, Integer

Params = Any  # a pytree of arrays
NO_VALUE = -1  # in the place of a pixel value, where a number is not finite: NaN has no nearest integer
Batch = dict[str, Array]  # {"image": integers (B, H, W, C), or points float32 (B, 2); "label": int32 (B,)}


class DataSpec(NamedTuple):
    """What an experiment may know of a data set before it builds its model."""

    name: str
    shape: tuple[int, ...]  # height, width, channels; or (2,) of points in a plane
    levels: int  # pixel values are 0 .. levels - 1; 0 where they are real numbers
    num_classes: int  # 0 where the set has no labels
    num_train: int
    num_test: int

    @property
    def noun(self) -> str:
        """What an example is called."""
        return "images" if self.levels else "points"


class SampleBatch(NamedTuple):
    """Drawn images or points, and how they came to be.

    images: values 0 .. levels - 1, shape (n, H, W, C), NO_VALUE where the sampler's number is not finite; or points
        (n, 2). What is not finite is neither drawn nor measured.
    trajectory: snapshots along the sampling chain, first row noise, last row clean, shape (K, m, H, W, C) or (K, m, 2);
        or None.
    labels: the class that each was asked to be of, shape (n,); None without.
    """

    images: Integer[Array, "n h w c"] | Float[Array, "n 2"]
    trajectory: Integer[Array, "k m h w c"] | Float[Array, "k m 2"] | None = None
    labels: Integer[Array, " n"] | None = None


class Cost(NamedTuple):
    """How often the network runs on each image: to tell beforehand how long a report will take.

    evaluate: for an evaluated image.
    sample: for a drawn image.
    """

    evaluate: int = 1
    sample: int = 1


class LikelihoodRow(NamedTuple):
    """A line of the ledger: a number of each test example.

    what: what the number is, or what it bounds, in a few words.
    nats: (params, key, batch) -> array (B,).
    cost: how often the network runs on each image.
    """

    what: str
    nats: Callable[[Params, Array, Batch], Array]
    cost: int = 1


class LikelihoodCurve(NamedTuple):
    """A quantity of each test example, spread out over another one: a picture beside the ledger.

    x_label, y_label: what the two are.
    points: (params, key, batch) -> {"x": array (B, K), "y": array (B, K)}, K parts whose y add up.
    cost: how often the network runs on each image.
    """

    x_label: str
    y_label: str
    points: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: int = 1


class Panel(NamedTuple):
    """A function on a plane, to be drawn.

    x: where it is known, a grid of shape (G, G, 2), x to the right and y up.
    height: its values, drawn as colours, shape (G, G).
    arrows: vector fields drawn on top, by name, at the coarser grid `places`, shape (g, g, 2) each; or None.
    paths: chains of points drawn on top, shape (K, m, 2); or None.
    """

    x: Any
    height: Any
    places: Any = None
    arrows: dict[str, Any] | None = None
    paths: Any = None


class Experiment(NamedTuple):
    """Four pure functions and what two of them cost; all that the loop knows of a model.

    init(key) -> params
    loss(params, key, batch, step) -> (scalar, {name: scalar}), step the number of updates made so far
    sample(params, key, n) -> Samples
    evaluate(params, key, batch) -> {name: array (B,)}, one number an example, such as its bits per dimension
    ledger: what else there is to say of each test example, by name; `make eval` says it
    curve: the picture that goes with it, or None
    pictures: what else to draw of test images, by name: (params, key, batch) -> values (rows, columns, H, W, C),
        NO_VALUE where a number is not finite
    codes: (params, key, batch) -> array (B, 2), where each image lies on a map of the latent; or None
    planes: where the data are points of a plane, pictures of it by name: (params, key) -> {title: Panel}
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Array, Batch, Array], tuple[Array, dict[str, Array]]]
    sample: Callable[[Params, Array, int], SampleBatch]
    evaluate: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: Cost = Cost()
    ledger: Mapping[str, LikelihoodRow] = MappingProxyType({})
    curve: LikelihoodCurve | None = None
    pictures: Mapping[str, Callable[[Params, Array, Batch], Integer[Array, "rows columns h w c"]]] = MappingProxyType(
        {}
    )
    codes: Callable[[Params, Array, Batch], Float[Array, "b 2"]] | None = None
    planes: Mapping[str, Callable[[Params, Array], dict[str, Panel]]] = MappingProxyType({})
