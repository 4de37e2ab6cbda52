"""How near drawn examples are to real ones, by their features: Fréchet and kernel distance, precision and recall.

    ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)      Fréchet distance of normal laws
    E k(x, x') + E k(y, y') - 2 E k(x, y)                               kernel distance, k = (x . y / F + 1)^3

Features are the rows of any array (N, F): pixels, or what a network sees. A number is as good as its features, and
comparable only with others of the same features and, for the Fréchet distance, of the same N. All of this runs on the
host, in float64 and NumPy: in float32 a covariance is what is left of large sums of squares. Features that are not
finite are refused with a ValueError that counts them.

Source: Heusel et al. 2017, arXiv:1706.08500; Binkowski et al. 2018, arXiv:1801.01401; Kynkäänniemi et al. 2019,
    arXiv:1904.06991.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vdm_jax.types import Key

Features = Float[np.ndarray, "_ _"] | Float[Array, "_ _"]  # (N, F), whatever the other set has
_ROUNDING = 1e-12  # of the largest square: squared distances that differ by less are equal
_LARGEST = 1e24  # of a feature: the twelfth power, the square of a kernel, is in float64's range


class Moments(NamedTuple):
    """Count, mean and scatter of features: all that a Fréchet distance asks of them.

    Fields:
        count: of examples, N.
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
            raise ValueError(f"{self.count} example(s) have no covariance: take at least 2")
        return self.scatter / (self.count - 1)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together.

            m = m_1 + d N_2 / N        S = S_1 + S_2 + d d^T N_1 N_2 / N        d = m_2 - m_1

        Raises:
            ValueError: features of other dimensions.

        Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        _check_alike(self.mean, other.mean)
        count, apart = self.count + other.count, other.mean - self.mean
        share = other.count / max(count, 1)
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * share)
        return Moments(count, self.mean + share * apart, scatter)

    def update(self, features: Features) -> "Moments":
        """The moments with a block of features more, shape (N, F): however a stream is cut, they are the same.

        Raises:
            ValueError: features of other dimensions, or not finite.
        """
        return self.merge(moments(features))


def moments(features: Features) -> Moments:
    """The moments of a block of features, shape (N, F); N may be 0, to begin a stream with.

    Raises:
        ValueError: features that are not finite.
    """
    x = _finite(features)
    mean = x.sum(axis=0) / max(len(x), 1)
    centred = x - mean[None]
    return Moments(len(x), mean, centred.T @ centred)


def frechet_distance(one: Moments, other: Moments) -> float:
    """The squared Fréchet (2-Wasserstein) distance of the normal laws with these moments.

        ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)

    With C_i = L_i L_i^T by symmetric eigen-decompositions, the trace of the root is the sum of the singular values of
    L_1^T L_2: no root of a product is taken, which would halve the digits, or turn complex. Eigenvalues below F times
    float64's rounding of the largest count as zero, as they are where there are fewer examples than dimensions.

    It is biased upwards: N draws are expected 1/N times a constant too far away. For N of the same normal law,

        E = (tr C + 1/2 sum_ij (1 + [i = j]) c_i c_j / (c_i + c_j)) / N + O(1 / N^2)

    c_i the eigenvalues of C: (F + F (F + 1) / 4) / N for C = I. Compare numbers of one N only, or
    `frechet_extrapolated` ones.

    Args:
        one, other: moments of F features each.

    Returns:
        the distance, at least 0.

    Raises:
        ValueError: features of other dimensions, fewer than two examples, or moments that are not finite.

    Source: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; Heusel et al. 2017,
        arXiv:1706.08500.
    """
    _check_alike(one.mean, other.mean)
    for part in (one, other):
        if not (np.isfinite(part.mean).all() and np.isfinite(part.scatter).all()):
            raise ValueError(f"the moments of {part.count} examples are not finite: take them of finite features")
    shift = np.sum((one.mean - other.mean) ** 2)
    spread = np.trace(one.covariance) + np.trace(other.covariance)
    fidelity = np.linalg.svd(_root(one.covariance).T @ _root(other.covariance), compute_uv=False).sum()
    return float(shift + max(spread - 2.0 * fidelity, 0.0))


def _root(covariance):
    """L of C = L L^T, shape (F, rank)."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max()
    return vectors[:, kept] * np.sqrt(values[kept])


class Extrapolation(NamedTuple):
    """A line in 1/N through distances of N examples.

    Fields:
        value: where it ends at N = infinity.
        slope: its bias times N.
        counts: the numbers of examples N, shape (K,).
        distances: the mean distance at each, shape (K,).
    """

    value: float
    slope: float
    counts: Int[np.ndarray, " k"]
    distances: Float[np.ndarray, " k"]


def frechet_distance_extrapolated(features: Features, other: Moments, key: Key, parts: int = 5) -> Extrapolation:
    """The Fréchet distance of infinitely many examples: a line in 1/n through that of n = N, N/2, ..., N/parts.

        d(n) = d(infinity) + slope / n

    The examples are put in a random order and cut into k parts of N/k each; d(N/k) is the mean over them. Only the bias
    of these features goes away: that of the other moments stays, and n should be well above F, where the next order is
    felt. May be below 0 where the laws are the same.

    Args:
        features: shape (N, F).
        other: moments of what they are compared with.
        key: for the order.
        parts: K, the most parts, at least 2.

    Raises:
        ValueError: fewer than 2 parts, parts of fewer than 2 examples, or features that are not finite.

    Source: Chong & Forsyth 2020, arXiv:1911.07023, with disjoint parts for random subsets.
    """
    if parts < 2 or len(features) < 2 * parts:
        raise ValueError(f"{len(features)} examples in {parts} parts: take 2 parts or more, of 2 examples or more each")
    shuffled = _shuffled(features, key)
    counts = len(shuffled) // np.arange(1, parts + 1)
    distances = np.array([_mean_distance(shuffled, other, count) for count in counts])
    slope, value = np.polyfit(1.0 / counts, distances, 1)
    return Extrapolation(float(value), float(slope), counts, distances)


def _mean_distance(features, other, count):
    blocks = range(0, len(features) - count + 1, count)
    return np.mean([frechet_distance(moments(features[first : first + count]), other) for first in blocks])


class KernelDistance(NamedTuple):
    """A squared maximum mean discrepancy, and the standard error of its mean over disjoint blocks."""

    mean: float
    standard_error: float


def kernel_distance(one: Features, other: Features, key: Key, blocks: int = 10) -> KernelDistance:
    """MMD^2 of two sets of features by the cubic kernel k(x, y) = (x . y / F + 1)^3, unbiased, with its error.

        sum_{i != j} k(x_i, x_j) / n (n - 1) + sum_{i != j} k(y_i, y_j) / m (m - 1) - 2 sum_ij k(x_i, y_j) / n m

    Each set, in a random order, is cut into as many blocks, and the estimate is their mean. The blocks share no
    example, so its standard error is what it says (random subsets that overlap would make it too small). It is zero
    where all first, second and third moments agree; the mean may be below 0, as no bias keeps it up.

    Args:
        one, other: features, shapes (N, F) and (M, F), in any order.
        key: for the order.
        blocks: at least 2, of at least 2 examples each; memory grows with the square of a block.

    Raises:
        ValueError: features of other dimensions or not finite, fewer than 2 blocks, or too few examples for them.

    Source: Gretton et al. 2012, "A kernel two-sample test"; Binkowski et al. 2018, arXiv:1801.01401.
    """
    _check_alike(one, other)
    least = min(len(one), len(other))
    if blocks < 2 or least < 2 * blocks:
        raise ValueError(f"{least} examples in {blocks} blocks: take 2 blocks or more, of 2 examples or more each")
    key_one, key_other = jax.random.split(key)
    cut = (np.array_split(_shuffled(one, key_one), blocks), np.array_split(_shuffled(other, key_other), blocks))
    values = np.array([_unbiased(x, y) for x, y in zip(*cut, strict=True)])
    return KernelDistance(float(values.mean()), float(values.std(ddof=1) / np.sqrt(blocks)))


def _unbiased(x, y):
    return _pairs(x) + _pairs(y) - 2.0 * _cubic(x, y).mean()


def _pairs(x):
    kernel = _cubic(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def _cubic(x, y):
    return (x @ y.T / x.shape[1] + 1.0) ** 3


class PrecisionRecall(NamedTuple):
    """Shares, between 0 and 1.

    Fields:
        precision: of drawn examples that lie where real ones do: are they good?
        recall: of real examples that lie where drawn ones do: are they all there?
    """

    precision: float
    recall: float


def precision_recall(real: Features, drawn: Features, neighbours: int = 3, chunk: int = 2048) -> PrecisionRecall:
    """Precision and recall by balls around every example, each as wide as the distance to its k-th neighbour.

    A drawn example counts towards precision if it lies in the ball of any real one, edge included; a real example
    towards recall if it lies in the ball of any drawn one. Fewer examples make wider balls: compare numbers of one N
    and one k. Examples far from everything have balls that hold everything: recall says little where precision is low.

    Args:
        real, drawn: features, shapes (N, F) and (M, F).
        neighbours: k; an example is no neighbour of its own, a copy of it is.
        chunk: examples whose distances to all others are held at once.

    Raises:
        ValueError: features of other dimensions or not finite, k below 1, or no k others in one of the sets.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, algorithm 1.
    """
    _check_alike(real, drawn)
    least = min(len(real), len(drawn))
    if not 1 <= neighbours < least:
        raise ValueError(f"no {neighbours} neighbours among {least} examples: take 1 to {least - 1}")
    real, drawn = _finite(real), _finite(drawn)
    centre = real.mean(axis=0)[None]  # nearer to zero the squares lose less
    real, drawn = real - centre, drawn - centre
    return PrecisionRecall(_covered(real, drawn, neighbours, chunk), _covered(drawn, real, neighbours, chunk))


def _covered(balls, points, neighbours, chunk):
    """The share of points in the ball of any example."""
    radii = np.concatenate([np.partition(d, neighbours, axis=1)[:, neighbours] for d in _squares(balls, balls, chunk)])
    slack = _ROUNDING * max(np.sum(balls**2, axis=1).max(), np.sum(points**2, axis=1).max())
    inside = [np.any(d <= radii[None] + slack, axis=1) for d in _squares(points, balls, chunk)]
    return float(np.concatenate(inside).mean())


def _squares(x, y, chunk) -> Iterator[np.ndarray]:
    """Squared distances of a chunk of x after the other to all of y."""
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
            f"{bad} of {len(x)} rows of features are not finite, or larger than {_LARGEST:g}: look for NaN in the "
            "samples and in the extractor's weights"
        )
    return x


def _check_alike(one, other):
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"features of {one.shape[-1]} and of {other.shape[-1]} dimensions: take both from the same extractor"
        )
