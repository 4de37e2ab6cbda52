"""Distances between features: closed forms, high precision, enumeration, brute force, and their bias in numbers."""

from fractions import Fraction
from itertools import product

import jax
import mpmath
import numpy as np
import pytest

from tests.derivations.check import assert_close, assert_mean, refuted
from vdm_jax.metrics import (
    Moments,
    frechet_distance,
    frechet_distance_extrapolated,
    kernel_distance,
    moments,
    precision_recall,
)

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def with_moments(mean, covariance, count=10):
    return Moments(count, np.asarray(mean, np.float64), np.asarray(covariance, np.float64) * (count - 1))


def covariance(seed, size):
    root = normal(seed, size, size)
    return root @ root.T / size


# Moments of a stream


def far_off(rows=50, seed=0):
    """Features whose mean is a thousand deviations from zero, in float32 as a network gives them."""
    return (1000.0 + normal(seed, rows, 3)).astype(np.float32)


def exact_moments(x):
    rows = [[Fraction(float(v)) for v in row] for row in x]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    pairs = product(range(3), range(3))
    scatter = [sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) for i, j in pairs]
    return np.array(mean, float), np.array(scatter, float).reshape(3, 3)


@pytest.mark.parametrize("block", [1, 7, 16, 50])
def test_moments_are_those_of_rational_arithmetic_however_the_stream_is_cut(block):
    x = far_off()
    ours = moments(x[:0])
    for first in range(0, len(x), block):
        ours = ours.update(x[first : first + block])
    mean, scatter = exact_moments(x)
    assert ours.count == 50
    assert_close(ours.mean, mean, rtol=1e-12)
    assert_close(ours.scatter, scatter, rtol=1e-11, atol=1e-12 * scatter.max())
    assert_close(ours.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-11, atol=1e-12)


def test_blocks_do_not_matter():
    x = normal(1, 1000, 5) + 3.0
    whole = moments(x)
    for block in (1, 3, 64, 999):
        parts = [moments(x[first : first + block]) for first in range(0, 1000, block)]
        left = right = moments(x[:0])
        for part in parts:
            left = left.merge(part)
        for part in reversed(parts):
            right = part.merge(right)
        for other in (left, right):
            assert other.count == 1000
            assert_close(other.mean, whole.mean, rtol=1e-12)
            assert_close(other.scatter, whole.scatter, rtol=1e-12, atol=1e-12 * whole.scatter.max())


def test_float32_sums_of_squares_would_lose_accuracy():
    x = far_off(2000)
    mean = x.mean(0)
    lost = (x.T @ x - len(x) * np.outer(mean, mean)) / (len(x) - 1)
    with refuted():
        assert_close(lost, moments(x).covariance, rtol=0.01, atol=0.01)


def test_one_example_has_no_covariance():
    with pytest.raises(ValueError, match=r"1 example\(s\): .*at least 2"):
        _ = moments(np.ones((1, 3))).covariance


# Fréchet distance


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rows", [2, 20, 500])
def test_equal_moments_are_at_distance_zero(rows, scale):
    distribution = moments(scale * normal(0, rows, 64))
    assert frechet_distance(distribution, distribution) <= 1e-9 * scale**2


def test_commuting_covariances():
    turn = np.linalg.qr(normal(0, 6, 6))[0]
    a, b = np.array([4.0, 1.0, 0.25, 0.0, 9.0, 1e-6]), np.array([1.0, 1.0, 0.0, 0.0, 16.0, 1e-4])
    m = np.arange(6.0)
    distance = frechet_distance(
        with_moments(m, turn @ np.diag(a) @ turn.T), with_moments(0 * m, turn @ np.diag(b) @ turn.T)
    )
    assert_close(distance, 55.0 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=1e-12)


def test_two_dimensions_by_trace_and_determinant():
    # tr (C_1 C_2)^1/2 = (tr C_1 C_2 + 2 (det C_1 C_2)^1/2)^1/2 of 2 x 2 matrices
    for seed in range(5):
        a, b = covariance(seed, 2), covariance(seed + 100, 2)
        root = np.sqrt(np.trace(a @ b) + 2.0 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
        expected = np.trace(a) + np.trace(b) - 2.0 * root
        assert_close(frechet_distance(with_moments([0, 0], a), with_moments([0, 0], b)), expected, rtol=1e-11)


def test_against_fifty_digits():
    with mpmath.workdps(50):
        for seed in range(3):
            a, b = covariance(seed, 5), covariance(seed + 50, 5)
            root = mpmath.sqrtm(mpmath.matrix(a.tolist()) * mpmath.matrix(b.tolist()))
            expected = mpmath.fsum(a.diagonal()) + mpmath.fsum(b.diagonal()) - 2 * sum(root[i, i] for i in range(5))
            ours = frechet_distance(with_moments(np.zeros(5), a), with_moments(np.zeros(5), b))
            assert_close(ours, float(mpmath.re(expected)), rtol=1e-11)


@pytest.mark.parametrize("cosine", [0.0, 0.6, 1.0])
def test_covariances_of_rank_one(cosine):
    turn = np.linalg.qr(normal(0, 50, 50))[0]
    u, v = 3.0 * turn[0], 2.0 * (cosine * turn[0] + np.sqrt(1.0 - cosine**2) * turn[1])
    distance = frechet_distance(with_moments(0 * u, np.outer(u, u)), with_moments(0 * u, np.outer(v, v)))
    assert_close(distance, 9.0 + 4.0 - 12.0 * cosine, rtol=1e-12, atol=1e-12)


def test_fewer_examples_than_dimensions():
    # For centered data X, C = X^T X / (N - 1), and the trace of (C_1^1/2 C_2 C_1^1/2)^1/2 is the nuclear norm of
    # X_1 X_2^T / (N - 1): no covariance is computed.
    x, y = normal(0, 20, 100), 0.5 + normal(1, 20, 100) * np.linspace(0.1, 2.0, 100)[None]
    a, b = x - x.mean(0)[None], y - y.mean(0)[None]
    squares = np.sum((x.mean(0) - y.mean(0)) ** 2) + (np.sum(a**2) + np.sum(b**2)) / 19
    expected = squares - 2.0 * np.linalg.norm(a @ b.T, "nuc") / 19
    assert_close(frechet_distance(moments(x), moments(y)), expected, rtol=1e-10)


def test_rotation_translation_scale_and_order():
    x, y = normal(0, 40, 6), 1.5 * normal(1, 30, 6) + 0.3
    turn = np.linalg.qr(normal(2, 6, 6))[0]
    distance = frechet_distance(moments(x), moments(y))
    assert distance > 1.0
    assert_close(frechet_distance(moments(y), moments(x)), distance, rtol=1e-12)
    assert_close(frechet_distance(moments(x @ turn + 7.0), moments(y @ turn + 7.0)), distance, rtol=1e-10)
    assert_close(frechet_distance(moments(3.0 * x), moments(3.0 * y)), 9.0 * distance, rtol=1e-12)


def test_features_must_be_alike():
    with pytest.raises(ValueError, match="features of 3 and of 2 dimensions: use the same"):
        frechet_distance(moments(np.ones((4, 3))), moments(np.ones((4, 2))))


# Its bias


def bias_constant(values):
    """N times the expected distance of N samples from their own distribution, as the docstring states it."""
    size = len(values)
    pairs = sum(
        (1.0 + (i == j)) * values[i] * values[j] / (values[i] + values[j]) for i in range(size) for j in range(size)
    )
    return sum(values) + 0.5 * pairs


def test_bias_constant_of_the_unit_covariance():
    for size in (1, 3, 8):
        assert_close(bias_constant(np.ones(size)), size + size * (size + 1) / 4)


@pytest.mark.parametrize("values", [(1.0,), (1.0, 1.0, 1.0), (4.0, 1.0, 0.1)])
def test_bias_is_the_stated_constant_over_n(values):
    distribution, scale, count = with_moments(np.zeros(len(values)), np.diag(values)), np.sqrt(values)[None], 1000
    found = [frechet_distance(moments(normal(seed, count, len(values)) * scale), distribution) for seed in range(300)]
    assert_mean(count * np.array(found), bias_constant(values), resolution=0.07 * bias_constant(values))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_extrapolation_removes_the_bias(shift):
    distribution = with_moments(np.full(4, shift), np.diag([1.0, 2.0, 0.5, 1.0]))
    expected = 4 * shift**2 + (2**0.5 - 1) ** 2 + (0.5**0.5 - 1) ** 2
    plain, lines = [], []
    for seed in range(100):
        x = normal(seed, 400, 4)
        plain.append(frechet_distance(moments(x), distribution))
        lines.append(frechet_distance_extrapolated(x, distribution, jax.random.key(seed)))
    values = np.array([line.value for line in lines])
    assert_mean(values, expected, resolution=0.02)
    if not shift:  # with one, the noise of so few tries hides the bias
        with refuted():
            assert_mean(plain, expected)
    assert_close([line.distances[0] for line in lines], plain, rtol=1e-9)
    assert lines[0].counts.tolist() == [400, 200, 133, 100, 80]
    assert_mean([line.value + line.slope / 400 for line in lines], np.mean(plain), resolution=0.02)


@pytest.mark.parametrize("rows", [4, 5])
def test_two_parts_are_extrapolated_by_the_line_through_both(rows):
    found = frechet_distance_extrapolated(normal(0, rows, 2), moments(normal(1, 50, 2)), KEY, 2)
    np.testing.assert_array_equal(found.counts, [rows, 2])
    np.testing.assert_allclose(found.value + found.slope / found.counts, found.distances, rtol=1e-9)


def test_extrapolation_needs_two_parts_of_two():
    distribution = moments(normal(0, 10, 2))
    for rows, parts in ((10, 1), (9, 5)):
        with pytest.raises(ValueError, match=f"{rows} examples in {parts} parts: use at least 2 parts"):
            frechet_distance_extrapolated(normal(0, rows, 2), distribution, KEY, parts)


# Kernel distance


def test_kernel_distance_is_unbiased_exactly():
    # Every set of 4 samples of two distributions on two points in the plane, each with its probability.
    points, p, q = np.array([[1.0, -0.5], [0.3, 2.0]]), np.array([0.3, 0.7]), np.array([0.6, 0.4])
    kernel = (points @ points.T / 2 + 1.0) ** 3
    mean = total = 0.0
    for sampled in product(range(2), repeat=8):
        one, other = list(sampled[:4]), list(sampled[4:])
        probability = p[one].prod() * q[other].prod()
        mean += probability * kernel_distance(points[one], points[other], KEY, 2).mean
        total += probability
    assert_close(total, 1.0)
    assert_close(mean, (p - q) @ kernel @ (p - q), rtol=1e-12)


def test_kernel_distance_is_zero_for_equal_distributions_and_its_standard_error_is_accurate():
    found = [kernel_distance(normal(2 * i, 60, 3), normal(2 * i + 1, 45, 3), jax.random.key(i), 5) for i in range(150)]
    means = np.array([d.mean for d in found])
    assert_mean(means, 0.0)
    assert 0.3 < np.mean(means < 0.0) < 0.8
    assert_mean([d.standard_error**2 for d in found], means.var(ddof=1))


def test_kernel_distance_of_normal_distributions_by_their_moments():
    # F = 1: (x y + 1)^3 is the inner product of (x^3, 3^1/2 x^2, 3^1/2 x, 1)
    found = [
        kernel_distance(normal(2 * i, 200, 1), 0.5 + normal(2 * i + 1, 200, 1), jax.random.key(i)).mean
        for i in range(100)
    ]
    assert_mean(found, 3 * 0.5**2 + 3 * 0.25**2 + 1.625**2, resolution=0.2)


def test_kernel_distance_sees_every_example_once():
    # A point mass against another one: the same distance for any blocks.
    one, other = np.tile([[1.0, 2.0]], (11, 1)), np.tile([[0.0, -1.0]], (9, 1))
    expected = 3.5**3 + 1.5**3 - 2 * 0.0**3
    result = kernel_distance(one, other, KEY, 4)
    assert_close(result.mean, expected)
    assert_close(result.standard_error, 0.0, atol=1e-12)


def test_kernel_distance_needs_blocks():
    for rows, blocks in ((10, 1), (9, 5)):
        with pytest.raises(ValueError, match=f"{rows} examples in {blocks} blocks: use at least 2 blocks"):
            kernel_distance(normal(0, rows, 2), normal(1, 30, 2), KEY, blocks)
    with pytest.raises(ValueError, match="features of 2 and of 3 dimensions"):
        kernel_distance(normal(0, 40, 2), normal(1, 40, 3), KEY)


# Precision and recall


def covered_by_hand(balls, points, k):
    """Every pair, in rational arithmetic."""
    exact = lambda x: [[Fraction(float(v)) for v in row] for row in x]  # noqa: E731
    square = lambda x, y: sum((a - b) ** 2 for a, b in zip(x, y, strict=True))  # noqa: E731
    balls, points = exact(balls), exact(points)
    radii = [sorted(square(a, b) for j, b in enumerate(balls) if j != i)[k - 1] for i, a in enumerate(balls)]
    return np.mean([any(square(p, b) <= r for b, r in zip(balls, radii, strict=True)) for p in points])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_precision_and_recall_by_brute_force_with_ties(k, chunk):
    # On a grid, distances tie and points coincide.
    real, sampled = (np.random.RandomState(i).randint(0, 9 + 6 * i, (25, 2)) / 8.0 for i in range(2))
    got = precision_recall(real, sampled, k, chunk)
    assert got == (covered_by_hand(real, sampled, k), covered_by_hand(sampled, real, k))
    assert 0.0 < got.precision < 1.0


def test_precision_and_recall_separate_quality_from_coverage():
    one, two = normal(0, 60, 4), 100.0 + normal(1, 60, 4)
    both = np.concatenate([one, two])
    half = precision_recall(both, normal(2, 60, 4))
    assert half.precision > 0.7
    assert half.recall < 0.5
    spread = precision_recall(one, np.concatenate([normal(2, 60, 4), 1000.0 * normal(3, 60, 4)]))
    assert spread.precision < 0.5
    assert spread.recall > 0.7
    assert precision_recall(one, two) == (0.0, 0.0)
    assert precision_recall(one, one) == (1.0, 1.0)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e3])
def test_the_edge_of_a_ball_is_inside(offset):
    # Radii of 0, 1, 3 with one neighbor are 1, 1, 2: -1 and 5 are on edges, 5.001 is outside all balls.
    real, sampled = np.array([[0.0], [1.0], [3.0]]), np.array([[-1.0], [5.0], [5.001], [-1.001]])
    assert precision_recall(real + offset, sampled + offset, 1).precision == 0.5


def test_num_neighbors_must_be_below_the_number_of_examples():
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"num_neighbors is {k}: .*1\.\.4"):
            precision_recall(normal(0, 9, 2), normal(1, 5, 2), k)
    with pytest.raises(ValueError, match="features of 2 and of 3 dimensions"):
        precision_recall(normal(0, 9, 2), normal(1, 9, 3))


def test_features_on_a_device_are_accepted():
    x, y = normal(0, 30, 3).astype(np.float32), normal(1, 30, 3).astype(np.float32)
    for function in (
        lambda a, b: kernel_distance(a, b, KEY),
        precision_recall,
        lambda a, b: frechet_distance(moments(a), moments(b)),
    ):
        assert function(jax.numpy.asarray(x), jax.numpy.asarray(y)) == function(x, y)


# Features that are not numbers

METRICS = {
    "moments": lambda a, b: (moments(a), moments(b)),
    "update": lambda a, b: moments(normal(9, 4, 3)).update(a).update(b),
    "frechet_extrapolated": lambda a, b: frechet_distance_extrapolated(a, moments(b), KEY, 2),
    "kernel_distance": lambda a, b: kernel_distance(a, b, KEY, 2),
    "precision_recall": precision_recall,
}


@pytest.mark.parametrize("function", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e60])  # powers of the last overflow
def test_features_that_are_not_finite_are_refused_with_their_number(function, bad):
    good, spoiled = normal(0, 20, 3), normal(1, 30, 3)
    spoiled[[4, 7, 7, 29], [0, 1, 2, 2]] = bad
    for pair in ((good, spoiled), (spoiled, good)):
        with pytest.raises(ValueError, match=r"3 of 30 rows of features are not finite"):
            function(*pair)


def test_moments_that_are_not_finite_have_no_distance():
    good = with_moments([0.0, 0.0], np.eye(2))
    for spoiled in (with_moments([0.0, np.nan], np.eye(2)), with_moments([0.0, 0.0], np.diag([1.0, np.inf]))):
        for pair in ((good, spoiled), (spoiled, good)):
            with pytest.raises(ValueError, match="moments of 10 examples are not finite"):
                frechet_distance(*pair)


def test_large_features_have_the_distances_of_small_ones():
    x, y, scale = normal(0, 40, 3), normal(1, 40, 3), 2.0**70
    assert precision_recall(scale * x, scale * y) == precision_recall(x, y)
    assert_close(
        frechet_distance(moments(scale * x), moments(scale * y)) / scale**2,
        frechet_distance(moments(x), moments(y)),
        rtol=1e-9,
    )
    # For large features the kernel is its cubic term.
    one, two = (kernel_distance(scale * k * x, scale * k * y, KEY, 4).mean for k in (1.0, 2.0))
    assert_close(two / one, 64.0, rtol=1e-9)
