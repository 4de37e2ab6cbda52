"""Inpainting by replacement: the known part of x_t is drawn anew from q(x_t | x_0) after every step."""

import jax
import jax.numpy as jnp

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.samplers.chain import Samples, check_snapshots, noise, posterior_step, predict, run, warn_of_amplification
from vdm_jax.types import Batch, Denoiser, Key, PredictionType


@compiled(static=("rounds", "clip", "snapshots"), check=warn_of_amplification)
def repaint(
    denoiser: Denoiser,
    key: Key,
    x_T: Batch,
    schedule: DiscreteSchedule,
    known: Batch,
    mask: Batch,
    *,
    prediction_type: PredictionType = "eps",
    rounds: int = 1,
    clip: float | None = None,
    snapshots: int = 0,
) -> Samples:
    """`ancestral` for the unknown part, q(x_t | x_0) for the known one, put together at every level.

    What is drawn for the unknown part does not know what the known part will be, so the law is not the conditional one:
    with `rounds` a step is taken again, from its end noised back to its beginning, and the two parts come to agree.
    `guidance.ReconstructionGuidance` is the other way.

    Args:
        denoiser: predicts `prediction_type`; called `rounds` times a step, with the whole batch.
        key: for the noise.
        x_T: draws of the prior, shape (B, *x).
        schedule: the schedule.
        known: x_0, of which the masked part is looked at, shape (B, *x).
        mask: 1 where it is known and 0 where not, shape (B, *x).
        prediction_type: what the denoiser predicts.
        rounds: how often each step is taken, at least 1.
        clip: bound on the size of every predicted x_0; None leaves it.
        snapshots: how many evenly spaced states to return, 0..T.

    Returns:
        `Samples`, their known part as it was given.

    Raises:
        ValueError: unknown prediction_type, rounds below 1, shapes that differ, or snapshots not in 0..T.

    Source: Song et al. 2021, arXiv:2011.13456, appendix I.2; Lugmayr et al. 2022, arXiv:2201.09865 (the rounds).
    """
    if not known.shape == mask.shape == x_T.shape:
        raise ValueError(f"x_T {x_T.shape}, known {known.shape} and mask {mask.shape} must be of one shape")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: every step is taken at least once")
    check_snapshots(snapshots, schedule)
    key_x, key_known, key_back = jax.random.split(key, 3)

    def put(level, fresh, x):
        return jnp.where(mask > 0, level.alpha * known + level.sigma * fresh, x)

    def visit(x_t, memory, step, t):
        def once(x_t, turn):
            i = t * rounds + turn
            x_hat = predict(denoiser, x_t, step.t, prediction_type, clip).x_hat
            x_s = put(step.s, noise(key_known, i, x_t), posterior_step(x_t, x_hat, step, noise(key_x, i, x_t)))
            again = forward.transition(x_s, step)
            return again.mean + jnp.sqrt(again.var) * noise(key_back, i, x_t), (x_s, x_hat)

        _, (x_s, x_hat) = scan(once, x_t, jnp.arange(rounds))
        return x_s[-1], x_hat[-1], memory

    start = put(schedule(schedule.num_steps), noise(key_known, 0, x_T), x_T).astype(x_T.dtype)
    return run(visit, start, schedule, snapshots)
