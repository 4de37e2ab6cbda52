"""Conversion of diffusers schedulers."""

import itertools
import json

import mpmath
import numpy as np
import pytest

from vdm_jax import interop
from vdm_jax.interop import Scheduler

GOOGLE = {  # of google/ddpm-cifar10-32
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def betas(schedule, start, end, steps):
    """beta_1 .. beta_T as diffusers defines them, in 40 digits."""

    def abar(t):
        return mpmath.cos((t + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2

    start, end = mpmath.mpf(repr(start)), mpmath.mpf(repr(end))
    match schedule:
        case "linear":
            return [start + (end - start) * i / (steps - 1) for i in range(steps)]
        case "scaled_linear":
            low, high = mpmath.sqrt(start), mpmath.sqrt(end)
            return [(low + (high - low) * i / (steps - 1)) ** 2 for i in range(steps)]
        case "squaredcos_cap_v2":
            times = [mpmath.mpf(i) / steps for i in range(steps + 1)]
            return [min(1 - abar(t) / abar(s), mpmath.mpf("0.999")) for s, t in itertools.pairwise(times)]


@pytest.mark.parametrize(
    ("continuous", "start", "end", "steps"),
    [
        ("linear", 0.0001, 0.02, 1000),
        ("linear", 0.0015, 0.0195, 100),
        ("scaled_linear", 0.00085, 0.012, 1000),
        ("squaredcos_cap_v2", 0.0001, 0.02, 1000),
    ],
)
def test_schedules_are_accurate_where_diffusers_float32_is_not(continuous, start, end, steps):
    config = {"beta_schedule": continuous, "beta_start": start, "beta_end": end, "num_train_timesteps": steps}
    schedule = interop.from_scheduler_config(config).discrete_schedule()
    with mpmath.workdps(40):
        abar, exact = mpmath.mpf(1), []
        for beta in betas(continuous, start, end, steps):
            abar *= 1 - beta
            exact.append((abar, 1 - abar))
        signal, noise = (np.array([float(pair[i]) for pair in exact]) for i in (0, 1))
    np.testing.assert_allclose(np.asarray(schedule.levels.alpha[1:], np.float64) ** 2, signal, rtol=3e-7)
    np.testing.assert_allclose(np.asarray(schedule.levels.sigma[1:], np.float64) ** 2, noise, rtol=3e-7)


def test_google_s_scheduler():
    scheduler = interop.from_scheduler_config(GOOGLE)
    assert scheduler == Scheduler(1000, "linear", 0.0001, 0.02, None, "eps", "fixed_large", 1.0)
    written = interop.to_scheduler_config(scheduler)
    assert written["prediction_type"] == "epsilon"
    assert {name: written[name] for name in GOOGLE if name != "_diffusers_version"} == {
        name: value for name, value in GOOGLE.items() if name != "_diffusers_version"
    }


@pytest.mark.parametrize(
    "scheduler",
    [
        Scheduler(),
        Scheduler(100, "squaredcos_cap_v2", prediction_type="v", variance="fixed_large", clip=None),
        Scheduler(3, betas=(0.1, 0.2, 0.7), prediction_type="x_0", clip=2.5),
    ],
)
def test_what_is_written_is_read_again(scheduler):
    config = json.loads(json.dumps(interop.to_scheduler_config(scheduler)))
    assert interop.from_scheduler_config(config) == scheduler


def test_any_schedule_by_its_betas():
    schedule = Scheduler(200, "squaredcos_cap_v2").discrete_schedule()
    by_betas = Scheduler.of(schedule, "v", "fixed_large")
    assert (by_betas.prediction_type, by_betas.variance, by_betas.num_steps) == ("v", "fixed_large", 200)
    # 1e-7 of beta is beta / (1 - beta) times as much of abar: a thousand times at the last beta, which is 0.999
    np.testing.assert_allclose(by_betas.discrete_schedule().log_snr[1:], schedule.log_snr[1:], rtol=0.0, atol=2e-4)
    np.testing.assert_allclose(by_betas.discrete_schedule().log_snr[1:-1], schedule.log_snr[1:-1], rtol=0.0, atol=5e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("variance_type", "learned_range"),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_unsupported_schedulers_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {value!r}: supported is"):
        interop.from_scheduler_config(GOOGLE | {field: value})


def test_other_faults_of_a_scheduler():
    with pytest.raises(ValueError, match="_class_name is 'DDIMScheduler': supported is 'DDPMScheduler'"):
        interop.from_scheduler_config(GOOGLE | {"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match=r"unknown fields \(1\): sigma_min"):
        interop.from_scheduler_config(GOOGLE | {"sigma_min": 0.1})
    with pytest.raises(ValueError, match="trained_betas has 2 entries: supported is num_train_timesteps, 1000"):
        interop.from_scheduler_config(GOOGLE | {"trained_betas": [0.1, 0.2]})
