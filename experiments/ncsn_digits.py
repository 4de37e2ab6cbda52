"""A noise-conditional score network on the handwritten digits, for a laptop's CPU.

    make train EXP=ncsn_digits

Sampling is annealed Langevin dynamics: a hundred steps on each of ten noise levels. `trajectory.png` shows the chains
after every level.

Cost: six minutes on 2 idle CPU cores. Expected: a denoising error of 0.115 per pixel (docs/results.md).

Source: Song & Ermon 2019, arXiv:1907.05600, with the scaled output and the EMA of arXiv:2006.09011.
"""

from vdm_jax.models.annealing import NoiseScales
from vdm_jax.models.ncsn import NCSN
from vdm_jax.networks.refinenet import RefineNetConfig

CONFIG = NCSN(
    data="digits",
    network=RefineNetConfig(channels=32, num_levels=10),
    noise_scales=NoiseScales(sigma_max=4.0, sigma_min=0.05),
    time_sampling="low_discrepancy",
    steps=4_000,
    batch_size=32,
    learning_rate=1e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    ema_decay=0.995,
    eval_batch_size=360,
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
