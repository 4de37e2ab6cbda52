"""Metrics of recent steps, kept on the devices until they are needed."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array

MAX_STEPS_AHEAD = 2  # dispatched steps not yet computed: keeps the devices busy and few batches in memory


class NonFinite(Exception):
    """A step's loss or gradient is NaN or infinite."""

    def __init__(self, step: int, metrics: dict[str, float]):
        super().__init__(f"loss {metrics['loss']:g} and gradient norm {metrics['grad_norm']:g} at step {step}")


class MetricBuffer:
    """Collects metrics without blocking the host."""

    def __init__(self):
        self._on_device: list[tuple[int, Mapping[str, Array]]] = []
        self._logged: list[dict[str, float]] = []
        self._losses: list[float] = []

    def add(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Add the metrics of a step; blocks only until the step two before it is computed."""
        self._on_device.append((step, metrics))
        if len(self._on_device) > MAX_STEPS_AHEAD:
            jax.block_until_ready(self._on_device[-1 - MAX_STEPS_AHEAD][1])

    def fetch(self) -> None:
        """Wait for all steps so far and fetch their metrics.

        Raises:
            NonFinite: the loss or gradient norm of a step is not finite; names the first such step.
        """
        steps = [step for step, _ in self._on_device]
        fetched = jax.device_get([metrics for _, metrics in self._on_device])
        self._on_device = []
        for step, metrics in zip(steps, fetched, strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise NonFinite(step, values)
            self._logged.append(values)
            self._losses.append(values["loss"])

    def means(self) -> dict[str, float]:
        """Mean of each metric over the steps since the last call."""
        self.fetch()
        rows, self._logged = self._logged, []
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def loss(self) -> float:
        """Mean loss over the steps since the last call."""
        self.fetch()
        losses, self._losses = self._losses, []
        return float(np.mean(losses))
