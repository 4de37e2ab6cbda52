"""What the DDPM recipes share: the forward process, Ho et al.'s network, L_simple, ancestral sampling, the bound.

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from experiments._ledger import Ledger, ledger
from experiments._pictures import pictures
from vdm_jax import elbo, losses, samplers
from vdm_jax.levels import Level
from vdm_jax.likelihoods import DiscretizedGaussian, to_unit
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.schedules import Cosine, LinearLogSNR, Sigmoid
from vdm_jax.tables import Interpolated, Table, even_steps, linear_betas, tabulate
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.contract import Cost, DataSpec, Experiment


@dataclass(frozen=True)
class DDPM(TrainConfig):
    """A denoising diffusion probabilistic model."""

    network: UNetConfig = field(default_factory=UNetConfig)
    """The denoiser."""
    kind: Literal["eps", "x_0", "v"] = "eps"
    """What the network predicts."""
    noise: Literal["linear", "cosine", "sigmoid", "log_snr"] = "linear"
    """Noise schedule: Ho et al.'s linear beta, cosine, sigmoid, or linear log-SNR."""
    num_steps: int = 1000
    """T, the steps of the forward process."""
    log_snr_max: float = 9.0
    """Log-SNR of step 1 (noise log_snr only)."""
    log_snr_min: float = -4.0
    """Log-SNR of step T (noise log_snr only)."""
    spread: bool = False
    """Spread the steps t of a batch evenly (less variance) instead of drawing each by itself."""
    variance: Literal["lower", "upper"] = "lower"
    """Variance of a sampling step: the posterior's (lower) or beta_t (upper)."""
    sampling_steps: int = 0
    """Steps a sample takes; 0 is all of them."""
    eval_terms: int = 0
    """Diffusion terms of the bound evaluated for each test image, spread evenly over t; 0 is all of them."""
    snapshots: int = 9
    """Rows of the trajectory picture before the finished samples."""
    ledger: Ledger = field(default_factory=Ledger)
    """What `make eval` looks at."""

    def build(self, data: DataSpec) -> Experiment:
        """The four functions that the loop trains, samples and evaluates with."""
        self.network.check(data.shape)
        table = self.table()
        network = UNet(self.network)
        num_dims = data.shape[0] * data.shape[1] * data.shape[2]

        def init(key):
            image = jnp.zeros((1, *data.shape))
            return network.init(key, image, jnp.zeros(1))["params"]

        def predict(params, key, x_t, level):
            rngs = {} if key is None else {"dropout": key}
            return network.apply({"params": params}, x_t, self.condition(level), train=key is not None, rngs=rngs)

        def loss(params, key, batch, step):
            del step
            key_dropout, key_loss = jax.random.split(key)
            x_0 = to_unit(batch["image"], data.levels)
            denoiser = Partial(predict, params, key_dropout)
            terms = losses.simple_loss(denoiser, key_loss, x_0, table, kind=self.kind, spread=self.spread)
            return terms.mean() / num_dims, {}

        def sample(params, key, n):
            key_T, key_chain = jax.random.split(key)
            x_T = jax.random.normal(key_T, (n, *data.shape))
            chain = table.strided(even_steps(self.num_steps, self.sampling_steps or self.num_steps))
            options = {"kind": self.kind, "variance": self.variance, "snapshots": min(self.snapshots, chain.num_steps)}
            drawn = samplers.ancestral(Partial(predict, params, None), key_chain, x_T, chain, clip=1.0, **options)
            return pictures(drawn, data.levels)

        def evaluate(params, key, batch):
            x_0 = to_unit(batch["image"], data.levels)
            denoiser, count = Partial(predict, params, None), self.eval_terms or None
            terms = elbo.bound(denoiser, key, x_0, table, _decoder(data.levels), kind=self.kind, terms=count)
            bits = {name: elbo.bits_per_dim(nats, num_dims) for name, nats in terms._asdict().items()}
            return {"bits_per_dim": elbo.bits_per_dim(terms.total, num_dims), **bits}

        cost = Cost(evaluate=1 + (self.eval_terms or self.num_steps - 1), sample=self.sampling_steps or self.num_steps)

        def model(params):
            return Partial(predict, params, None), Interpolated(table)

        rows = ledger(model, _decoder(data.levels), data, self.kind, self.ledger)
        return Experiment(init, loss, sample, evaluate, cost, *rows)

    def table(self) -> Table:
        """The discrete schedule."""
        match self.noise:
            case "linear":
                return linear_betas(self.num_steps, 0.1 / self.num_steps, 20.0 / self.num_steps)
            case "cosine":
                return tabulate(Cosine(), self.num_steps)
            case "sigmoid":
                return tabulate(Sigmoid(), self.num_steps)
            case "log_snr":
                return tabulate(LinearLogSNR(self.log_snr_max, self.log_snr_min), self.num_steps)

    def condition(self, level: Level) -> Array:
        """What the network is told of the noise: Ho et al.'s 0-based step, or the log-SNR."""
        return jnp.asarray(level.t) - 1.0 if self.network.embedding == "sinusoidal" else level.log_snr


def _decoder(levels: int):
    """Ho et al.'s p(x_0 | x_1): around the predicted x_0, as wide as the noise of x_1."""
    return lambda x_hat, x_1, level: DiscretizedGaussian(x_hat, level.sigma, levels)
