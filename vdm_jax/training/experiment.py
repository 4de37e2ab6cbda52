"""The interface between a model and the training loop."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jax import Array
from jaxtyping import Float, Integer

from vdm_jax.training.data.spec import DataSpec

__all__ = [
    "NO_VALUE",
    "Batch",
    "Cost",
    "DataSpec",
    "DiffusionModel",
    "Experiment",
    "LikelihoodCurve",
    "LikelihoodRow",
    "Panel",
    "Params",
    "SampleBatch",
]

Params = Any  # a pytree of arrays
NO_VALUE = -1  # pixel value of a number that is not finite, since NaN has no nearest integer
Batch = dict[str, Array]  # {"image": integers (B, H, W, C), or points float32 (B, 2); "label": int32 (B,)}


class SampleBatch(NamedTuple):
    """Samples of a model, with snapshots of the sampling chain.

    images: values 0 .. levels - 1, shape (n, H, W, C), with NO_VALUE in place of numbers that are not finite; or points
        (n, 2). Samples that are not finite are neither plotted nor measured.
    trajectory: snapshots along the sampling chain from noise to data, shape (K, m, H, W, C) or (K, m, 2); or None.
    labels: the class on which each sample is conditioned, shape (n,); None for unconditional samples.
    """

    images: Integer[Array, "n h w c"] | Float[Array, "n 2"]
    trajectory: Integer[Array, "k m h w c"] | Float[Array, "k m 2"] | None = None
    labels: Integer[Array, " n"] | None = None


class Cost(NamedTuple):
    """Network evaluations for each example, from which the duration of a report is estimated.

    evaluate: for an evaluated example.
    sample: for a sample.
    """

    evaluate: int = 1
    sample: int = 1


class LikelihoodRow(NamedTuple):
    """A row of the likelihood report: a number of nats for each test example.

    description: what the number is or bounds, in a few words.
    nats: (params, key, batch) -> array (B,).
    cost: network evaluations for each example.
    """

    description: str
    nats: Callable[[Params, Array, Batch], Array]
    cost: int = 1


class LikelihoodCurve(NamedTuple):
    """The plot of the likelihood report: how a term of each test example is distributed over another quantity.

    x_label, y_label: labels of the axes.
    points: (params, key, batch) -> {"x": array (B, K), "y": array (B, K)}; the K values of y sum to the term.
    cost: network evaluations for each example.
    """

    x_label: str
    y_label: str
    points: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: int = 1


class Panel(NamedTuple):
    """A plot of a function on the plane.

    x: grid of points, shape (G, G, 2), with x to the right and y up.
    height: values of the function on the grid, shape (G, G), plotted as colors.
    places: coarser grid for the arrows, shape (g, g, 2); or None.
    arrows: vector fields by name, shape (g, g, 2) each; or None.
    paths: chains of points, shape (K, m, 2); or None.
    """

    x: Any
    height: Any
    places: Any = None
    arrows: dict[str, Any] | None = None
    paths: Any = None


class DiffusionModel(NamedTuple):
    """A diffusion model with its parameters, as bounds, samplers and likelihoods take it.

    denoiser: x_t, level -> prediction, for x_t of shape (B, *x) on [-1, 1]; a pytree.
    schedule: the noise schedule in continuous time, with noise at t = 0.
    decoder: p(x_0 | z_0), with z_0 at t = 0 of `schedule`, which is timestep 1 of a model in discrete time.
    prediction_type: what the denoiser predicts.
    discrete_schedule: the timesteps 0..T of a model in discrete time; the default sampling steps of one in continuous
        time.
    variance_denoiser: x_t, level -> prediction and interpolation between the two reverse variances, for a model that
        learns its reverse variance; else None.
    """

    denoiser: Callable[..., Any]
    schedule: Any
    decoder: Callable[..., Any]
    prediction_type: Literal["x_0", "eps", "v", "score"]
    discrete_schedule: Any
    variance_denoiser: Callable[..., Any] | None = None


class Experiment(NamedTuple):
    """A model as the training loop sees it: four pure functions and what is reported beside them.

    init: key -> params.
    loss: (params, key, batch, step) -> (scalar, {name: scalar}), with step the number of updates made so far.
    sample: (params, key, n) -> SampleBatch.
    evaluate: (params, key, batch) -> {name: array (B,)}, numbers of each example such as its bits per dimension.
    cost: network evaluations of `evaluate` and `sample`.
    likelihood_rows: rows of the likelihood report by name, which `evaluate` of the command line computes.
    likelihood_curve: the plot of the likelihood report; or None.
    image_grids: further plots of test images by name, (params, key, batch) -> values (rows, columns, H, W, C), with
        NO_VALUE in place of numbers that are not finite.
    latent_codes: (params, key, batch) -> array (B, 2), two-dimensional codes of images to plot; or None.
    plane_plots: for points in the plane, plots by name, (params, key) -> {title: Panel}.
    diffusion: for a diffusion model, (params, label) -> DiffusionModel, with the labels that condition it, of shape
        () or (B,), or None for the unconditional model; else None.
    num_classes: number of classes that condition the model; 0 for an unconditional one. `evaluate` takes the label
        num_classes for "no label".
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Array, Batch, Array], tuple[Array, dict[str, Array]]]
    sample: Callable[[Params, Array, int], SampleBatch]
    evaluate: Callable[[Params, Array, Batch], dict[str, Array]]
    cost: Cost = Cost()
    likelihood_rows: Mapping[str, LikelihoodRow] = MappingProxyType({})
    likelihood_curve: LikelihoodCurve | None = None
    image_grids: Mapping[str, Callable[[Params, Array, Batch], Integer[Array, "rows columns h w c"]]] = (
        MappingProxyType({})
    )
    latent_codes: Callable[[Params, Array, Batch], Float[Array, "b 2"]] | None = None
    plane_plots: Mapping[str, Callable[[Params, Array], dict[str, Panel]]] = MappingProxyType({})
    diffusion: Callable[[Params, Array | None], DiffusionModel] | None = None
    num_classes: int = 0
