"""A deep hierarchical VAE of MNIST: 20 levels of latents at 1 x 1, 7 x 7, 14 x 14 and 28 x 28.

    make train EXP=hvae_mnist                                     # reads TFDS_DATA_DIR, or downloads

Cost: about 0.86 steps of 64 images per second on two CPU cores. Not trained in full.

Source: Child 2021, arXiv:2011.10650, scaled down.
"""

from vdm_jax.models.hvae import HVAE
from vdm_jax.models.pixel_likelihood import PixelLikelihood
from vdm_jax.networks.very_deep_vae import VeryDeepVAEConfig

CONFIG = HVAE(
    data="mnist",
    network=VeryDeepVAEConfig(
        width=64,
        z_channels=8,
        layers=((1, 2), (7, 8), (14, 8), (28, 2)),
        encoder=((28, 1), (14, 2), (7, 2), (1, 1)),
    ),
    likelihood=PixelLikelihood(distribution="mixture", components=5),
    steps=40_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=500,
    lr_schedule="cosine",
    weight_decay=1e-2,
    b2=0.9,
    ema_decay=0.999,
    free_nats=0.5,
    grad_clip=200.0,
    grad_skip=400.0,
    eval_batch_size=250,
    checkpoint_every=1_000,
    picture_every=2_000,
)
