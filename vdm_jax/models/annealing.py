"""Options of score models: the noise scales, and annealed Langevin dynamics along them.

Source: Song & Ermon 2019, arXiv:1907.05600; Song & Ermon 2020, arXiv:2006.09011.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vdm_jax import langevin
from vdm_jax.discrete_schedules import TabulatedSchedule, discretize
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.schedules import VarianceExploding

__all__ = ["AnnealedLangevin", "NoiseScales", "decreasing_levels"]


@dataclass(frozen=True)
class NoiseScales:
    """Noise levels x + sigma eps, sigma a geometric sequence."""

    sigma_max: float = 2.0
    """Largest sigma: about the largest distance between two examples lets chains move between all modes."""
    sigma_min: float = 0.02
    """Smallest sigma: too small to be visible."""

    def continuous_schedule(self) -> VarianceExploding:
        """The variance-exploding schedule between the two ends.

        Raises:
            ValueError: sigma_max is not above sigma_min, or one of them outside 1e-6..1e6.
        """
        if not 1e6 >= self.sigma_max > self.sigma_min >= 1e-6:
            raise ValueError(
                f"--noise-scales.sigma-max {self.sigma_max:g} must be above --noise-scales.sigma-min "
                f"{self.sigma_min:g}, and both within 1e-6..1e6"
            )
        return VarianceExploding(self.sigma_min, self.sigma_max)

    def discrete_schedule(self, num_levels: int) -> TabulatedSchedule:
        """Levels 1..num_levels in order of increasing sigma; level 0 is clean."""
        return discretize(self.continuous_schedule(), num_levels)


@dataclass(frozen=True)
class AnnealedLangevin:
    """Sampling by annealed Langevin dynamics."""

    rate: float = 0.1
    """Step size of a level divided by its sigma^2."""
    steps: int = 100
    """Langevin steps on each level."""
    denoise: bool = True
    """End with the denoised last state, by Tweedie's formula."""

    def __call__(
        self, denoiser, key, shape: tuple[int, ...], schedule: TabulatedSchedule, prediction_type
    ) -> langevin.Chain:
        """Run chains from N(0, sigma_max^2 I) over all levels, noisiest first; the path has the state after each."""
        key_x, key_chain = jax.random.split(key)
        levels = decreasing_levels(schedule)
        x = levels.sigma[0] * jax.random.normal(key_x, shape)
        options = {"rate": self.rate, "steps": self.steps, "denoise": self.denoise}
        return langevin.annealed_langevin(
            denoiser, key_chain, x, levels, prediction_type=prediction_type, path=True, **options
        )


def decreasing_levels(schedule: TabulatedSchedule) -> NoiseLevel:
    """The levels T..1 of a discrete schedule, in order of decreasing sigma."""
    return schedule(jnp.arange(schedule.num_steps, 0, -1))
