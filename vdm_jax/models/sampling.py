"""How samples are drawn: options of `make sample` that a trained model does not depend on."""

from dataclasses import dataclass
from typing import Literal

from vdm_jax import samplers
from vdm_jax.discrete_schedules import (
    DiscreteSchedule,
    TabulatedSchedule,
    karras_steps,
    log_snr_uniform_steps,
    uniform_steps,
)
from vdm_jax.schedules import Schedule


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    sampler: Literal[
        "ancestral", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "predictor_corrector", "adaptive"
    ] = "ancestral"
    """The way from noise to data."""
    steps: int = 0
    """Steps of it; 0 is all of the model's."""
    spacing: Literal["even", "log_snr", "karras"] = "even"
    """Which steps, where they are fewer: even in t, even in the log-SNR, or Karras et al.'s, most with little noise."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """Variance of an ancestral step: the posterior's (lower) or beta_t (upper)."""
    eta: float = 0.0
    """Share of the noise in a step of ddim."""
    s_churn: float = 0.0
    """Noise added in each step of euler and heun (S_churn of Karras et al.)."""
    tolerance: float = 1e-4
    """Of the adaptive sampler."""
    label: int | None = None
    """Draw this class only (models with labels); all in turn by default."""
    guidance: float = 1.0
    """Weight of the label: 1 is the model's own, more is more than that, 0 is none."""

    def check(self, num_steps: int, num_classes: int = 0) -> None:
        """Refuse what a model of so many steps and classes cannot do.

        Raises:
            ValueError: names the option and its remedy.
        """
        if not 0 <= self.steps <= num_steps:
            raise ValueError(f"{self.steps} sampling steps: the model has {num_steps}, and 0 takes all of them")
        if self.label is not None and not 0 <= self.label < num_classes:
            known = f"takes labels 0..{num_classes - 1}" if num_classes else "has no labels"
            raise ValueError(f"label {self.label}: the model {known}")
        if self.guidance != 1.0 and not num_classes:
            raise ValueError("guidance needs a model with labels, such as ddpm_digits_cond")

    def chain(self, schedule: TabulatedSchedule) -> TabulatedSchedule:
        """The steps to take, of a table's."""
        count = self.steps or schedule.num_steps
        match self.spacing:
            case "even":
                return schedule.subsequence(uniform_steps(schedule.num_steps, count))
            case "log_snr":
                return schedule.subsequence(log_snr_uniform_steps(schedule, count))
            case "karras":
                return schedule.subsequence(karras_steps(schedule, count))

    def passes(self, num_steps: int) -> int:
        """How often the network runs for a sample of a model of so many steps, about."""
        each = {"heun": 2, "predictor_corrector": 2}.get(self.sampler, 1) * (1 if self.guidance == 1.0 else 2)
        return each * (100 if self.sampler == "adaptive" else self.steps or num_steps)

    def draw(
        self,
        denoiser,
        key,
        x_T,
        schedule: DiscreteSchedule,
        continuous: Schedule,
        *,
        prediction_type,
        clip: float | None,
        snapshots: int,
    ) -> samplers.Samples:
        """Samples from x_T by the steps asked for of a table, or all of a grid; with snapshots where there are any."""
        given, chain = (
            {"prediction_type": prediction_type, "clip": clip},
            self.chain(schedule) if isinstance(schedule, TabulatedSchedule) else schedule,
        )
        if self.sampler == "adaptive":
            return samplers.adaptive(denoiser, key, x_T, continuous, tolerance=self.tolerance, **given)
        given["snapshots"] = min(snapshots, chain.num_steps)
        match self.sampler:
            case "ancestral":
                return samplers.ancestral(denoiser, key, x_T, chain, variance=self.variance, **given)
            case "ddim":
                return samplers.ddim(denoiser, key, x_T, chain, eta=self.eta, **given)
            case "euler":
                return samplers.euler(denoiser, key, x_T, chain, s_churn=self.s_churn, full_schedule=schedule, **given)
            case "heun":
                return samplers.heun(denoiser, key, x_T, chain, s_churn=self.s_churn, full_schedule=schedule, **given)
            case "dpmpp_2m":
                return samplers.dpmpp_2m(denoiser, key, x_T, chain, **given)
            case "dpmpp_2m_sde":
                return samplers.dpmpp_2m_sde(denoiser, key, x_T, chain, **given)
            case "predictor_corrector":
                return samplers.predictor_corrector(denoiser, key, x_T, chain, **given)
