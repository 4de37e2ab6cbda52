"""LAN-3: unadjusted and annealed Langevin chains between two isolated modes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from docs.figures import plt, save
from vdm_jax import closed_form, langevin
from vdm_jax.schedules import VarianceExploding

WEIGHT = 0.8  # of the large mode
STEP_SIZE = 0.1  # of unadjusted chains


def modes(distance: float) -> closed_form.Mixture:
    """Two modes N(m, I) with the weights 1/5 and 4/5. Song & Ermon's distance is 10 sqrt(2)."""
    far = distance / np.sqrt(8)
    return closed_form.mixture([1 - WEIGHT, WEIGHT], [[-far, -far], [far, far]], [1.0, 1.0])


@partial(jax.jit, static_argnames=("records", "every"))
def crossing(distribution, key, x, records: int, every: int):
    """Which chains from x are on the large mode's side, and which have ever been there, every `every` steps."""

    def advance(carry, key):
        x, crossed = carry
        x = langevin.ula(jax.vmap(distribution.score), key, x, STEP_SIZE, every).x
        there = x.sum(-1) > 0
        return (x, crossed | there), (there, crossed | there)

    start = x, jnp.zeros(x.shape[0], bool)
    return jax.lax.scan(advance, start, jax.random.split(key, records))[1]


def isolated() -> None:
    """Samples of Song & Ermon's mixture (2019, section 3.2.2), and the time to cross from the small mode."""
    distribution, keys = modes(10 * np.sqrt(2)), jax.random.split(jax.random.key(0), 8)
    start = jax.random.uniform(keys[0], (2000, 2), minval=-8.0, maxval=8.0)
    unadjusted = langevin.ula(jax.vmap(distribution.score), keys[1], start, STEP_SIZE, 4000).x
    levels, steps = jax.vmap(VarianceExploding(0.1, 20.0))(jnp.linspace(1.0, 0.0, 40)), 100
    anneal = partial(langevin.annealed_langevin, levels=levels, steps=steps)
    annealed = anneal(
        closed_form.OptimalDenoiser(distribution, "score"), keys[2], 20.0 * jax.random.normal(keys[3], (2000, 2))
    ).x

    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3), layout="constrained", width_ratios=(1, 1, 1.5))
    line = jnp.linspace(-9.0, 9.0, 181)
    log_p = jax.vmap(jax.vmap(distribution.log_prob))(jnp.stack(jnp.meshgrid(line, line), -1))
    for axis, name, x in zip(axes, ("unadjusted", "annealed"), (unadjusted, annealed), strict=False):
        share = float((x.sum(-1) > 0).mean())
        print(f"isolated, {name}: {share:.3f} of the chains are in the large mode, whose weight is {WEIGHT}")
        axis.scatter(*x[:1000].T, s=2, alpha=0.5, lw=0)
        heights = np.log(WEIGHT / (2 * np.pi)) - 0.5 * np.array([9.0, 4.0, 1.0])
        axis.contour(line, line, log_p, levels=heights, colors="0.3", linewidths=0.6, linestyles="-")
        for at, part in ((-5.0, 1 - share), (5.0, share)):
            axis.text(0.15 * at, at, f"{part:.2f}", ha="center", va="center")
        axis.set(title=f"{name}, {steps * len(levels.alpha):,} steps", aspect="equal", xlim=(-9, 9), ylim=(-9, 9))
        axis.set(xticks=(-5, 0, 5), yticks=(-5, 0, 5))

    small = jax.random.normal(keys[4], (500, 2))
    axis, every = axes[2], 20
    for distance, records, key in zip(
        (4.0, 6.0, 8.0, 10 * np.sqrt(2)), (200, 1000, 5000, 1000), jax.random.split(keys[5], 4), strict=True
    ):
        distribution = modes(distance)
        there, crossed = crossing(distribution, key, small + distribution.components.mean[0][None], records, every)
        ever = np.asarray(crossed).mean(1)
        half = np.argmax(ever >= 0.5)
        median = f"{every * (half + 1):,}" if ever[half] >= 0.5 else f"more than {every * records:,}"
        print(f"isolated, distance {distance:.3g}: half of the chains have crossed after {median} steps")
        axis.plot(
            every * np.arange(1, records + 1), np.asarray(there).mean(1), label=f"unadjusted, distance {distance:.3g}"
        )
    distribution = modes(10 * np.sqrt(2))
    path = anneal(
        closed_form.OptimalDenoiser(distribution, "score"),
        keys[6],
        small + distribution.components.mean[0][None],
        path=True,
    ).path
    share = np.asarray(path.sum(-1) > 0).mean(1)
    print(f"isolated, annealed from the small mode, distance 14.1: {share[-1]:.3f} are in the large mode")
    axis.plot(steps * np.arange(1, len(share) + 1), share, label="annealed, distance 14.1", color="k")
    axis.axhline(WEIGHT, color="0.6", ls=":", lw=1)
    axis.set(xscale="log", xlabel="steps", ylabel="fraction in the large mode", ylim=(-0.03, 1))
    axis.set(title="started in the small mode")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, "modes")


if __name__ == "__main__":
    isolated()
