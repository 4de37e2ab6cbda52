"""Series with known density: named Gaussian processes at regular times."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LENGTH = 32


class DampedOscillation(NamedTuple):
    """A stationary Gaussian process with mean 0, variance 1 and a damped oscillation as its autocorrelation.

        Cov(x_i, x_j) = (1 - noise) exp(-|i - j| / decay) cos(2 pi (i - j) / period) + noise [i = j]

    Fields:
        period, decay: in time steps.
        noise: share of the variance that is independent at each time.
    """

    period: float
    decay: float
    noise: float

    def covariance(self) -> Float[np.ndarray, "l l"]:
        """The covariance matrix of a series."""
        lag = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
        smooth = np.exp(-np.abs(lag) / self.decay) * np.cos(2 * np.pi * lag / self.period)
        return (1 - self.noise) * smooth + self.noise * np.eye(LENGTH)

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples, float32 (count, LENGTH, 1), and the label 0 of each, int32 (count,)."""
        noise = np.random.RandomState(seed).standard_normal((count, LENGTH))  # its stream never changes
        series = noise @ np.linalg.cholesky(self.covariance()).T
        return series[..., None].astype(np.float32), np.zeros(count, np.int32)


SERIES: dict[str, Callable[[], DampedOscillation]] = {
    "oscillations": lambda: DampedOscillation(period=10.0, decay=12.0, noise=0.05),
}
