"""Samplers with an exact denoiser: distance to the data and to the ODE solution, by number of network evaluations."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from docs.figures import plt, save
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize
from vdm_jax.probability_flow import sample
from vdm_jax.samplers import Samples, ancestral, ddim, dpmpp_2m, dpmpp_2m_sde, heun, predictor_corrector
from vdm_jax.schedules import LinearLogSNR

SCHEDULE = LinearLogSNR(10.0, -8.0)  # discretized uniformly in log-SNR; level 1 is nearly clean
EVALUATIONS = (5, 10, 20, 40, 80, 160, 320)
PROBABILITIES = (np.arange(40_000) + 0.5) / 40_000  # of the quantiles


class Sampler(NamedTuple):
    """A line of the figure.

    Fields:
        name: its label.
        run: the sampler.
        steps: number of steps by number of network evaluations.
        solves_ode: whether it solves the probability-flow ODE.
    """

    name: str
    run: Callable[..., Samples]
    steps: dict[int, int]
    solves_ode: bool = False


EACH = {calls: calls for calls in EVALUATIONS}
PAIRS = {calls: (calls + 1) // 2 for calls in EVALUATIONS if calls > 5}  # T steps make 2 T - 1 evaluations
SAMPLERS = (
    Sampler("ancestral, fixed_small", partial(ancestral, variance="fixed_small"), EACH),
    Sampler("ancestral, fixed_large", partial(ancestral, variance="fixed_large"), EACH),
    Sampler("DDIM, η = 0 (Euler)", ddim, EACH, True),
    Sampler("DDIM, η = 1/2", partial(ddim, eta=0.5), EACH),
    Sampler("Heun", heun, PAIRS, True),
    Sampler("Heun, churn 10", partial(heun, s_churn=10.0), PAIRS),
    Sampler("DPM-Solver++ 2M", dpmpp_2m, EACH, True),
    Sampler("DPM-Solver++ 2M, SDE", dpmpp_2m_sde, EACH),
    Sampler("predictor-corrector", partial(predictor_corrector, snr=0.16), PAIRS),
)


def quantiles(distribution) -> np.ndarray:
    """Quantiles of a one-dimensional mixture at PROBABILITIES, from its cumulative distribution on a fine grid."""
    grid = np.linspace(-4.0, 4.0, 400_001)
    density = np.exp(np.asarray(jax.jit(jax.vmap(distribution.log_prob))(jnp.asarray(grid)[:, None])))
    below = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(grid))])
    return np.interp(PROBABILITIES, below / below[-1], grid)


def latents(distribution) -> jax.Array:
    """Shuffled quantiles of q(x_T), so that neither chance nor the prior causes an error."""
    x_T = quantiles(closed_form.marginal(distribution, SCHEDULE(jnp.ones(()))))
    return jax.random.permutation(jax.random.key(1), jnp.asarray(x_T))[:, None]


def distances(distribution) -> dict[str, list[float]]:
    """1-Wasserstein distance of each sampler's samples to the data, by number of evaluations."""
    exact, x_T, best = quantiles(distribution), latents(distribution), closed_form.OptimalDenoiser(distribution)

    def distance(run, steps):
        x_0 = run(best, jax.random.key(2), x_T, discretize(SCHEDULE, steps)).x_0
        return float(np.mean(np.abs(np.sort(np.asarray(x_0)[:, 0]) - exact)))

    return {s.name: [distance(s.run, s.steps[n]) if n in s.steps else np.nan for n in EVALUATIONS] for s in SAMPLERS}


def sampling_error(distribution) -> float:
    """The same distance for the same number of exact samples."""
    samples = jax.jit(jax.vmap(distribution.sample))(jax.random.split(jax.random.key(3), PROBABILITIES.size))
    return float(np.mean(np.abs(np.sort(np.asarray(samples)[:, 0]) - quantiles(distribution))))


def ode_errors(distribution) -> dict[str, list[float]]:
    """Root mean square distance of the ODE samplers to the ODE solution at level 1."""
    x_T, best = jax.random.normal(jax.random.key(0), (256, 2)), closed_form.OptimalDenoiser(distribution)
    exact = sample(best, x_T, SCHEDULE, tolerance=1e-11)

    def error(run, steps):
        states = run(best, jax.random.key(2), x_T, discretize(SCHEDULE, steps), snapshots=2).trajectory.x_t
        return float(jnp.sqrt(jnp.mean((states[-1] - exact) ** 2)))

    solvers = [s for s in SAMPLERS if s.solves_ode]
    return {s.name: [error(s.run, s.steps[n]) if n in s.steps else np.nan for n in EVALUATIONS] for s in solvers}


def order(errors: list[float]) -> float:
    """The order of convergence: the slope over the last three doublings."""
    return float(-np.polyfit(np.log(EVALUATIONS[-4:]), np.log(errors[-4:]), 1)[0])


def plot(to_data: dict, to_ode: dict, exact_samples: float) -> None:
    """Write docs/samplers.png."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, sampler in enumerate(SAMPLERS):
        style = {
            "color": f"C{i}",
            "ls": "-" if sampler.solves_ode else "--",
            "marker": "o" if sampler.solves_ode else "s",
            "ms": 3,
        }
        left.loglog(EVALUATIONS, to_data[sampler.name], label=sampler.name, **style)
        if sampler.solves_ode:
            right.loglog(EVALUATIONS, to_ode[sampler.name], **style)
    left.axhline(exact_samples, color="gray", lw=0.8, label="exact samples")
    for power, start in ((1, 4.0), (2, 80.0)):
        right.loglog(EVALUATIONS[3:], start * np.array(EVALUATIONS[3:], float) ** -power, color="gray", lw=0.8, ls=":")
        end = EVALUATIONS[-1], start * EVALUATIONS[-1] ** -power
        right.annotate(f"evaluations$^{{-{power}}}$", end, fontsize=8, va="bottom", ha="right")
    left.set(xlabel="network evaluations", ylabel="1-Wasserstein distance to the data")
    right.set(xlabel="network evaluations", ylabel="distance to the ODE solution")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, "samplers")


def table(to_data: dict, to_ode: dict) -> str:
    """Both distances as a Markdown table."""
    head = "| network evaluations | " + " | ".join(map(str, EVALUATIONS)) + " | order |"
    lines = [head, "|---" * (len(EVALUATIONS) + 2) + "|"]
    for title, rows in (("distance to the data", to_data), ("distance to the ODE solution", to_ode)):
        lines.append(f"| *{title}* |" + " |" * (len(EVALUATIONS) + 1))
        for name, errors in rows.items():
            cells = ["-" if np.isnan(e) else f"{e:.4f}" if e >= 1e-3 else f"{e:.1e}" for e in errors]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {order(errors) if rows is to_ode else np.nan:.2f} |")
    return "\n".join(lines).replace("nan", "")


def main() -> None:
    """Distances to the data in one dimension in float32, to the ODE solution in two dimensions in float64."""
    line = closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])
    to_data, exact_samples = distances(line), sampling_error(line)
    with jax.enable_x64(True):
        to_ode = ode_errors(
            closed_form.mixture([0.3, 0.5, 0.2], [[-1.0, 0.2], [0.8, -0.4], [0.2, 1.5]], [0.05, 0.2, 0.02])
        )
    plot(to_data, to_ode, exact_samples)
    print(table(to_data, to_ode))
    print(f"exact samples: {exact_samples:.4f}")


if __name__ == "__main__":
    main()
