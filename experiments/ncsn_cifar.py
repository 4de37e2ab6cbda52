"""Song & Ermon's noise-conditional score network on CIFAR-10, with the settings of the paper.

    make train EXP=ncsn_cifar                                     # reads TFDS_DATA_DIR, or downloads

Pixels are on [-1, 1] here and on [0, 1] in the paper, so every sigma is twice as large: ten levels from 2 to 0.02. The
paper's eps = 2e-5 is a rate of 0.1. There is no EMA and no final denoising step, which came a year later:
`ARGS="--prediction-type eps --ema-decay 0.999 --sampling.denoise"` adds them.

Cost: a day on a GPU. Expected: FID 25.32 from the best checkpoint, as published. Not trained in full.

Source: Song & Ermon 2019, arXiv:1907.05600, sections 4 and 5, appendix B.
"""

from vdm_jax.models.annealing import AnnealedLangevin
from vdm_jax.models.ncsn import NCSN
from vdm_jax.networks.refinenet import RefineNetConfig

CONFIG = NCSN(
    data="cifar10",
    network=RefineNetConfig(channels=128, num_levels=10),
    sampling=AnnealedLangevin(rate=0.1, steps=100, denoise=False),
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
