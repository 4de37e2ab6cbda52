"""A denoiser of handwritten digits trained on noisy digits alone, by Stein's unbiased risk estimate.

    make train EXP=sure_denoise_digits
    make train EXP=clean_denoise_digits                           # the same network, trained on clean digits

Each training digit has one fixed noise. The network is small, has much dropout and stops early: a large one memorizes
the noise, and its risk estimate falls below zero while the risk rises. `denoised.png` has clean, noisy and denoised
test digits. `samples.png` is made by Langevin dynamics, as a denoiser gives a score.

Cost: a minute on 2 idle CPU cores. Expected: 18.5 dB PSNR, within 0.8 dB of `clean_denoise_digits` (docs/results.md).
"""

from vdm_jax.models.denoiser import ImageDenoiser
from vdm_jax.networks.unet import UNetConfig

CONFIG = ImageDenoiser(
    data="digits",
    network=UNetConfig(
        channels=32,
        multipliers=(1,),
        blocks=1,
        groups=8,
        attention_resolutions=(),
        middle_attention=False,
        dropout=0.5,
        embedding="log_snr",
    ),
    steps=1_200,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    weight_decay=1e-2,
    ema_decay=0.995,
    eval_batch_size=360,
    log_every=100,
    checkpoint_every=500,
    picture_every=0,
)
