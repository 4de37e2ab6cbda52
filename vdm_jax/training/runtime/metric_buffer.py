"""Metrics of the last steps, left on the devices until somebody looks."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array

AHEAD = 2  # steps the host may be ahead of the devices: enough to keep them busy, and it holds few batches


class NonFinite(Exception):
    """A step's loss or gradient is NaN or infinite."""

    def __init__(self, step: int, metrics: dict[str, float]):
        super().__init__(f"loss {metrics['loss']:g} and gradient norm {metrics['grad_norm']:g} at step {step}")


class Recent:
    """Collects metrics without waiting for them."""

    def __init__(self):
        self._on_device: list[tuple[int, Mapping[str, Array]]] = []
        self._line: list[dict[str, float]] = []
        self._losses: list[float] = []

    def add(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Take a step's metrics; waits only for those of the step before the last two."""
        self._on_device.append((step, metrics))
        if len(self._on_device) > AHEAD:
            jax.block_until_ready(self._on_device[-1 - AHEAD][1])

    def fetch(self) -> None:
        """Wait for all steps so far.

        Raises:
            NonFinite: names the first step whose loss or gradient is not finite.
        """
        steps = [step for step, _ in self._on_device]
        fetched = jax.device_get([metrics for _, metrics in self._on_device])
        self._on_device = []
        for step, metrics in zip(steps, fetched, strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise NonFinite(step, values)
            self._line.append(values)
            self._losses.append(values["loss"])

    def line(self) -> dict[str, float]:
        """Mean of each metric over the steps since the last line."""
        self.fetch()
        rows, self._line = self._line, []
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def loss(self) -> float:
        """Mean loss since the last checkpoint."""
        self.fetch()
        losses, self._losses = self._losses, []
        return float(np.mean(losses))
