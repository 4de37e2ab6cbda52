"""Sample quality in a feature space: Fréchet distance, kernel distance, precision and recall.

    ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)      Fréchet distance of normal distributions
    E k(x, x') + E k(y, y') - 2 E k(x, y)                               kernel distance, k = (x . y / F + 1)^3

Features are the rows of any array (N, F): pixels or activations of a network. With features of the Inception network
the Fréchet distance is FID and the kernel distance KID. Values are comparable only for the same features and, for the
Fréchet distance, the same N. Everything runs on the host with NumPy in float64, because the covariance in float32
suffers from cancellation. Features that are not finite raise a ValueError that counts them.

Source: Heusel et al. 2017, arXiv:1706.08500; Binkowski et al. 2018, arXiv:1801.01401; Kynkäänniemi et al. 2019,
    arXiv:1904.06991.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vdm_jax.types import Key

__all__ = [
    "Extrapolation",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "frechet_distance",
    "frechet_distance_extrapolated",
    "kernel_distance",
    "moments",
    "precision_recall",
]

_Features = Float[np.ndarray, "_ _"] | Float[Array, "_ _"]  # (N, F)
_ROUNDING = 1e-12  # relative to the largest square: squared distances that differ by less are equal
_LARGEST = 1e24  # of a feature: its twelfth power, the square of a kernel, is in the range of float64


class Moments(NamedTuple):
    """Count, mean and scatter matrix of features, from which the Fréchet distance is computed.

    Fields:
        count: number of examples, N.
        mean: m, shape (F,), float64.
        scatter: sum (x - m)(x - m)^T, shape (F, F), float64.
    """

    count: int
    mean: Float[np.ndarray, " f"]
    scatter: Float[np.ndarray, "f f"]

    @property
    def covariance(self) -> Float[np.ndarray, "f f"]:
        """C = scatter / (N - 1), the unbiased estimate.

        Raises:
            ValueError: fewer than two examples.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} example(s): a covariance needs at least 2")
        return self.scatter / (self.count - 1)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of the union of both sets.

            m = m_1 + d N_2 / N        S = S_1 + S_2 + d d^T N_1 N_2 / N        d = m_2 - m_1

        Raises:
            ValueError: features of different dimensions.

        Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        _check_dimensions(self.mean, other.mean)
        count, difference = self.count + other.count, other.mean - self.mean
        fraction = other.count / max(count, 1)
        scatter = self.scatter + other.scatter + np.outer(difference, difference) * (self.count * fraction)
        return Moments(count, self.mean + fraction * difference, scatter)

    def update(self, features: _Features) -> "Moments":
        """The moments with another block of features, shape (N, F). The result does not depend on the block sizes.

        Raises:
            ValueError: features of different dimensions, or not finite.
        """
        return self.merge(moments(features))


def moments(features: _Features) -> Moments:
    """The moments of a block of features, shape (N, F); N may be 0 to initialize a stream.

    Raises:
        ValueError: features that are not finite.
    """
    x = _finite(features)
    mean = x.sum(axis=0) / max(len(x), 1)
    centered = x - mean[None]
    return Moments(len(x), mean, centered.T @ centered)


def frechet_distance(one: Moments, other: Moments) -> float:
    """The squared Fréchet (2-Wasserstein) distance of the normal distributions with these moments.

        ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)

    With C_i = L_i L_i^T from symmetric eigendecompositions, the trace of the square root is the sum of the singular
    values of L_1^T L_2. This avoids the square root of a product, which loses half of the digits or becomes complex.
    Eigenvalues below F times the float64 precision of the largest are set to zero; they occur if N < F.

    The estimate from N samples has a positive bias of O(1/N). For N samples of the same normal distribution,

        E = (tr C + 1/2 sum_ij (1 + [i = j]) c_i c_j / (c_i + c_j)) / N + O(1 / N^2)

    with c_i the eigenvalues of C: (F + F (F + 1) / 4) / N for C = I. Compare distances only for the same N, or use
    `frechet_distance_extrapolated`.

    Args:
        one, other: moments of F features each.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: features of different dimensions, fewer than two examples, or moments that are not finite.

    Source: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; Heusel et al. 2017,
        arXiv:1706.08500.
    """
    _check_dimensions(one.mean, other.mean)
    for part in (one, other):
        if not (np.isfinite(part.mean).all() and np.isfinite(part.scatter).all()):
            raise ValueError(f"the moments of {part.count} examples are not finite: check the features for NaN")
    shift = np.sum((one.mean - other.mean) ** 2)
    spread = np.trace(one.covariance) + np.trace(other.covariance)
    fidelity = np.linalg.svd(_root(one.covariance).T @ _root(other.covariance), compute_uv=False).sum()
    return float(shift + max(spread - 2.0 * fidelity, 0.0))


def _root(covariance):
    """L of C = L L^T, shape (F, rank)."""
    values, vectors = np.linalg.eigh(covariance)
    positive = values > len(values) * np.finfo(np.float64).eps * values.max()
    return vectors[:, positive] * np.sqrt(values[positive])


class Extrapolation(NamedTuple):
    """A linear fit in 1/N of distances from N examples.

    Fields:
        value: the extrapolation to N = infinity.
        slope: the bias times N.
        counts: the numbers of examples N, shape (K,).
        distances: the mean distance for each N, shape (K,).
    """

    value: float
    slope: float
    counts: Int[np.ndarray, " k"]
    distances: Float[np.ndarray, " k"]


def frechet_distance_extrapolated(features: _Features, other: Moments, key: Key, parts: int = 5) -> Extrapolation:
    """The Fréchet distance extrapolated to infinitely many examples, from n = N, N/2, ..., N/parts (FID-infinity).

        d(n) = d(infinity) + slope / n

    The examples are shuffled and split into k parts of N/k each; d(N/k) is the mean over the parts. This removes the
    bias of `features` but not that of `other`, and n should be well above F, where higher orders are negligible. The
    result may be negative if both distributions are equal.

    Args:
        features: shape (N, F).
        other: moments of the reference features.
        key: for the shuffling.
        parts: the largest number of parts, at least 2.

    Raises:
        ValueError: fewer than 2 parts, parts of fewer than 2 examples, or features that are not finite.

    Source: Chong & Forsyth 2020, arXiv:1911.07023, with disjoint parts instead of random subsets.
    """
    if parts < 2 or len(features) < 2 * parts:
        raise ValueError(f"{len(features)} examples in {parts} parts: use at least 2 parts of at least 2 examples each")
    shuffled = _shuffled(features, key)
    counts = len(shuffled) // np.arange(1, parts + 1)
    distances = np.array([_mean_distance(shuffled, other, count) for count in counts])
    slope, value = np.polyfit(1.0 / counts, distances, 1)
    return Extrapolation(float(value), float(slope), counts, distances)


def _mean_distance(features, other, count):
    blocks = range(0, len(features) - count + 1, count)
    return np.mean([frechet_distance(moments(features[first : first + count]), other) for first in blocks])


class KernelDistance(NamedTuple):
    """A squared maximum mean discrepancy with its standard error, over disjoint blocks."""

    mean: float
    standard_error: float


def kernel_distance(one: _Features, other: _Features, key: Key, blocks: int = 10) -> KernelDistance:
    """Unbiased MMD^2 of two sets of features with the cubic kernel k(x, y) = (x . y / F + 1)^3, and its standard error.

        sum_{i != j} k(x_i, x_j) / n (n - 1) + sum_{i != j} k(y_i, y_j) / m (m - 1) - 2 sum_ij k(x_i, y_j) / n m

    Both sets are shuffled and split into blocks, and the estimate is the mean over the blocks. The blocks are disjoint,
    so the standard error is valid (overlapping random subsets would underestimate it). The expected value is zero if
    all first, second and third moments agree; the estimate may be negative.

    Args:
        one, other: features, shapes (N, F) and (M, F), in any order.
        key: for the shuffling.
        blocks: number of blocks, at least 2, of at least 2 examples each. Memory is quadratic in the size of a block.

    Raises:
        ValueError: features of different dimensions or not finite, fewer than 2 blocks, or too few examples.

    Source: Gretton et al. 2012, "A kernel two-sample test"; Binkowski et al. 2018, arXiv:1801.01401.
    """
    _check_dimensions(one, other)
    smallest = min(len(one), len(other))
    if blocks < 2 or smallest < 2 * blocks:
        raise ValueError(f"{smallest} examples in {blocks} blocks: use at least 2 blocks of at least 2 examples each")
    key_one, key_other = jax.random.split(key)
    split = (np.array_split(_shuffled(one, key_one), blocks), np.array_split(_shuffled(other, key_other), blocks))
    values = np.array([_unbiased(x, y) for x, y in zip(*split, strict=True)])
    return KernelDistance(float(values.mean()), float(values.std(ddof=1) / np.sqrt(blocks)))


def _unbiased(x, y):
    return _pairs(x) + _pairs(y) - 2.0 * _cubic(x, y).mean()


def _pairs(x):
    kernel = _cubic(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def _cubic(x, y):
    return (x @ y.T / x.shape[1] + 1.0) ** 3


class PrecisionRecall(NamedTuple):
    """Precision and recall, between 0 and 1.

    Fields:
        precision: fraction of generated examples inside the estimated support of the real ones: fidelity.
        recall: fraction of real examples inside the estimated support of the generated ones: coverage.
    """

    precision: float
    recall: float


def precision_recall(
    real: _Features, generated: _Features, num_neighbors: int = 3, chunk: int = 2048
) -> PrecisionRecall:
    """Improved precision and recall: supports are unions of balls whose radius is the distance to the k-th neighbor.

    A generated example counts towards precision if it is inside the ball of any real example (boundary included), and a
    real example counts towards recall if it is inside the ball of any generated example. Fewer examples have larger
    balls: compare values only for the same N and k. Outliers have very large balls, so recall is unreliable if
    precision is low.

    Args:
        real, generated: features, shapes (N, F) and (M, F).
        num_neighbors: k. An example is not its own neighbor, but an exact copy of it is.
        chunk: number of examples whose distances to all others are computed at a time, which limits memory.

    Raises:
        ValueError: features of different dimensions or not finite, k below 1, or a set with at most k examples.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, algorithm 1.
    """
    _check_dimensions(real, generated)
    smallest = min(len(real), len(generated))
    if not 1 <= num_neighbors < smallest:
        raise ValueError(f"num_neighbors is {num_neighbors}: it must be in 1..{smallest - 1} for {smallest} examples")
    real, generated = _finite(real), _finite(generated)
    center = real.mean(axis=0)[None]  # reduces cancellation in the squared distances
    real, generated = real - center, generated - center
    precision = _coverage(real, generated, num_neighbors, chunk)
    return PrecisionRecall(precision, _coverage(generated, real, num_neighbors, chunk))


def _coverage(balls, points, k, chunk):
    """The fraction of points inside any of the balls."""
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squares(balls, balls, chunk)])
    slack = _ROUNDING * max(np.sum(balls**2, axis=1).max(), np.sum(points**2, axis=1).max())
    inside = [np.any(d <= radii[None] + slack, axis=1) for d in _squares(points, balls, chunk)]
    return float(np.concatenate(inside).mean())


def _squares(x, y, chunk) -> Iterator[np.ndarray]:
    """Squared distances of x to all of y, one chunk of x at a time."""
    lengths = np.sum(y**2, axis=1)[None]
    for first in range(0, len(x), chunk):
        part = x[first : first + chunk]
        yield np.sum(part**2, axis=1)[:, None] + lengths - 2.0 * part @ y.T


def _shuffled(features, key):
    order = np.asarray(jax.random.permutation(key, len(features)))
    return _finite(features)[order]


def _finite(features):
    """Features in float64."""
    x = np.asarray(features, np.float64)
    bad = np.count_nonzero(~(np.abs(x) <= _LARGEST).all(axis=1))  # true for NaN
    if bad:
        raise ValueError(
            f"{bad} of {len(x)} rows of features are not finite or exceed {_LARGEST:g}: check the samples and the "
            "weights of the feature extractor for NaN"
        )
    return x


def _check_dimensions(one, other):
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"features of {one.shape[-1]} and of {other.shape[-1]} dimensions: use the same feature extractor for both"
        )
