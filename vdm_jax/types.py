"""Type aliases and protocols for the arguments of the equations, and the checks of what callables return."""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int, PRNGKeyArray, UInt32

from vdm_jax.compilation import ARGUMENT_CHECKS

__all__ = [
    "Batch",
    "Data",
    "Denoiser",
    "Energy",
    "Key",
    "Latents",
    "PerExample",
    "PerStep",
    "PredictionType",
    "Real",
    "Scalar",
    "Score",
    "Steps",
    "X",
    "Z",
    "at_least_float32",
    "check_distribution",
    "check_positive_scalar",
    "check_prediction",
    "check_scalar",
    "check_values",
    "check_weights",
    "evaluate",
    "evaluate_scalars",
    "per_example",
    "unknown_prediction_type",
]

X = Float[Array, "*x"]  # one example, of any shape
Batch = Float[Array, "b *x"]  # examples stacked along the first axis
Data = Float[Array, "n *x"]  # a whole data set
Z = Float[Array, "*z"]  # the latent of one example, of another shape than x
Latents = Float[Array, "b *z"]
PerExample = Float[Array, " b"]
PerStep = Float[Array, "T *y"]  # the value of step t in 1..T at index t - 1
Scalar = Float[Array, ""]
Real = Float[Array, "..."]  # a scalar or an array: the function is elementwise
Steps = Int[Array, "..."] | Int[np.ndarray, "..."] | int  # discrete times 0..T
Key = PRNGKeyArray | UInt32[Array, "2"]  # new-style or raw

PredictionType = Literal["x_0", "eps", "v", "score"]
Score = Callable[[Any], Any]  # (B, *x) -> (B, *x), for each example independently
Energy = Callable[[Any], Any]  # (B, *x) -> (B,), for each example independently


@runtime_checkable
class Denoiser(Protocol):
    """A network or any other callable `denoiser(x_t, level) -> prediction`.

    The arguments are a *batch* x_t, shape (B, *x), and a `NoiseLevel` whose fields have shape (B,). The result is a
    prediction of one of the four types, shape (B, *x). The denoiser receives a batch, not one example, so that labels
    and dropout masks that it closes over stay per example.

    Pass a Flax network as `jax.tree_util.Partial(net.apply, params)`. Any other pytree works too, such as an Equinox
    module or the exact denoiser of a known distribution. So does a plain function, which is compiled again whenever a
    variable that it closes over changes. A network must not change its own state when it is evaluated: pass dropout
    keys and batch statistics as arguments of the `Partial`.
    """

    def __call__(self, x_t: Batch, level: Any, /) -> Batch: ...


def evaluate(network: Callable, x: Batch, *conditioning: Any, name: str = "denoiser") -> Batch:
    """Evaluate a network on a batch and check that it returns one floating-point number per number of x.

    Args:
        network: (x, *conditioning) -> prediction.
        x: shape (B, *x).
        conditioning: further arguments, such as a `NoiseLevel`.
        name: the network's name in error messages.

    Returns:
        Shape (B, *x), in float32 or a wider type.

    Raises:
        ValueError: the prediction has another shape, or the network changed its own state.
        TypeError: the prediction is not a floating-point array.
    """
    return check_prediction(_stateless(network, name, x, *conditioning), x, name)


def evaluate_scalars(function: Callable, x: Batch, *conditioning: Any, name: str) -> PerExample:
    """Evaluate an energy or a log-density on a batch and check that it returns one floating-point number per example.

    Args as in `evaluate`. Returns shape (B,), in float32 or a wider type.

    Raises:
        ValueError: the values have another shape, or the function changed its own state.
        TypeError: they are not a floating-point array.
    """
    return check_values(_stateless(function, name, x, *conditioning), x.shape[:1], name)


def _stateless(function: Callable, name: str, *arguments: Any) -> Any:
    """The function's result; ValueError if the call changes the function's state."""
    function = jax.tree.map(lambda leaf: leaf, function)  # a copy, in case a stateful module changes itself
    before = jax.tree.leaves(function)
    try:
        result = function(*arguments)
    except Exception as error:
        if type(error).__name__ == "TraceContextError":  # Flax's, from an NNX module in a closure
            raise _stateful(name) from error
        raise
    after = jax.tree.leaves(function)
    if len(before) != len(after) or any(old is not new for old, new in zip(before, after, strict=True)):
        raise _stateful(name)
    return result


def _stateful(name: str) -> ValueError:
    return ValueError(
        f"the {name} changes its own state when it is evaluated (a dropout key or batch statistics), and the change "
        "would be lost: switch it to evaluation mode, or pass the state as an argument, as in "
        "Partial(apply, params, dropout_key)"
    )


def check_prediction(prediction: Any, x: Batch, name: str = "denoiser") -> Batch:
    """A prediction for x, in float32 or a wider type; errors as in `evaluate`."""
    shape, dtype = getattr(prediction, "shape", None), getattr(prediction, "dtype", None)
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = type(prediction).__name__ if dtype is None else dtype
        raise TypeError(f"the {name} returned {found}: it must return a floating-point array of x_t's shape {x.shape}")
    if shape != x.shape:
        raise ValueError(f"the {name} returned shape {shape} for x_t of shape {x.shape}: the two must be equal")
    return prediction.astype(at_least_float32(prediction.dtype, x.dtype))


def check_values(values: Any, shape: tuple[int, ...], name: str) -> Real:
    """The values returned by a callable, in float32 or a wider type; errors as in `evaluate_scalars`."""
    found, dtype = getattr(values, "shape", None), getattr(values, "dtype", None)
    if found is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = type(values).__name__ if dtype is None else dtype
        raise TypeError(f"the {name} returned {found}: it must return a floating-point array of shape {shape}")
    if found != shape:
        raise ValueError(f"the {name} returned shape {found}: it must return shape {shape}")
    return values.astype(at_least_float32(dtype))


def check_weights(weights: Any, shape: tuple[int, ...]) -> Real:
    """Check the result of a weight function: one number for all, or an array of this shape.

    Raises:
        ValueError: another shape.
    """
    if jnp.shape(weights) not in ((), shape):
        raise ValueError(f"the weight returned shape {jnp.shape(weights)}: it must return shape {shape} or one number")
    return weights


def check_distribution(distribution: Any, name: str, *methods: str) -> Any:
    """Check that the result of a callable is a distribution with these methods.

    Raises:
        TypeError: a method is missing.
    """
    if not all(callable(getattr(distribution, method, None)) for method in methods):
        raise TypeError(
            f"the {name} returned {type(distribution).__name__}: it must return a distribution with "
            f"{' and '.join(methods)}, such as gaussian.Normal"
        )
    return distribution


def check_scalar(name: str, value: Any) -> None:
    """Check that an argument is one number; an array would broadcast.

    Raises:
        ValueError: the value has a shape.
    """
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}: it must be one number")


def check_positive_scalar(name: str, value: Any) -> None:
    """Check that a number is positive, where it is not traced.

    Raises:
        ValueError: zero, negative or NaN.
    """
    if not isinstance(value, Tracer) and not np.asarray(value) > 0:  # a comparison by JAX would be traced inside jit
        raise ValueError(f"{name} is {value}: it must be positive")


def at_least_float32(*dtypes: Any) -> Any:
    """The floating-point type of levels, times and sums for data of these types: float32 or wider."""
    known = (jax.dtypes.canonicalize_dtype(dtype) if isinstance(dtype, np.dtype) else dtype for dtype in dtypes)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.float32, jnp.result_type(*known))


def _check_batch(name: str, x: Any) -> None:
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"{name} is a {type(x).__name__}: it must be a floating-point array of shape (B, *x)")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {dtype}: it must be floating-point, convert integers by "
            "likelihoods.normalize(values, levels)"
        )
    if len(shape) == 0 or 0 in shape:
        raise ValueError(f"{name} has shape {shape}: a batch has shape (B, *x) with at least one example")


ARGUMENT_CHECKS[Batch] = ARGUMENT_CHECKS[Data] = _check_batch
ARGUMENT_CHECKS[Scalar | float] = check_scalar


def per_example(x: Batch) -> PerExample:
    """The sum over the dimensions of each example."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).sum(-1)


def unknown_prediction_type(prediction_type: object) -> ValueError:
    """The error for an unknown prediction type."""
    return ValueError(f"unknown prediction_type {prediction_type!r}: choose 'x_0', 'eps', 'v' or 'score'")
