"""Shared by all VAEs, of one latent or many layers: the options, the loss, sampling, evaluation, the figures."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import hvae
from vdm_jax.elbo import bits_per_dim
from vdm_jax.models.images import to_pixels
from vdm_jax.models.pixel_likelihood import PixelLikelihood
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import DataSpec, Experiment, LikelihoodCurve, LikelihoodRow, SampleBatch

__all__ = ["LatentVariableFunctions", "LatentVariableModel"]

MAX_LEVEL_ROWS = 8  # with more layers than this, their KLs are in the likelihood curve alone


@dataclass(frozen=True)
class LatentVariableModel(TrainConfig):
    """Options of a variational autoencoder with any number of layers."""

    likelihood: PixelLikelihood = field(default_factory=PixelLikelihood)
    """The distribution p(x|z) of an image given its latents."""
    kl_warmup_steps: int = 0
    """Updates over which the weight of the KL terms grows from 0 to 1."""
    free_nats: float = 0.0
    """Free bits: nats per image below which the KL of a layer is not penalized."""
    temperature: float = 1.0
    """Factor of the latents' standard deviations in sampling."""
    importance_samples: int = 1000
    """K of the importance-weighted bound in the likelihood report."""


class LatentVariableFunctions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the likelihood report and the figures.

    A subclass defines `init` and `hierarchy`, and `latent_codes` where the latent is two-dimensional.

    Args:
        config: the options.
        data: the images.
        num_levels: number of latents in the hierarchy.
    """

    def __init__(self, config: LatentVariableModel, data: DataSpec, num_levels: int):
        self.config, self.data, self.num_levels = config, data, num_levels
        self.num_values, self.num_dims = config.likelihood.num_values(data.levels), int(np.prod(data.shape))

    def init(self, key):
        """The parameters before training."""
        raise NotImplementedError

    def hierarchy(self, params, key=None, step=None) -> hvae.Hierarchy:
        """The model with these parameters; with a key, dropout is on; `step` is the number of updates in training."""
        raise NotImplementedError

    def experiment(self, latent_codes=None) -> Experiment:
        return Experiment(
            self.init,
            self.loss,
            self.sample,
            self.evaluate,
            likelihood_rows=self.likelihood_rows(),
            likelihood_curve=self.level_curve() if self.num_levels > 1 else None,
            image_grids={"reconstructions": self.reconstructions},
            latent_codes=latent_codes,
        )

    def loss(self, params, key, batch, step):
        """The free-bits objective with KL warm-up, in bits per dimension."""
        key_dropout, key_z = jax.random.split(key)
        density = partial(self.distribution, density=True)
        terms = hvae.bound(self.hierarchy(params, key_dropout, step), density, key_z, self.x(batch))
        beta = hvae.kl_warm_up(step, self.config.kl_warmup_steps)
        value = hvae.free_bits_objective(terms, beta=beta, free_nats=self.config.free_nats)
        nats = {"reconstruction": terms.reconstruction.mean(), "kl": terms.kl.sum(0).mean()}
        return self.bits(value), {name: self.bits(value) for name, value in nats.items()}

    def sample(self, params, key, n):
        """n samples: the means of p(x|z), z from the prior."""
        temperature = self.config.temperature
        outputs = hvae.sample_decoder_output(self.hierarchy(params), key, n, temperature=temperature)
        return SampleBatch(self.mean_images(outputs))

    def evaluate(self, params, key, batch):
        """The bound and its two parts, in bits per dimension."""
        terms = self.bound(params, key, batch)
        nats = {"bits_per_dim": terms.total, "reconstruction": terms.reconstruction, "kl": terms.kl.sum(0)}
        return {name: self.bits(value) for name, value in nats.items()}

    def bound(self, params, key, batch) -> hvae.HierarchicalBound:
        return hvae.bound(self.hierarchy(params), self.distribution, key, self.x(batch))

    def importance_weighted_bound(self, params, key, batch):
        samples = self.config.importance_samples
        hierarchy, x = self.hierarchy(params), self.x(batch)
        return hvae.importance_weighted_bound(hierarchy, self.distribution, key, x, samples=samples)

    def likelihood_rows(self) -> dict[str, LikelihoodRow]:
        """Rows of the likelihood report: the terms of the bound, the bound, the importance-weighted bound."""
        samples = self.config.importance_samples
        return {
            "reconstruction": LikelihoodRow("-E log P(x|z)", lambda *args: self.bound(*args).reconstruction),
            **self.kl_rows(),
            "bound": LikelihoodRow("-log P(x) <= -ELBO", lambda *args: self.bound(*args).total),
            f"bound, K = {samples:,}": LikelihoodRow(
                "-log P(x) <= importance-weighted bound of K samples", self.importance_weighted_bound, samples
            ),
        }

    def kl_rows(self) -> dict[str, LikelihoodRow]:
        """The KL of all layers, and of each layer if there are few."""

        def kl_of_level(i, *args):
            return self.bound(*args).kl[i]

        count = self.num_levels
        if count == 1:
            return {"kl": LikelihoodRow("E KL(q(z|x) || p(z))", partial(kl_of_level, 0))}
        rows = {"kl": LikelihoodRow("sum over all layers", lambda *args: self.bound(*args).kl.sum(0))}
        for i in range(count if count <= MAX_LEVEL_ROWS else 0):
            description = f"E KL(q(z_{count - i}|z above, x) || p)"
            rows[f"kl, z_{count - i}"] = LikelihoodRow(description, partial(kl_of_level, i))
        return rows

    def level_curve(self) -> LikelihoodCurve:
        """The KL of every layer."""

        def points(params, key, batch):
            kl = self.bound(params, key, batch).kl.T
            return {"x": jnp.broadcast_to(jnp.arange(1.0, self.num_levels + 1), kl.shape), "y": kl}

        return LikelihoodCurve("layer, from the top", "KL of the layer, nats", points)

    def reconstructions(self, params, key, batch):
        """Rows: the images, then reconstructions from the upper layers: the top one only, more, all."""
        x = self.x(batch)
        kept = np.unique(np.linspace(1, self.num_levels, min(self.num_levels, 4)).astype(int))
        rows = [self.mean_images(hvae.reconstruct(self.hierarchy(params), key, x, keep=int(k))) for k in kept]
        return jnp.stack([to_pixels(x, self.data.levels), *rows])

    def x(self, batch):
        """The images of a batch as numbers on [-1, 1]."""
        return self.config.likelihood.normalize(batch["image"], self.data.levels)

    def distribution(self, output, density=False):
        """p(x|z) of one image, from the decoder's output."""
        return self.config.likelihood.distribution_of(output, self.num_values, density=density)

    def mean_images(self, outputs):
        """Pixel values from the decoder's outputs."""
        likelihood = self.config.likelihood
        means = jax.vmap(lambda output: likelihood.mean_image(output, self.num_values))(outputs)
        return to_pixels(means, self.data.levels)

    def bits(self, nats):
        return bits_per_dim(nats, self.num_dims)
