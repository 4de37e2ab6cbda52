"""DPM-Solver++ of second order, multistep (2M): the ODE, or the SDE, integrated exactly but for the denoiser."""

import jax.numpy as jnp

from vdm_jax.compilation import compiled
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType, at_least_float32


@compiled(static=("clip", "snapshots"), check=warn_of_amplification)
def dpmpp(
    denoiser: Denoiser,
    key: Key | None,
    x_T: Batch,
    schedule: DiscreteSchedule,
    *,
    prediction_type: PredictionType = "eps",
    stochastic: bool = False,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """One question a step, and second order by the answer before, in half log-SNR h = 1/2 (lambda_s - lambda_t).

        D   = x_hat + h / (2 h_before) (x_hat - x_hat_before)
        ODE:  x_s = sigma_s/sigma_t x_t + alpha_s (1 - e^-h) D
        SDE:  x_s = sigma_s/sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z

    The first and the last step, with no answer before and to clean data, are of first order: those of `ddim`, with
    eta 0 or 1.

    Args:
        denoiser: predicts `prediction_type`; called once a step, with the whole batch.
        key: for the noise of the SDE; may be None for the ODE.
        x_T: draws of the prior, shape (B, *x).
        schedule: the schedule; `schedule.subsequence(...)` takes fewer steps, of which this sampler needs some 10 to 20.
        prediction_type: what the denoiser predicts.
        stochastic: the SDE.
        clip: bound on the size of every predicted x_0; None leaves it.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`.

    Raises:
        ValueError: unknown prediction_type, stochastic without a key, or snapshots not in 0..T.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2 and appendix on the SDE.
    """
    if stochastic and key is None:
        raise ValueError("key is None: a stochastic chain needs a key")
    check_snapshots(snapshots, schedule)

    def visit(x_t, memory, step, t):
        (before, drop_before), drop = memory, step.log_snr_drop
        x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
        finite, second = jnp.where(t > 1, drop, 1.0), (t > 1) & (t < schedule.num_steps)
        target = x_hat + jnp.where(second, 0.5 * finite / drop_before, 0.0) * (x_hat - before)
        kept = step.s.sigma / step.t.sigma * x_t
        if stochastic:
            scale = jnp.sqrt(jnp.where(t > 1, step.one_minus_ratio, 1.0))
            x_s = jnp.exp(-0.5 * drop) * kept + step.s.alpha * step.one_minus_ratio * target
            x_s = x_s + step.s.sigma * scale * noise(key, t, x_t)
        else:
            x_s = kept - step.s.alpha * jnp.expm1(-0.5 * drop) * target
        return x_s, x_hat, (x_hat, finite)

    return run(visit, x_T, schedule, snapshots, (jnp.zeros_like(x_T), jnp.ones((), at_least_float32(x_T.dtype))))
