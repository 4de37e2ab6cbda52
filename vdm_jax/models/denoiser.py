"""Denoisers at one noise level, trained by Stein's unbiased risk estimate (SURE) or on clean images.

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
from vdm_jax.models.images import to_pixels
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.sure import sure
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch
from vdm_jax.types import per_example

__all__ = ["ImageDenoiser"]

PEAK = 2.0  # difference between black and white on [-1, 1]


@dataclass(frozen=True)
class ImageDenoiser(TrainConfig):
    """A denoiser of images at one noise level. Every training image has one fixed noise, so that SURE never uses
    information about the clean image."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """Options of the denoising network, which predicts the noise."""
    objective: Literal["sure", "clean"] = "sure"
    """Train on noisy images alone by Stein's unbiased risk estimate, or on clean images by squared error."""
    sigma: float = 0.5
    """Standard deviation of the noise, on [-1, 1]."""
    probes: int = 1
    """Random directions for the divergence estimate of SURE."""
    fresh_noise: bool = False
    """Add new noise to each image in every epoch (objective clean only)."""
    chain_steps: int = 500
    """Langevin steps of a sample."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on images of a data set."""
        self.network.check(data.shape)
        if not self.sigma > 0.0:
            raise ValueError(f"--sigma {self.sigma:g} must be above 0")
        if self.probes < 1:
            raise ValueError(f"--probes {self.probes} must be at least 1")
        if self.network.num_classes:
            raise ValueError(
                f"--network.num-classes {self.network.num_classes}: class conditioning is not implemented for "
                "ImageDenoiser recipes; set --network.num-classes 0"
            )
        if self.fresh_noise and self.objective == "sure":
            raise ValueError(
                "--fresh-noise gives --objective sure many noisy versions of each image, which reveal the clean one: "
                "omit --fresh-noise, or set --objective clean"
            )
        return _Functions(self, data).experiment()


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the figure of denoised images."""

    def __init__(self, config: ImageDenoiser, data: DataSpec):
        self.config, self.data, self.network = config, data, UNet(config.network)
        self.num_dims = int(np.prod(data.shape))

    def experiment(self) -> Experiment:
        cost = Cost(evaluate=4, sample=self.config.chain_steps)
        grids = {"denoised": self.denoised_images}
        return Experiment(self.init, self.loss, self.sample, self.evaluate, cost, image_grids=grids)

    def init(self, key):
        return self.network.init(key, jnp.zeros((1, *self.data.shape)), jnp.zeros(1))["params"]

    def denoise(self, params, key, y):
        """The clean images predicted from y. With a key, dropout is on."""
        rngs = {} if key is None else {"dropout": key}
        noise = self.network.apply({"params": params}, y, jnp.zeros(len(y)), train=key is not None, rngs=rngs)
        return y - self.config.sigma * jnp.asarray(noise)

    def add_noise(self, key, x):
        return x + self.config.sigma * jax.random.normal(key, x.shape)

    def loss(self, params, key, batch, step):
        """SURE or the squared error, per dimension."""
        del step
        config = self.config
        key_y, key_dropout, key_v = jax.random.split(key, 3)
        x = normalize(batch["image"], self.data.levels)
        y = self.add_noise(key_y, x) if config.fresh_noise else jax.vmap(self.add_noise)(_image_keys(batch["image"]), x)
        denoiser = Partial(self.denoise, params, key_dropout if config.network.dropout else None)
        if config.objective == "clean":
            return per_example(jnp.square(denoiser(y) - x)).mean() / self.num_dims, {}
        return sure(denoiser, key_v, y, config.sigma, probes=config.probes).mean() / self.num_dims, {}

    def sample(self, params, key, n):
        """Langevin chains on the distribution of noisy images, score (D(y) - y) / sigma^2; the last state denoised."""
        sigma = self.config.sigma
        key_y, key_chain = jax.random.split(key)
        start = jnp.sqrt(1.0 + sigma**2) * jax.random.normal(key_y, (n, *self.data.shape))

        def score(y):
            return (self.denoise(params, None, y) - y) / sigma**2

        chain = langevin.ula(score, key_chain, start, 0.1 * sigma**2, self.config.chain_steps)
        return SampleBatch(to_pixels(self.denoise(params, None, chain.x), self.data.levels))

    def evaluate(self, params, key, batch):
        """PSNR before and after denoising, squared error, and SURE's estimate of it, per dimension."""
        key_y, key_v = jax.random.split(key)
        x = normalize(batch["image"], self.data.levels)
        y, denoiser = self.add_noise(key_y, x), Partial(self.denoise, params, None)
        error, noise = (per_example(jnp.square(image - x)) / self.num_dims for image in (denoiser(y), y))
        estimate = sure(denoiser, key_v, y, self.config.sigma) / self.num_dims
        return {"psnr": _psnr(error), "psnr_noisy": _psnr(noise), "squared_error": error, "sure": estimate}

    def denoised_images(self, params, key, batch):
        """Rows: clean, noisy, denoised."""
        x = normalize(batch["image"], self.data.levels)
        y = self.add_noise(key, x)
        return to_pixels(jnp.stack([x, y, self.denoise(params, None, y)]), self.data.levels)


def _image_keys(images):
    """A key for every image, computed from its pixel values, so that it is the same in every epoch."""
    values = images.reshape(len(images), -1).astype(jnp.uint32)
    odd = 2 * jax.random.bits(jax.random.key(1), values.shape[1:]) + 1
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(2), number))((values * odd[None]).sum(-1))


def _psnr(squared_error):
    """Peak signal-to-noise ratio, in dB."""
    return 10.0 * jnp.log10(PEAK**2 / squared_error)
