"""The probability-flow ODE: a deterministic path from data to noise, and along it the likelihood itself, not a bound.

    dx/dt = alpha'(t) x_hat(x, t) + sigma'(t) eps_hat(x, t)                                                    (LIK-2)
    log p(x) = log p_1(x_1) + int_{t_0}^1 div dx/dt dt

has at every t the marginals q(x_t), if the denoiser is the best there is. Solved by diffrax, for a whole batch at once.

Source: Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D; Kingma et al. 2021, arXiv:2107.00630.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

from vdm_jax.divergence import Trace, check_trace, directions, value_and_divergence
from vdm_jax.gaussian import Normal
from vdm_jax.levels import Level
from vdm_jax.parameterization import to_eps, to_x_0
from vdm_jax.schedules import Schedule, check_begins_noisy
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    Parameterization,
    PerExample,
    Real,
    Scalar,
    X,
    per_example,
    pytree_callable,
)


def drift(prediction: X, x_t: X, level: Level, rate: Level, kind: Parameterization) -> X:
    """dx/dt of the probability-flow ODE, for one example and any schedule (LIK-2).

        alpha' x_hat + sigma' eps_hat  =  (log alpha)' x_t - 1/2 lambda' sigma eps_hat  =  f x_t - 1/2 g^2 score

    The first form is computed: it is finite where there is no signal left, and (log alpha)' and lambda' are not. In
    the last one f = (log alpha)' and g^2 = -sigma^2 lambda' are those of the forward SDE.

    Args:
        prediction: the denoiser's, shape (*x).
        x_t: the noisy example it was made from, shape (*x).
        level: scalars.
        rate: the level's derivative by t, of which alpha and sigma are read: `jax.jvp(schedule, (t,), (one,))[1]`.
        kind: what the prediction is.

    Raises:
        ValueError: unknown kind.

    Source: Song et al. 2021, arXiv:2011.13456, equation 13; Kingma et al. 2021, arXiv:2107.00630, appendix G (f and g).
    """
    return rate.alpha * to_x_0(prediction, x_t, level, kind) + rate.sigma * to_eps(prediction, x_t, level, kind)


class FlowLikelihood(NamedTuple):
    """The density of a batch, and where the flow took it.

    Fields:
        log_prob: log p(x) at t_0 in nats, shape (B,); NaN if the solver needed more than max_steps.
        x_1: the latents at t = 1, shape (B, *x); NaN likewise.
        evaluations: how often the denoiser was asked.
    """

    log_prob: PerExample
    x_1: Batch
    evaluations: Int[Array, ""]


def flow_log_prob(
    denoiser: Denoiser,
    key: Key,
    x: Batch,
    schedule: Schedule,
    *,
    kind: Parameterization = "eps",
    trace: Trace = "rademacher",
    probes: int = 1,
    t_0: Real | float = 0.0,
    prior_log_var: float = 0.0,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> FlowLikelihood:
    """log p(x) of the model's density at t_0, by the change of variables along the ODE (LIK-2).

        log p(x) = log p_1(x_1) + int_{t_0}^1 div dt

    With the data's own denoiser it is log q(x_{t_0}), but for what the prior p_1 differs from q(x_1). The divergence is
    the trace of a Jacobian, taken exactly, D products a time, or estimated by v^T J v with random v, the same along the
    path: E v v^T = I, so the estimate has no bias. Signs v (`rademacher`) have the least variance, and none where J is
    diagonal.

    The steps of the solver suit the worst example of the batch, so that none depends on its neighbours by more than the
    tolerance. In float32 a number is off by some 1e-5 nats a dimension. Can be differentiated in reverse by the
    denoiser, x and the schedule.

    Args:
        denoiser: predicts `kind`, of each example by itself; asked with the whole batch.
        key: for the probes.
        x: noisy data at t_0, shape (B, *x).
        schedule: continuous, with noise at t_0. Where no signal is left at t = 1, `Cosine` goes with kind x_0 and v,
            and `Sigmoid`, which ends too abruptly, not at all.
        kind: what the denoiser predicts.
        trace: see above.
        probes: how many v an example; their mean is taken.
        t_0: where x is.
        prior_log_var: as in `elbo.prior_kl`.
        tolerance: of the solver a step, relative and absolute; a dimension.
        max_steps: of the solver.

    Returns:
        `FlowLikelihood`.

    Raises:
        ValueError: unknown kind or trace, probes below 1, a schedule without noise at t_0, or one for which the ODE is
            singular at t = 1.

    Source: Song et al. 2021, arXiv:2011.13456, appendix D.2; Grathwohl et al. 2018, arXiv:1810.01367 (the estimate).
    """
    check_trace(trace, probes)
    check_ends(schedule, kind, t_0)
    arguments = (pytree_callable(denoiser), key, x, schedule, jnp.asarray(t_0, x.dtype), prior_log_var, tolerance)
    return _flow_log_prob(*arguments, kind=kind, trace=trace, probes=probes, max_steps=max_steps)


@partial(jax.jit, static_argnames=("kind", "trace", "probes", "max_steps"))
def _flow_log_prob(denoiser, key, x, schedule, t_0, prior_log_var, tolerance, *, kind, trace, probes, max_steps):
    dims, probing = x[0].size, directions(key, x, trace, probes)

    def velocity(t, state):
        move, div = value_and_divergence(partial(_velocity, denoiser, schedule, kind, t), state[0], probing)
        return move, div / dims  # nats a dimension, to which the tolerance applies

    start = (x, jnp.zeros(x.shape[:1], x.dtype))
    (x_1, grown), evaluations = _solve(velocity, start, t_0, jnp.ones_like(t_0), tolerance, max_steps)
    prior = Normal(jnp.zeros_like(x[0]), var=jnp.exp(jnp.asarray(prior_log_var, x.dtype)))
    return FlowLikelihood(jax.vmap(prior.log_prob)(x_1) + dims * grown, x_1, evaluations)


def flow_sample(
    denoiser: Denoiser,
    x_1: Batch,
    schedule: Schedule,
    *,
    kind: Parameterization = "eps",
    t_0: Real | float = 0.0,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> Batch:
    """The ODE backwards: latents x_1, draws of the prior, to x at t_0; the inverse of `flow_log_prob`'s map (LIK-2).

    Args and errors as there. Returns shape (B, *x); NaN if the solver needed more than max_steps.
    """
    check_ends(schedule, kind, t_0)
    t_0 = jnp.asarray(t_0, x_1.dtype)
    return _flow_sample(pytree_callable(denoiser), x_1, schedule, t_0, tolerance, kind=kind, max_steps=max_steps)


@partial(jax.jit, static_argnames=("kind", "max_steps"))
def _flow_sample(denoiser, x_1, schedule, t_0, tolerance, *, kind, max_steps) -> Batch:
    def velocity(t, state):
        return (_velocity(denoiser, schedule, kind, t, state[0]),)

    (x,), _ = _solve(velocity, (x_1,), jnp.ones_like(t_0), t_0, tolerance, max_steps)
    return x


def check_ends(schedule: Schedule, kind: Parameterization, t_0: Real | float = 0.0) -> None:
    """Refuse a schedule along which the ODE of this prediction is singular; one that is traced is not checked.

    Raises:
        ValueError: no noise at t_0, or no signal at t = 1 with a prediction of eps or the score.
    """
    check_begins_noisy(schedule, t_0, jnp.float32)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(schedule)):
        return
    with jax.ensure_compile_time_eval():
        level, rate = _level_and_rate(schedule, jnp.ones(()))
        if not jnp.isfinite(rate.alpha) or (kind in ("eps", "score") and not level.alpha > 0.0):
            cure = "predict x_0 or v, or stop before it does as tables.Interpolated of a table does"
            raise ValueError(f"{schedule} loses its signal at t = 1, where the ODE by {kind} is singular: {cure}")


def _level_and_rate(schedule, t) -> tuple[Level, Level]:
    """The level, and its derivative by t."""
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def _velocity(denoiser, schedule, kind, t, x_t) -> Batch:
    """dx/dt of a batch."""
    level, rate = _level_and_rate(schedule, t)
    prediction = denoiser(x_t, jax.tree.map(lambda field: jnp.full(x_t.shape[:1], field), level))
    return jax.vmap(lambda p, x: drift(p, x, level, rate, kind))(prediction, x_t)


def _solve(velocity, start, begin, end, tolerance, max_steps):
    """The state at `end`, NaN if max_steps did not suffice, and how often the velocity was asked."""
    import diffrax  # a slow import, which the samplers and losses beside this file do not need

    ask = jax.jit(velocity)  # so that it is traced once, however often the solver mentions it
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, state, _: ask(t, state)),
        diffrax.Tsit5(),
        begin,
        end,
        None,
        start,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=_worst),
        max_steps=max_steps,
        throw=False,
    )
    solved = solution.result == diffrax.RESULTS.successful
    state = jax.tree.map(lambda leaf: jnp.where(solved, leaf[-1], jnp.nan), solution.ys)
    evaluations = 6 * solution.stats["num_steps"] + 1  # of Tsit5's seven stages the last is the next step's first
    return state, evaluations


def _worst(error) -> Real:
    """The largest over the batch of an example's root mean square error, in units of what is allowed."""
    return jnp.max(jnp.stack([jnp.max(jnp.sqrt(per_example(leaf**2) / leaf[0].size)) for leaf in error]))
