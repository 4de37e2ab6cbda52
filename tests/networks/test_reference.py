"""The U-Net against a float64 NumPy implementation of Ho et al.'s published code."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.optimizations import unoptimized
from vdm_jax.networks.unet import UNet, UNetConfig

GROUPS = 2


def reference(params, x, t, channels, multipliers, blocks, attention_resolutions):
    """Ho et al. 2020, diffusion_tf/models/unet.py, one statement per line of theirs."""
    used = Counter()

    def take(kind):  # Flax numbers the layers of a kind in the order in which they are called
        used[kind] += 1
        return params[f"{kind}_{used[kind] - 1}"]

    temb = np.concatenate([f(t[:, None] * rates(channels)) for f in (np.sin, np.cos)], axis=1)
    layers = take("LevelEmbedding")
    temb = dense(layers["Dense_1"], swish(dense(layers["Dense_0"], temb)))

    hs = [conv(take("Conv"), x)]
    for level in range(len(multipliers)):
        for _ in range(blocks):
            h = residual(take("ResidualBlock"), hs[-1], temb)
            hs.append(attention(take("Attention"), h) if h.shape[1] in attention_resolutions else h)
        if level != len(multipliers) - 1:
            hs.append(conv(take("Conv"), hs[-1], stride=2))
    h = residual(take("ResidualBlock"), hs[-1], temb)
    h = attention(take("Attention"), h)
    h = residual(take("ResidualBlock"), h, temb)
    for level in reversed(range(len(multipliers))):
        for _ in range(blocks + 1):
            h = residual(take("ResidualBlock"), np.concatenate([h, hs.pop()], axis=-1), temb)
            h = attention(take("Attention"), h) if h.shape[1] in attention_resolutions else h
        if level != 0:
            h = conv(take("Conv"), h.repeat(2, axis=1).repeat(2, axis=2))
    assert not hs
    return conv(take("Conv"), swish(norm(params["GroupNorm_0"], h)))


def rates(channels):
    half = channels // 2
    return np.exp(-np.log(10_000) * np.arange(half) / (half - 1))


def swish(h):
    return h / (1 + np.exp(-h))


def dense(p, h):
    return h @ p["kernel"] + p["bias"]


def norm(p, h):
    grouped = h.reshape(*h.shape[:3], GROUPS, -1)
    centered = grouped - grouped.mean((1, 2, 4), keepdims=True)
    unit = centered / np.sqrt((centered**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    return unit.reshape(h.shape) * p["scale"] + p["bias"]


def conv(p, h, stride=1):
    """TensorFlow's "SAME": a border of one, at stride 2 only at the bottom and the right."""
    before = 1 if stride == 1 else 0
    padded = np.pad(h, ((0, 0), (before, 1), (before, 1), (0, 0)))
    height, width = h.shape[1:3]
    return p["bias"] + sum(
        padded[:, i : i + height : stride, j : j + width : stride] @ p["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )


def residual(p, x, temb):
    h = conv(p["Conv_0"], swish(norm(p["GroupNorm_0"], x)))
    h = h + dense(p["Dense_0"], swish(temb))[:, None, None, :]
    h = conv(p["Conv_1"], swish(norm(p["GroupNorm_1"], h)))
    return h + (dense(p["Dense_1"], x) if "Dense_1" in p else x)


def attention(p, x):
    h = norm(p["GroupNorm_0"], x)
    q, k, v = (dense(p[f"Dense_{i}"], h) for i in range(3))
    w = np.exp(np.einsum("bhwc,bHWc->bhwHW", q, k) / np.sqrt(x.shape[-1]))
    h = np.einsum("bhwHW,bHWc->bhwc", w / w.sum((3, 4), keepdims=True), v)
    return x + dense(p["Dense_3"], h)


@pytest.mark.parametrize(("size", "multipliers", "blocks"), [(8, (1, 2), 1), (4, (2, 1), 2)])
def test_unet_is_ho_et_al_s(size, multipliers, blocks):
    config = UNetConfig(4, multipliers, blocks, attention_resolutions=(4,), groups=GROUPS)
    x = np.random.RandomState(0).standard_normal((2, size, size, 3))
    t = np.array([0.0, 700.0])
    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32)
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), *arguments)
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda leaf: 0.5 * random.standard_normal(leaf.shape), shapes)
    apply = unoptimized(UNet(config).apply)
    got = apply(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), *arguments)
    want = reference(params["params"], x, t, 4, multipliers, blocks, (4,))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
