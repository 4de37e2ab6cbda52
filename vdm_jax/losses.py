"""What one trains: one-step estimates of the bound and of its reweightings, per example.

Each draws one step t per example, makes x_t, asks the denoiser, and returns terms of shape (B,); the caller reduces.
All are compiled, trace once per shape, and can be differentiated with respect to whatever the denoiser closes over
(`jax.tree_util.Partial(net.apply, params)`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vdm_jax.elbo import Bound, Decoder, bound, denoising_error
from vdm_jax.levels import Step
from vdm_jax.tables import Table
from vdm_jax.types import Batch, Denoiser, Key, Parameterization, PerExample, Real, pytree_callable


class DenoisingLoss(NamedTuple):
    """The parts of a denoising loss, each of shape (B,).

    Fields:
        t: the step drawn, 1..T.
        squared_error: ||target - prediction||^2, summed over the example.
        weight: the weight of that step.
    """

    t: Int[Array, " b"]
    squared_error: PerExample
    weight: PerExample

    @property
    def loss(self) -> PerExample:
        """weight * squared_error."""
        return self.weight * self.squared_error


def draw_steps(key: Key, batch: int, num_steps: int, *, spread: bool = False) -> Int[Array, " b"]:
    """Steps t, each uniform on 1..T (ELBO-10).

    Args:
        key: for the draw.
        batch: how many.
        num_steps: T.
        spread: place the batch's steps evenly from one random start, so that their mean has less variance; each is
            still uniform.

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (the low-discrepancy draw).
    """
    if spread:
        u = (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
    else:
        u = jax.random.uniform(key, (batch,))
    return jnp.minimum(1 + jnp.floor(u * num_steps).astype(jnp.int32), num_steps)


def denoising_loss(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    table: Table,
    *,
    kind: Parameterization = "eps",
    weight: Callable[[Step], Real] | None = None,
    spread: bool = False,
) -> DenoisingLoss:
    """w_t ||target - prediction||^2 at one random step t in 1..T per example (ELBO-11, SAM-1).

    Args:
        denoiser: predicts `kind`; called once, with the whole batch.
        key: for the steps and the noise.
        x_0: clean batch, shape (B, *x).
        table: the discrete schedule.
        kind: what is predicted: "x_0", "eps", "v" or "score".
        weight: w_t of a scalar `Step` (t - 1, t); None is 1. `elbo.diffusion_weight` is the bound's, from t = 2 on.
        spread: as in `draw_steps`.

    Returns:
        `DenoisingLoss`, each field (B,).

    Raises:
        ValueError: unknown kind.

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 1 and equation 14.
    """
    return _denoising_loss(pytree_callable(denoiser), key, x_0, table, kind, pytree_callable(weight or _one), spread)


def simple_loss(
    denoiser: Denoiser, key: Key, x_0: Batch, table: Table, *, kind: Parameterization = "eps", spread: bool = False
) -> PerExample:
    """L_simple = ||eps - eps_hat||^2 at one random step, or its like for another `kind` (ELBO-11).

    Args and errors as in `denoising_loss`. Returns shape (B,), summed over the example.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 14.
    """
    return denoising_loss(denoiser, key, x_0, table, kind=kind, spread=spread).loss


def ddpm_loss(
    denoiser: Denoiser,
    key: Key,
    x_0: Batch,
    table: Table,
    decoder: Decoder,
    *,
    kind: Parameterization = "eps",
    prior_log_var: float = 0.0,
) -> Bound:
    """L_DDPM, the bound itself, with (T - 1) times one random diffusion term for their sum (ELBO-6, ELBO-10).

    Args, result and errors as in `elbo.bound`, which with `terms=None` visits every step.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 5.
    """
    return bound(denoiser, key, x_0, table, decoder, kind=kind, terms=1, prior_log_var=prior_log_var)


@partial(jax.jit, static_argnames=("kind", "spread"))
def _denoising_loss(denoiser, key, x_0, table, kind, weight, spread) -> DenoisingLoss:
    key_t, key_eps = jax.random.split(key)
    t = draw_steps(key_t, x_0.shape[0], table.num_steps, spread=spread)
    step = table.step(t - 1, t)
    error = denoising_error(denoiser, key_eps, x_0, step.t, kind)
    return DenoisingLoss(t, error, jax.vmap(weight)(step))


def _one(step: Step) -> Real:
    return jnp.ones_like(step.log_snr_drop)
