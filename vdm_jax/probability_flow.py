"""The probability-flow ODE: a deterministic path from data to noise, and along it the likelihood itself, not a bound.

    dx/dt = alpha'(t) x_hat(x, t) + sigma'(t) eps_hat(x, t)                                                    (LIK-2)
    log p(x) = log p_1(x_1) + int_{t_0}^1 div dx/dt dt

has at every t the marginals q(x_t), if the denoiser is the best there is. Solved by diffrax, for a whole batch at once,
in float32 or wider: an adaptive solver would take the rounding of a smaller type for the ODE's own motion. The denoiser
sees that wider x_t; what is returned of x's kind has x's type.

Source: Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D; Kingma et al. 2021, arXiv:2107.00630.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_context, eval_jaxpr
from jaxtyping import Array, Int

from vdm_jax.compilation import compiled, varying_like
from vdm_jax.divergence import Trace, check_trace, directions, value_and_divergence
from vdm_jax.gaussian import STANDARD_NORMAL, Prior
from vdm_jax.noise_levels import NoiseLevel, broadcast_to_batch
from vdm_jax.parameterization import to_eps, to_x_0
from vdm_jax.schedules import Schedule, check_noise_at_start
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    PerExample,
    PredictionType,
    Real,
    Scalar,
    X,
    at_least_float32,
    evaluate,
    per_example,
)


def drift(prediction: X, x_t: X, level: NoiseLevel, rate: NoiseLevel, prediction_type: PredictionType) -> X:
    """dx/dt of the probability-flow ODE, for one example and any schedule (LIK-2).

        alpha' x_hat + sigma' eps_hat  =  (log alpha)' x_t - 1/2 lambda' sigma eps_hat  =  f x_t - 1/2 g^2 score

    The first form is computed: it is finite where there is no signal left, and (log alpha)' and lambda' are not. In
    the last one f = (log alpha)' and g^2 = -sigma^2 lambda' are those of the forward SDE.

    Args:
        prediction: the denoiser's, shape (*x).
        x_t: the noisy example it was made from, shape (*x).
        level: scalars.
        rate: the level's derivative by t, of which alpha and sigma are read: `jax.jvp(schedule, (t,), (one,))[1]`.
        prediction_type: what the prediction is.

    Raises:
        ValueError: unknown prediction_type.

    Source: Song et al. 2021, arXiv:2011.13456, equation 13; Kingma et al. 2021, arXiv:2107.00630, appendix G (f and g).
    """
    return rate.alpha * to_x_0(prediction, x_t, level, prediction_type) + rate.sigma * to_eps(
        prediction, x_t, level, prediction_type
    )


class FlowLogLikelihood(NamedTuple):
    """The density of a batch, and where the flow took it.

    Fields:
        log_prob: log p(x) at t_0 in nats, shape (B,); NaN if the solver needed more than max_steps.
        x_1: the latents at t = 1, shape (B, *x); NaN likewise.
        evaluations: how often the denoiser was asked.
    """

    log_prob: PerExample
    x_1: Batch
    evaluations: Int[Array, ""]


def check_nonsingular(schedule: Schedule, prediction_type: PredictionType, t_0: Scalar | float = 0.0) -> None:
    """Refuse a schedule along which the ODE of this prediction is singular; one that is traced is not checked.

    Raises:
        ValueError: no noise at t_0, or no signal at t = 1 with a prediction of eps or the score.
    """
    import diffrax  # noqa: F401  now: it adds to JAX's configuration, and what was compiled before would be again

    check_noise_at_start(schedule, t_0, jnp.float32)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(schedule)):
        return
    with eval_context(), jax.numpy_dtype_promotion("standard"):
        level, rate = _level_and_rate(schedule, jnp.ones(()))
        singular = not jnp.isfinite(rate.alpha) or (prediction_type in ("eps", "score") and not level.alpha > 0.0)
    if singular:
        cure = "predict x_0 or v, or stop before it does as discrete_schedules.InterpolatedSchedule of a table does"
        raise ValueError(
            f"{schedule} loses its signal at t = 1, where the ODE by {prediction_type} is singular: {cure}"
        )


@compiled(static=("probes", "max_steps"), check=check_nonsingular)
def log_likelihood(
    denoiser: Denoiser,
    key: Key | None,
    x: Batch,
    schedule: Schedule,
    *,
    prediction_type: PredictionType = "eps",
    trace: Trace = "rademacher",
    probes: int = 1,
    t_0: Scalar | float = 0.0,
    prior: Prior = STANDARD_NORMAL,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> FlowLogLikelihood:
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
        denoiser: predicts `prediction_type`, of each example by itself; asked with the whole batch.
        key: for the probes; may be None where the trace is exact.
        x: noisy data at t_0, shape (B, *x).
        schedule: continuous, with noise at t_0. Where no signal is left at t = 1, `Cosine` goes with kind x_0 and v,
            and `Sigmoid`, which ends too abruptly, not at all.
        prediction_type: what the denoiser predicts.
        trace: see above.
        probes: how many v an example; their mean is taken.
        t_0: where x is.
        prior: p(x_T), with scalar fields, as in `elbo.prior_kl`.
        tolerance: of the solver a step, relative and absolute; a dimension.
        max_steps: of the solver.

    Returns:
        `FlowLikelihood`.

    Raises:
        ValueError: unknown prediction_type or trace, probes below 1, a schedule without noise at t_0, or one for which the ODE is
            singular at t = 1.

    Source: Song et al. 2021, arXiv:2011.13456, appendix D.2; Grathwohl et al. 2018, arXiv:1810.01367 (the estimate).
    """
    check_trace(trace, probes)
    start = x.astype(at_least_float32(x.dtype))
    dims, probing = x[0].size, directions(key, start, trace, probes)

    def velocity(parts, t, state):
        denoiser, schedule, probing = parts
        move, div = value_and_divergence(partial(_velocity, denoiser, schedule, prediction_type, t), state[0], probing)
        return move, div / dims  # nats a dimension, to which the tolerance applies

    state = (start, jnp.zeros(x.shape[:1], start.dtype))
    solve = partial(_solve, velocity, max_steps)
    (x_1, grown), evaluations = _apart(solve, (denoiser, schedule, probing), state, (t_0, 1.0), tolerance)
    log_prob = jax.vmap(prior.astype(x_1.dtype).log_prob)(x_1)
    return FlowLogLikelihood(log_prob + dims * grown, x_1.astype(x.dtype), evaluations)


@compiled(static=("max_steps",), check=check_nonsingular)
def sample(
    denoiser: Denoiser,
    x_1: Batch,
    schedule: Schedule,
    *,
    prediction_type: PredictionType = "eps",
    t_0: Scalar | float = 0.0,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> Batch:
    """The ODE backwards: latents x_1, draws of the prior, to x at t_0; the inverse of `flow_log_prob`'s map (LIK-2).

    Args and errors as there. Returns shape (B, *x); NaN if the solver needed more than max_steps.
    """

    def velocity(parts, t, state):
        denoiser, schedule = parts
        return (_velocity(denoiser, schedule, prediction_type, t, state[0]),)

    solve, start = partial(_solve, velocity, max_steps), (x_1.astype(at_least_float32(x_1.dtype)),)
    (x,), _ = _apart(solve, (denoiser, schedule), start, (1.0, t_0), tolerance)
    return x.astype(x_1.dtype)


def _level_and_rate(schedule, t) -> tuple[NoiseLevel, NoiseLevel]:
    """The level, and its derivative by t."""
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def _velocity(denoiser, schedule, prediction_type, t, x_t) -> Batch:
    """dx/dt of a batch."""
    level, rate = _level_and_rate(schedule, t)
    prediction = evaluate(denoiser, x_t, broadcast_to_batch(level, x_t))
    return jax.vmap(lambda p, x: drift(p, x, level, rate, prediction_type))(prediction, x_t).astype(x_t.dtype)


def _solve(velocity, max_steps, parts, start, ends, tolerance):
    """The state at the second of the ends, NaN if max_steps did not suffice, and how often the velocity was asked."""
    import diffrax  # a slow import, which the samplers and losses beside this file do not need

    begin, end, tolerance = (jnp.asarray(number, start[0].dtype) for number in (*ends, tolerance))
    ask = jax.jit(partial(velocity, parts))  # so that it is traced once, however often the solver mentions it
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


def _apart(function, *arguments):
    """function(*arguments), traced as outside of the `jax.shard_map` that this is in, if in one.

    The loops of diffrax and their gradients mix arrays that vary over a mesh with constants that do not, which a
    `shard_map` refuses. On one device they are right, so they are traced as for one, and again for the gradient.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return function(*arguments)
    leaves, treedef = jax.tree.flatten(arguments)
    arrays = [varying_like(leaf, leaves) for leaf in leaves if isinstance(leaf, jax.Array)]
    smooth = [jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays]

    def join(floats, others):
        floats, others = iter(floats), iter(others)
        given = iter([next(floats if is_float else others) for is_float in smooth])
        return jax.tree.unflatten(treedef, [next(given) if isinstance(leaf, jax.Array) else leaf for leaf in leaves])

    @jax.custom_vjp
    def call(floats, others):
        return _traced_apart(lambda *parts: function(*join(*parts)), floats, others)

    def forward(floats, others):
        return _traced_apart(
            lambda floats, others: jax.vjp(lambda floats: function(*join(floats, others)), floats), floats, others
        )

    def backward(pull, cotangent):
        return *_traced_apart(lambda pull, cotangent: pull(cotangent), pull, cotangent), None

    call.defvjp(forward, backward)
    split = ([a for a, s in zip(arrays, smooth, strict=True) if s is chosen] for chosen in (True, False))
    return call(*split)


def _traced_apart(function, *arguments):
    """function(*arguments), of arrays alone: its program made without a mesh, and results that vary as they do."""
    leaves, treedef = jax.tree.flatten(arguments)
    program = jax.jit(lambda *leaves: function(*jax.tree.unflatten(treedef, leaves)))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        jaxpr, result = jax.make_jaxpr(program, return_shape=True)(*shapes)
    found = eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)
    return jax.tree.unflatten(jax.tree.structure(result), [varying_like(leaf, leaves) for leaf in found])
