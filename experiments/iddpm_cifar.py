"""Nichol & Dhariwal's CIFAR-10 model: learned variances, cosine schedule, T = 4,000, L_hybrid, 500,000 steps.

    make train EXP=iddpm_cifar                                    # reads TFDS_DATA_DIR, or downloads
    make train EXP=iddpm_cifar ARGS="--objective vlb"             # better likelihood, worse samples
    make train EXP=iddpm_cifar ARGS="--network.dtype bfloat16"    # on a GPU or TPU

Two differences from the paper. Its network has four attention heads and lets the noise level scale as well as shift the
features; this one is Ho et al.'s. And L_vlb samples its timesteps with fixed probabilities, not by a loss history.

Cost: 500,000 steps of 128 images; needs an accelerator.
Expected, as published (Table 2, 500,000 steps, T = 4,000, cosine): 3.17 bits/dim and an FID of 3.19 with L_hybrid; 2.94
bits/dim and an FID of 11.47 with L_vlb. Not trained in full.

Source: Nichol & Dhariwal 2021, arXiv:2102.09672, Sections 3 and 4, and github.com/openai/improved-diffusion.
"""

from vdm_jax.models.iddpm import IDDPM
from vdm_jax.networks.unet import UNetConfig

CONFIG = IDDPM(
    data="cifar10",
    network=UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=3, attention_resolutions=(16, 8), dropout=0.3),
    objective="hybrid",
    steps=500_000,
    batch_size=128,
    learning_rate=1e-4,
    grad_clip=0.0,
    ema_decay=0.9999,
    noise_schedule="cosine",
    num_steps=4000,
    log_every=100,
    checkpoint_every=5_000,
    picture_every=20_000,
    eval_batch_size=500,
    eval_terms=100,
)
