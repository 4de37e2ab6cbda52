"""An autoencoder of MNIST.

    make train EXP=ae_mnist                                       # reads TFDS_DATA_DIR, or downloads

Cost: minutes on a GPU; about 3 steps of 64 images per second on two CPU cores. Not trained in full.
"""

from dataclasses import replace

from . import ae_digits, vae_mnist

CONFIG = replace(
    ae_digits.CONFIG,
    data="mnist",
    network=vae_mnist.CONFIG.network,
    steps=30_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=500,
    ema_decay=0.999,
    eval_batch_size=500,
    log_every=vae_mnist.CONFIG.log_every,
    checkpoint_every=1_000,
    picture_every=2_000,
)
