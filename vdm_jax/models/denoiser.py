"""What the recipes of a denoiser share: one level of noise, and clean images to learn from, or none.

Source: Stein 1981; Metzler et al. 2018, arXiv:1805.10531 (networks trained by SURE).
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import langevin
from vdm_jax.likelihoods import normalize
from vdm_jax.models.images import pixels
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.sure import sure
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch
from vdm_jax.types import per_example

PEAK = 2.0  # between black and white


@dataclass(frozen=True)
class DenoiserConfig(TrainConfig):
    """A denoiser of images in noise of one size. Each training image has one noise for good, so that with SURE nothing
    clean is ever seen."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """The network, which gives the noise."""
    objective: Literal["sure", "clean"] = "sure"
    """Learn from the noisy images alone, by Stein's estimate of the risk, or from the clean ones."""
    sigma: float = 0.5
    """Standard deviation of the noise, on [-1, 1]."""
    probes: int = 1
    """Directions along which the divergence is estimated."""
    fresh_noise: bool = False
    """New noise whenever an image is seen, in the place of one for good: what clean images allow."""
    chain_steps: int = 500
    """Langevin steps of a sample."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        if not self.sigma > 0.0 or self.probes < 1:
            raise ValueError("--sigma must be above 0 and --probes at least 1")
        if self.network.num_classes:
            raise ValueError("--network.num-classes: denoisers take no labels here")
        if self.fresh_noise and self.objective == "sure":
            raise ValueError(
                "--fresh-noise would show --objective sure every image in many noises: take one of the two"
            )
        network, dims = UNet(self.network), int(np.prod(data.shape))

        def init(key):
            return network.init(key, jnp.zeros((1, *data.shape)), jnp.zeros(1))["params"]

        def denoise(params, key, y):
            rngs = {} if key is None else {"dropout": key}
            noise = network.apply({"params": params}, y, jnp.zeros(len(y)), train=key is not None, rngs=rngs)
            return y - self.sigma * jnp.asarray(noise)

        def noisy(key, x):
            return x + self.sigma * jax.random.normal(key, x.shape)

        def loss(params, key, batch, step):
            del step
            key_y, key_dropout, key_v = jax.random.split(key, 3)
            x = normalize(batch["image"], data.levels)
            y = noisy(key_y, x) if self.fresh_noise else jax.vmap(noisy)(_own_keys(batch["image"]), x)
            denoiser = Partial(denoise, params, key_dropout if self.network.dropout else None)
            if self.objective == "clean":
                return per_example(jnp.square(denoiser(y) - x)).mean() / dims, {}
            return sure(denoiser, key_v, y, self.sigma, probes=self.probes).mean() / dims, {}

        def evaluate(params, key, batch):
            key_y, key_v = jax.random.split(key)
            x = normalize(batch["image"], data.levels)
            y, denoiser = noisy(key_y, x), Partial(denoise, params, None)
            error, before = (per_example(jnp.square(seen - x)) / dims for seen in (denoiser(y), y))
            numbers = {"psnr": _decibels(error), "psnr_of_the_noisy": _decibels(before), "squared_error": error}
            return numbers | {"sure": sure(denoiser, key_v, y, self.sigma) / dims}

        def sample(params, key, n):
            """Langevin chains on the noisy law, whose score is (D(y) - y) / sigma^2, and what is behind their ends."""
            key_y, key_chain = jax.random.split(key)
            start = jnp.sqrt(1.0 + self.sigma**2) * jax.random.normal(key_y, (n, *data.shape))

            def score(y):
                return (denoise(params, None, y) - y) / self.sigma**2

            ends = langevin.ula(score, key_chain, start, 0.1 * self.sigma**2, self.chain_steps).x
            return SampleBatch(pixels(denoise(params, None, ends), data.levels))

        def denoised(params, key, batch):
            x = normalize(batch["image"], data.levels)
            y = noisy(key, x)
            return pixels(jnp.stack([x, y, denoise(params, None, y)]), data.levels)

        cost = Cost(evaluate=4, sample=self.chain_steps)
        return Experiment(init, loss, sample, evaluate, cost, pictures={"denoised": denoised})


def _own_keys(images):
    """A key for every image, the same whenever it is seen: from its pixel values."""
    values = images.reshape(len(images), -1).astype(jnp.uint32)
    odd = 2 * jax.random.bits(jax.random.key(1), values.shape[1:]) + 1
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(2), number))((values * odd[None]).sum(-1))


def _decibels(squared_error):
    """Peak signal to noise ratio."""
    return 10.0 * jnp.log10(PEAK**2 / squared_error)
