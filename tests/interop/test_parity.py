"""Against diffusers itself, on PyTorch: the same weights, the same outputs, the same chain.

    pip install -e '.[test,parity]'     # Python 3.11 and newer, CPU

Each test prints its numbers: pytest -s tests/interop/test_parity.py
"""

import hashlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from tests.interop.reference import CIFAR, SMALL, TINY, shapes, unet
from tests.training.bits import assert_same_bits
from vdm_jax import interop, samplers
from vdm_jax.discrete_schedules import to_betas
from vdm_jax.interop.folder import WEIGHTS
from vdm_jax.networks.unet import UNet

torch = pytest.importorskip("torch", reason="needs the extra `parity`: pip install -e '.[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`: pip install -e '.[parity]'")
    from diffusers.schedulers import scheduling_ddpm

torch.set_num_threads(1)  # the networks are small
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

MEDIUM = CIFAR | {"block_out_channels": [32, 64, 64, 64], "sample_size": 16}
MEDIUM |= {"down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]}
MEDIUM |= {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"]}
TIMES = (0, 1, 10, 250, 500, 999)


def random_model(config, seed=0):
    """diffusers' network with all weights perturbed, so that no weight is zero or one."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def images(config, batch, seed=1):
    size = config["sample_size"]
    return np.random.RandomState(seed).standard_normal((batch, config["in_channels"], size, size)).astype(np.float32)


def theirs(model, x, t, **labels):
    with torch.no_grad():
        return model(torch.from_numpy(x), torch.from_numpy(t), **labels).sample.numpy()


def ours(pretrained, x, t, *labels):
    apply = jax.jit(UNet(pretrained.network).apply)
    out = apply({"params": pretrained.params}, x.transpose(0, 2, 3, 1), jnp.asarray(t, jnp.float32), *labels)
    return np.asarray(out).transpose(0, 3, 1, 2)


def saved(model, folder):
    model.save_pretrained(folder)
    return interop.load(folder)


@pytest.mark.parametrize("config", [TINY, SMALL, TINY | {"add_attention": False, "out_channels": 6}, CIFAR, MEDIUM])
def test_the_reference_s_names_are_diffusers(config):
    with torch.device("meta"):
        model = diffusers.UNet2DModel.from_config(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes(config)


@pytest.mark.parametrize("config", [TINY, MEDIUM], ids=["tiny", "medium"])
def test_outputs_agree(tmp_path, config):
    model = random_model(config)
    pretrained = saved(model, tmp_path)
    x, t = images(config, len(TIMES)), np.array(TIMES)
    want, got = theirs(model, x, t), ours(pretrained, x, t)
    scale = np.abs(want).max()
    print(f"\n{scale=:.3f}, largest difference by t:", dict(zip(TIMES, np.abs(got - want).max((1, 2, 3)), strict=True)))
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, scale)


def test_the_reference_is_diffusers_in_float64():
    config = TINY | {"num_class_embeds": 4}
    model = random_model(config).double()
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    x, t, labels = images(config, 3).astype(np.float64), np.array([0, 10, 999]), np.array([3, 0, 1])
    model.time_proj.forward = lambda t: torch.from_numpy(embedding(t.numpy()))  # theirs is always float32
    want, got = theirs(model, x, t, class_labels=torch.from_numpy(labels)), unet(config, tensors, x, t, labels)
    print("\nlargest difference in float64:", np.abs(got - want).max())
    assert np.abs(got - want).max() <= 1e-12


def embedding(t, half=4):
    angles = t[:, None] * np.exp(-np.log(10_000.0) * np.arange(half) / (half - 1))[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_labels_agree(tmp_path):
    config = TINY | {"num_class_embeds": 4}
    model = random_model(config)
    x, t, labels = images(config, 4), np.array([0, 10, 500, 999]), np.array([3, 0, 1, 2])
    want = theirs(model, x, t, class_labels=torch.from_numpy(labels))
    got = ours(saved(model, tmp_path), x, t, jnp.asarray(labels))
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


def test_diffusers_loads_what_we_write(tmp_path):
    model = random_model(SMALL)
    first = saved(model, tmp_path / "first")
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(variance_type="fixed_large"))
    interop.save(tmp_path / "ours", first._replace(scheduler=interop.Scheduler(variance="fixed_large")))
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert_same_bits(
        {name: value.numpy() for name, value in loaded.unet.state_dict().items()},
        {name: value.numpy() for name, value in model.state_dict().items()},
    )
    assert loaded.scheduler.alphas_cumprod.equal(pipeline.scheduler.alphas_cumprod)
    assert loaded.scheduler.config.variance_type == "fixed_large"
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob(WEIGHTS)]
    assert len(digests) == 2
    assert digests[0] == digests[1]  # the very file that diffusers wrote
    with torch.no_grad():
        loaded.unet.conv_in.bias += 1.0
    loaded.save_pretrained(tmp_path / "changed")  # ours to diffusers and, changed there, back to us
    again = interop.load(tmp_path / "changed")
    np.testing.assert_array_equal(again.params["Conv_0"]["bias"], first.params["Conv_0"]["bias"] + np.float32(1.0))
    assert again.scheduler == interop.Scheduler(variance="fixed_large")


@pytest.mark.parametrize("continuous", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_agree_to_diffusers_float32(tmp_path, continuous):
    theirs_ = diffusers.DDPMScheduler(beta_schedule=continuous)
    theirs_.save_pretrained(tmp_path)
    schedule = interop.from_scheduler_config(theirs_.load_config(tmp_path)).discrete_schedule()
    beta, abar = (np.asarray(x, np.float64) for x in (theirs_.betas, theirs_.alphas_cumprod))
    alpha, sigma = (np.asarray(x, np.float64) for x in (schedule.levels.alpha[1:], schedule.levels.sigma[1:]))
    t = np.arange(1, 1001)
    step = schedule.step(jnp.asarray(t - 1), jnp.asarray(t))
    posterior = np.asarray((step.s.sigma**2 * step.one_minus_ratio)[1:], np.float64)
    var = np.array([theirs_._get_variance(i, variance_type="fixed_small").item() for i in range(1, 1000)])
    relative = {
        "beta": np.abs(beta / np.asarray(to_betas(schedule).beta, np.float64) - 1.0).max(),
        "abar": np.abs(abar / alpha**2 - 1.0).max(),
        "1 - abar": np.abs((1.0 - abar) / sigma**2 - 1.0).max(),
        "posterior variance": np.abs(var / posterior - 1.0).max(),
    }
    print(f"\n{continuous}: diffusers' largest relative error:", {name: f"{e:.1e}" for name, e in relative.items()})
    assert relative["beta"] < 2e-3
    assert max(relative["1 - abar"], relative["posterior variance"]) < 2e-2
    loud = abar > 1e-3
    assert np.abs(abar / alpha**2 - 1.0)[loud].max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(("digits", "along", "at_x_0"), [("float32", 1e-3, 1e-4), ("float64", 2e-5, 2e-5)])
@pytest.mark.parametrize(
    ("kind", "variance", "clip"), [("epsilon", "fixed_small", True), ("v_prediction", "fixed_large", False)]
)
def test_the_whole_chain_agrees_under_the_same_noise(
    tmp_path, monkeypatch, kind, variance, clip, digits, along, at_x_0
):
    """1,000 steps of DDPMScheduler and of samplers.ancestral, with a random network.

    With diffusers' own float32 schedule, and with the schedule in float64, which leaves the networks' rounding alone.
    """
    options = {"prediction_type": kind, "variance_type": variance, "clip_sample": clip}
    model, scheduler = random_model(TINY), diffusers.DDPMScheduler(**options)
    diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path)
    pretrained, key, x_T = interop.load(tmp_path), jax.random.key(0), images(TINY, 2)

    def denoiser(params, x_t, level):
        return UNet(pretrained.network).apply({"params": params}, x_t, level.t - 1.0)

    options = {"prediction_type": pretrained.scheduler.prediction_type, "variance": pretrained.scheduler.variance}
    options["clip"] = pretrained.scheduler.clip
    partial, schedule = Partial(denoiser, pretrained.params), pretrained.scheduler.discrete_schedule()
    start = jnp.asarray(x_T.transpose(0, 2, 3, 1))
    got = samplers.ancestral(partial, key, start, schedule, snapshots=1000, **options)
    states = np.concatenate([got.trajectory.x_t[1:], got.x_0[None]]).transpose(0, 1, 4, 2, 3)
    noises = jax.vmap(lambda t: jax.random.normal(jax.random.fold_in(key, t), start.shape))(jnp.arange(1001))
    noises = np.asarray(noises).transpose(0, 1, 4, 2, 3)
    if digits == "float64":
        scheduler.alphas_cumprod = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        scheduler.one = scheduler.one.double()
    x, errors = torch.from_numpy(x_T), []
    for t in range(999, -1, -1):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, t=t, **__: torch.from_numpy(noises[t + 1]))
        with torch.no_grad():
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        errors.append(float(np.abs(x.numpy() - states[999 - t]).max()))
    marks = {steps: f"{max(errors[:steps]):.1e}" for steps in (1, 10, 100, 300, 600, 900, 990, 1000)}
    case = f"{kind}, {variance}, schedule in {digits}"
    print(f"\n{case}: largest difference within so many steps: {marks}; at x_0 {errors[-1]:.1e}")
    assert max(errors) < along
    assert errors[-1] < at_x_0
