"""A DDPM on MNIST's 28 x 28 digits: a small U-Net with attention at 14 x 14.

    make train EXP=ddpm_mnist                                     # reads TFDS_DATA_DIR, or downloads

Cost: minutes on a GPU; hours on two CPU cores, where `ARGS="--steps 2000"` already gives digits. Not trained in full.

Source: Ho et al. 2020, arXiv:2006.11239, scaled down.
"""

from vdm_jax.models.ddpm import DDPM
from vdm_jax.networks.unet import UNetConfig

CONFIG = DDPM(
    data="mnist",
    network=UNetConfig(channels=32, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(14,), dropout=0.1),
    steps=40_000,
    batch_size=128,
    learning_rate=1e-3,
    warmup_steps=500,
    lr_schedule="cosine",
    ema_decay=0.999,
    noise_schedule="log_snr",
    log_snr_max=12.0,
    log_snr_min=-7.0,
    checkpoint_every=1_000,
    picture_every=2_000,
    eval_batch_size=500,
    eval_terms=100,
)
