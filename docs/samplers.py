"""All samplers side by side in an exact world: how near to the data, and to the flow, by how many network calls."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from docs.figures import plt, save
from vdm_jax import closed_form
from vdm_jax.discrete_schedules import discretize
from vdm_jax.probability_flow import sample
from vdm_jax.samplers import ancestral, ddim, dpmpp_2m, dpmpp_2m_sde, heun, predictor_corrector
from vdm_jax.schedules import LinearLogSNR

SCHEDULE = LinearLogSNR(10.0, -8.0)  # tables of it are even in log-SNR, and level 1 is nearly clean
CALLS = (5, 10, 20, 40, 80, 160, 320)
PLACES = (np.arange(40_000) + 0.5) / 40_000  # of the quantiles


class Sampler(NamedTuple):
    """A line of the figure: how many steps so many calls are, and whether it follows the flow."""

    name: str
    draw: partial
    steps: dict[int, int]
    flows: bool = False


EACH = {calls: calls for calls in CALLS}
PAIRS = {calls: (calls + 1) // 2 for calls in CALLS if calls > 5}  # of 2 T - 1 calls
SAMPLERS = (
    Sampler("ancestral, lower variance", partial(ancestral, variance="fixed_small"), EACH),
    Sampler("ancestral, upper variance", partial(ancestral, variance="fixed_large"), EACH),
    Sampler("DDIM, η = 0 (Euler)", ddim, EACH, True),
    Sampler("DDIM, η = 1/2", partial(ddim, eta=0.5), EACH),
    Sampler("Heun", heun, PAIRS, True),
    Sampler("Heun, churn 10", partial(heun, s_churn=10.0), PAIRS),
    Sampler("DPM-Solver++ 2M", dpmpp_2m, EACH, True),
    Sampler("DPM-Solver++ 2M, SDE", dpmpp_2m_sde, EACH),
    Sampler("predictor-corrector", partial(predictor_corrector, snr=0.16), PAIRS),
)


def quantiles(distribution) -> np.ndarray:
    """Those of a mixture in one dimension at PLACES, by its cumulative distribution on a fine grid."""
    grid = np.linspace(-4.0, 4.0, 400_001)
    density = np.exp(np.asarray(jax.jit(jax.vmap(distribution.log_prob))(jnp.asarray(grid)[:, None])))
    below = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(grid))])
    return np.interp(PLACES, below / below[-1], grid)


def latents(distribution) -> jax.Array:
    """The noisiest law's own quantiles, shuffled: neither luck nor a wrong prior is seen."""
    x_T = quantiles(closed_form.marginal(distribution, SCHEDULE(jnp.ones(()))))
    return jax.random.permutation(jax.random.key(1), jnp.asarray(x_T))[:, None]


def distances(distribution) -> dict[str, list[float]]:
    """1-Wasserstein distance of every sampler's draws to the data, by its number of calls."""
    truth, x_T, best = quantiles(distribution), latents(distribution), closed_form.OptimalDenoiser(distribution)

    def distance(draw, steps):
        x_0 = draw(best, jax.random.key(2), x_T, discretize(SCHEDULE, steps)).x_0
        return float(np.mean(np.abs(np.sort(np.asarray(x_0)[:, 0]) - truth)))

    return {s.name: [distance(s.draw, s.steps[n]) if n in s.steps else np.nan for n in CALLS] for s in SAMPLERS}


def luck(distribution) -> float:
    """The same distance of as many true draws."""
    draws = jax.jit(jax.vmap(distribution.sample))(jax.random.split(jax.random.key(3), PLACES.size))
    return float(np.mean(np.abs(np.sort(np.asarray(draws)[:, 0]) - quantiles(distribution))))


def flow_errors(distribution) -> dict[str, list[float]]:
    """Root mean square distance to the exact flow at level 1, of the samplers that follow it."""
    x_T, best = jax.random.normal(jax.random.key(0), (256, 2)), closed_form.OptimalDenoiser(distribution)
    truth = sample(best, x_T, SCHEDULE, tolerance=1e-11)

    def error(draw, steps):
        states = draw(best, jax.random.key(2), x_T, discretize(SCHEDULE, steps), snapshots=2).trajectory.x_t
        return float(jnp.sqrt(jnp.mean((states[-1] - truth) ** 2)))

    flowing = [s for s in SAMPLERS if s.flows]
    return {s.name: [error(s.draw, s.steps[n]) if n in s.steps else np.nan for n in CALLS] for s in flowing}


def order(errors: list[float]) -> float:
    """The slope over the last three doublings."""
    return float(-np.polyfit(np.log(CALLS[-4:]), np.log(errors[-4:]), 1)[0])


def draw(near: dict, apart: dict, own: float) -> None:
    """docs/samplers.png."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, sampler in enumerate(SAMPLERS):
        style = {
            "color": f"C{i}",
            "ls": "-" if sampler.flows else "--",
            "marker": "o" if sampler.flows else "s",
            "ms": 3,
        }
        left.loglog(CALLS, near[sampler.name], label=sampler.name, **style)
        if sampler.flows:
            right.loglog(CALLS, apart[sampler.name], **style)
    left.axhline(own, color="gray", lw=0.8, label="as many draws of the data")
    for power, start in ((1, 4.0), (2, 80.0)):
        right.loglog(CALLS[3:], start * np.array(CALLS[3:], float) ** -power, color="gray", lw=0.8, ls=":")
        end = CALLS[-1], start * CALLS[-1] ** -power
        right.annotate(f"calls$^{{-{power}}}$", end, fontsize=8, va="bottom", ha="right")
    left.set(xlabel="network calls", ylabel="1-Wasserstein distance to the data")
    right.set(xlabel="network calls", ylabel="distance to the exact flow")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, "samplers")


def table(near: dict, apart: dict) -> str:
    """Both, in Markdown."""
    head = "| | " + " | ".join(f"{n} calls" for n in CALLS) + " | order |"
    lines = [head, "|---" * (len(CALLS) + 2) + "|"]
    for title, rows in (("distance to the data", near), ("distance to the flow", apart)):
        lines.append(f"| *{title}* |" + " |" * (len(CALLS) + 1))
        for name, errors in rows.items():
            cells = ["-" if np.isnan(e) else f"{e:.4f}" if e >= 1e-3 else f"{e:.1e}" for e in errors]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {order(errors) if rows is apart else np.nan:.2f} |")
    return "\n".join(lines).replace("nan", "")


def main() -> None:
    """Draws on a line in float32, the flow of a plane in float64."""
    line = closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])
    near, own = distances(line), luck(line)
    with jax.enable_x64(True):
        apart = flow_errors(
            closed_form.mixture([0.3, 0.5, 0.2], [[-1.0, 0.2], [0.8, -0.4], [0.2, 1.5]], [0.05, 0.2, 0.02])
        )
    draw(near, apart, own)
    print(table(near, apart))
    print(f"as many draws of the data: {own:.4f}")


if __name__ == "__main__":
    main()
