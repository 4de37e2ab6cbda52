"""Bounds estimated along whole paths x_1..x_T sampled from q, where `elbo` samples one level at a time.

`consistency_bound` (ELBO-2) and `joint_log_ratio` (ELBO-1) have the expectation of `elbo.bound`.
`importance_weighted_bound` is tighter, and converges to -log p(x_0) with the number of paths (LIK-1). The states of a
path are in float32 or a wider type; the denoiser receives them in the dtype of x_0.
"""

from functools import partial

import jax
import jax.numpy as jnp

from vdm_jax import forward
from vdm_jax.compilation import compiled, scan
from vdm_jax.discrete_schedules import DiscreteSchedule
from vdm_jax.elbo import DiffusionBound, DiffusionDecoder, decoder_log_prob, reconstruction_nll
from vdm_jax.gaussian import STANDARD_NORMAL, Normal, Prior, kl
from vdm_jax.noise_levels import broadcast_to_batch
from vdm_jax.parameterization import to_x_0
from vdm_jax.types import Batch, Denoiser, Key, PerExample, PredictionType, at_least_float32, evaluate
from vdm_jax.vae import importance_weighted_average

__all__ = [
    "consistency_bound",
    "importance_weighted_bound",
    "joint_log_ratio",
]


@compiled()
def consistency_bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
    prior: Prior = STANDARD_NORMAL,
) -> DiffusionBound:
    """One unbiased estimate per example of the bound's first decomposition (ELBO-2), along one path sampled from q.

        - E log p(x_0 | x_1) + E KL(q(x_T | x_{T-1}) || p(x_T)) + sum_{t=1..T-1} E C_t
        C_t = E log q(x_t | x_{t-1}) / p(x_t | x_{t+1}) = KL(b || p(x_t | x_{t+1})) - KL(b || q(x_t | x_{t-1}))

    The consistency terms C_t, summed in the field `diffusion`, average x_t over the bridge b = q(x_t | x_{t-1},
    x_{t+1}); each needs two states, a term of ELBO-3 one. The source prints C_t as KL(q(x_t | x_{t-1}) ||
    p(x_t | x_{t+1})), which ignores the dependence of x_t on x_{t+1}: that is larger, and its sum grows with T.

    Args, result and errors as in `elbo.bound`, which has the same expectation.

    Source: Luo 2022, arXiv:2208.11970, equations 37 to 45, corrected.
    """
    key_1, key_path = jax.random.split(key)
    start = x_0.astype(at_least_float32(x_0.dtype))

    def move(x_s, t):
        step = broadcast_to_batch(schedule.step(t - 1, t), x_0)
        q, x_t = _transition(x_s, step, jax.random.fold_in(key_path, t))
        return step, q, x_t

    def visit(carry, t):
        x_r, (step_s, q_s, x_s), total = carry  # r, s, t are neighbors: q_s = q(x_s | x_r)
        step_t, q_t, x_t = move(x_s, t)
        bridge = jax.vmap(forward.bridge)(x_r, x_t, step_s, step_t)
        model = jax.vmap(forward.posterior)(x_t, _x_hat(denoiser, x_t, x_0, step_t.t, prediction_type), step_t)
        term = jax.vmap(kl)(bridge, model) - jax.vmap(kl)(bridge, q_s)
        return (x_s, (step_t, q_t, x_t), total + term), None

    first = move(start, 1)
    carry = (start, first, jnp.zeros(x_0.shape[:1], start.dtype))
    (_, (_, q_T, _), consistency), _ = scan(visit, carry, jnp.arange(2, schedule.num_steps + 1))
    p_T = prior.astype(start.dtype)
    return DiffusionBound(
        jax.vmap(lambda q: kl(q, p_T))(q_T),
        reconstruction_nll(denoiser, key_1, x_0, first[0].t, decoder, prediction_type),
        consistency,
    )


def _transition(x_s: Batch, step, key: Key) -> tuple[Normal, Batch]:
    """q(x_t | x_s) of each example, and x_t sampled from it."""
    q = jax.vmap(forward.transition)(x_s, step)
    return q, jax.vmap(Normal.sample)(q, jax.random.split(key, x_s.shape[0])).astype(x_s.dtype)


def _x_hat(denoiser, x_t, x_0, level, prediction_type) -> Batch:
    """The prediction of x_0 from a state of the path; the denoiser receives the state in the dtype of x_0."""
    prediction = evaluate(denoiser, x_t.astype(x_0.dtype), level)
    return jax.vmap(partial(to_x_0, prediction_type=prediction_type))(prediction, x_t, level)


@compiled()
def joint_log_ratio(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: DiffusionDecoder,
    *,
    prediction_type: PredictionType = "eps",
    prior: Prior = STANDARD_NORMAL,
) -> PerExample:
    """log p(x_{0:T}) - log q(x_{1:T} | x_0) along one path x_1..x_T sampled from q (ELBO-1).

    Its expectation is a lower bound on log p(x_0): the negative of the expectation of `elbo.bound`. Which of the two
    has less variance depends on the model; this one equals log p(x_0) on every path if the model is the true reverse
    process.

    Args and errors as in `elbo.bound`. Returns shape (B,), nats.

    Source: Sohl-Dickstein et al. 2015, arXiv:1503.03585; Ho et al. 2020, arXiv:2006.11239, equation 3.
    """
    return _joint_log_ratio(denoiser, key, x_0, schedule, decoder, prediction_type, prior)


def _joint_log_ratio(denoiser, key, x_0, schedule, decoder, prediction_type, prior) -> PerExample:
    start = x_0.astype(at_least_float32(x_0.dtype))

    def visit(carry, t):
        x_s, total = carry
        step = broadcast_to_batch(schedule.step(t - 1, t), x_0)
        q, x_t = _transition(x_s, step, jax.random.fold_in(key, t))
        x_hat = _x_hat(denoiser, x_t, x_0, step.t, prediction_type)
        decoded = decoder_log_prob(decoder, x_0, x_hat, x_t, step.t)
        p = jax.vmap(forward.posterior)(x_t, x_hat, step)
        p = Normal(p.mean, var=jnp.where(t == 1, 1.0, p.var))  # avoids NaN at t = 1, where the decoder replaces it
        reverse = jax.vmap(Normal.log_prob)(p, x_s)
        return (x_t, total + jnp.where(t == 1, decoded, reverse) - jax.vmap(Normal.log_prob)(q, x_t)), None

    carry = (start, jnp.zeros(x_0.shape[:1], start.dtype))
    (x_T, total), _ = scan(visit, carry, jnp.arange(1, schedule.num_steps + 1))
    return total + jax.vmap(prior.astype(start.dtype).log_prob)(x_T)


@compiled(static=("samples",))
def importance_weighted_bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: DiscreteSchedule,
    decoder: DiffusionDecoder,
    *,
    samples: int,
    prediction_type: PredictionType = "eps",
    prior: Prior = STANDARD_NORMAL,
) -> PerExample:
    """The K-sample importance-weighted bound on -log p(x_0), nats (LIK-1).

        -log p(x_0) <= -E log 1/K sum_k p(x_{0:T}^k) / q(x_{1:T}^k | x_0)

    K = 1 is the bound of `elbo`. It decreases with K and converges to -log p(x_0) of the model of T steps. Each path
    evaluates the network T times.

    Args:
        samples: K, at least 1. The others, and errors, as in `elbo.bound`.

    Returns:
        Shape (B,).

    Raises:
        ValueError: samples below 1.

    Source: Burda et al. 2015, arXiv:1509.00519.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: the bound needs at least one path")

    def path(key):
        return _joint_log_ratio(denoiser, key, x_0, schedule, decoder, prediction_type, prior)

    return importance_weighted_average(jax.lax.map(path, jax.random.split(key, samples)))
