"""The scheduler_config.json of a diffusers `DDPMScheduler` <-> schedule, prediction type and reverse variance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vdm_jax.discrete_schedules import TabulatedSchedule, discretize, from_betas, linear_betas, to_betas
from vdm_jax.interop.config_checks import (
    invalid_fields,
    is_int,
    is_list_of,
    is_null_or,
    is_number,
    raise_if_any,
    shorten,
    unsupported_fields,
    with_defaults,
)
from vdm_jax.schedules import Cosine

__all__ = ["Scheduler", "from_scheduler_config", "to_scheduler_config"]

PREDICTION_TYPES: dict[str, Literal["eps", "x_0", "v"]] = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
VARIANCES = ("fixed_small", "fixed_large")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
DIFFUSERS_DEFAULTS = {  # for fields missing from scheduler_config.json
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
    "prediction_type": tuple(PREDICTION_TYPES),
    "variance_type": VARIANCES,
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}
MAX_STEPS = 1_000_000
FIELD_CHECKS = {  # for other fields that matter here: the check of a value, and a description of valid ones
    "num_train_timesteps": (is_int(1, MAX_STEPS), f"1 to {MAX_STEPS:,}"),
    "beta_start": (is_number(0, 1), "a number in [0, 1]"),
    "beta_end": (is_number(0, 1), "a number in [0, 1]"),
    "trained_betas": (
        is_null_or(is_list_of(is_number(0, 1), MAX_STEPS)),
        "null, or a list of numbers in [0, 1]",
    ),
    "clip_sample": (lambda v: isinstance(v, bool), "true or false"),
    "clip_sample_range": (is_number(1e-6, 1e6), "a number above 0"),
}


@dataclass(frozen=True)
class Scheduler:
    """A discrete schedule, the prediction type of the network, and the variance of a sampling step.

    Diffusers' timestep t = 0..T-1 is our level t + 1; the network is conditioned on t.

    Fields:
        num_steps: T.
        beta_schedule, beta_start, beta_end: diffusers' name of the beta schedule and its ends (unused by the cosine).
        betas: beta_1 .. beta_T, instead of a named schedule.
        prediction_type, variance: as in `samplers.ancestral`.
        clip: bound on the predicted x_0 in sampling, or None.
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
        """Levels 0..T in float64; diffusers' float32 product has a relative error of 2e-4 in 1 - abar at T = 1,000.

        Raises:
            ValueError: invalid betas, as in `discrete_schedules.from_betas`.

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
        """Any variance-preserving discrete schedule, by its betas."""
        betas = tuple(np.asarray(to_betas(schedule).beta, np.float64).tolist())
        return cls(schedule.num_steps, betas=betas, prediction_type=prediction_type, variance=variance)


def from_scheduler_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler described by scheduler_config.json.

    Args:
        config: the contents of scheduler_config.json; missing fields have diffusers' defaults. The selection of
            fewer steps (timestep_spacing, steps_offset) is an option of sampling and ignored here.

    Raises:
        ValueError: an unsupported scheduler; lists every invalid field and the supported values.
    """
    if config.get("_class_name", "DDPMScheduler") != "DDPMScheduler":
        raise ValueError(f"_class_name is {shorten(config['_class_name'])}: supported is 'DDPMScheduler'")
    given = with_defaults("scheduler_config.json", config, DIFFUSERS_DEFAULTS)
    betas, steps = given["trained_betas"], given["num_train_timesteps"]
    faults = [*unsupported_fields(given, SUPPORTED), *invalid_fields(given, FIELD_CHECKS)]
    if isinstance(betas, list) and len(betas) != steps:
        faults.append(f"trained_betas has {len(betas)} entries: supported is num_train_timesteps, {shorten(steps)}")
    raise_if_any(faults, "scheduler_config.json", "vdm_jax.discrete_schedules cannot represent this scheduler.")
    return Scheduler(
        num_steps=steps,
        beta_schedule=given["beta_schedule"],
        beta_start=float(given["beta_start"]),  # JSON may have them as integers
        beta_end=float(given["beta_end"]),
        betas=None if betas is None else tuple(map(float, betas)),
        prediction_type=PREDICTION_TYPES[given["prediction_type"]],
        variance=given["variance_type"],
        clip=float(given["clip_sample_range"]) if given["clip_sample"] else None,
    )


def to_scheduler_config(scheduler: Scheduler) -> dict[str, Any]:
    """The contents of scheduler_config.json for a scheduler."""
    return {
        "_class_name": "DDPMScheduler",
        **DIFFUSERS_DEFAULTS,
        "num_train_timesteps": scheduler.num_steps,
        "beta_start": scheduler.beta_start,
        "beta_end": scheduler.beta_end,
        "beta_schedule": scheduler.beta_schedule,
        "trained_betas": None if scheduler.betas is None else list(scheduler.betas),
        "prediction_type": {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}[scheduler.prediction_type],
        "variance_type": scheduler.variance,
        "clip_sample": scheduler.clip is not None,
        "clip_sample_range": 1.0 if scheduler.clip is None else scheduler.clip,
    }
