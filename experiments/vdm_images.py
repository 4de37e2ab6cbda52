"""A variational diffusion model on your own images: a folder of image files, or an array of integers (N, H, W, C).

    make train EXP=vdm_images ARGS="--data path/to/folder --image-size 64"
    make train EXP=vdm_images ARGS="--data images.npy"            # docs/training.md, "Your own data"

The loss is the variational bound for T -> infinity, with a learned noise schedule. The U-Net is that of `ddpm_images`,
with Fourier features that resolve 256 gray levels. For images with few gray levels, `--head categorical` has a logit
for each value of each pixel.

Cost: 11 million parameters for images of 64 x 64, for a GPU or TPU. On two CPU cores use few steps, images of at most
28 x 28 and `--network.channels 32`. Expected: depends on the data; the report has the bits/dim of independent pixels as
a baseline. Not trained in full.

Source: Kingma et al. 2021, arXiv:2107.00630.
"""

from dataclasses import replace

from vdm_jax.models.sampling import Sampling
from vdm_jax.models.vdm import VDM

from . import ddpm_images

CONFIG = VDM(
    data="digits",  # give --data
    network=replace(ddpm_images.CONFIG.network, embedding="log_snr", fourier_exponents=(7, 8)),
    steps=100_000,
    batch_size=64,
    learning_rate=3e-4,
    warmup_steps=1_000,
    lr_schedule="cosine",
    grad_clip=0.0,
    weight_decay=0.01,
    b2=0.99,
    ema_decay=0.9995,
    sampling=Sampling(steps=250),
    eval_batch_size=128,
    eval_terms=50,
    log_every=100,
    checkpoint_every=1_000,
    picture_every=2_000,
)
