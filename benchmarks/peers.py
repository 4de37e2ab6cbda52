"""Our training step and samplers against diffusers on PyTorch, and against plain JAX as tutorials write it.

    pip install -e '.[test,parity]'
    python -m benchmarks.peers

One network for all three, with the same weights (they are first seen to give the same output), one batch, float32, as
many threads each as there are cores. The step is noise, forward, backward, clipping, Adam and the moving average.
PyTorch runs eagerly, as diffusers' users do, with its tensors in channels_last, which its convolutions take faster on a
CPU, and its own fused Adam. Without PyTorch the plain one alone is compared.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from benchmarks import plain
from benchmarks.clock import in_turns, milliseconds, ratio, repeat
from vdm_jax import interop, losses, samplers
from vdm_jax.discrete_schedules import linear_betas, uniform_steps
from vdm_jax.networks.unet import UNet, UNetConfig
from vdm_jax.training import state
from vdm_jax.training.experiment import Experiment
from vdm_jax.training.runtime.devices import batch_sharding, make_mesh, replicated
from vdm_jax.training.step import make_step

DECAY, RATE, CALLS = 0.999, 2e-4, 50
Ways = dict[str, Callable[[], Any]]
WHAT = {"step": "a training step", "ddim": f"DDIM, {CALLS} steps", "ancestral": "ancestral, 1,000 steps"}


class Case(NamedTuple):
    """A network, a batch, and how much of it is measured.

    long: rounds of the 1,000-step sampler, 0 leaves it out.
    """

    name: str
    network: UNetConfig
    shape: tuple[int, int, int]
    batch: int
    steps: int
    rounds: int
    long: int


SMALL = UNetConfig(
    channels=32, multipliers=(1, 2), blocks=1, groups=8, attention_resolutions=(), middle_attention=False, dropout=0.0
)
CASES = (
    Case("8 x 8, 32 channels, batch 32", SMALL, (8, 8, 1), 32, 5, 15, 3),
    Case("32 x 32, Ho et al.'s with 32 channels, batch 8", UNetConfig(channels=32), (32, 32, 3), 8, 1, 9, 0),
)


def ours(case: Case, params: Any, x: np.ndarray) -> Ways:
    """The library's step and samplers."""
    network, schedule, key = UNet(case.network), linear_betas(1000), jax.random.key(1)

    def predict(params, key, x_t, level):
        options = {} if key is None else {"train": True, "rngs": {"dropout": key}}
        return network.apply({"params": params}, x_t, level.t - 1.0, **options)

    def loss(params, key, batch, step):
        key_dropout, key_loss = jax.random.split(key)
        terms = losses.simple_loss(Partial(predict, params, key_dropout), key_loss, batch["image"], schedule)
        return terms.mean() / x[0].size, {}

    none: Any = None
    experiment = Experiment(lambda key: jax.tree.map(jnp.copy, params), loss, none, none)
    mesh = make_mesh(1)
    step = make_step(experiment, _adam(), mesh, seed=0, ema_decay=DECAY)
    first = jax.jit(lambda: state.create(experiment, _adam(), 0), out_shardings=replicated(mesh))()
    denoiser, noise = Partial(predict, params, None), jnp.asarray(x)
    batch = jax.device_put({"image": noise}, batch_sharding(mesh))
    short = schedule.subsequence(uniform_steps(1000, CALLS))
    return {
        "step": repeat(step, first, batch, times=case.steps),
        "ancestral": lambda: samplers.ancestral(denoiser, key, noise, schedule, clip=1.0).x_0,
        "ddim": lambda: samplers.ddim(denoiser, key, noise, short, clip=1.0).x_0,
    }


def plainly(case: Case, params: Any, x: np.ndarray) -> Ways:
    """The tutorial's."""
    network, key, noise = UNet(case.network), jax.random.key(1), jnp.asarray(x)

    def apply(params, x, t, **options):
        return jnp.asarray(network.apply({"params": params}, x, t.astype(jnp.float32), **options))

    update = plain.make_update(apply, _adam(), DECAY)
    first = plain.State(params, params, _adam().init(params))
    ancestral, ddim = plain.make_ancestral(apply), plain.make_ddim(apply, CALLS)
    return {
        "step": repeat(update, (first, key), noise, times=case.steps),
        "ancestral": lambda: ancestral(params, key, noise),
        "ddim": lambda: ddim(params, key, noise),
    }


def perturbed(case: Case) -> Any:
    """Parameters of which none is zero, so that outputs say something."""
    key = jax.random.key(0)
    params = jax.jit(UNet(case.network).init)(key, jnp.zeros((1, *case.shape)), jnp.zeros(1))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def compare(case: Case) -> None:
    """The lines of one case."""
    params = perturbed(case)
    x = np.random.RandomState(0).standard_normal((case.batch, *case.shape)).astype(np.float32)
    peers = {"ours": ours(case, params, x), "plain JAX": plainly(case, params, x)}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers"):
        from benchmarks import eager

        def same(output: np.ndarray) -> None:
            here = jax.jit(UNet(case.network).apply)({"params": params}, x, jnp.full(case.batch, 500.0))
            np.testing.assert_allclose(output, np.asarray(here), atol=1e-4)

        tensors = interop.to_tensors(case.network, case.shape, params)
        peers["diffusers"] = eager.ways(interop.to_unet_config(case.network, case.shape), tensors, x, case.steps, same)
    for what, rounds in {"step": case.rounds, "ddim": case.rounds, "ancestral": case.long}.items():
        if not rounds:
            continue
        taken = in_turns({name: ways[what] for name, ways in peers.items()}, rounds)
        own = milliseconds(taken["ours"], case.steps if what == "step" else 1)
        cells = [ratio(taken[name], taken["ours"]) for name in list(peers)[1:]]
        print(f"| {case.name}: {WHAT[what]} | {own} | {' | '.join(cells)} |", flush=True)


def _adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))


def main() -> None:
    """Print the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print("Times of the others over ours: above 1, ours is faster.\n")
        print("| | ours | plain JAX | diffusers on PyTorch |\n|---|---|---|---|")
        for case in CASES:
            compare(case)


if __name__ == "__main__":
    from vdm_jax.training.cli.common import execute

    execute(main)
