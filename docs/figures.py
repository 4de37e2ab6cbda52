"""The figures of docs/derivations.md from closed-form distributions: `make figures`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from vdm_jax import closed_form, forward, information
from vdm_jax.discrete_schedules import discretize
from vdm_jax.noise_levels import level_from_log_snr, step_from_log_snr
from vdm_jax.samplers import ancestral
from vdm_jax.schedules import LinearLogSNR

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent


def save(figure, name: str) -> None:
    """Write docs/NAME.png."""
    figure.savefig(FOLDER / f"{name}.png", dpi=120)
    plt.close(figure)
    print(f"docs/{name}.png")


def reverse_kernel() -> None:
    """POST-7: q(x_s|x_t) and the model's normal distribution, for three step sizes."""
    distribution, x_t, low = (
        closed_form.mixture([0.5, 0.5], [[-1.0], [1.0]], [0.01, 0.01]),
        jnp.asarray([0.1]),
        jnp.asarray(-2.0),
    )
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained", sharex=True)
    grid = jnp.linspace(-3.0, 3.0, 601)[:, None]
    for axis, drop in zip(axes, (0.1, 1.0, 6.0), strict=True):
        step = step_from_log_snr(low + drop, low)
        kernel = closed_form.reverse_transition(distribution, x_t, step)
        model = forward.posterior(x_t, closed_form.optimal_prediction(distribution, x_t, step.t, "x_0"), step)
        best = closed_form.gaussian(kernel.mean, kernel.covariance())
        for curve, label in (
            (kernel, "$q(x_s|x_t)$"),
            (best, "nearest normal distribution"),
            (model, r"model, variance $\sigma_q^2$"),
        ):
            style = "-" if curve is kernel else "--" if curve is best else ":"
            axis.plot(grid[:, 0], jnp.exp(jax.vmap(curve.log_prob)(grid)), style, label=label)
        beta = 1 - float((step.t.alpha / step.s.alpha) ** 2)
        axis.set(title=f"one step of $\\beta$ = {beta:.2g}", xlabel="$x_s$", yticks=[])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(figure, "reverse_kernel")


def coarse_to_fine() -> None:
    """SAM-3: sampling paths for two pairs of points, and when the pair and the point are decided."""
    distribution, schedule = (
        closed_form.empirical([[-1.1], [-0.9], [0.9], [1.1]]),
        discretize(LinearLogSNR(9.0, -9.0), 300),
    )
    x_T = jax.random.normal(jax.random.key(0), (24, 1))
    chain = ancestral(
        closed_form.OptimalDenoiser(distribution), jax.random.key(1), x_T, schedule, snapshots=300
    ).trajectory
    log_snr = schedule.log_snr[chain.t]

    def decided(lam):
        level = level_from_log_snr(lam)
        noisy = closed_form.marginal(distribution, level)
        shares = lambda x: jnp.exp(distribution.posterior(x, level).log_weights).reshape(2, 2)  # noqa: E731
        return [information.quadrature(lambda x, i=i: jnp.sum(shares(x).sum(i) ** 2), noisy).value for i in (1, 0)]

    coarse, fine = jax.jit(jax.vmap(decided))(log_snr)
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 4.2), layout="constrained", sharex=True)
    above.plot(log_snr, chain.x_hat[..., 0], lw=0.7)
    above.set(ylabel=r"predicted $\hat x$")
    below.plot(log_snr, coarse, label="pair")
    below.plot(log_snr, fine, label="point of the pair")
    below.set(xlabel=r"$\lambda_t$, from noise to data", ylabel="probability that $x_t$\nhas decided")
    below.legend()
    save(figure, "coarse_to_fine")


def gap() -> None:
    """ELBO-3, ELBO-12: E bound - entropy against T."""
    distribution = closed_form.mixture([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.02])
    steps = np.array([4, 8, 16, 32, 64, 128, 256, 512, 1024])
    figure, axis = plt.subplots(figsize=(4.5, 3), layout="constrained")
    for low in (-15.0, -5.0, -2.0):
        schedules = [discretize(LinearLogSNR(9.0, low), int(n)) for n in steps]
        entropy = information.entropy(distribution).value
        gaps = [float(information.optimal_bound(distribution, s).total.value - entropy) for s in schedules]
        (line,) = axis.loglog(steps, gaps, "o-", ms=3, label=rf"$\lambda_T$ = {low:g}")
        limit = information.optimal_bound_limit(distribution, schedules[0](1), schedules[0](4)).total.value - entropy
        axis.axhline(float(limit), color=line.get_color(), ls=":", lw=1)
    axis.set(xlabel="T", ylabel="E bound - entropy, nats", ylim=(1e-3, 30))
    axis.legend(fontsize=8)
    save(figure, "gap")


if __name__ == "__main__":
    with jax.enable_x64(True):
        reverse_kernel()
        coarse_to_fine()
        gap()
