"""Kingma et al.'s CIFAR-10 model without augmentation: 32 + 33 residual blocks at full resolution, T -> infinity.

    make train EXP=vdm_cifar                                      # reads TFDS_DATA_DIR, or downloads
    make train EXP=vdm_cifar ARGS="--network.dtype bfloat16"      # on a GPU or TPU

There is no downsampling: all blocks work at 32 x 32 with 128 channels, and only the two middle blocks have attention.
Fourier features of x_t (n = 7, 8) resolve the last bits of a pixel. gamma is linear, from -13.3 to 5 at first, and its
end points are learned, as in the authors' settings for this experiment.

Cost: 10 million steps of 128 images; needs accelerators (on two CPU cores a step takes minutes).
Expected: 2.65 bits/dim with EMA, as published (Table 1). Not trained in full.

Source: Kingma et al. 2021, arXiv:2107.00630, section 6 and appendix B.
"""

from vdm_jax.models.sampling import Sampling
from vdm_jax.models.vdm import VDM
from vdm_jax.networks.unet import UNetConfig

CONFIG = VDM(
    data="cifar10",
    network=UNetConfig(
        channels=128,
        multipliers=(1,),
        blocks=32,
        attention_resolutions=(),
        middle_attention=True,
        dropout=0.1,
        embedding="log_snr",
        fourier_exponents=(7, 8),
    ),
    schedule_features=0,
    steps=10_000_000,
    batch_size=128,
    learning_rate=2e-4,
    warmup_steps=100,
    grad_clip=0.0,
    weight_decay=0.01,
    b2=0.99,
    ema_decay=0.9999,
    log_every=100,
    checkpoint_every=5_000,
    picture_every=20_000,
    sampling=Sampling(steps=1_000),
    eval_batch_size=500,
)
