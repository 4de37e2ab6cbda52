"""The score of points in a plane, learned at every level of noise; the truth is known, and drawn beside it.

    make train EXP=score_2d ARGS="--data moons"                   # two_modes, eight_modes, moons or spiral

`field.png` has the learned score on the true one, at three levels of noise; `langevin.png` chains of one length on the
cleanest law, which stay in the mode where they began, and annealed ones, which find all. `--objective implicit` and
`sliced` never see the noise that was added; they come to the same score.

Cost: a minute on 2 idle CPU cores.

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
from vdm_jax.models.annealing import Langevin, Noise
from vdm_jax.networks.mlp import MLP, MLPConfig
from vdm_jax.parameterization import ScoreFromDenoiser
from vdm_jax.time_sampling import sample_timesteps
from vdm_jax.training.experiment import Cost, DataSpec, Experiment, SampleBatch
from vdm_jax.types import per_example

SHOWN = 40  # chains in a picture


@dataclass(frozen=True)
class Score2D(planes.PlaneConfig):
    """A noise-conditional score network of points in a plane."""

    network: MLPConfig = field(default_factory=MLPConfig)
    """The network, which gives the noise."""
    noise: Noise = field(default_factory=lambda: Noise(sigma_max=3.0, sigma_min=0.05))
    """The levels."""
    num_levels: int = 20
    """How many."""
    objective: Literal["denoising", "implicit", "sliced"] = "denoising"
    """How the score is matched."""
    sampling: Langevin = field(default_factory=lambda: Langevin(steps=50))
    """How samples are drawn."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with, and the pictures."""
        planes.check_network(self.network)
        distribution, network, schedule = (
            planes.truth(data),
            MLP(self.network),
            self.noise.discrete_schedule(self.num_levels),
        )

        def init(key):
            return network.init(key, jnp.zeros((1, 2)), jnp.zeros(1))["params"]

        def predict(params, x_t, level):
            return network.apply({"params": params}, x_t / jnp.sqrt(1.0 + level.sigma**2)[:, None], level.log_snr)

        def loss(params, key, batch, step):
            del step
            key_t, key_loss = jax.random.split(key)
            level = schedule(
                sample_timesteps(key_t, len(batch["image"]), self.num_levels, time_sampling="low_discrepancy")
            )
            return self.matching(Partial(predict, params), key_loss, batch["image"], level).mean(), {}

        def sample(params, key, n):
            chain = self.sampling(Partial(predict, params), key, (n, 2), schedule, "eps")
            return SampleBatch(chain.x, chain.path[:, :SHOWN])

        def evaluate(params, key, batch):
            def at(t):
                level = schedule(t)
                x = batch["image"] + level.sigma * jax.random.normal(jax.random.fold_in(key, t), batch["image"].shape)
                apart = ScoreFromDenoiser(Partial(predict, params), level)(x) - jax.vmap(
                    closed_form.marginal(distribution, level).score
                )(x)
                return 0.5 * per_example((level.sigma * apart) ** 2)

            errors = jax.lax.map(at, jnp.arange(1, self.num_levels + 1))
            return {"score_error": errors.mean(0), "of_the_noisiest": errors[-1], "of_the_cleanest": errors[0]}

        def fields(params, key):
            del key
            return self.fields(Partial(predict, params), distribution, schedule)

        def chains(params, key):
            return self.chains(Partial(predict, params), key, distribution, schedule)

        cost = Cost(evaluate=self.num_levels, sample=self.num_levels * self.sampling.steps)
        return Experiment(init, loss, sample, evaluate, cost, planes={"field": fields, "langevin": chains})

    def matching(self, denoiser, key, x, level):
        """Score matching of the noisy points, each at its level, times sigma^2; per example."""
        if self.objective == "denoising":
            return score_matching.denoising_at(denoiser, key, x, level, prediction_type="eps")
        key_eps, key_v = jax.random.split(key)
        x_t = x + level.sigma[:, None] * jax.random.normal(key_eps, x.shape)

        def score(x_t):
            return -denoiser(x_t, level) / level.sigma[:, None]

        if self.objective == "implicit":
            return level.sigma**2 * score_matching.implicit(score, x_t)
        return level.sigma**2 * score_matching.sliced(score, key_v, x_t)

    def fields(self, denoiser, distribution, schedule):
        """The learned score on the true one, at the cleanest level, and with more noise."""
        sigma, found = np.asarray(schedule.levels.sigma), {}
        for t in (1, 1 + self.num_levels // 4, 1 + self.num_levels // 2):
            noisy, score = closed_form.marginal(distribution, schedule(t)), ScoreFromDenoiser(denoiser, schedule(t))
            arrows = {"truth": jax.vmap(noisy.score), "learned": score}
            found[f"sigma = {sigma[t]:.2f}"] = planes.field(jax.vmap(noisy.log_prob), **arrows)
        return found

    def chains(self, denoiser, key, distribution, schedule):
        """Chains on the cleanest law alone, and annealed ones, of as many steps."""
        clean, steps = schedule(1), self.num_levels * self.sampling.steps
        key_x, key_alone, key_annealed = jax.random.split(key, 3)
        x, eta = jax.random.uniform(key_x, (SHOWN, 2), minval=-2.0, maxval=2.0), self.sampling.rate * clean.sigma**2
        alone = langevin.ula(ScoreFromDenoiser(denoiser, clean), key_alone, x, eta, steps, path=True).path
        annealed = self.sampling(denoiser, key_annealed, (SHOWN, 2), schedule, "eps").path[self.num_levels // 2 :]
        paths = {"annealed": annealed, "at the last level alone": alone[:: max(1, steps // 100)]}
        log_prob = jax.vmap(closed_form.marginal(distribution, clean).log_prob)
        return {title: planes.landscape(log_prob, paths=states) for title, states in paths.items()}


CONFIG = Score2D(
    data="two_modes",
    steps=5_000,
    batch_size=256,
    learning_rate=2e-3,
    lr_schedule="cosine",
    ema_decay=0.995,
    eval_batch_size=2_000,
    num_samples=2_000,
    log_every=500,
    picture_every=0,
)
