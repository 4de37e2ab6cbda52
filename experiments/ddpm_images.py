"""A DDPM on your own images: a folder of image files, or an array of integers (N, H, W, C).

    make train EXP=ddpm_images ARGS="--data path/to/folder --image-size 64"
    make train EXP=ddpm_images ARGS="--data images.npy"           # docs/training.md, "Your own data"

The U-Net has as many resolutions as the size of the images allows: their sides are halved down to 4, or as long as they
are even. Attention is at the resolution with 9 to 16 rows, which is 16 for 32, 64 or 128 and 14 for 28, and in the
middle. `--network.channels 128` makes it four times as large; `--batch-size` is limited by memory.

Cost: 11 million parameters for images of 64 x 64, for a GPU or TPU. On two CPU cores use few steps, images of at most
28 x 28 and `--network.channels 32`. Expected: depends on the data; the report has the bits/dim of independent pixels as
a baseline. Not trained in full.

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from vdm_jax.models.ddpm import DDPM
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.unet import UNetConfig

CONFIG = DDPM(
    data="digits",  # give --data
    network=UNetConfig(channels=64, multipliers=(), blocks=2, attention_resolutions=tuple(range(9, 17)), dropout=0.1),
    steps=100_000,
    batch_size=64,
    learning_rate=3e-4,
    warmup_steps=1_000,
    lr_schedule="cosine",
    ema_decay=0.9995,
    noise_schedule="log_snr",
    log_snr_max=12.0,
    log_snr_min=-7.0,
    time_sampling="low_discrepancy",
    sampling=Sampling(steps=250),
    eval_batch_size=128,
    eval_terms=50,
    log_every=100,
    checkpoint_every=1_000,
    picture_every=2_000,
)
