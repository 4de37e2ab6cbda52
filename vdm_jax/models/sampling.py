"""Sampling options of diffusion models: `make sample` can change all of them without training again."""

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

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Sampling with a trained diffusion model."""

    sampler: Literal[
        "ancestral", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "predictor_corrector", "adaptive"
    ] = "ancestral"
    """The sampling algorithm."""
    steps: int = 0
    """Number of sampling steps; 0 takes every step of the model."""
    spacing: Literal["uniform", "log_snr", "karras"] = "uniform"
    """Spacing of the steps: uniform in t, uniform in the log-SNR, or as in Karras et al., densest at low noise
    levels."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """Variance of an ancestral step: the posterior variance (fixed_small) or beta_t (fixed_large)."""
    eta: float = 0.0
    """DDIM stochasticity eta: 0 is deterministic, 1 is ancestral sampling."""
    s_churn: float = 0.0
    """Amount of noise added before each step of euler and heun (S_churn of Karras et al.)."""
    tolerance: float = 1e-4
    """Error tolerance of the adaptive sampler, absolute and relative."""
    label: int | None = None
    """Sample this class only (class-conditional models); by default every class in turn."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale: 0 is unconditional, 1 conditional, above 1 strengthens the conditioning."""

    def check(self, num_steps: int, num_classes: int = 0) -> None:
        """Reject options that a model with this many steps and classes cannot satisfy.

        Raises:
            ValueError: names the option and its remedy.
        """
        if not 0 <= self.steps <= num_steps:
            raise ValueError(f"the number of sampling steps must be in 1..{num_steps}, or 0 for all; got {self.steps}")
        if self.label is not None and not 0 <= self.label < num_classes:
            if not num_classes:
                raise ValueError(f"label {self.label} was given, but the model is unconditional: omit it")
            raise ValueError(
                f"label {self.label} is out of range: the model has {num_classes} classes (0..{num_classes - 1})"
            )
        if self.guidance_scale != 1.0 and not num_classes:
            raise ValueError(
                f"guidance scale {self.guidance_scale:g} needs a class-conditional model, such as ddpm_digits_cond; "
                "use 1 for an unconditional model"
            )

    def subsequence(self, schedule: TabulatedSchedule) -> TabulatedSchedule:
        """The steps of a discrete schedule that sampling takes."""
        count = self.steps or schedule.num_steps
        match self.spacing:
            case "uniform":
                return schedule.subsequence(uniform_steps(schedule.num_steps, count))
            case "log_snr":
                return schedule.subsequence(log_snr_uniform_steps(schedule, count))
            case "karras":
                return schedule.subsequence(karras_steps(schedule, count))

    def network_evaluations(self, num_steps: int) -> int:
        """Approximate number of network evaluations per sample, for a model with this many steps."""
        each = {"heun": 2, "predictor_corrector": 2}.get(self.sampler, 1) * (1 if self.guidance_scale == 1.0 else 2)
        return each * (100 if self.sampler == "adaptive" else self.steps or num_steps)

    def sample(
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
        """Run the sampler from x_T.

        Args:
            denoiser: predicts `prediction_type`.
            key: randomness of the sampler.
            x_T: noise, shape (B, *x).
            schedule: a tabulated schedule, of which `spacing` selects the steps; of any other, every step is taken.
            continuous: the same schedule in continuous time, for the adaptive sampler.
            prediction_type: what the denoiser predicts.
            clip: bound on the predicted x_0, or None.
            snapshots: the largest number of states in the trajectory; the adaptive sampler keeps none.
        """
        options = {"prediction_type": prediction_type, "clip": clip}
        if self.sampler == "adaptive":
            return samplers.adaptive(denoiser, key, x_T, continuous, tolerance=self.tolerance, **options)
        steps = self.subsequence(schedule) if isinstance(schedule, TabulatedSchedule) else schedule
        options["snapshots"] = min(snapshots, steps.num_steps)
        match self.sampler:
            case "ancestral":
                return samplers.ancestral(denoiser, key, x_T, steps, variance=self.variance, **options)
            case "ddim":
                return samplers.ddim(denoiser, key, x_T, steps, eta=self.eta, **options)
            case "euler":
                return samplers.euler(
                    denoiser, key, x_T, steps, s_churn=self.s_churn, full_schedule=schedule, **options
                )
            case "heun":
                return samplers.heun(denoiser, key, x_T, steps, s_churn=self.s_churn, full_schedule=schedule, **options)
            case "dpmpp_2m":
                return samplers.dpmpp_2m(denoiser, key, x_T, steps, **options)
            case "dpmpp_2m_sde":
                return samplers.dpmpp_2m_sde(denoiser, key, x_T, steps, **options)
            case "predictor_corrector":
                return samplers.predictor_corrector(denoiser, key, x_T, steps, **options)
