"""A variational diffusion model on MNIST's 28 x 28 digits with 256 gray levels.

    make train EXP=vdm_mnist                                      # reads TFDS_DATA_DIR, or downloads

Cost: minutes on a GPU; about 1.6 steps of 32 images per second on two CPU cores. Not trained in full.
Expected: 1.07 bits/dim after 2,500 steps of 32 images, a sixteenth of the recipe (docs/results.md).

Source: Kingma et al. 2021, arXiv:2107.00630, scaled down.
"""

from vdm_jax.models.vdm import VDM
from vdm_jax.networks.unet import UNetConfig

CONFIG = VDM(
    data="mnist",
    network=UNetConfig(
        channels=32,
        multipliers=(1, 2, 2),
        blocks=1,
        groups=8,
        attention_resolutions=(),
        middle_attention=True,
        dropout=0.1,
        embedding="log_snr",
        fourier_exponents=(4, 5, 6),
        position_bias=True,
    ),
    head="categorical",
    steps=40_000,
    batch_size=64,
    learning_rate=2e-3,
    warmup_steps=500,
    lr_schedule="cosine",
    grad_clip=0.0,
    weight_decay=0.01,
    b2=0.99,
    ema_decay=0.999,
    checkpoint_every=1_000,
    picture_every=2_000,
    eval_batch_size=500,
)
