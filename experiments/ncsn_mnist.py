"""A noise-conditional score network on MNIST.

    make train EXP=ncsn_mnist                                     # reads TFDS_DATA_DIR, or downloads

Cost: minutes on a GPU, hours on two CPU cores. Not trained in full.

Source: Song & Ermon 2019, arXiv:1907.05600 (noise levels and 64 channels), with the scaled output and the EMA of
arXiv:2006.09011.
"""

from vdm_jax.models.ncsn import NCSN
from vdm_jax.networks.refinenet import RefineNetConfig

CONFIG = NCSN(
    data="mnist",
    network=RefineNetConfig(channels=64, num_levels=10),
    time_sampling="low_discrepancy",
    steps=100_000,
    batch_size=128,
    learning_rate=1e-3,
    ema_decay=0.999,
    checkpoint_every=2_000,
    picture_every=5_000,
    eval_batch_size=500,
)
