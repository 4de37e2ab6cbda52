"""Song & Ermon's noise-conditional score network on CIFAR-10, with the paper's settings.

    make train EXP=ncsn_cifar                                     # TFDS_DATA_DIR, or downloaded with the tfds extra

Pixels here lie on [-1, 1], the paper's on [0, 1], so every sigma is twice as large: ten levels from 2 to 0.02. Their
eps = 2e-5 is a rate of 0.1. No averaged parameters, no last denoising: those came a year later
(`ARGS="--kind eps --ema-decay 0.999 --sampling.denoise"` has them).

Cost: a day on a GPU. Published: FID 25.32 from the best checkpoint. Not trained here yet.

Source: Song & Ermon 2019, arXiv:1907.05600, sections 4 and 5, appendix B.
"""

from vdm_jax.models.annealing import Langevin
from vdm_jax.models.ncsn import NCSN
from vdm_jax.networks.refinenet import RefineNetConfig

CONFIG = NCSN(
    data="cifar10",
    network=RefineNetConfig(channels=128, num_levels=10),
    sampling=Langevin(rate=0.1, steps=100, denoise=False),
    prediction_type="score",
    dequantize=True,
    flip=True,
    steps=200_000,
    batch_size=128,
    learning_rate=1e-3,
    grad_clip=0.0,
    ema_decay=0.0,
    checkpoint_every=5_000,
    picture_every=5_000,
    eval_batch_size=500,
)
