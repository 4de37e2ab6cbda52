"""The variational bound of a diffusion model, term by term.

    -log p(x_0) <=  - E log p(x_0 | x_1)                                              reconstruction
                    + KL(q(x_T | x_0) || p(x_T))                                      prior
                    + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))    diffusion             (ELBO-3)

Terms act on one example; `bound` (ELBO-3), `consistency_bound` (ELBO-2), `joint_log_ratio` (ELBO-1) and
`continuous_bound` (ELBO-12, T -> infinity) take a batch and a `Denoiser`. All are in nats, and costs: the bound on the
*negative* log-likelihood.
"""

from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vdm_jax import forward
from vdm_jax.gaussian import Normal, kl, variance_kl
from vdm_jax.levels import Level, Step
from vdm_jax.parameterization import target, to_x_0
from vdm_jax.schedules import Schedule
from vdm_jax.tables import Table
from vdm_jax.types import (
    Batch,
    Denoiser,
    Key,
    Parameterization,
    PerExample,
    Real,
    Scalar,
    X,
    pytree_callable,
    unknown_parameterization,
)


@runtime_checkable
class Likelihood(Protocol):
    """A law of one example: `gaussian.Normal`, or one of `likelihoods`."""

    def log_prob(self, x: X) -> Scalar: ...


@runtime_checkable
class Decoder(Protocol):
    """`decoder(x_hat, x_1, level)`: the law p(x_0 | x_1) of one example.

    x_hat is the denoiser's prediction of x_0 from x_1. Ho et al.'s decoder reads it, `DiscretizedGaussian(x_hat,
    level.sigma, levels)`; Kingma et al.'s reads x_1 alone, `Categorical(x_1, level, levels)`.
    """

    def __call__(self, x_hat: X, x_1: X, level: Level, /) -> Likelihood: ...


def prior_kl(x_0: X, level: Level, log_var: Scalar | float = 0.0) -> Scalar:
    """KL(q(x_T | x_0) || N(0, e^log_var I)) in nats (ELBO-4).

        1/2 sum[ (alpha_T x_0)^2 / v + sigma_T^2 / v - 1 - log(sigma_T^2 / v) ]

    Args:
        x_0: clean example, shape (*x).
        level: the last level T, scalars.
        log_var: log-variance of the prior: 0, or 2 log sigma_max for a variance-exploding schedule.

    Returns:
        A scalar.

    Source: Ho et al. 2020, arXiv:2006.11239, L_T; Kingma et al. 2021, arXiv:2107.00630, equation 7.
    """
    signal = 0.5 * jnp.sum((level.alpha * x_0) ** 2) * jnp.exp(-jnp.asarray(log_var, x_0.dtype))
    return signal + x_0.size * variance_kl(2.0 * level.log_sigma - log_var)


def diffusion_weight(step: Step, kind: Parameterization) -> Real:
    """The w in KL(q(x_s|x_t,x_0) || p(x_s|x_t)) = w ||target - prediction||^2 (ELBO-7, ELBO-8, ELBO-9).

        x_0: (SNR(s) - SNR(t)) / 2      v: sigma_t^2 (SNR(s) - SNR(t)) / 2     (alpha^2 + sigma^2 = 1)
        eps: (SNR(s)/SNR(t) - 1) / 2    score: sigma_t^2 (SNR(s)/SNR(t) - 1) / 2

    Args:
        step: the levels s < t, scalars; the weight is infinite where s is clean, whose term is the decoder's.
        kind: what is predicted.

    Raises:
        ValueError: unknown kind.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 12; Kingma et al. 2021, arXiv:2107.00630, equation 13.
    """
    t = step.t
    lost = 0.5 * step.one_minus_ratio  # times SNR(s), or over r: two forms, so that no end makes 0 times infinity
    match kind:
        case "x_0":
            return lost * step.s.snr
        case "v":
            return lost * step.s.snr * (t.sigma / (t.alpha**2 + t.sigma**2)) ** 2
        case "eps":
            return lost / step.snr_ratio
        case "score":
            return lost / step.snr_ratio * t.sigma**2
    raise unknown_parameterization(kind)


def diffusion_rate(level: Level, log_snr_slope: Real, kind: Parameterization) -> Real:
    """What `diffusion_weight` becomes per unit of time as s -> t (ELBO-12).

        eps: -lambda'(t) / 2; times SNR by x_0, times sigma^2 by score, times alpha^2 by v (alpha^2 + sigma^2 = 1)

    Args:
        level: the level t, scalars, sigma > 0.
        log_snr_slope: lambda'(t) = -gamma'(t) < 0: `jax.grad(schedule.log_snr)(t)`.
        kind: what is predicted.

    Raises:
        ValueError: unknown kind.

    Source: Kingma et al. 2021, arXiv:2107.00630, equation 17.
    """
    rate = -0.5 * log_snr_slope
    match kind:
        case "x_0":
            return rate * level.snr
        case "v":
            return rate * (level.alpha / (level.alpha**2 + level.sigma**2)) ** 2
        case "eps":
            return rate
        case "score":
            return rate * level.sigma**2
    raise unknown_parameterization(kind)


def diffusion_kl(target: X, prediction: X, step: Step, kind: Parameterization) -> Scalar:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, from target and prediction of the same kind (ELBO-6).

    The model's step has the posterior's variance, so this is ||mu_q - mu_theta||^2 / (2 sigma_q^2).

    Args:
        target, prediction: the true x_0, eps, v or score and the predicted one, shape (*x).
        step, kind: as in `diffusion_weight`.

    Returns:
        A scalar.
    """
    return diffusion_weight(step, kind) * jnp.sum((target - prediction) ** 2)


def denoising_error(denoiser: Denoiser, key: Key, x_0: Batch, level: Level, kind: Parameterization) -> PerExample:
    """||target - prediction||^2 at x_t = alpha x_0 + sigma eps, with fresh noise: what every bound and loss weights.

    Args:
        denoiser: predicts `kind`; called once, with the whole batch.
        key: for the noise.
        x_0: clean batch, shape (B, *x).
        level: fields of shape (B,).
        kind: what the denoiser predicts.

    Returns:
        Shape (B,), summed over the example.

    Raises:
        ValueError: unknown kind.
    """
    eps = jax.random.normal(key, x_0.shape, x_0.dtype)
    x_t = jax.vmap(lambda x, e, lv: lv.alpha * x + lv.sigma * e)(x_0, eps, level)
    truth = jax.vmap(partial(target, kind=kind))(x_0, eps, level)
    return jnp.square(truth - denoiser(x_t, level)).reshape(x_0.shape[0], -1).sum(-1)


class Bound(NamedTuple):
    """The three terms of the bound on -log p(x_0), in nats; each shape (B,)."""

    prior: PerExample
    reconstruction: PerExample
    diffusion: PerExample

    @property
    def total(self) -> PerExample:
        """The bound itself."""
        return self.prior + self.reconstruction + self.diffusion


def bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    table: Table,
    decoder: Decoder,
    *,
    kind: Parameterization = "eps",
    terms: int | None = None,
    prior_log_var: float = 0.0,
) -> Bound:
    """One unbiased estimate per example of the bound on -log p(x_0) (ELBO-3, ELBO-10).

    With `terms` None every step 2..T is visited once, each with fresh noise: the sum L_DDPM. With `terms` = K, K steps
    spread evenly over 2..T from a random start (low discrepancy) stand for all, times (T - 1) / K.

    Args:
        denoiser: predicts `kind`; called once a term, with the whole batch.
        key: for the noises and steps.
        x_0: clean batch, shape (B, *x).
        table: the discrete schedule.
        decoder: p(x_0 | x_1) of one example.
        kind: what the denoiser predicts.
        terms: number of diffusion terms, None for all.
        prior_log_var: as in `prior_kl`.

    Returns:
        `Bound`, each field (B,).

    Raises:
        ValueError: unknown kind, or terms below 1.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 5; Kingma et al. 2021, arXiv:2107.00630 (low-discrepancy t).
    """
    if terms is not None and terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term, or None for all")
    if terms is None or table.num_steps == 1:
        terms = table.num_steps - 1
    return _bound(pytree_callable(denoiser), key, x_0, table, pytree_callable(decoder), kind, terms, prior_log_var)


@partial(jax.jit, static_argnames=("kind", "terms"))
def _bound(denoiser, key, x_0, table, decoder, kind, terms, prior_log_var) -> Bound:
    key_1, key_t, key_eps = jax.random.split(key, 3)
    num_steps = table.num_steps

    def visit(total, index):
        t = _spread_steps(key_t, index, terms, num_steps, x_0.shape[0])
        step = table.step(t - 1, t)
        error = denoising_error(denoiser, jax.random.fold_in(key_eps, index), x_0, step.t, kind)
        return total + jax.vmap(partial(diffusion_weight, kind=kind))(step) * error, None

    diffusion, _ = jax.lax.scan(visit, jnp.zeros(x_0.shape[0], x_0.dtype), jnp.arange(terms))
    scale = (num_steps - 1) / terms if terms else 0.0
    prior = jax.vmap(lambda x: prior_kl(x, table(num_steps), prior_log_var))(x_0)
    level = table(jnp.ones(x_0.shape[0], jnp.int32))
    return Bound(prior, _reconstruction(denoiser, key_1, x_0, level, decoder, kind), scale * diffusion)


def _spread_steps(key, index, terms, num_steps, batch):
    """Step number `index` of `terms` spread over 2..T: exactly all of them when terms = T - 1, else a random comb."""
    if terms == num_steps - 1:
        return jnp.full((batch,), index + 2)
    start = jax.random.uniform(key, (batch,))
    u = (start + index.astype(start.dtype)) / terms
    return jnp.minimum(2 + jnp.floor(u * (num_steps - 1)).astype(jnp.int32), num_steps)


def _reconstruction(denoiser, key, x_0, level, decoder, kind) -> PerExample:
    x_1 = jax.vmap(lambda x, lv, k: forward.marginal(x, lv).sample(k))(x_0, level, jax.random.split(key, x_0.shape[0]))
    x_hat = jax.vmap(partial(to_x_0, kind=kind))(denoiser(x_1, level), x_1, level)
    return jax.vmap(lambda x, h, z, lv: -decoder(h, z, lv).log_prob(x))(x_0, x_hat, x_1, level)


def continuous_bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    schedule: Schedule,
    decoder: Decoder,
    *,
    kind: Parameterization = "eps",
    terms: int = 1,
    t_0: float = 0.0,
    prior_log_var: float = 0.0,
) -> Bound:
    """One unbiased estimate per example of the bound as T -> infinity (ELBO-12).

        diffusion = 1/2 int_{t_0}^1 gamma'(t) E ||eps - eps_hat||^2 dt

    The expectation depends on the schedule by its levels at t_0 and 1 alone, not by its shape between them; the
    variance does. The decoder stands at t_0. The integral is estimated at `terms` times an example, spread evenly from
    a random start.

    Args:
        denoiser, key, x_0, decoder, kind, prior_log_var: as in `bound`.
        schedule: continuous.
        terms: how many times an example, at least 1.
        t_0: where the schedule is cut; 0 for one that begins with noise.

    Returns:
        `Bound`, each field (B,).

    Raises:
        ValueError: unknown kind, terms below 1, or a schedule without noise at t_0.

    Source: Kingma et al. 2021, arXiv:2107.00630, section 5.1.
    """
    if terms < 1:
        raise ValueError(f"terms is {terms}: the bound needs at least one diffusion term")
    with jax.ensure_compile_time_eval():
        if not 0.0 <= t_0 < 1.0 or not float(schedule(jnp.asarray(t_0, x_0.dtype)).sigma) > 0.0:
            raise ValueError(f"t_0 is {t_0}: the bound needs 0 <= t_0 < 1 and noise there, which {schedule} has later")
    arguments = (pytree_callable(denoiser), key, x_0, schedule, pytree_callable(decoder))
    return _continuous_bound(*arguments, kind, terms, t_0, prior_log_var)


@partial(jax.jit, static_argnames=("kind", "terms", "t_0"))
def _continuous_bound(denoiser, key, x_0, schedule, decoder, kind, terms, t_0, prior_log_var) -> Bound:
    key_1, key_t, key_eps = jax.random.split(key, 3)
    start = jax.random.uniform(key_t, x_0.shape[:1], x_0.dtype)

    def visit(total, index):
        t = t_0 + (1.0 - t_0) * (start + index.astype(start.dtype)) / terms
        level, slope = schedule(t), jax.vmap(jax.grad(lambda u: schedule(u).log_snr))(t)
        error = denoising_error(denoiser, jax.random.fold_in(key_eps, index), x_0, level, kind)
        return total + jax.vmap(partial(diffusion_rate, kind=kind))(level, slope) * error, None

    diffusion, _ = jax.lax.scan(visit, jnp.zeros_like(start), jnp.arange(terms))
    prior = jax.vmap(lambda x: prior_kl(x, schedule(jnp.ones((), x.dtype)), prior_log_var))(x_0)
    reconstruction = _reconstruction(denoiser, key_1, x_0, schedule(jnp.full_like(start, t_0)), decoder, kind)
    return Bound(prior, reconstruction, (1.0 - t_0) / terms * diffusion)


def consistency_bound(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    table: Table,
    decoder: Decoder,
    *,
    kind: Parameterization = "eps",
    prior_log_var: float = 0.0,
) -> Bound:
    """One unbiased estimate per example of the bound's first decomposition (ELBO-2), along one path drawn from q.

        - E log p(x_0 | x_1) + E KL(q(x_T | x_{T-1}) || p(x_T)) + sum_{t=1..T-1} E C_t
        C_t = E log q(x_t | x_{t-1}) / p(x_t | x_{t+1}) = KL(b || p(x_t | x_{t+1})) - KL(b || q(x_t | x_{t-1}))

    Each consistency term C_t, under `diffusion`, averages x_t over the bridge b = q(x_t | x_{t-1}, x_{t+1}); it needs a
    pair of states where ELBO-3's need one. In print C_t is KL(q(x_t | x_{t-1}) || p(x_t | x_{t+1})), as if x_{t+1} told
    nothing of x_t: that is larger, and its sum grows with T.

    Args, result and errors as in `bound`, whose expectation it has.

    Source: Luo 2022, arXiv:2208.11970, equations 37 to 45, corrected.
    """
    return _consistency_bound(pytree_callable(denoiser), key, x_0, table, pytree_callable(decoder), kind, prior_log_var)


@partial(jax.jit, static_argnames="kind")
def _consistency_bound(denoiser, key, x_0, table, decoder, kind, prior_log_var) -> Bound:
    batch = x_0.shape[0]
    key_1, key_path = jax.random.split(key)

    def draw(x_s, t):
        step = jax.tree.map(lambda field: jnp.full((batch,), field), table.step(t - 1, t))
        q = jax.vmap(forward.transition)(x_s, step)
        return step, q, jax.vmap(Normal.sample)(q, jax.random.split(jax.random.fold_in(key_path, t), batch))

    def visit(carry, t):
        x_r, (step_s, q_s, x_s), total = carry  # r, s, t are neighbours: q_s = q(x_s | x_r)
        step_t, q_t, x_t = draw(x_s, t)
        bridge = jax.vmap(forward.bridge)(x_r, x_t, step_s, step_t)
        x_hat = jax.vmap(partial(to_x_0, kind=kind))(denoiser(x_t, step_t.t), x_t, step_t.t)
        model = jax.vmap(forward.posterior)(x_t, x_hat, step_t)
        term = jax.vmap(kl)(bridge, model) - jax.vmap(kl)(bridge, q_s)
        return (x_s, (step_t, q_t, x_t), total + term), None

    first = draw(x_0, 1)
    carry = (x_0, first, jnp.zeros(batch, x_0.dtype))
    (_, (_, q_T, _), consistency), _ = jax.lax.scan(visit, carry, jnp.arange(2, table.num_steps + 1))
    law = Normal(jnp.zeros_like(x_0[0]), jnp.exp(jnp.asarray(prior_log_var, x_0.dtype)))
    prior = jax.vmap(lambda q: kl(q, law))(q_T)
    return Bound(prior, _reconstruction(denoiser, key_1, x_0, first[0].t, decoder, kind), consistency)


def joint_log_ratio(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    table: Table,
    decoder: Decoder,
    *,
    kind: Parameterization = "eps",
    prior_log_var: float = 0.0,
) -> PerExample:
    """log p(x_{0:T}) - log q(x_{1:T} | x_0) along one path x_1..x_T drawn from q (ELBO-1).

    Its expectation is the bound on +log p(x_0), as that of `bound` is with the sign turned. Neither has the smaller
    variance for every model: this one is log p(x_0) on every path if the model is the true reverse process.

    Args and errors as in `bound`. Returns shape (B,), nats.

    Source: Sohl-Dickstein et al. 2015, arXiv:1503.03585; Ho et al. 2020, arXiv:2006.11239, equation 3.
    """
    return _joint_log_ratio(pytree_callable(denoiser), key, x_0, table, pytree_callable(decoder), kind, prior_log_var)


@partial(jax.jit, static_argnames="kind")
def _joint_log_ratio(denoiser, key, x_0, table, decoder, kind, prior_log_var) -> PerExample:
    steps = jnp.arange(1, table.num_steps + 1)
    batch = x_0.shape[0]

    def visit(carry, t):
        x_s, total = carry
        step = jax.tree.map(lambda field: jnp.full((batch,), field), table.step(t - 1, t))
        keys = jax.random.split(jax.random.fold_in(key, t), batch)
        q = jax.vmap(forward.transition)(x_s, step)
        x_t = jax.vmap(Normal.sample)(q, keys)
        x_hat = jax.vmap(partial(to_x_0, kind=kind))(denoiser(x_t, step.t), x_t, step.t)
        decoded = jax.vmap(lambda x, h, z, lv: decoder(h, z, lv).log_prob(x))(x_0, x_hat, x_t, step.t)
        law = jax.vmap(forward.posterior)(x_t, x_hat, step)
        law = law._replace(var=jnp.where(t == 1, 1.0, law.var))  # a point at t = 1, where the decoder stands: no NaN
        reverse = jax.vmap(Normal.log_prob)(law, x_s)
        return (x_t, total + jnp.where(t == 1, decoded, reverse) - jax.vmap(Normal.log_prob)(q, x_t)), None

    (x_T, total), _ = jax.lax.scan(visit, (x_0, jnp.zeros(batch, x_0.dtype)), steps)
    prior = Normal(jnp.zeros_like(x_0[0]), jnp.exp(jnp.asarray(prior_log_var, x_0.dtype)))
    return total + jax.vmap(prior.log_prob)(x_T)


def bits_per_dim(nats: Real, num_dims: int, bin_width: float = 1.0) -> Real:
    """Nats of one example as bits per dimension (ELBO-13).

        nats / (D log 2) - log2(bin_width)

    Args:
        nats: -log p of an example, or a bound on it; any shape.
        num_dims: D, its number of dimensions.
        bin_width: 1 for the probability of discrete data; for a *density* of quantised data the width of a bin,
            2 / 255 for 8 bits on [-1, 1].

    Source: Theis et al. 2016, arXiv:1511.01844.
    """
    return nats / (num_dims * jnp.log(2.0)) - jnp.log2(bin_width)
