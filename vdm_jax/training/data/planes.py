"""Distributions in the plane with known density and score: named mixtures of isotropic Gaussians."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class PlaneDistribution(NamedTuple):
    """sum_k w_k N(m_k, v_k I) in two dimensions.

    weights: shape (K,), with sum 1.
    means: shape (K, 2).
    variances: shape (K,).
    """

    weights: Float[np.ndarray, " k"]
    means: Float[np.ndarray, "k 2"]
    variances: Float[np.ndarray, " k"]

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples, float32 (count, 2), and the index of the component of each, int32 (count,)."""
        random = np.random.RandomState(seed)  # its stream never changes
        component = random.choice(len(self.weights), count, p=self.weights)
        noise = random.standard_normal((count, 2)) * np.sqrt(self.variances[component])[:, None]
        return (self.means[component] + noise).astype(np.float32), component.astype(np.int32)


def _even(means: list, deviation: float) -> PlaneDistribution:
    count = len(means)
    return PlaneDistribution(np.full(count, 1 / count), np.asarray(means, np.float64), np.full(count, deviation**2))


def _two_modes() -> PlaneDistribution:
    return PlaneDistribution(np.array([0.2, 0.8]), np.array([[-1.0, -1.0], [1.0, 1.0]]), np.full(2, 0.2**2))


def _ring(count: int, radius: float, deviation: float) -> PlaneDistribution:
    angles = 2 * np.pi * np.arange(count) / count
    return _even(np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1).tolist(), deviation)


def _moons(count: int = 40) -> PlaneDistribution:
    angles = np.pi * (np.arange(count) + 0.5) / count
    upper = np.stack([np.cos(angles) - 0.5, np.sin(angles) - 0.25], axis=1)
    return _even([*upper, *-upper], 0.08)


def _spiral(count: int = 100) -> PlaneDistribution:
    turn = np.sqrt(np.linspace(0.02, 1.0, count))  # uniform along the arm
    angles = 3.5 * np.pi * turn
    return _even(list(1.6 * turn[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)), 0.06)


PLANES: dict[str, Callable[[], PlaneDistribution]] = {
    "two_modes": _two_modes,
    "eight_modes": lambda: _ring(8, 1.4, 0.12),
    "moons": _moons,
    "spiral": _spiral,
}
