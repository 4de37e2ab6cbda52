"""The probability-flow ODE: a deterministic map between data and noise, and the log-likelihood along it.

    dx/dt = alpha'(t) x_hat(x, t) + sigma'(t) eps_hat(x, t)                                                    (LIK-2)
    log p(x) = log p_1(x_1) + int_{t_0}^1 div dx/dt dt

With the optimal denoiser the ODE has the marginals q(x_t) at every t. diffrax solves it for a whole batch, in float32
or wider: an adaptive solver would mistake the rounding errors of a narrower type for the dynamics. The denoiser is
evaluated on this wider x_t; results of the shape of x have the dtype of x.

Source: Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D; Kingma et al. 2021, arXiv:2107.00630.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_context, eval_jaxpr
from jaxtyping import Array, Float, Int

from vdm_jax.compilation import compiled, varying_like
from vdm_jax.divergence import Trace, check_trace, hutchinson_probes, value_and_divergence
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

__all__ = [
    "FlowLogLikelihood",
    "FlowSample",
    "check_nonsingular",
    "drift",
    "encode",
    "interpolate",
    "log_likelihood",
    "sample",
    "sample_with_log_prob",
    "spherical_interpolation",
]


def drift(prediction: X, x_t: X, level: NoiseLevel, rate: NoiseLevel, prediction_type: PredictionType) -> X:
    """dx/dt of the probability-flow ODE for one example (LIK-2).

        alpha' x_hat + sigma' eps_hat  =  (log alpha)' x_t - 1/2 lambda' sigma eps_hat  =  f x_t - 1/2 g^2 score

    The first form is computed: it is finite at alpha = 0, unlike (log alpha)' and lambda'. In the last form
    f = (log alpha)' and g^2 = -sigma^2 lambda' are the coefficients of the forward SDE.

    Args:
        prediction: the denoiser's prediction for x_t, shape (*x).
        x_t: noisy example, shape (*x).
        level: scalars.
        rate: derivative of the level with respect to t; only alpha and sigma are used: `jax.jvp(schedule, (t,),
            (one,))[1]`.
        prediction_type: what the denoiser predicts.

    Raises:
        ValueError: unknown prediction_type.

    Source: Song et al. 2021, arXiv:2011.13456, equation 13; Kingma et al. 2021, arXiv:2107.00630, appendix G (f and g).
    """
    return rate.alpha * to_x_0(prediction, x_t, level, prediction_type) + rate.sigma * to_eps(
        prediction, x_t, level, prediction_type
    )


class FlowLogLikelihood(NamedTuple):
    """The log-density of a batch and its latents.

    Fields:
        log_prob: log p(x) at t_0 in nats, shape (B,); NaN if the solver needed more than max_steps.
        x_1: the latents at t = 1, shape (B, *x); NaN in the same case.
        evaluations: number of evaluations of the denoiser.
    """

    log_prob: PerExample
    x_1: Batch
    evaluations: Int[Array, ""]


class FlowSample(NamedTuple):
    """Samples of the probability-flow ODE and their log-density.

    Fields:
        x: the samples at t_0, shape (B, *x); NaN if the solver needed more than max_steps.
        log_prob: log p(x) at t_0 in nats, shape (B,); NaN in the same case.
        evaluations: number of evaluations of the denoiser.
    """

    x: Batch
    log_prob: PerExample
    evaluations: Int[Array, ""]


def check_nonsingular(schedule: Schedule, prediction_type: PredictionType, t_0: Scalar | float = 0.0) -> None:
    """Check that the ODE is nonsingular for this schedule and prediction type. Traced schedules are not checked.

    Raises:
        ValueError: no noise at t_0, or no signal at t = 1 with an eps or score prediction.
    """
    import diffrax  # noqa: F401  before compilation: the import changes JAX's configuration, which invalidates compiled programs

    check_noise_at_start(schedule, t_0, jnp.float32)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(schedule)):
        return
    with eval_context(), jax.numpy_dtype_promotion("standard"):
        level, rate = _level_and_rate(schedule, jnp.ones(()))
        singular = not jnp.isfinite(rate.alpha) or (prediction_type in ("eps", "score") and not level.alpha > 0.0)
    if singular:
        raise ValueError(
            f"{schedule} has no signal at t = 1, where the ODE is singular with prediction_type={prediction_type!r}: "
            "predict x_0 or v, or use discrete_schedules.InterpolatedSchedule of a discrete schedule"
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
    """log p(x) at t_0, by the instantaneous change of variables along the probability-flow ODE (LIK-2).

        log p(x) = log p_1(x_1) + int_{t_0}^1 div dt

    With the optimal denoiser it is log q(x_{t_0}), up to the difference between the prior p_1 and q(x_1). The
    divergence is the trace of a Jacobian: exact, with D products per evaluation, or estimated by v^T J v with random v
    that are fixed along the path (FFJORD). The estimate is unbiased; `rademacher` has the smallest variance.

    Step sizes are those of the worst example of the batch, so an example depends on the others only within the
    tolerance. The error in float32 is about 1e-5 nats per dimension. Differentiable in reverse mode with respect to the
    denoiser, x and the schedule.

    Args:
        denoiser: predicts `prediction_type` for each example independently; evaluated on the whole batch.
        key: for the random v; may be None if the trace is exact.
        x: noisy data at t_0, shape (B, *x).
        schedule: a continuous schedule with noise at t_0. `Cosine` has no signal at t = 1 and needs x_0 or v
            predictions; `Sigmoid`, whose derivative is not finite at t = 1, is not supported.
        prediction_type: what the denoiser predicts.
        trace: how the divergence is computed, as in `divergence.hutchinson_probes`.
        probes: number of v for each example, over which the mean is taken.
        t_0: the time of x.
        prior: p(x_T), with scalar fields, as in `elbo.prior_kl`.
        tolerance: relative and absolute tolerance of a solver step, for each dimension.
        max_steps: maximum number of solver steps.

    Returns:
        `FlowLogLikelihood`.

    Raises:
        ValueError: unknown prediction_type or trace, probes below 1, a schedule without noise
            at t_0, or one for which the ODE is singular at t = 1.

    Source: Song et al. 2021, arXiv:2011.13456, appendix D.2; Grathwohl et al. 2018, arXiv:1810.01367 (the trace
    estimate).
    """
    how = (prediction_type, trace, probes, tolerance, max_steps)
    x_1, divergence, evaluations = _solve_with_divergence(denoiser, key, x, schedule, (t_0, 1.0), *how)
    log_prob = jax.vmap(prior.astype(x_1.dtype).log_prob)(x_1)
    return FlowLogLikelihood(log_prob + divergence, x_1.astype(x.dtype), evaluations)


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
    """Solve the ODE from latents x_1, samples of the prior, to x at t_0: the inverse of `log_likelihood` (LIK-2).

    Arguments and errors as in `log_likelihood`. Returns shape (B, *x); NaN if the solver needed more than max_steps.
    """
    return _solve_between(denoiser, x_1, schedule, (1.0, t_0), prediction_type, tolerance, max_steps)


@compiled(static=("max_steps",), check=check_nonsingular)
def encode(
    denoiser: Denoiser,
    x: Batch,
    schedule: Schedule,
    *,
    prediction_type: PredictionType = "eps",
    t_0: Scalar | float = 0.0,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> Batch:
    """Solve the ODE from x at t_0 to its latents x_1: the inverse of `sample` (LIK-2).

    They are the latents of `log_likelihood`, without the cost of the divergence. Arguments and errors as there. Returns
    shape (B, *x); NaN if the solver needed more than max_steps.
    """
    return _solve_between(denoiser, x, schedule, (t_0, 1.0), prediction_type, tolerance, max_steps)


@compiled(static=("max_steps",), check=check_nonsingular)
def interpolate(
    denoiser: Denoiser,
    x_a: Batch,
    x_b: Batch,
    schedule: Schedule,
    weights: Float[Array, " W"],
    *,
    prediction_type: PredictionType = "eps",
    t_0: Scalar | float = 0.0,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> Float[Array, "W B *x"]:
    """Interpolation between examples through the latents of the ODE: `encode`, `spherical_interpolation`, `sample`.

    Args:
        denoiser: predicts `prediction_type`; evaluated on W B examples at once.
        x_a, x_b: pairs of examples at t_0, shape (B, *x).
        schedule, prediction_type, t_0, tolerance, max_steps: as in `log_likelihood`.
        weights: of x_b, shape (W,): 0 gives x_a and 1 gives x_b, up to the tolerance of the solver.

    Returns:
        shape (W, B, *x); NaN if the solver needed more than max_steps.

    Raises:
        ValueError: as in `log_likelihood`, or x_a and x_b have different shapes.

    Source: Song et al. 2021, arXiv:2010.02502, section 5.3 and appendix D.5; Song et al. 2021, arXiv:2011.13456,
    appendix D.3.
    """
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a has shape {x_a.shape} and x_b {x_b.shape}: they must be the same")
    how = (prediction_type, tolerance, max_steps)
    ends = _solve_between(denoiser, jnp.concatenate([x_a, x_b]), schedule, (t_0, 1.0), *how)
    between = spherical_interpolation(ends[: len(x_a)], ends[len(x_a) :], weights)
    flat = between.reshape(-1, *x_a.shape[1:])
    return _solve_between(denoiser, flat, schedule, (1.0, t_0), *how).reshape(between.shape)


def spherical_interpolation(x_a: Batch, x_b: Batch, weights: Float[Array, " W"]) -> Float[Array, "W B *x"]:
    """The points on the arc between x_a and x_b, whose norms interpolate: latents of a typical size stay typical.

        [sin((1 - w) theta) x_a + sin(w theta) x_b] / sin(theta),   theta the angle between x_a and x_b

    In high dimensions samples of N(0, I) have a norm near sqrt(D), and so have these points; the points of a straight
    line have a smaller one. For theta near 0, where both are the same, the straight line is returned.

    Args:
        x_a, x_b: shape (B, *x).
        weights: w, shape (W,).

    Returns:
        shape (W, B, *x).

    Source: Shoemake 1985; Song et al. 2021, arXiv:2010.02502, appendix D.5.
    """

    def one(a, b):
        a, b = (x.astype(at_least_float32(x.dtype)) for x in (a, b))
        lengths = jnp.linalg.norm(a.reshape(-1)), jnp.linalg.norm(b.reshape(-1))
        unit_a, unit_b = (x / jnp.where(length > 0.0, length, 1.0) for x, length in zip((a, b), lengths, strict=True))
        # accurate at all angles, unlike the arccosine
        difference, total = (jnp.linalg.norm(x.reshape(-1)) for x in (unit_a - unit_b, unit_a + unit_b))
        theta = 2.0 * jnp.arctan2(difference, total)
        near = jnp.sin(theta) < 1e-4
        sine = jnp.where(near, 1.0, jnp.sin(theta))

        def point(w):
            arc = (jnp.sin((1.0 - w) * theta) * a + jnp.sin(w * theta) * b) / sine
            return jnp.where(near, (1.0 - w) * a + w * b, arc).astype(x_a.dtype)

        return jax.vmap(point)(weights)

    return jnp.moveaxis(jax.vmap(one)(x_a, x_b), 0, 1)


@compiled(static=("probes", "max_steps"), check=check_nonsingular)
def sample_with_log_prob(
    denoiser: Denoiser,
    key: Key | None,
    x_1: Batch,
    schedule: Schedule,
    *,
    prediction_type: PredictionType = "eps",
    trace: Trace = "rademacher",
    probes: int = 1,
    t_0: Scalar | float = 0.0,
    prior: Prior = STANDARD_NORMAL,
    tolerance: Scalar | float = 1e-5,
    max_steps: int = 4096,
) -> FlowSample:
    """`sample` together with the log-density of the samples, in one solve (LIK-2).

        log p(x) = log p_1(x_1) - int_1^{t_0} div dt

    The divergence is integrated along the path from x_1 to x, with exact or estimated trace as in `log_likelihood`; an
    estimate is unbiased for log p(x). Differentiable in reverse mode with respect to the denoiser, x_1 and the
    schedule: the gradient of log_prob includes the change of the sample itself.

    Args:
        denoiser: predicts `prediction_type` for each example independently; evaluated on the whole batch.
        key: for the random v of the trace; may be None if the trace is exact. Samples do not depend on it, except
            through the steps of the solver.
        x_1: latents, samples of the prior, shape (B, *x).
        schedule, prediction_type, trace, probes, t_0, prior, tolerance, max_steps: as in `log_likelihood`.

    Returns:
        `FlowSample`.

    Raises:
        ValueError: as in `log_likelihood`.

    Source: Song et al. 2021, arXiv:2011.13456, appendix D.2; Grathwohl et al. 2018, arXiv:1810.01367.
    """
    how = (prediction_type, trace, probes, tolerance, max_steps)
    x, divergence, evaluations = _solve_with_divergence(denoiser, key, x_1, schedule, (1.0, t_0), *how)
    log_prob = jax.vmap(prior.astype(x.dtype).log_prob)(x_1.astype(x.dtype))
    return FlowSample(x.astype(x_1.dtype), log_prob - divergence, evaluations)


def _solve_between(denoiser, x, schedule, ends, prediction_type, tolerance, max_steps) -> Batch:
    """The state at the second of the ends, from x at the first."""

    def velocity(parts, t, state):
        denoiser, schedule = parts
        return (_velocity(denoiser, schedule, prediction_type, t, state[0]),)

    solve, start = partial(_solve, velocity, max_steps), (x.astype(at_least_float32(x.dtype)),)
    (end,), _ = _without_mesh(solve, (denoiser, schedule), start, ends, tolerance)
    return end.astype(x.dtype)


def _solve_with_divergence(denoiser, key, x, schedule, ends, prediction_type, trace, probes, tolerance, max_steps):
    """The state at the second of the ends, the integral of the divergence from the first, number of evaluations."""
    check_trace(trace, probes)
    start = x.astype(at_least_float32(x.dtype))
    dims, probing = x[0].size, hutchinson_probes(key, start, trace, probes)

    def velocity(parts, t, state):
        denoiser, schedule, probing = parts
        move, div = value_and_divergence(partial(_velocity, denoiser, schedule, prediction_type, t), state[0], probing)
        return move, div / dims  # per dimension, to which the tolerance applies

    state = (start, jnp.zeros(x.shape[:1], start.dtype))
    solve = partial(_solve, velocity, max_steps)
    (end, grown), evaluations = _without_mesh(solve, (denoiser, schedule, probing), state, ends, tolerance)
    return end, dims * grown, evaluations


def _level_and_rate(schedule, t) -> tuple[NoiseLevel, NoiseLevel]:
    """The level and its derivative with respect to t."""
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def _velocity(denoiser, schedule, prediction_type, t, x_t) -> Batch:
    """dx/dt of a batch."""
    level, rate = _level_and_rate(schedule, t)
    prediction = evaluate(denoiser, x_t, broadcast_to_batch(level, x_t))
    return jax.vmap(lambda p, x: drift(p, x, level, rate, prediction_type))(prediction, x_t).astype(x_t.dtype)


def _solve(velocity, max_steps, parts, start, ends, tolerance):
    """The state at the second of the ends, NaN if max_steps was exceeded, and the number of evaluations."""
    import diffrax  # a slow import that other modules do not need

    begin, end, tolerance = (jnp.asarray(number, start[0].dtype) for number in (*ends, tolerance))
    velocity = jax.jit(partial(velocity, parts))  # traced once, although the solver uses it several times
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, state, _: velocity(t, state)),
        diffrax.Tsit5(),
        begin,
        end,
        None,
        start,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=_max_rms),
        max_steps=max_steps,
        throw=False,
    )
    solved = solution.result == diffrax.RESULTS.successful
    state = jax.tree.map(lambda leaf: jnp.where(solved, leaf[-1], jnp.nan), solution.ys)
    evaluations = 6 * solution.stats["num_steps"] + 1  # the last of Tsit5's seven stages is the first of the next step
    return state, evaluations


def _max_rms(error) -> Real:
    """The largest root mean square error of an example of the batch, relative to the tolerance."""
    return jnp.max(jnp.stack([jnp.max(jnp.sqrt(per_example(leaf**2) / leaf[0].size)) for leaf in error]))


def _without_mesh(function, *arguments):
    """function(*arguments), traced as if outside of the `jax.shard_map` that contains this call, if any.

    The loops of diffrax and their gradients mix arrays that vary over a mesh with constants that do not, which
    `shard_map` rejects. They are valid on one device, so function and gradient are traced for one device.
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
        return _trace_without_mesh(lambda *parts: function(*join(*parts)), floats, others)

    def forward(floats, others):
        return _trace_without_mesh(
            lambda floats, others: jax.vjp(lambda floats: function(*join(floats, others)), floats), floats, others
        )

    def backward(vjp, cotangent):
        return *_trace_without_mesh(lambda vjp, cotangent: vjp(cotangent), vjp, cotangent), None

    call.defvjp(forward, backward)
    split = ([a for a, s in zip(arrays, smooth, strict=True) if s is chosen] for chosen in (True, False))
    return call(*split)


def _trace_without_mesh(function, *arguments):
    """function(*arguments) of arrays, traced without a mesh; the results vary over the same axes as the arguments."""
    leaves, treedef = jax.tree.flatten(arguments)
    program = jax.jit(lambda *leaves: function(*jax.tree.unflatten(treedef, leaves)))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        jaxpr, result = jax.make_jaxpr(program, return_shape=True)(*shapes)
    results = eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)
    return jax.tree.unflatten(jax.tree.structure(result), [varying_like(leaf, leaves) for leaf in results])
