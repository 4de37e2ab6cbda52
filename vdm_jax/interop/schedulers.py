"""The noise: diffusers' scheduler_config.json of a `DDPMScheduler` <-> a table, what is predicted, and the variance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vdm_jax.discrete_schedules import TabulatedSchedule, discretize, from_betas, linear_betas, to_betas
from vdm_jax.interop.faults import absent_or, list_of, misfits, number, refuse, settings, shown, unsupported, whole
from vdm_jax.schedules import Cosine

KINDS: dict[str, Literal["eps", "x_0", "v"]] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES: dict[str, Literal["fixed_small", "fixed_large"]] = {
    "fixed_small": "fixed_small",
    "fixed_large": "fixed_large",
}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
DEFAULTS = {  # diffusers', for fields that a scheduler_config.json does not name
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
SUPPORTED = {
    "beta_schedule": BETAS,
    "prediction_type": tuple(KINDS),
    "variance_type": tuple(VARIANCES),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}
MOST = 1_000_000  # steps
OPEN = {  # of the other fields that say something here: a test, and what passes it
    "num_train_timesteps": (whole(1, MOST), f"1 to {MOST:,}"),
    "beta_start": (number(0, 1), "a number in [0, 1]"),
    "beta_end": (number(0, 1), "a number in [0, 1]"),
    "trained_betas": (absent_or(list_of(number(0, 1), MOST)), "null, or a list of numbers in [0, 1]"),
    "clip_sample": (lambda v: isinstance(v, bool), "true or false"),
    "clip_sample_range": (number(1e-6, 1e6), "a number above 0"),
}


@dataclass(frozen=True)
class Scheduler:
    """A discrete schedule, what the network predicts along it, and the variance of a sampling step.

    Their timestep t = 0..T-1 is our level t + 1, and what the network is told.

    Fields:
        num_steps: T.
        beta_schedule, beta_start, beta_end: diffusers' name of the betas and their ends, which the cosine has not.
        betas: beta_1 .. beta_T themselves, in the place of a named schedule.
        prediction_type, variance: as `samplers.ancestral` takes them.
        clip: bound on the predicted x_0 while sampling, or None.
    """

    num_steps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    betas: tuple[float, ...] | None = None
    prediction_type: Literal["eps", "x_0", "v"] = "eps"
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    clip: float | None = 1.0

    def discrete_schedule(self) -> TabulatedSchedule:
        """Levels 0..T in float64; diffusers' own, a float32 product, has lost 2e-4 of 1 - abar by T = 1,000.

        Raises:
            ValueError: betas that are no table's, as `discrete_schedules.from_betas`.

        Source: Ho et al. 2020, arXiv:2006.11239; Nichol & Dhariwal 2021, arXiv:2102.09672 (squaredcos_cap_v2).
        """
        if self.betas is not None:
            return from_betas(self.betas)
        match self.beta_schedule:
            case "linear":
                return linear_betas(self.num_steps, self.beta_start, self.beta_end)
            case "scaled_linear":
                return from_betas(np.square(np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_steps)))
            case "squaredcos_cap_v2":
                return discretize(Cosine(), self.num_steps)

    @classmethod
    def of(
        cls, schedule: TabulatedSchedule, prediction_type: Any = "eps", variance: Any = "fixed_small"
    ) -> "Scheduler":
        """Any variance-preserving table, by its betas."""
        betas = tuple(np.asarray(to_betas(schedule).beta, np.float64).tolist())
        return cls(schedule.num_steps, betas=betas, prediction_type=prediction_type, variance=variance)


def from_scheduler_config(config: Mapping[str, Any]) -> Scheduler:
    """The schedule of a scheduler_config.json.

    Args:
        config: what is in it; fields that are not there have diffusers' defaults. How to take fewer steps
            (timestep_spacing, steps_offset) is a sampler's affair, and passed over.

    Raises:
        ValueError: a scheduler that we have not; names every field at fault, and what is supported.
    """
    if config.get("_class_name", "DDPMScheduler") != "DDPMScheduler":
        raise ValueError(f"_class_name is {shown(config['_class_name'])}: supported is 'DDPMScheduler'")
    given = settings("scheduler_config.json", config, DEFAULTS)
    betas, steps = given["trained_betas"], given["num_train_timesteps"]
    faults = [*unsupported(given, SUPPORTED), *misfits(given, OPEN)]
    if isinstance(betas, list) and len(betas) != steps:
        faults.append(f"trained_betas has {len(betas)} entries: supported is num_train_timesteps, {shown(steps)}")
    refuse("scheduler_config.json", faults, "It cannot be read as a schedule of vdm_jax.discrete_schedules.")
    return Scheduler(
        num_steps=steps,
        beta_schedule=given["beta_schedule"],
        beta_start=float(given["beta_start"]),  # JSON may have written them as whole numbers
        beta_end=float(given["beta_end"]),
        betas=None if betas is None else tuple(map(float, betas)),
        prediction_type=KINDS[given["prediction_type"]],
        variance=VARIANCES[given["variance_type"]],
        clip=float(given["clip_sample_range"]) if given["clip_sample"] else None,
    )


def to_scheduler_config(scheduler: Scheduler) -> dict[str, Any]:
    """The scheduler_config.json of a schedule."""
    return {
        "_class_name": "DDPMScheduler",
        **DEFAULTS,
        "num_train_timesteps": scheduler.num_steps,
        "beta_start": scheduler.beta_start,
        "beta_end": scheduler.beta_end,
        "beta_schedule": scheduler.beta_schedule,
        "trained_betas": None if scheduler.betas is None else list(scheduler.betas),
        "prediction_type": {ours: theirs for theirs, ours in KINDS.items()}[scheduler.prediction_type],
        "variance_type": {ours: theirs for theirs, ours in VARIANCES.items()}[scheduler.variance],
        "clip_sample": scheduler.clip is not None,
        "clip_sample_range": 1.0 if scheduler.clip is None else scheduler.clip,
    }
