"""Ho et al.'s CIFAR-10 model: 35.7 million parameters, linear beta, T = 1,000, L_simple, 800,000 steps.

    make train EXP=ddpm_cifar                                     # reads TFDS_DATA_DIR, or downloads
    make train EXP=ddpm_cifar ARGS="--network.dtype bfloat16"     # on a GPU or TPU

Cost: 800,000 steps of 128 images; needs an accelerator (on two CPU cores a step takes most of a minute).
Expected: at most 3.75 bits/dim and an FID of 3.17 with EMA, as published (Table 1 and Section 4.1).
Not trained in full.

Source: Ho et al. 2020, arXiv:2006.11239, Section 4 and Appendix B.
"""

from vdm_jax.models.ddpm import DDPM
from vdm_jax.models.sampling import Sampling

CONFIG = DDPM(
    data="cifar10",
    flip=True,
    steps=800_000,
    batch_size=128,
    learning_rate=2e-4,
    warmup_steps=5_000,
    grad_clip=1.0,
    ema_decay=0.9999,
    noise_schedule="linear",
    num_steps=1000,
    sampling=Sampling(variance="fixed_large"),
    log_every=100,
    checkpoint_every=5_000,
    picture_every=20_000,
    eval_batch_size=500,
    eval_terms=100,
)
