"""What the recipes of score models share: levels of noise, and annealed Langevin chains down them.

Source: Song & Ermon 2019, arXiv:1907.05600; Song & Ermon 2020, arXiv:2006.09011.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vdm_jax import langevin
from vdm_jax.discrete_schedules import TabulatedSchedule, discretize
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.schedules import VarianceExploding


@dataclass(frozen=True)
class Noise:
    """Levels x + sigma eps whose sigma falls geometrically."""

    sigma_max: float = 2.0
    """Of the noisiest level: about the largest distance between two examples mixes all modes."""
    sigma_min: float = 0.02
    """Of the cleanest level: too small to be seen."""

    def continuous_schedule(self) -> VarianceExploding:
        """In continuous time.

        Raises:
            ValueError: sigma_max is not above sigma_min, or one of them outside 1e-6..1e6.
        """
        if not 1e6 >= self.sigma_max > self.sigma_min >= 1e-6:
            raise ValueError("--noise.sigma-max must be above --noise.sigma-min, and both within 1e-6..1e6")
        return VarianceExploding(self.sigma_min, self.sigma_max)

    def discrete_schedule(self, num_levels: int) -> TabulatedSchedule:
        """Levels 1..L, the cleanest first."""
        return discretize(self.continuous_schedule(), num_levels)


@dataclass(frozen=True)
class Langevin:
    """How samples are drawn."""

    rate: float = 0.1
    """Step size of a level over its sigma^2."""
    steps: int = 100
    """Steps on each level."""
    denoise: bool = True
    """End with the clean example that the last state is thought to have come from."""

    def __call__(
        self, denoiser, key, shape: tuple[int, ...], schedule: TabulatedSchedule, prediction_type
    ) -> langevin.Chain:
        """Chains down the levels of a table, from its noisiest law around 0; with their state after every level."""
        key_x, key_chain = jax.random.split(key)
        levels = falling(schedule)
        x = levels.sigma[0] * jax.random.normal(key_x, shape)
        options = {"rate": self.rate, "steps": self.steps, "denoise": self.denoise}
        return langevin.annealed_langevin(
            denoiser, key_chain, x, levels, prediction_type=prediction_type, path=True, **options
        )


def falling(schedule: TabulatedSchedule) -> NoiseLevel:
    """The levels of a table but for the clean one, the noisiest first."""
    return schedule(jnp.arange(schedule.num_steps, 0, -1))
