"""The name and shape that each of our arrays has in a diffusers `UNet2DModel`."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.interop.tensor_layouts import to_torch
from vdm_jax.networks.unet import UNet, UNetConfig

__all__ = ["Path", "TensorEntry", "current_name", "flatten", "tensor_table"]

Path = tuple[str, ...]

RESIDUAL = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Dense_1": "conv_shortcut",
}
ATTENTION = {
    "GroupNorm_0": "group_norm",
    "Dense_0": "to_q",
    "Dense_1": "to_k",
    "Dense_2": "to_v",
    "Dense_3": "to_out.0",
}
EMBEDDING = {"Dense_0": "time_embedding.linear_1", "Dense_1": "time_embedding.linear_2", "Embed_0": "class_embedding"}
ARRAYS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
LAYERS = {"ResidualBlock": RESIDUAL, "Attention": ATTENTION, "LevelEmbedding": EMBEDDING}
LEGACY_NAMES = {  # of attention layers in the first versions of diffusers
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class TensorEntry(NamedTuple):
    """One array in both libraries.

    flax_shape: its shape in our parameters.
    name, shape: its name and shape in diffusers.
    """

    flax_shape: tuple[int, ...]
    name: str
    shape: tuple[int, ...]


@cache  # abstract initialization of a network takes a second
def tensor_table(config: UNetConfig, shape: tuple[int, int, int]) -> dict[Path, TensorEntry]:
    """For every array of our parameters, by path, its name and shape in diffusers."""
    label = jnp.zeros(1, jnp.int32) if config.num_classes else None
    arguments = jnp.zeros((1, *shape)), jnp.zeros(1), label
    params = jax.eval_shape(UNet(config).init, jax.random.key(0), *arguments)["params"]
    modules = _modules(config.resolved(shape), shape[0])
    return {path: _entry(modules, path, array.shape) for path, array in flatten(params).items()}


def _entry(modules: Mapping[str, str], path: Path, shape: tuple[int, ...]) -> TensorEntry:
    module, array = path[0], ARRAYS[path[-1]]
    layers = LAYERS.get(module.rsplit("_", 1)[0], {})
    name = ".".join(part for part in (modules.get(module), layers.get(path[1]), array) if part)
    return TensorEntry(shape, name, to_torch(name, np.broadcast_to(np.float32(0.0), shape)).shape)


def _modules(config: UNetConfig, height: int) -> dict[str, str]:
    """Diffusers' module name for each of ours; Flax numbers modules in the order in which they are called."""
    last = len(config.multipliers) - 1
    attends = [height // 2**level in config.attention_resolutions for level in range(last + 1)]
    residual, attention, conv = [], [], ["conv_in"]

    def stage(name: str, blocks: int, attend: bool, resample: str | None) -> None:
        residual.extend(f"{name}.resnets.{j}" for j in range(blocks))
        attention.extend(f"{name}.attentions.{j}" for j in range(blocks if attend else 0))
        conv.extend([f"{name}.{resample}.0.conv"] if resample else [])

    for i in range(last + 1):
        stage(f"down_blocks.{i}", config.blocks, attends[i], "downsamplers" if i < last else None)
    residual += ["mid_block.resnets.0", "mid_block.resnets.1"]
    attention += ["mid_block.attentions.0"] if config.middle_attention else []
    for i in range(last + 1):
        stage(f"up_blocks.{i}", config.blocks + 1, attends[last - i], "upsamplers" if i < last else None)
    kinds = {"ResidualBlock": residual, "Attention": attention, "Conv": [*conv, "conv_out"]}
    numbered = {f"{kind}_{i}": theirs for kind, names in kinds.items() for i, theirs in enumerate(names)}
    return {**numbered, "GroupNorm_0": "conv_norm_out"}


def current_name(name: str) -> str:
    """The current name of a tensor that may have a name of diffusers' first versions."""
    for old, new in LEGACY_NAMES.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def flatten(params: Any) -> dict[Path, Any]:
    """The arrays of nested dictionaries, by path."""
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
