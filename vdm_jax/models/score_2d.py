"""Noise-conditional score models of points in the plane; the exact score is known and shown beside the learned one.

Source: Song & Ermon 2019, arXiv:1907.05600, sections 3 and 4.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from vdm_jax import closed_form, langevin, score_matching
from vdm_jax.models import planes
from vdm_jax.models.annealing import AnnealedLangevin, NoiseScales
from vdm_jax.networks.mlp import MLP, MLPConfig
from vdm_jax.parameterization import ScoreFromDenoiser
from vdm_jax.time_sampling import sample_timesteps
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch
from vdm_jax.types import per_example

__all__ = ["Score2D"]

SHOWN = 40  # chains in a figure


@dataclass(frozen=True)
class Score2D(planes.PlaneModel):
    """A noise-conditional score network of points in the plane."""

    network: MLPConfig = field(default_factory=MLPConfig)
    """Options of the score network, which predicts the noise."""
    noise_scales: NoiseScales = field(default_factory=lambda: NoiseScales(sigma_max=3.0, sigma_min=0.05))
    """The range of the noise scales."""
    num_levels: int = 20
    """Number of noise scales."""
    objective: Literal["denoising", "implicit", "sliced"] = "denoising"
    """Form of score matching."""
    sampling: AnnealedLangevin = field(default_factory=lambda: AnnealedLangevin(steps=50))
    """Options of annealed Langevin dynamics."""

    def build(self, data: DataSpec) -> Experiment:
        """The functions that train, sample and evaluate this model on points of a data set."""
        planes.check_network(self.network)
        return _Functions(self, data).experiment()

    def score_matching_loss(self, denoiser, key, x, level):
        """Score matching of noisy points, each at its level, times sigma^2; shape (B,)."""
        if self.objective == "denoising":
            return score_matching.denoising_at_level(denoiser, key, x, level, prediction_type="eps")
        key_eps, key_v = jax.random.split(key)
        x_t = x + level.sigma[:, None] * jax.random.normal(key_eps, x.shape)

        def score(x_t):
            return -denoiser(x_t, level) / level.sigma[:, None]

        if self.objective == "implicit":
            return level.sigma**2 * score_matching.implicit(score, x_t)
        return level.sigma**2 * score_matching.sliced(score, key_v, x_t)


class _Functions:
    """What the trainer calls, in this order: init, loss, sample, evaluate; then the figures."""

    def __init__(self, config: Score2D, data: DataSpec):
        self.config, self.network = config, MLP(config.network)
        self.distribution = planes.data_distribution(data)
        self.schedule = config.noise_scales.discrete_schedule(config.num_levels)

    def experiment(self) -> Experiment:
        num_levels = self.config.num_levels
        cost = Cost(evaluate=num_levels, sample=num_levels * self.config.sampling.steps)
        plots = {"field": self.score_panels, "langevin": self.langevin_panels}
        return Experiment(self.init, self.loss, self.sample, self.evaluate, cost, plane_plots=plots)

    def init(self, key):
        return self.network.init(key, jnp.zeros((1, 2)), jnp.zeros(1))["params"]

    def predict(self, params, x_t, level):
        return self.network.apply({"params": params}, x_t / jnp.sqrt(1.0 + level.sigma**2)[:, None], level.log_snr)

    def loss(self, params, key, batch, step):
        """Score matching, each point at a random level."""
        del step
        key_t, key_loss = jax.random.split(key)
        x, num_levels = batch["image"], self.config.num_levels
        t = sample_timesteps(key_t, len(x), num_levels, time_sampling="low_discrepancy")
        denoiser = Partial(self.predict, params)
        return self.config.score_matching_loss(denoiser, key_loss, x, self.schedule(t)).mean(), {}

    def sample(self, params, key, n):
        """n samples by annealed Langevin dynamics, and some of the chains."""
        chain = self.config.sampling(Partial(self.predict, params), key, (n, 2), self.schedule, "eps")
        return SampleBatch(chain.x, chain.path[:, :SHOWN])

    def evaluate(self, params, key, batch):
        """sigma^2/2 times the squared error of the learned score: the mean over levels, and the two ends."""
        x_0 = batch["image"]

        def score_error(t):
            level = self.schedule(t)
            x = x_0 + level.sigma * jax.random.normal(jax.random.fold_in(key, t), x_0.shape)
            learned = ScoreFromDenoiser(Partial(self.predict, params), level)(x)
            exact = jax.vmap(closed_form.marginal(self.distribution, level).score)(x)
            return 0.5 * per_example((level.sigma * (learned - exact)) ** 2)

        errors = jax.lax.map(score_error, jnp.arange(1, self.config.num_levels + 1))
        return {"score_error": errors.mean(0), "error_noisiest": errors[-1], "error_cleanest": errors[0]}

    def score_panels(self, params, key):
        """The learned and the exact score, at the lowest noise level and at two higher ones."""
        del key
        denoiser, num_levels = Partial(self.predict, params), self.config.num_levels
        sigma, panels = np.asarray(self.schedule.levels.sigma), {}
        for t in (1, 1 + num_levels // 4, 1 + num_levels // 2):
            marginal = closed_form.marginal(self.distribution, self.schedule(t))
            scores = {"exact": jax.vmap(marginal.score), "learned": ScoreFromDenoiser(denoiser, self.schedule(t))}
            panels[f"sigma = {sigma[t]:.2f}"] = planes.score_panel(jax.vmap(marginal.log_prob), **scores)
        return panels

    def langevin_panels(self, params, key):
        """Annealed chains, and chains at the lowest noise level alone with the same number of steps."""
        denoiser, sampling, num_levels = Partial(self.predict, params), self.config.sampling, self.config.num_levels
        lowest, steps = self.schedule(1), num_levels * sampling.steps
        key_x, key_alone, key_annealed = jax.random.split(key, 3)
        x, eta = jax.random.uniform(key_x, (SHOWN, 2), minval=-2.0, maxval=2.0), sampling.rate * lowest.sigma**2
        alone = langevin.ula(ScoreFromDenoiser(denoiser, lowest), key_alone, x, eta, steps, path=True).path
        annealed = sampling(denoiser, key_annealed, (SHOWN, 2), self.schedule, "eps").path[num_levels // 2 :]
        paths = {"annealed": annealed, "lowest noise level alone": alone[:: max(1, steps // 100)]}
        log_prob = jax.vmap(closed_form.marginal(self.distribution, lowest).log_prob)
        return {title: planes.density_panel(log_prob, paths=states) for title, states in paths.items()}
