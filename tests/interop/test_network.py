"""Conversion of tensors and configs: the same function, names and bits as diffusers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.reference import CIFAR, SMALL, TINY, random_tensors, shapes, unet
from tests.training.bits import assert_same_bits
from vdm_jax import interop
from vdm_jax.interop import tensor_names
from vdm_jax.networks.unet import UNet, UNetConfig

SHAPES = {
    "cifar": CIFAR,
    "tiny": TINY,
    "attention everywhere": TINY
    | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2, "layers_per_block": 2},
    "no middle attention": SMALL | {"add_attention": False, "out_channels": 5},
    "labels": TINY | {"num_class_embeds": 4},
    "one resolution": TINY
    | {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
    "oblong": TINY | {"sample_size": [4, 8]},
}


def apply(config, tensors, x, t, labels=None):
    """Our output for diffusers' tensors, both in channels-first layout."""
    network, shape = interop.from_unet_config(config)
    params = interop.from_tensors(network, shape, tensors)
    arguments = [jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32), jnp.asarray(t, jnp.float32)]
    arguments += [] if labels is None else [jnp.asarray(labels)]
    return np.asarray(jax.jit(UNet(network).apply)({"params": params}, *arguments)).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def tiny():
    return random_tensors(TINY | {"num_class_embeds": 4})


def test_every_layer_computes_what_diffusers_does(tiny):
    config, random = TINY | {"num_class_embeds": 4, "sample_size": [4, 8]}, np.random.RandomState(1)
    x, t, labels = random.standard_normal((3, 3, 4, 8)), np.array([10.0, 0.0, 999.0]), np.array([3, 0, 1])
    got, want = apply(config, tiny, x, t, labels), unet(config, tiny, x, t, labels)
    np.testing.assert_allclose(got, want, rtol=0.0, atol=1e-5 * np.abs(want).max())
    few = x[:1, :, :, :4], t[:1], labels[:1]
    unchanged = unet(config, tiny, *few)
    for name in [name for name in tiny if not name.endswith("to_k.bias")]:  # it shifts all scores of a query alike
        changed = tiny | {name: np.float32(1.01) * tiny[name]}
        assert np.abs(unet(config, changed, *few) - unchanged).max() > 2e-5 * np.abs(unchanged).max(), name


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_names_and_shapes_are_diffusers(config):
    network, shape = interop.from_unet_config(config)
    assert {entry.name: entry.shape for entry in tensor_names.tensor_table(network, shape).values()} == shapes(config)


@pytest.mark.parametrize("kind", ["labels", "no middle attention", "attention everywhere"])
def test_round_trips_change_no_bit(kind):
    config, tensors = SHAPES[kind], random_tensors(SHAPES[kind])
    network, shape = interop.from_unet_config(config)
    params = interop.from_tensors(network, shape, tensors)
    assert_same_bits(interop.to_tensors(network, shape, params), tensors)
    again = interop.from_unet_config(interop.to_unet_config(network, shape))
    assert again == (network, shape)
    assert_same_bits(interop.from_tensors(*again, interop.to_tensors(network, shape, params)), params)


def test_a_written_config_is_equivalent_to_the_one_read():
    written = interop.to_unet_config(*interop.from_unet_config(CIFAR))
    assert {name: written[name] for name in CIFAR if name != "_diffusers_version"} == {
        name: value for name, value in CIFAR.items() if name != "_diffusers_version"
    }


def test_ho_et_al_s_network_is_ours_by_default():
    network, shape = interop.from_unet_config(CIFAR)
    assert network == UNetConfig(dropout=0.0)
    assert shape == (32, 32, 3)


def test_multipliers_that_are_left_open_are_exported_as_those_of_the_size(tiny):
    network, shape = interop.from_unet_config(TINY)
    left_open = dataclasses.replace(network, multipliers=())
    explicit, shape = left_open.resolved((8, *shape[1:])), (8, *shape[1:])
    assert interop.to_unet_config(left_open, shape) == interop.to_unet_config(explicit, shape)
    assert tensor_names.tensor_table(left_open, shape) == tensor_names.tensor_table(explicit, shape)


def test_older_names_of_attention(tiny):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(tiny)
    for name in tiny:
        for today, then in new.items():
            if f".attentions.0.{today}." in name:
                old[name.replace(today, then)] = old.pop(name)
    assert any("query" in name for name in old)
    network, shape = interop.from_unet_config(TINY | {"num_class_embeds": 4})
    assert_same_bits(interop.from_tensors(network, shape, old), interop.from_tensors(network, shape, tiny))
    both = tiny | {"mid_block.attentions.0.query.weight": tiny["mid_block.attentions.0.to_q.weight"]}
    with pytest.raises(ValueError, match=r"a legacy and a current name \(1\): mid_block.attentions.0.query.weight"):
        interop.from_tensors(network, shape, both)


def test_invalid_tensors_are_listed(tiny):
    network, shape = interop.from_unet_config(TINY | {"num_class_embeds": 4})
    bad = {name: value for name, value in tiny.items() if not name.startswith("up_blocks")}
    bad |= {"conv_out.weight": tiny["conv_out.weight"][:, :, :1], "ema.decay": np.zeros(1, np.float32)}
    bad |= {"conv_in.bias": tiny["conv_in.bias"].astype(np.float16)}
    bad |= {"conv_norm_out.bias": np.where(np.arange(8) == 3, np.nan, tiny["conv_norm_out.bias"])}
    with pytest.raises(ValueError) as error:  # noqa: PT011  its lines are read below
        interop.from_tensors(network, shape, bad)
    gone = [name for name in tiny if name.startswith("up_blocks")]
    lines = str(error.value).splitlines()
    assert lines[1].strip().startswith(f"missing ({len(gone)}): ")
    assert lines[1].count(",") == 9
    assert lines[1].endswith(f" and {len(gone) - 10} more")
    assert [line.strip() for line in lines[2:6]] == [
        "not of this network (1): ema.decay",
        "of another shape (1): conv_out.weight (3, 8, 1, 3), not (3, 8, 3, 3)",
        "not float32 (convert by model.float()) (1): conv_in.bias float16",
        "with non-finite values (1): conv_norm_out.bias",
    ]


def test_parameters_of_another_network_are_listed(tiny):
    network, shape = interop.from_unet_config(TINY | {"num_class_embeds": 4})
    params = interop.from_tensors(network, shape, tiny)
    params["Conv_0"]["kernel"] = params["Conv_0"]["kernel"][..., :4]
    params["Stem_0"] = params.pop("GroupNorm_0")
    with pytest.raises(ValueError, match="match the network's config") as error:
        interop.to_tensors(network, shape, params)
    assert "missing (2): GroupNorm_0/bias, GroupNorm_0/scale" in str(error.value)
    assert "not of this network (2): Stem_0/bias, Stem_0/scale" in str(error.value)
    assert "of another shape (1): Conv_0/kernel (3, 3, 3, 4), not (3, 3, 3, 8)" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 99),
        ("freq_shift", 0),
        ("flip_sin_to_cos", True),
        ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("block_out_channels", [8, 12]),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 2),
        ("downsample_padding", 1),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("act_fn", "gelu"),
        ("attention_head_dim", 8),
        ("attn_norm_num_groups", 2),
        ("norm_eps", 1e-5),
        ("norm_num_groups", None),
        ("resnet_time_scale_shift", "scale_shift"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 1),
        ("sample_size", None),
    ],
)
def test_unsupported_fields_of_diffusers_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*: supported is") as error:
        interop.from_unet_config(TINY | {field: value})
    assert str(error.value).count("supported is") == 1


def test_fields_left_out_have_diffusers_values():
    with pytest.raises(ValueError, match="norm_eps is 1e-05: supported is 1e-06"):
        interop.from_unet_config({name: value for name, value in TINY.items() if name != "norm_eps"})
    with pytest.raises(ValueError, match=r"unknown fields \(1\): skip_conv"):
        interop.from_unet_config(TINY | {"skip_conv": 2})
    with pytest.raises(ValueError, match="_class_name is 'UNet2DConditionModel': supported is 'UNet2DModel'"):
        interop.from_unet_config(TINY | {"_class_name": "UNet2DConditionModel"})


def test_one_head_by_its_dimension():
    alike = TINY | {"attention_head_dim": 16}
    assert interop.from_unet_config(alike) == interop.from_unet_config(TINY)


@pytest.mark.parametrize(
    ("field", "value"), [("embedding", "log_snr"), ("fourier_exponents", (7,)), ("position_bias", True)]
)
def test_networks_without_a_diffusers_equivalent_are_refused(field, value):
    network = dataclasses.replace(UNetConfig(), **{field: value})
    with pytest.raises(ValueError, match=f"{field} is "):
        interop.to_unet_config(network, (32, 32, 3))
