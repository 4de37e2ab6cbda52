"""A hierarchical VAE of the handwritten digits: latents of 2 x 2, 4 x 4 (two levels) and 8 x 8.

    make train EXP=hvae_digits

Three free nats per level: without them the posterior collapses on all levels but one (HVAE-4), and the bound is 0.1
bits worse. The likelihood report has the bound without free nats.

Cost: a minute on 2 idle CPU cores. Expected: 1.78 bits/dim on the test digits, 1.68 by the importance-weighted bound of
1,000 samples (docs/results.md).

Source: Child 2021, arXiv:2011.10650, scaled down.
"""

from vdm_jax.models.hvae import HVAE
from vdm_jax.models.pixel_likelihood import PixelLikelihood
from vdm_jax.networks.very_deep_vae import VeryDeepVAEConfig

CONFIG = HVAE(
    data="digits",
    network=VeryDeepVAEConfig(
        width=32,
        bottleneck=1.0,
        z_channels=4,
        layers=((2, 1), (4, 2), (8, 1)),
        encoder=((8, 1), (4, 1), (2, 1)),
    ),
    likelihood=PixelLikelihood(distribution="mixture", components=5),
    steps=2_000,
    batch_size=32,
    learning_rate=4e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    weight_decay=1e-2,
    b2=0.99,
    ema_decay=0.995,
    free_nats=3.0,
    eval_batch_size=360,
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
