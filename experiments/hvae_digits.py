"""A hierarchical VAE of the handwritten digits: three levels of latents, 1 x 1, 4 x 4 and 8 x 8, for a laptop's CPU.

    make train EXP=hvae_digits

Source: Child 2021, arXiv:2011.10650, scaled down.
"""

from experiments._hvae import HVAE
from experiments._observation import Observation
from vdm_jax.networks.hierarchy import HierarchyConfig

CONFIG = HVAE(
    data="digits",
    network=HierarchyConfig(
        width=64,
        bottleneck=0.5,
        z_channels=8,
        layers=((1, 1), (4, 1), (8, 1)),
        encoder=((8, 2), (4, 1), (1, 1)),
    ),
    observation=Observation(law="mixture", components=5),
    steps=4_000,
    batch_size=32,
    learning_rate=2e-3,
    warmup_steps=100,
    schedule="cosine",
    weight_decay=1e-2,
    b2=0.99,
    ema_decay=0.995,
    kl_warmup_steps=500,
    grad_clip=200.0,
    grad_skip=400.0,
    eval_batch_size=360,
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
