"""The default recipe: a DDPM on scikit-learn's 8 x 8 handwritten digits, for a laptop's CPU.

    make train

L_simple with eps-prediction, T = 1,000, and two choices that save training time. The log-SNR falls linearly from 8 to
-4: every timestep then has the same weight in the bound, so L_simple equals the bound up to a constant. Above 8 the 17
pixel values can be told apart without a network; below -4 less than a nat of the bound is left. The small U-Net (8 x 8
and 4 x 4) gets Fourier features of its input and a learned position bias.

Cost: two minutes on 2 idle CPU cores. Expected: 1.73 bits/dim on the test digits (docs/results.md).
"""

from vdm_jax.models.ddpm import DDPM
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.unet import UNetConfig

CONFIG = DDPM(
    data="digits",
    network=UNetConfig(
        channels=32,
        multipliers=(1, 2),
        blocks=1,
        groups=8,
        attention_resolutions=(),
        middle_attention=False,
        dropout=0.0,
        embedding="log_snr",
        fourier_exponents=(2, 3, 4),
        position_bias=True,
    ),
    steps=5_000,
    batch_size=32,
    learning_rate=4e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    weight_decay=1e-2,
    b2=0.99,
    ema_decay=0.995,
    noise_schedule="log_snr",
    log_snr_max=8.0,
    log_snr_min=-4.0,
    time_sampling="low_discrepancy",
    eval_batch_size=360,
    sampling=Sampling(steps=250),
    eval_terms=50,
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
