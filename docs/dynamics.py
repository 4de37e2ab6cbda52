"""LAN-3: Langevin chains between two isolated modes, as they are and annealed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from docs.figures import plt, save
from vdm_jax import closed_form, langevin
from vdm_jax.schedules import VarianceExploding

SHARE = 0.8  # of the large mode
SIZE = 0.1  # of an unadjusted step


def modes(apart: float) -> closed_form.Mixture:
    """Two modes N(m, I) of weights 1/5 and 4/5, so many standard deviations apart: Song & Ermon have 10 sqrt(2)."""
    far = apart / np.sqrt(8)
    return closed_form.mixture([1 - SHARE, SHARE], [[-far, -far], [far, far]], [1.0, 1.0])


@partial(jax.jit, static_argnames=("looks", "every"))
def crossing(distribution, key, x, looks: int, every: int):
    """Of chains begun at x, after every so many steps: who is on the large mode's side, and who has ever been."""

    def stretch(carry, key):
        x, crossed = carry
        x = langevin.ula(jax.vmap(distribution.score), key, x, SIZE, every).x
        there = x.sum(-1) > 0
        return (x, crossed | there), (there, crossed | there)

    start = x, jnp.zeros(x.shape[0], bool)
    return jax.lax.scan(stretch, start, jax.random.split(key, looks))[1]


def isolated() -> None:
    """Draws of the law of Song & Ermon 2019, section 3.2.2; and how long it is from the small mode to the large."""
    distribution, keys = modes(10 * np.sqrt(2)), jax.random.split(jax.random.key(0), 8)
    start = jax.random.uniform(keys[0], (2000, 2), minval=-8.0, maxval=8.0)
    unadjusted = langevin.ula(jax.vmap(distribution.score), keys[1], start, SIZE, 4000).x
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
        print(f"isolated, {name}: {share:.3f} of the chains in the large mode, whose weight is {SHARE}")
        axis.scatter(*x[:1000].T, s=2, alpha=0.5, lw=0)
        heights = np.log(SHARE / (2 * np.pi)) - 0.5 * np.array([9.0, 4.0, 1.0])
        axis.contour(line, line, log_p, levels=heights, colors="0.3", linewidths=0.6, linestyles="-")
        for at, part in ((-5.0, 1 - share), (5.0, share)):
            axis.text(0.15 * at, at, f"{part:.2f}", ha="center", va="center")
        axis.set(title=f"{name}, {steps * len(levels.alpha):,} steps", aspect="equal", xlim=(-9, 9), ylim=(-9, 9))
        axis.set(xticks=(-5, 0, 5), yticks=(-5, 0, 5))

    small = jax.random.normal(keys[4], (500, 2))
    axis, every = axes[2], 20
    for apart, looks, key in zip(
        (4.0, 6.0, 8.0, 10 * np.sqrt(2)), (200, 1000, 5000, 1000), jax.random.split(keys[5], 4), strict=True
    ):
        distribution = modes(apart)
        there, crossed = crossing(distribution, key, small + distribution.components.mean[0][None], looks, every)
        ever = np.asarray(crossed).mean(1)
        half = np.argmax(ever >= 0.5)
        median = f"{every * (half + 1):,}" if ever[half] >= 0.5 else f"more than {every * looks:,}"
        print(f"isolated, modes {apart:.3g} apart: half of the chains have crossed after {median} steps")
        axis.plot(every * np.arange(1, looks + 1), np.asarray(there).mean(1), label=f"unadjusted, {apart:.3g} apart")
    distribution = modes(10 * np.sqrt(2))
    path = anneal(
        closed_form.OptimalDenoiser(distribution, "score"),
        keys[6],
        small + distribution.components.mean[0][None],
        path=True,
    ).path
    share = np.asarray(path.sum(-1) > 0).mean(1)
    print(f"isolated, annealed from the small mode, 14.1 apart: {share[-1]:.3f}")
    axis.plot(steps * np.arange(1, len(share) + 1), share, label="annealed, 14.1 apart", color="k")
    axis.axhline(SHARE, color="0.6", ls=":", lw=1)
    axis.set(xscale="log", xlabel="steps", ylabel="share in the large mode", ylim=(-0.03, 1))
    axis.set(title="begun in the small mode")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, "modes")


if __name__ == "__main__":
    isolated()
