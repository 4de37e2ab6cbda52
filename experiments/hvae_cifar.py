"""Child's very deep VAE on CIFAR-10: 43 levels of latents from 1 x 1 to 32 x 32, 39 million parameters.

    make train EXP=hvae_cifar ACCEL=cuda13                        # reads TFDS_DATA_DIR, or downloads

Cost: as published, 650,000 to 1,050,000 updates, almost a week on two V100 GPUs.
Expected: 2.87 bits/dim (the bound), as published: the mean of four seeds with early stopping. Not trained in full.

Source: Child 2021, arXiv:2011.10650, and the settings of its published code for CIFAR-10.
"""

import math

from vdm_jax.models.hvae import HVAE
from vdm_jax.models.pixel_likelihood import PixelLikelihood
from vdm_jax.networks.very_deep_vae import VeryDeepVAEConfig

CONFIG = HVAE(
    data="cifar10",
    network=VeryDeepVAEConfig(),
    likelihood=PixelLikelihood(distribution="mixture", components=10),
    steps=1_000_000,
    batch_size=32,
    learning_rate=2e-4,
    warmup_steps=100,
    weight_decay=1e-2,
    b2=0.9,
    ema_decay=0.9999,
    grad_clip=200.0 / math.log(2.0),  # Child's loss is in nats per dimension, this one is in bits
    grad_skip=400.0 / math.log(2.0),
    eval_batch_size=100,
    checkpoint_every=5_000,
    picture_every=5_000,
)
