"""What every VAE recipe shares, whatever the number of its levels: the bound, its ledger, its pictures."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import hvae
from vdm_jax.elbo import bits_per_dim
from vdm_jax.models.likelihood_options import LikelihoodOptions
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.experiment import DataSpec, Experiment, LikelihoodCurve, LikelihoodRow, SampleBatch

ROWS_OF_LEVELS = 8  # levels with a row each in the ledger; more are in its curve only


@dataclass(frozen=True)
class Hierarchical(TrainConfig):
    """A variational autoencoder of any number of levels."""

    observation: LikelihoodOptions = field(default_factory=LikelihoodOptions)
    """The law of an image given its latents."""
    kl_warmup_steps: int = 0
    """Updates over which the weight of the KL terms grows from 0 to 1."""
    free_nats: float = 0.0
    """Nats an image that every level may say before its KL costs anything."""
    temperature: float = 1.0
    """Factor of the latents' standard deviations in sampling."""
    importance_samples: int = 1000
    """K of the ledger's importance-weighted bound."""

    def assemble(self, data: DataSpec, init, model, levels: int, codes=None) -> Experiment:
        """The functions that the loop trains, samples and evaluates with.

        Args:
            data: the images.
            init: key -> params.
            model: params, key of dropout or None, number of updates made or None -> hierarchy. Its last levels are
                drawn last.
            levels: how many.
            codes: params, x -> where x lies on a map of the latent; or None.
        """
        look, num_dims = self.observation, int(np.prod(data.shape))
        values = look.levels(data.levels)
        x_of = lambda batch: look.x(batch["image"], data.levels)  # noqa: E731
        distribution, density = (lambda o: look.read(o, values)), (lambda o: look.read(o, values, density=True))

        def show(outputs):
            return look.values(jax.vmap(lambda o: look.picture(o, values))(outputs), data.levels)

        def loss(params, key, batch, step):
            key_dropout, key_z = jax.random.split(key)
            terms = hvae.bound(model(params, key_dropout, step), density, key_z, x_of(batch))
            beta = hvae.kl_warm_up(step, self.kl_warmup_steps)
            nats = {"reconstruction": terms.reconstruction.mean(), "kl": terms.kl.sum(0).mean()}
            value = hvae.free_bits_objective(terms, beta=beta, free_nats=self.free_nats)
            return bits_per_dim(value, num_dims), {name: bits_per_dim(v, num_dims) for name, v in nats.items()}

        def sample(params, key, n):
            return SampleBatch(
                show(hvae.sample_decoder_output(model(params, None, None), key, n, temperature=self.temperature))
            )

        def bound(params, key, batch):
            return hvae.bound(model(params, None, None), distribution, key, x_of(batch))

        def evaluate(params, key, batch):
            terms = bound(params, key, batch)
            nats = {"bits_per_dim": terms.total, "reconstruction": terms.reconstruction, "kl": terms.kl.sum(0)}
            return {name: bits_per_dim(value, num_dims) for name, value in nats.items()}

        def importance(params, key, batch):
            options = {"samples": self.importance_samples}
            return hvae.importance_weighted_bound(model(params, None, None), distribution, key, x_of(batch), **options)

        def reconstructions(params, key, batch):
            x, kept = x_of(batch), np.unique(np.linspace(1, levels, min(levels, 4)).astype(int))
            rows = [show(hvae.reconstruct(model(params, None, None), key, x, keep=int(k))) for k in kept]
            return jnp.stack([look.values(x, data.levels), *rows])

        rows = {"reconstruction": LikelihoodRow("-E log P(x|z)", lambda *given: bound(*given).reconstruction)}
        rows |= _level_rows(bound, levels)
        rows["bound"] = LikelihoodRow("-log P(x) <= ELBO", lambda *given: bound(*given).total)
        what = "-log P(x) <= K importance-weighted draws"
        rows[f"bound, K = {self.importance_samples:,}"] = LikelihoodRow(what, importance, self.importance_samples)
        more = {"ledger": rows, "curve": _level_curve(bound, levels), "pictures": {"reconstructions": reconstructions}}
        where = codes and (lambda params, key, batch: codes(params, x_of(batch)))
        return Experiment(init, loss, sample, evaluate, codes=where, **more)


def _level_rows(bound, levels: int) -> dict[str, LikelihoodRow]:
    if levels == 1:
        return {"kl": LikelihoodRow("E KL(q(z|x) || p(z))", lambda *given: bound(*given).kl[0])}
    rows = {"kl": LikelihoodRow("of all levels together", lambda *given: bound(*given).kl.sum(0))}
    if levels > ROWS_OF_LEVELS:
        return rows
    for i in range(levels):
        what = f"E KL(q(z_{levels - i}|z above, x) || p)"
        rows[f"kl, z_{levels - i}"] = LikelihoodRow(what, lambda *given, i=i: bound(*given).kl[i])
    return rows


def _level_curve(bound, levels: int) -> LikelihoodCurve | None:
    if levels == 1:
        return None

    def points(params, key, batch):
        kl = bound(params, key, batch).kl.T
        return {"x": jnp.broadcast_to(jnp.arange(1.0, levels + 1), kl.shape), "y": kl}

    return LikelihoodCurve("level, from the top", "KL of the level, nats", points)
