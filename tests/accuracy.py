"""Every coefficient and kernel in float32, compiled, against 50-digit arithmetic: `make accuracy`.

The reference values are computed from the definitions in the sources (products of 1 - beta, ratios of alpha and
sigma), not from the library's rearrangements. Errors are relative; those of the log-SNR, of an exploding log sigma and
of a decoder's log mass, which can be close to zero, are relative to at least 1. If the reference is 0 or infinite
(clean data, or no signal), the value must equal it.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

from vdm_jax import discrete_schedules, elbo, forward, parameterization, schedules
from vdm_jax.gaussian import Normal, kl, variance_kl
from vdm_jax.likelihoods import Categorical, DiscretizedGaussian, DiscretizedLogisticMixture, normalize
from vdm_jax.noise_levels import NoiseLevel, Step, level_from_log_snr, step_from_log_snr

LIMIT = 1e-6
LOG_SNR = "log SNR (of at least 1)"
LOG_SIGMA = "log sigma, exploding (of at least 1)"
PREDICTION_TYPES = ("x_0", "eps", "v", "score")
mpmath.mp.dps = 50


class Check(NamedTuple):
    """Values of one quantity, their references and places; errors are relative to max(floor, |reference|)."""

    quantity: str
    values: np.ndarray
    references: list
    places: list[str]
    floor: float = 0.0


class Noise(NamedTuple):
    """The exact alpha and sigma of a level."""

    alpha: mpf
    sigma: mpf

    @property
    def snr(self) -> mpf:
        return mpmath.inf if self.sigma == 0 else (self.alpha / self.sigma) ** 2


def preserving(abar: mpf) -> Noise:
    """The level of Ho et al.'s abar = alpha^2."""
    return Noise(mpmath.sqrt(abar), mpmath.sqrt(1 - abar))


def of_log_snr(log_snr: Any) -> Noise:
    """The variance-preserving level of a log-SNR."""
    return preserving(1 / (1 + mpmath.exp(-mpf(float(log_snr)))))


def ratio(s: Noise, t: Noise) -> mpf:
    return mpf(0) if s.sigma == 0 else t.snr / s.snr


# -- reference values of a level and of a step ------------------------------------------------------------------------


def level_values(level: NoiseLevel) -> dict[str, Any]:
    return {
        "alpha": level.alpha,
        "sigma": level.sigma,
        "sigma^2 (marginal variance)": jax.vmap(forward.marginal)(jnp.ones_like(level.alpha), level).var,
        "log alpha": level.log_alpha,
        "log sigma": level.log_sigma,
        "SNR": level.snr,
        LOG_SNR: level.log_snr,
    }


def level_references(noise: Noise) -> dict[str, mpf]:
    alpha, sigma = noise
    log_alpha, log_sigma = _log(alpha), _log(sigma)
    return {
        "alpha": alpha,
        "sigma": sigma,
        "sigma^2 (marginal variance)": sigma**2,
        "log alpha": log_alpha,
        "log sigma": log_sigma,
        "SNR": noise.snr,
        LOG_SNR: 2 * (log_alpha - log_sigma),
    }


def step_values(step: Step) -> dict[str, Any]:
    one, zero = jnp.ones_like(step.t.alpha), jnp.zeros_like(step.t.alpha)
    coefficients = forward.posterior_coefficients(step)
    posterior, by_eps, by_score = (
        jax.vmap(f) for f in (forward.posterior, forward.posterior_from_eps, forward.posterior_from_score)
    )
    transition = jax.vmap(forward.transition)(one, step)
    return {
        "r = SNR(t) / SNR(s)": step.snr_ratio,
        "1 - r": step.one_minus_ratio,
        "transition: coefficient": transition.mean,
        "transition: variance": transition.var,
        "posterior: c_1": coefficients.c_1,
        "posterior: c_2": coefficients.c_2,
        "posterior: sigma": coefficients.sigma,
        "posterior: of x_t": posterior(one, zero, step).mean,
        "posterior: of x_0": posterior(zero, one, step).mean,
        "posterior: variance": posterior(one, one, step).var,
        "posterior by eps: of x_t": by_eps(one, zero, step).mean,
        "posterior by eps: of eps": by_eps(zero, one, step).mean,
        "posterior by score: of x_t": by_score(one, zero, step).mean,
        "posterior by score: of score": by_score(zero, one, step).mean,
        **{
            f"KL weight of {prediction_type}": elbo.diffusion_weight(step, prediction_type)
            for prediction_type in PREDICTION_TYPES
        },
    }


def step_references(s: Noise, t: Noise) -> dict[str, mpf]:
    (alpha_s, sigma_s), (alpha_t, sigma_t) = s, t
    variance = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2  # FWD-3, as printed
    c_1, c_2 = alpha_t / alpha_s * sigma_s**2 / sigma_t**2, alpha_s * variance / sigma_t**2
    variance_s = sigma_s**2 * variance / sigma_t**2  # beta_t (1 - abar_{t-1}) / (1 - abar_t)
    back = mpmath.inf if alpha_t == 0 else alpha_s / alpha_t
    kl_x_0 = mpmath.inf if sigma_s == 0 else (s.snr - t.snr) / 2
    power = alpha_t**2 + sigma_t**2
    eps = sigma_t**2 / alpha_t**2 if alpha_t else mpmath.inf
    weights = {"x_0": mpf(1), "eps": eps, "v": (sigma_t / power) ** 2, "score": eps * sigma_t**2}
    return {
        "r = SNR(t) / SNR(s)": ratio(s, t),
        "1 - r": 1 - ratio(s, t),
        "transition: coefficient": alpha_t / alpha_s,
        "transition: variance": variance,
        "posterior: c_1": c_1,
        "posterior: c_2": c_2,
        "posterior: sigma": mpmath.sqrt(variance_s),
        "posterior: of x_t": c_1,
        "posterior: of x_0": c_2,
        "posterior: variance": variance_s,
        "posterior by eps: of x_t": back,
        "posterior by eps: of eps": -back * variance / sigma_t,
        "posterior by score: of x_t": back,
        "posterior by score: of score": back * variance,
        **{f"KL weight of {prediction_type}": kl_x_0 * weight for prediction_type, weight in weights.items()},
    }


def _log(x: mpf) -> mpf:
    return mpmath.log(x) if x > 0 else -mpmath.inf


def compare(values: dict[str, Any], references: Iterable[dict[str, mpf]], places: list[str]) -> Iterator[Check]:
    references = list(references)
    for quantity, value in values.items():
        floor = 1.0 if quantity in (LOG_SNR, LOG_SIGMA) else 0.0
        yield Check(
            quantity, np.asarray(value, np.float64), [reference[quantity] for reference in references], places, floor
        )


@jax.jit
def levels_at(schedule, t) -> dict[str, Any]:
    return level_values(schedule(t))


@jax.jit
def steps_between(schedule, s, t) -> dict[str, Any]:
    return step_values(schedule.step(s, t))


# -- log-SNRs given exactly -------------------------------------------------------------------------------------------

LOG_SNRS = np.unique(np.concatenate([np.linspace(-20, 20, 161), [1e-6, -1e-6, 0.3, 13.3, -5.0]]).astype(np.float32))


def exact_levels() -> Iterator[Check]:
    values = jax.jit(lambda x: level_values(level_from_log_snr(x)))(LOG_SNRS)
    yield from compare(values, map(level_references, map(of_log_snr, LOG_SNRS)), [f"log SNR {x:g}" for x in LOG_SNRS])


def exact_steps(density: int = 21) -> Iterator[Check]:
    starts = np.linspace(-20, 20, density)
    drops = np.concatenate([10.0 ** np.arange(-6, 1), [2.0, 5.0, 12.0, 20.0, 31.0, 40.0]])
    pairs = [(s, np.float32(s - drop)) for s in np.float32(starts) for drop in drops if s - drop >= -20]
    pairs = [(s, t) for s, t in pairs if t < s]
    s, t = (np.array(side, np.float32) for side in zip(*pairs, strict=True))
    values = jax.jit(lambda s, t: step_values(step_from_log_snr(s, t)))(s, t)
    references = [step_references(of_log_snr(a), of_log_snr(b)) for a, b in pairs]
    yield from compare(values, references, [f"log SNR {a:g} -> {b:.9g}" for a, b in pairs])


# -- discrete schedules -----------------------------------------------------------------------------------------------


def linear_ends(num_steps: int) -> tuple[float, float]:
    """The first and last beta: T beta is constant, except for short schedules, which use Ho et al.'s numbers."""
    return (1e-4, 0.02) if num_steps < 100 else (0.1 / num_steps, 20.0 / num_steps)


def linear_reference(num_steps: int) -> Callable[[int], Noise]:
    abar = [mpf(1)]
    for beta in np.linspace(*linear_ends(num_steps), num_steps):
        abar.append(abar[-1] * (1 - mpf(float(beta))))
    return lambda t: preserving(abar[t])


def clipped_reference(abar: Callable[[mpf], mpf], num_steps: int) -> Callable[[int], Noise]:
    """A schedule that ends without signal: its last beta is 0.999."""

    def noise(t: int) -> Noise:
        if t < num_steps:
            return preserving(abar(mpf(t) / num_steps))
        return preserving(abar(mpf(t - 1) / num_steps) * mpf(1 - np.float64(0.999)))

    return noise


def cosine_abar(t: mpf) -> mpf:
    f = [mpmath.cos((u + mpf(0.008)) / (1 + mpf(0.008)) * mpmath.pi / 2) ** 2 for u in (t, mpf(0))]
    return _tiny_is_zero(f[0] / f[1])


def sigmoid_abar(t: mpf) -> mpf:
    f = [1 / (1 + mpmath.exp(-u)) for u in (mpf(3), -3 + 6 * t, mpf(-3))]
    return (f[0] - f[1]) / (f[0] - f[2])


def from_first(noise: Callable[[mpf], Noise], num_steps: int) -> Callable[[int], Noise]:
    """A schedule with noise at t = 0: level 1 is at t = 0, level T at t = 1, level 0 is clean."""
    return lambda t: Noise(mpf(1), mpf(0)) if t == 0 else noise(mpf(t - 1) / (num_steps - 1))


def log_snr_noise(t: mpf) -> Noise:
    return preserving(1 / (1 + mpmath.exp(40 * t - 20)))


def exploding_noise(t: mpf) -> Noise:
    return Noise(mpf(1), mpf(0.01) * (50 / mpf(0.01)) ** t)


def discrete_cases(num_steps: int) -> dict[str, tuple[discrete_schedules.TabulatedSchedule, Callable[[int], Noise]]]:
    linear = discrete_schedules.linear_betas(num_steps, *linear_ends(num_steps))
    discretize = discrete_schedules.discretize
    wide = schedules.LinearLogSNR(20.0, -20.0)
    exploding = discretize(schedules.VarianceExploding(), num_steps)
    return {
        "linear": (linear, linear_reference(num_steps)),
        "cosine": (discretize(schedules.Cosine(), num_steps), clipped_reference(cosine_abar, num_steps)),
        "sigmoid": (discretize(schedules.Sigmoid(), num_steps), clipped_reference(sigmoid_abar, num_steps)),
        "log SNR": (discretize(wide, num_steps), from_first(log_snr_noise, num_steps)),
        "exploding": (exploding, from_first(exploding_noise, num_steps)),
    }


def steps_to_check(num_steps: int, count: int) -> np.ndarray:
    """Both ends, a logarithmic and a random selection of step numbers."""
    ends = np.concatenate([np.arange(min(count, num_steps + 1)), num_steps - np.arange(min(count, num_steps))])
    spaced = np.geomspace(1, num_steps, 2 * count).astype(int)
    return np.unique(np.concatenate([ends, spaced, np.random.RandomState(0).randint(0, num_steps + 1, count)]))


def of_discrete_schedules(num_steps: int, count: int = 12) -> Iterator[Check]:
    for name, (schedule, reference) in discrete_cases(num_steps).items():
        t = steps_to_check(num_steps, count)
        place = f"{name}, T = {num_steps:,}"
        values = levels_at(schedule, t)
        yield from compare(values, [level_references(reference(int(i))) for i in t], [f"{place}, t = {i}" for i in t])
        later = t[t > 0]
        rng = np.random.RandomState(1)
        pairs = [(i - 1, i) for i in later] + [(rng.randint(0, i), i) for i in later]
        s, t = (np.array(side, np.int32) for side in zip(*pairs, strict=True))
        values = steps_between(schedule, s, t)
        references = [step_references(reference(int(a)), reference(int(b))) for a, b in pairs]
        yield from compare(values, references, [f"{place}, {a} -> {b}" for a, b in pairs])
        if name != "exploding":
            yield from of_betas(schedule, reference, later, place)
        yield from of_subsequence(schedule, reference, place)


def of_betas(
    schedule: discrete_schedules.TabulatedSchedule, reference: Callable[[int], Noise], t: np.ndarray, place: str
) -> Iterator[Check]:
    one_step = [1 - (reference(int(i)).alpha / reference(int(i) - 1).alpha) ** 2 for i in t]
    beta = np.asarray(jax.jit(discrete_schedules.to_betas)(schedule).beta)[t - 1]
    yield Check("beta_t", beta, one_step, [f"{place}, t = {i}" for i in t])
    deviation = np.asarray(jax.jit(discrete_schedules.to_standard_deviations)(schedule).beta)[t - 1]
    yield Check("beta_t (deviation)", deviation, list(map(mpmath.sqrt, one_step)), [f"{place}, t = {i}" for i in t])


def of_subsequence(
    schedule: discrete_schedules.TabulatedSchedule, reference: Callable[[int], Noise], place: str
) -> Iterator[Check]:
    steps = discrete_schedules.uniform_steps(schedule.num_steps, min(7, schedule.num_steps))
    few = schedule.subsequence(steps)
    t = np.arange(1, few.num_steps + 1)
    values = steps_between(few, t - 1, t)
    references = [step_references(reference(int(a)), reference(int(b))) for a, b in itertools.pairwise(steps)]
    places = [f"{place}, subsequence {a} -> {b}" for a, b in itertools.pairwise(steps)]
    yield from compare(values, references, places)


# -- continuous schedules ---------------------------------------------------------------------------------------------


def linear_beta_noise(t: mpf) -> Noise:
    return preserving(mpmath.exp(-(mpf(0.1) * t + (20 - mpf(0.1)) * t**2 / 2)))


CONTINUOUS: dict[str, tuple[schedules.Schedule, Callable[[mpf], Noise]]] = {
    "linear beta": (schedules.LinearBeta(), linear_beta_noise),
    "cosine": (schedules.Cosine(), lambda t: preserving(cosine_abar(t))),
    "sigmoid": (schedules.Sigmoid(), lambda t: preserving(sigmoid_abar(t))),
    "log SNR": (schedules.LinearLogSNR(20.0, -20.0), log_snr_noise),
    "exploding": (schedules.VarianceExploding(), exploding_noise),
}


def continuous() -> Iterator[Check]:
    rng = np.random.RandomState(2)
    t = np.concatenate([np.linspace(0, 1, 41), 10.0 ** np.arange(-6, 0), 1 - 10.0 ** np.arange(-6, 0), rng.rand(30)])
    t = np.unique(t.astype(np.float32))
    inner = t[(t > 0) & (t < 1)]
    near, far = np.nextafter(inner, np.float32(1)), (inner + rng.rand(inner.size) * (1 - inner)).astype(np.float32)
    s = np.concatenate([inner, inner, 0 * inner, inner]).astype(np.float32)
    u = np.concatenate([near, far, inner, 0 * inner + 1]).astype(np.float32)
    for name, (schedule, reference) in CONTINUOUS.items():
        noises = {float(i): reference(mpf(float(i))) for i in np.concatenate([s, t, u])}
        values = levels_at(schedule, t)
        references = [level_references(noises[float(i)]) for i in t]
        if name == "exploding":  # its log sigma passes through zero
            values[LOG_SIGMA] = values.pop("log sigma")
            references = [{**reference, LOG_SIGMA: reference["log sigma"]} for reference in references]
        yield from compare(values, references, [f"continuous {name}, t = {i:.9g}" for i in t])
        values = steps_between(schedule, s, u)
        pairs = [(float(a), float(b)) for a, b in zip(s, u, strict=True)]
        references = [step_references(noises[a], noises[b]) for a, b in pairs]
        yield from compare(values, references, [f"continuous {name}, {a:.9g} -> {b:.9g}" for a, b in pairs])


# -- divergences, conversions, decoders, bits -------------------------------------------------------------------------


def divergences() -> Iterator[Check]:
    y = np.concatenate([s * 10.0 ** np.arange(-12, 1.5, 0.5) for s in (1, -1)] + [[20.0, -20.0]]).astype(np.float32)
    references = [(mpmath.exp(mpf(float(v))) - 1 - mpf(float(v))) / 2 for v in y]
    yield Check("KL of variances", np.asarray(jax.jit(variance_kl)(y)), references, [f"log ratio {v:.3g}" for v in y])
    prior_kl = jax.jit(jax.vmap(lambda x, lam: elbo.prior_kl(x, level_from_log_snr(lam))))
    for x_0 in (0.0, 0.5, 1.0):
        values = prior_kl(np.full_like(LOG_SNRS, x_0), LOG_SNRS)
        references = []
        for log_snr in LOG_SNRS:
            alpha, sigma = of_log_snr(log_snr)
            references.append(((alpha * mpf(x_0)) ** 2 + sigma**2 - 1 - 2 * mpmath.log(sigma)) / 2)
        yield Check("prior KL", np.asarray(values), references, [f"x_0 = {x_0}, log SNR {v:g}" for v in LOG_SNRS])
    p = [(0.3, 1.0), (0.0, 1e-6), (1.0, 1 + 2**-20), (-2.0, 30.0)]
    q = [(0.3, 1.0 + 2**-12), (0.0, 2.0), (1.0, 1.0), (3.0, 1e-3)]
    rows = np.array([(*a, *b) for a in p for b in q], np.float32)
    values = jax.jit(jax.vmap(lambda m, v, n, w: kl(Normal(m, var=v), Normal(n, var=w))))(*rows.T)
    references = []
    for m, v, n, w in rows:
        r, d = mpf(float(v)) / mpf(float(w)), mpf(float(m)) - mpf(float(n))
        references.append((d**2 / mpf(float(w)) + r - 1 - mpmath.log(r)) / 2)
    yield Check("KL of normals", np.asarray(values), references, [f"N({m}, {v}) || N({n}, {w})" for m, v, n, w in rows])


def conversion_references(source: str, target: str, noise: Noise) -> tuple[mpf, mpf]:
    """The coefficients of x_t and of the prediction, by solving the two defining linear equations."""
    alpha, sigma = noise
    rows = {"x_0": (1, 0), "eps": (0, 1), "v": (-sigma, alpha), "score": (0, -1 / sigma)}  # of (x_0, eps)
    known = mpmath.matrix([[alpha, sigma], list(rows[source])])
    solved = mpmath.matrix([list(rows[target])]) * known**-1
    return solved[0], solved[1]


@jax.jit
@partial(jax.vmap, in_axes=(None, None, 0))
def converted(value, x_t, log_snr) -> dict[tuple[str, str], Any]:
    """A prediction of every type as every other type."""
    level = level_from_log_snr(log_snr)
    pairs = itertools.permutations(PREDICTION_TYPES, 2)
    return {pair: parameterization.convert(value, x_t, level, *pair) for pair in pairs}


def conversions() -> Iterator[Check]:
    log_snrs, one, zero = LOG_SNRS[::8], np.float32(1.0), np.float32(0.0)
    of_x_t, of_value = converted(zero, one, log_snrs), converted(one, zero, log_snrs)
    for source, target in of_x_t:
        references = [conversion_references(source, target, of_log_snr(log_snr)) for log_snr in log_snrs]
        places = [f"{source} -> {target}, log SNR {log_snr:g}" for log_snr in log_snrs]
        values = (np.asarray(of[source, target]) for of in (of_x_t, of_value))
        yield Check("conversion: of x_t", next(values), [_tiny_is_zero(a) for a, _ in references], places)
        yield Check("conversion: of prediction", next(values), [b for _, b in references], places)


def _tiny_is_zero(x: mpf) -> mpf:
    return mpf(0) if abs(x) < mpf(10) ** -40 else x  # an exact zero in 50 digits


def mass(mean: mpf, scale: mpf, k: int, levels: int) -> mpf:
    low, high = ((2 * k + side - (levels - 1)) / mpf(levels - 1) for side in (-1, 1))
    upper = [mpmath.erfc(-(edge - mean) / scale / mpmath.sqrt(2)) / 2 for edge in (low, high)]
    lower = [mpmath.erfc((edge - mean) / scale / mpmath.sqrt(2)) / 2 for edge in (low, high)]
    if k == 0:
        return upper[1]
    if k == levels - 1:
        return lower[0]
    return upper[1] - upper[0] if low + high < 2 * mean else lower[0] - lower[1]


DECODERS = [(17, 0.01), (17, 0.1), (17, 0.3), (17, 30.0), (256, 1e-3), (256, 0.01), (256, 1.0)]
MEANS = (0.0, 0.3, -0.97, 1.0, 1.4)


@partial(jax.jit, static_argnames="levels")
def discretized(mean, scale, levels: int):
    return DiscretizedGaussian(mean, scale=scale, levels=levels).log_masses()


@partial(jax.jit, static_argnames="levels")
def categorical_masses(z, log_snr, levels: int):
    return Categorical(z, level_from_log_snr(log_snr), levels).log_masses()


def decoders() -> Iterator[Check]:
    for levels, scale in DECODERS:
        for mean in MEANS:
            m, s = np.float32(mean), np.float32(scale)
            log_masses = np.asarray(discretized(m, s, levels), np.float64)
            ks = np.unique(np.linspace(0, levels - 1, 17).astype(int))
            references = [mpmath.log(mass(mpf(float(m)), mpf(float(s)), int(k), levels)) for k in ks]
            place = f"{levels} levels, scale {scale:g}, mean {mean:g}"
            places = [f"{place}, value {k}" for k in ks]
            yield Check("decoder: log mass (of at least 1)", log_masses[ks], references, places, 1.0)
            yield Check("decoder: sum of masses", np.array([np.exp(log_masses).sum()]), [mpf(1)], [place])
    yield from categorical()


def categorical() -> Iterator[Check]:
    for levels, log_snr in ((17, 8.0), (17, 2.0), (256, 13.3), (256, 5.0)):
        for z in (-1.02, 0.1, 0.997):
            z, lam = np.float32([z]), np.float32(log_snr)
            masses = np.exp(np.asarray(categorical_masses(z, lam, levels), np.float64))[0]
            alpha, sigma = of_log_snr(lam)
            grid = [mpf(2 * k - levels + 1) / (levels - 1) for k in range(levels)]
            weights = [mpmath.exp(-((mpf(float(z[0])) - alpha * v) ** 2) / (2 * sigma**2)) for v in grid]
            references = [w / sum(weights) for w in weights]
            likely = [k for k in range(levels) if references[k] > 0.01]
            place = f"{levels} levels, log SNR {log_snr:g}, z = {z[0]:g}"
            places = [f"{place}, value {k}" for k in likely]
            yield Check("categorical: mass", masses[likely], [references[k] for k in likely], places)
            yield Check("categorical: sum of masses", np.array([masses.sum()]), [mpf(1)], [place])


def near_edges(rng: np.random.RandomState, edge: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Adverse means in float32: the numbers next to an edge, some scales from it, or anywhere."""
    near = edge.astype(np.float32)
    aside = np.nextafter(near, rng.choice(np.float32([-9, 9]), edge.size))
    some = edge + scale * rng.randn(edge.size)
    where = [near, aside, some, rng.uniform(-3.0, 3.0, edge.size)]
    return np.choose(rng.randint(0, 4, edge.size), where).astype(np.float32)


def edges(levels: int, count: int = 60) -> Iterator[Check]:
    """Decoders far narrower than a bin, on its edges: their log mass depends on the difference of mean and edge."""
    rng = np.random.RandomState(levels)
    k = np.append(rng.randint(0, levels, count), [0, levels - 1] * 5)
    edge = (2 * k + rng.choice([-1, 1], k.size) - (levels - 1)) / (levels - 1)
    scale = np.float32(10.0 ** rng.uniform(-6, 1, k.size))
    rows = near_edges(rng, edge, scale), scale, k

    def log_mass(mean, scale, k):
        return DiscretizedGaussian(mean, scale=scale, levels=levels).log_prob(normalize(k, levels))

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_mass, (0, 1))))(*rows)
    rows = list(zip(*rows, strict=True))
    references = [mpmath.log(mass(mpf(float(m)), mpf(float(s)), int(i), levels)) for m, s, i in rows]
    places = [f"{levels} levels, mean {m}, scale {s}, value {i}" for m, s, i in rows]
    yield Check("decoder: log mass at an edge (of at least 1)", np.asarray(values), references, places, 1.0)
    yield finite("decoder: gradient at an edge", np.stack(slopes), places * 2)
    yield from mixture_edges(rng, levels, count)


def mixture_edges(rng: np.random.RandomState, levels: int, count: int) -> Iterator[Check]:
    """One logistic with three channels: the edges are shifted by the regression on the earlier channels."""
    k = rng.randint(0, levels, (count, 3))
    log_scale = rng.uniform(-70.0, 2.3, (count, 3)).astype(np.float32)
    coefficient = np.tanh(rng.randn(count, 3)).astype(np.float32)
    value = (2 * k - (levels - 1)) / (levels - 1)
    edge = value + rng.choice([-1, 1], k.shape) / (levels - 1)
    for c, j, pair in ((1, 0, 0), (2, 0, 1), (2, 1, 2)):
        edge[:, c] -= coefficient[:, pair] * value[:, j]
    mean = near_edges(rng, edge.ravel(), np.exp(log_scale).ravel()).reshape(k.shape)

    def log_mass(mean, log_scale, coefficient, k):
        distribution = DiscretizedLogisticMixture(
            jnp.zeros(1), mean[:, None], log_scale[:, None], levels, coefficient[:, None]
        )
        return distribution.log_prob(normalize(k, levels))

    rows = mean, log_scale, coefficient, k
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_mass, (0, 1, 2))))(*rows)
    rows = list(zip(*rows, strict=True))
    references = [logistic_reference(*row, levels) for row in rows]
    places = [f"{levels} levels, mean {m}, log scale {s}, values {i}" for m, s, _, i in rows]
    yield Check("mixture: log mass at an edge (of at least 1)", np.asarray(values), references, places, 1.0)
    yield finite("mixture: gradient at an edge", np.stack(slopes), [p for p in places for _ in range(3)] * 3)


def logistic_reference(mean, log_scale, coefficient, k, levels: int) -> mpf:
    """The log mass of a pixel of three channels under one logistic."""
    n, total = levels - 1, mpf(0)
    x = [mpf(2 * int(i) - n) / n for i in k]
    a, b, c = (mpf(float(number)) for number in coefficient)
    for m, s, v, i, shift in zip(mean, log_scale, x, k, (0, a * x[0], b * x[0] + c * x[1]), strict=True):
        apart, scale = v - mpf(float(m)) - shift, mpmath.exp(mpf(float(s)))
        low = -mpmath.inf if i == 0 else (apart - mpf(1) / n) / scale
        high = mpmath.inf if i == n else (apart + mpf(1) / n) / scale
        low, high = (-high, -low) if low > 0 else (low, high)  # on the side where it does not cancel
        total += mpmath.log(logistic(high) - logistic(low))
    return total


def logistic(x: mpf) -> mpf:
    return mpf(int(x > 0)) if mpmath.isinf(x) else 1 / (1 + mpmath.exp(-x))


def bits() -> Iterator[Check]:
    nats = np.float32([1e-3, 1.0, 5000.0])
    values = jax.jit(lambda n: elbo.bits_per_dim(n, 3072))(nats)
    references = [mpf(float(n)) / 3072 / mpmath.log(2) for n in nats]
    yield Check("bits per dimension", np.asarray(values), references, [f"{n:g} nats" for n in nats])


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients() -> Iterator[Check]:
    """Gradients must be finite: of kernels by the log-SNRs, of schedules by t, of decoders by the mean."""
    s, t = np.float32([20.0, 3.0, -19.9, 0.001]), np.float32([-20.0, 2.999999, -20.0, 0.0])

    def total(s, t):
        values = step_values(jax.tree.map(lambda x: x[None], step_from_log_snr(s, t)))
        return sum(jnp.sum(jnp.log(jnp.abs(v) + 1e-30)) for v in values.values())

    grads = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1))))(s, t)
    yield finite("gradient by log SNR", np.stack(grads), [f"{a:g} -> {b:g}" for a, b in zip(s, t, strict=True)] * 2)
    times = np.float32([1e-6, 0.3, 0.5, 1 - 1e-6])
    slopes = jax.jit(lambda times: [jax.vmap(jax.grad(schedule.log_snr))(times) for schedule, _ in CONTINUOUS.values()])
    for name, grads in zip(CONTINUOUS, slopes(times), strict=True):
        yield finite("gradient by t", np.asarray(grads), [f"{name}, t = {t:g}" for t in times])
    slopes = jax.jit(jax.vmap(jax.jacrev(discretized), (0, None, None)), static_argnums=2)
    means = np.float32([*MEANS, 40.0])
    for levels, scale in DECODERS:
        grads = np.asarray(slopes(means, np.float32(scale), levels))
        places = [f"{levels} levels, scale {scale:g}, mean {m:g}" for m in means for _ in range(levels)]
        yield finite("decoder: gradient by mean", grads, places)


def finite(quantity: str, values: np.ndarray, places: list[str]) -> Check:
    values = np.where(np.isfinite(values), 1.0, np.nan).ravel()
    return Check(quantity + " (is finite)", values, [mpf(1)] * values.size, places)


# -- the report -------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[], Iterator[Check]]] = {
    "exact levels": exact_levels,
    "exact steps": exact_steps,
    **{f"discrete schedules of {n} steps": (lambda n=n: of_discrete_schedules(n)) for n in (10, 1_000, 4_000, 100_000)},
    "continuous schedules": continuous,
    "divergences": divergences,
    "conversions": conversions,
    "decoders": decoders,
    **{f"edges of {n} bins": (lambda n=n: edges(n)) for n in (2, 3, 17, 256, 65536)},
    "bits": bits,
    "gradients": gradients,
}


def error(value: float, reference: mpf, floor: float) -> float:
    """The relative error; infinite for a NaN, or if the reference is 0 or infinite and the value is not."""
    if np.isnan(value):
        return np.inf
    if mpmath.isinf(reference) or max(abs(reference), floor) == 0:
        return 0.0 if value == float(reference) else np.inf
    return float(abs(mpf(float(value)) - reference) / max(abs(reference), mpf(floor)))


def worst(check: Check) -> tuple[float, str]:
    """The largest error of a check and its place."""
    errors = [error(v, t, check.floor) for v, t in zip(check.values.ravel(), check.references, strict=True)]
    i = int(np.argmax(errors))
    return errors[i], check.places[i]


def main() -> None:
    """Print the report; exit with 1 if an error exceeds the limit."""
    found: dict[str, tuple[float, str]] = {}
    for source in SOURCES.values():
        for check in source():
            found[check.quantity] = max(found.get(check.quantity, (0.0, "")), worst(check))
    print(f"{'quantity':34} {'worst relative error':>20}   where")
    for quantity, (size, place) in found.items():
        mark = "ok" if size <= LIMIT else "FAIL"
        print(f"{quantity:34} {size:20.1e}   {place or '-'}   {mark}")
    bad = sum(size > LIMIT for size, _ in found.values())
    print(f"{len(found) - bad} of {len(found)} quantities within {LIMIT:g}.")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
