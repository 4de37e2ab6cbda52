"""The config.json of a diffusers `UNet2DModel` <-> `UNetConfig` and the image shape."""

from collections.abc import Mapping
from typing import Any

from vdm_jax.interop.config_checks import invalid_fields, raise_if_any, shorten, unsupported_fields, with_defaults
from vdm_jax.interop.unet_fields import DIFFUSERS_DEFAULTS, FIELD_CHECKS, FIXED_FIELDS
from vdm_jax.networks.unet import UNetConfig

__all__ = ["from_unet_config", "to_unet_config"]

Shape = tuple[int, int, int]

REMEDY = "vdm_jax.networks.unet.UNet cannot represent this network; it cannot be loaded."


def from_unet_config(config: Mapping[str, Any]) -> tuple[UNetConfig, Shape]:
    """Our config for a `UNet2DModel`, and the shape (H, W, C) of its input.

    num_class_embeds = K means K - 1 classes; the last embedding means "no label".

    Args:
        config: the contents of config.json; missing fields have diffusers' defaults.

    Raises:
        ValueError: our U-Net cannot represent the network; lists every invalid field and the supported values.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B, whose CIFAR-10 network is diffusers' google/ddpm-cifar10-32.
    """
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"_class_name is {shorten(config['_class_name'])}: supported is 'UNet2DModel'")
    given = with_defaults("config.json", config, DIFFUSERS_DEFAULTS)
    faults = invalid_fields(given, FIELD_CHECKS)
    faults = [*unsupported_fields(given, FIXED_FIELDS), *(faults or _inconsistent_fields(given))]
    raise_if_any(faults, "config.json", REMEDY)
    widths, size = given["block_out_channels"], given["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    attends = _attends(given["down_block_types"])
    same = given["in_channels"] == given["out_channels"]
    network = UNetConfig(
        channels=widths[0],
        multipliers=tuple(each // widths[0] for each in widths),
        blocks=given["layers_per_block"],
        attention_resolutions=tuple(height // 2**i for i, attend in enumerate(attends) if attend),
        middle_attention=given["add_attention"],
        dropout=float(given["dropout"]),
        groups=given["norm_num_groups"],
        out_channels=0 if same else given["out_channels"],
        num_classes=(given["num_class_embeds"] or 1) - 1,
    )
    shape = (height, width, given["in_channels"])
    network.check(shape)
    return network, shape


def to_unet_config(config: UNetConfig, shape: Shape) -> dict[str, Any]:
    """The config.json for our network on images of this shape (H, W, C).

    Raises:
        ValueError: diffusers cannot represent the network; lists every invalid field.
    """
    config.check(shape)
    config = config.resolved(shape)
    supported = {"embedding": ("sinusoidal",), "fourier_exponents": ((),), "position_bias": (False,)}
    faults = unsupported_fields(vars(config), supported)
    raise_if_any(faults, "UNetConfig", "diffusers has no such network: train one with supported values to export it.")
    height, width, channels = shape
    attends = [height // 2**i in config.attention_resolutions for i in range(len(config.multipliers))]
    return {
        "_class_name": "UNet2DModel",
        **DIFFUSERS_DEFAULTS,
        **{name: values[0] for name, values in FIXED_FIELDS.items()},
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": config.out_channels or channels,
        "down_block_types": [f"{'Attn' * attend}DownBlock2D" for attend in attends],
        "up_block_types": [f"{'Attn' * attend}UpBlock2D" for attend in reversed(attends)],
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.blocks,
        "dropout": config.dropout,
        "attention_head_dim": None,
        "norm_num_groups": config.groups,
        "add_attention": config.middle_attention,
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
    }


def _attends(types: list[str]) -> list[bool]:
    return [name.startswith("Attn") for name in types]


def _inconsistent_fields(given: Mapping[str, Any]) -> list[str]:
    """A line for every field that contradicts another one."""
    down, up, widths = (given[f] for f in "down_block_types up_block_types block_out_channels".split())
    groups, attention, head = (given[f] for f in "norm_num_groups attn_norm_num_groups attention_head_dim".split())
    known = all(name in ("DownBlock2D", "AttnDownBlock2D") for name in down)
    mirror = [name.replace("Down", "Up") for name in reversed(down)]
    heads = [width for width, attend in zip(widths, _attends(down), strict=False) if attend]
    heads += [widths[-1]] if given["add_attention"] else []
    checks = {
        "down_block_types": (known and len(down) == len(widths), "DownBlock2D or AttnDownBlock2D for each resolution"),
        "up_block_types": (not known or list(up) == mirror, f"the mirror image of down_block_types, {mirror}"),
        "block_out_channels": (all(w % widths[0] == 0 for w in widths), "multiples of the first"),
        "time_embedding_dim": (given["time_embedding_dim"] in (None, 4 * widths[0]), f"null or {4 * widths[0]}"),
        "attn_norm_num_groups": (attention in (None, groups), f"null or {groups}"),
        "attention_head_dim": (head is None or set(heads) <= {head}, "null, which is one head of all channels"),
    }
    return [f"{name} is {shorten(given[name])}: supported is {valid}" for name, (ok, valid) in checks.items() if not ok]
