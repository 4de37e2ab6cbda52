"""An independent float64 NumPy implementation of diffusers' `UNet2DModel`: names and shapes of its tensors, its output.

`test_parity` holds both against diffusers itself, where that is installed.
"""

import numpy as np

CIFAR = {  # google/ddpm-cifar10-32
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
TINY = CIFAR | {  # every kind of layer, once or twice
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 4,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
SMALL = CIFAR | {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "in_channels": 2, "out_channels": 2}


def shapes(config):
    """The shape of every tensor, by name."""
    widths, layers, found = config["block_out_channels"], config["layers_per_block"], {}

    def layer(name, out, *rest):
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, *rest), (out,)

    def resnet(name, inputs, out):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", out, inputs, 3, 3)
        layer(f"{name}.time_emb_proj", out, 4 * widths[0])
        layer(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if inputs != out:
            layer(f"{name}.conv_shortcut", out, inputs, 1, 1)

    def attention(name, width):
        layer(f"{name}.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.{part}", width, width)

    layer("conv_in", widths[0], config["in_channels"], 3, 3)
    layer("time_embedding.linear_1", 4 * widths[0], widths[0])
    layer("time_embedding.linear_2", 4 * widths[0], 4 * widths[0])
    if config.get("num_class_embeds"):
        found["class_embedding.weight"] = (config["num_class_embeds"], 4 * widths[0])
    width, skips = widths[0], [widths[0]]
    for i, kind in enumerate(config["down_block_types"]):
        for j in range(layers):
            resnet(f"down_blocks.{i}.resnets.{j}", width, widths[i])
            width = widths[i]
            skips.append(width)
            if kind == "AttnDownBlock2D":
                attention(f"down_blocks.{i}.attentions.{j}", width)
        if i + 1 < len(widths):
            layer(f"down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
    resnet("mid_block.resnets.0", width, width)
    if config.get("add_attention", True):
        attention("mid_block.attentions.0", width)
    resnet("mid_block.resnets.1", width, width)
    for i, kind in enumerate(config["up_block_types"]):
        for j in range(layers + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), widths[-1 - i])
            width = widths[-1 - i]
            if kind == "AttnUpBlock2D":
                attention(f"up_blocks.{i}.attentions.{j}", width)
        if i + 1 < len(widths):
            layer(f"up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)
    layer("conv_norm_out", width)
    layer("conv_out", config["out_channels"], width, 3, 3)
    return found


def random_tensors(config, seed=0):
    """Random tensors without zeros and ones."""
    random, found = np.random.RandomState(seed), {}
    for name, shape in shapes(config).items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
        unit = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        found[name] = (unit + random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
    return found


def unet(config, tensors, x, t, labels=None):
    """The network's output in float64, shape (B, C, H, W)."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    groups = config["norm_num_groups"]

    def dense(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(name, h, stride=1):
        kernel = w[f"{name}.weight"]
        if kernel.shape[-1] == 3:  # a border of one; at stride 2 one of diffusers' (0, 1, 0, 1)
            before = 1 if stride == 1 else 0
            h = np.pad(h, ((0, 0), (0, 0), (before, 1), (before, 1)))
        rows, columns = ((size - kernel.shape[-1]) // stride + 1 for size in h.shape[2:])
        out = np.zeros((len(h), len(kernel), rows, columns))
        for row in range(rows):  # correlation, by its definition
            for column in range(columns):
                top, left = stride * row, stride * column
                patch = h[:, :, top : top + kernel.shape[2], left : left + kernel.shape[3]]
                out[:, :, row, column] = np.einsum("bihw,oihw->bo", patch, kernel)
        return out + w[f"{name}.bias"][:, None, None]

    def norm(name, h):
        parts = h.reshape(len(h), groups, -1)
        parts = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + config["norm_eps"])
        return parts.reshape(h.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def resnet(name, h):
        r = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", h)))
        r = r + dense(f"{name}.time_emb_proj", silu(embedding))[:, :, None, None]
        r = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", r)))
        return r + (conv(f"{name}.conv_shortcut", h) if f"{name}.conv_shortcut.weight" in w else h)

    def attention(name, h):
        places = norm(f"{name}.group_norm", h).reshape(*h.shape[:2], -1).swapaxes(1, 2)
        query, key, value = (dense(f"{name}.{part}", places) for part in ("to_q", "to_k", "to_v"))
        scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(h.shape[1]))
        mixed = (scores / scores.sum(2, keepdims=True)) @ value
        return h + dense(f"{name}.to_out.0", mixed).swapaxes(1, 2).reshape(h.shape)

    def block(stage, j, h, kind):
        h = resnet(f"{stage}.resnets.{j}", h)
        return attention(f"{stage}.attentions.{j}", h) if kind.startswith("Attn") else h

    half = config["block_out_channels"][0] // 2
    angles = t[:, None] * np.exp(-np.log(10_000.0) * np.arange(half) / (half - 1))[None, :]
    embedding = dense("time_embedding.linear_1", np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    embedding = dense("time_embedding.linear_2", silu(embedding))
    if labels is not None:
        embedding = embedding + w["class_embedding.weight"][labels]
    h, last = conv("conv_in", x), len(config["block_out_channels"]) - 1
    skips = [h]
    for i, kind in enumerate(config["down_block_types"]):
        for j in range(config["layers_per_block"]):
            h = block(f"down_blocks.{i}", j, h, kind)
            skips.append(h)
        if i < last:
            h = conv(f"down_blocks.{i}.downsamplers.0.conv", h, stride=2)
            skips.append(h)
    h = resnet("mid_block.resnets.0", h)
    h = attention("mid_block.attentions.0", h) if config.get("add_attention", True) else h
    h = resnet("mid_block.resnets.1", h)
    for i, kind in enumerate(config["up_block_types"]):
        for j in range(config["layers_per_block"] + 1):
            h = block(f"up_blocks.{i}", j, np.concatenate([h, skips.pop()], axis=1), kind)
        if i < last:
            h = conv(f"up_blocks.{i}.upsamplers.0.conv", h.repeat(2, axis=2).repeat(2, axis=3))
    return conv("conv_out", silu(norm("conv_norm_out", h)))


def silu(h):
    return h / (1.0 + np.exp(-h))
