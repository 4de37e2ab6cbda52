"""Kingma et al.'s model of CIFAR-10 without augmentation: 32 + 33 residual blocks at full resolution, T -> infinity.

    make train EXP=vdm_cifar                                      # TFDS_DATA_DIR, or downloaded with the tfds extra
    make train EXP=vdm_cifar ARGS="--network.dtype bfloat16"      # on a GPU or TPU

No down-sampling: all blocks see 32 x 32 pixels, 128 channels, with attention between the two middle ones alone; Fourier
features of x_t (n = 7, 8) let the network see the last bits of a pixel. Only the end points of gamma are learned, from
-13.3 and 5, between which it is a line, as in the authors' settings for this experiment.

Cost: made for accelerators. 10 million steps of 128 images; on two CPU cores a step takes minutes.
Expected: 2.65 bits/dim with EMA after 10M steps, as published (Table 1).

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
