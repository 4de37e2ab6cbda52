"""Two failure modes of VAEs, reproduced and measured: blur (VAE-8) and posterior collapse (HVAE-4)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from sklearn.datasets import load_digits

from docs.figures import plt, save
from vdm_jax import hvae, vae
from vdm_jax.gaussian import Normal
from vdm_jax.likelihoods import normalize
from vdm_jax.networks.autoencoder import AutoencoderConfig, Decoder, Encoder


def trained(params, loss, key, steps: int, rate: float, records: int):
    """Train with Adam; return the parameters at `records` times, stacked, from the initial to the final ones."""
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def update(carry, key):
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    def advance(carry, keys):
        return jax.lax.scan(update, carry, keys)[0], carry[0]

    keys = jax.random.split(key, (records - 1, steps // (records - 1)))
    (last, _), seen = jax.jit(lambda start: jax.lax.scan(advance, start, keys))((params, adam.init(params)))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), seen, last)


def blur() -> None:
    """VAE-8: a Gaussian decoder trained on 100 digits, compared with the optimal mean at z, an average of digits."""
    data = normalize(jnp.asarray(load_digits().images[:100].astype(np.uint8))[..., None], 17)
    config = AutoencoderConfig(architecture="mlp", latent=2, width=256, blocks=2)
    encoder, decoder = Encoder(config), Decoder(config, 1, data.shape[1:])

    def encode(params, x):
        mean, log_var = encoder.apply({"params": params}, x)
        return Normal(mean, var=jnp.exp(jnp.asarray(log_var)))

    def decode(params, z):
        return decoder.apply({"params": params}, z)

    def loss(params, key):
        maps = Partial(encode, params["encoder"]), Partial(decode, params["decoder"])
        return vae.bound(*maps, lambda mean: Normal(mean, var=jnp.float32(2.0)), key, data).total.mean()

    keys = jax.random.split(jax.random.key(0), 4)
    start = {
        "encoder": encoder.init(keys[0], data[:1])["params"],
        "decoder": decoder.init(keys[1], jnp.zeros((1, 2)))["params"],
    }
    steps = 20_000
    seen = trained(start, loss, keys[2], steps, 1e-3, 41)

    @jax.jit
    def compare(params):
        q = encode(params["encoder"], data)
        z = jnp.concatenate([vae.reparameterized_sample(q, key) for key in jax.random.split(keys[3], 8)])
        average = jax.vmap(partial(vae.optimal_mean_decoder, q, data))(z)
        ours = decode(params["decoder"], z)
        spread = jnp.square(average - data.mean(0)).mean()
        return jnp.sqrt(jnp.square(ours - average).mean() / spread), (ours, average)

    errors = np.asarray(jax.lax.map(lambda params: compare(params)[0], seen))
    print(f"blur: distance to the optimal mean, relative to its spread: {errors[1]:.3f} ... {errors[-1]:.4f}")
    _, (ours, average) = compare(jax.tree.map(lambda a: a[-1], seen))
    figure = plt.figure(figsize=(9, 2.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    axis = left.subplots()
    axis.semilogy(np.linspace(0, steps, len(errors)), errors)
    axis.set(xlabel="updates", ylabel="distance to the\noptimal mean, relative")
    for line, (name, images) in zip(
        right.subplots(3, 8), {"x": data, "decoder": ours, "optimal mean": average}.items(), strict=True
    ):
        for place, image in zip(line, images[:8], strict=True):
            place.imshow(image[..., 0], cmap="gray", vmin=-1, vmax=1)
            place.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, "blur")


class Coupled(NamedTuple):
    """prod_i N(x_i; mean_i + sum_{j<i} coupling_ij x_j, e^(2 log_scale_i)): any normal distribution, without z."""

    mean: jax.Array
    coupling: jax.Array
    log_scale: jax.Array

    def log_prob(self, x):
        """log p(x) in nats."""
        return Normal(self.mean + jnp.tril(self.coupling, -1) @ x, var=jnp.exp(2.0 * self.log_scale)).log_prob(x)


SIZE = 6
COVARIANCE = 0.9 ** np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))


def two_levels(params, fixed: bool):
    """Two linear levels, top-down; the fixed encoder is z_1 = 0.8 x + noise, z_2 = 0.3 x + noise, as in diffusion."""
    if fixed:
        posteriors = [
            lambda _, x: Normal(0.3 * x, var=jnp.full_like(x, 1 - 0.3**2)),
            lambda z, x: Normal(0.8 * x, var=jnp.full_like(x, 1 - 0.8**2)),
        ]
    else:
        posteriors = [
            lambda _, x: Normal(x @ params["q2"], var=jnp.broadcast_to(jnp.exp(params["v2"]), x.shape)),
            lambda z, x: Normal(
                x @ params["q1"] + z @ params["q12"], var=jnp.broadcast_to(jnp.exp(params["v1"]), x.shape)
            ),
        ]
    below = [lambda z: Normal(z @ params["p1"], var=jnp.broadcast_to(jnp.exp(params["w1"]), z.shape))]
    return hvae.top_down((SIZE,), posteriors, below, lambda z: z @ params["decode"])


def collapse() -> None:
    """HVAE-4: the KL of two levels on normal data, for four pairs of decoder and encoder."""
    samples = np.random.default_rng(0).multivariate_normal(np.zeros(SIZE), COVARIANCE, 256)
    data = jnp.asarray(samples, jnp.float32)
    runs = {
        "independent pixels": {"expressive": False},
        "over-expressive": {},
        "over-expressive, 2 free nats": {"free": 2.0},
        "over-expressive, fixed encoder": {"fixed": True},
    }
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained", sharey=True)
    for axis, (name, options) in zip(axes, runs.items(), strict=True):
        curves, found = _collapse_run(data, **options)
        print(f"collapse, {name}: KL of z_2, z_1 {found.kl} nats, active units {found.active_units}, "
              f"I(x; z_2), I(x; z_1, z_2) {found.mutual_information} nats")  # fmt: skip
        for curve, label in zip(curves.T, ("$z_2$", "$z_1$"), strict=True):
            axis.plot(np.linspace(0, 4000, len(curve)), curve, label=label)
        axis.set(title=name, xlabel="updates")
    axes[0].set_ylabel("KL, nats")
    axes[0].legend()
    save(figure, "collapse")


def _collapse_run(data, expressive: bool = True, free: float = 0.0, fixed: bool = False):
    names = ("q2", "q1", "q12", "p1", "decode")
    keys = dict(zip(names, jax.random.split(jax.random.key(0), 5), strict=True))
    params = {name: 0.3 * jax.random.normal(key, (SIZE, SIZE)) for name, key in keys.items()}
    params |= {name: jnp.zeros(SIZE) for name in ("v1", "v2", "w1", "log_scale")} | {
        "coupling": jnp.zeros((SIZE, SIZE))
    }

    def likelihood(params, mean):
        return Coupled(mean, params["coupling"] * expressive, params["log_scale"])

    def bound(params, key):
        return hvae.bound(two_levels(params, fixed), Partial(likelihood, params), key, data)

    def loss(params, key):
        return hvae.free_bits_objective(bound(params, key), free_nats=free)

    seen = trained(params, loss, jax.random.key(1), 4_000, 1e-2, 41)
    curves = jax.lax.map(lambda params: bound(params, jax.random.key(2)).kl.mean(1), seen)
    last = jax.tree.map(lambda a: a[-1], seen)
    found = jax.tree.map(
        lambda a: np.round(np.asarray(a), 3),
        hvae.collapse_diagnostics(two_levels(last, fixed), jax.random.key(3), data),
    )
    return np.asarray(curves), found


if __name__ == "__main__":
    blur()
    collapse()
