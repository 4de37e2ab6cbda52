"""An autoencoder of the 8 x 8 handwritten digits, with a 16-dimensional code.

    make train EXP=ae_digits

The codes are trained for reconstruction alone. `samples.png` decodes samples of N(0, I), which are far from the codes
of images (AE-3). With `--network.latent 2`, `codes.png` plots the codes.

Cost: a minute on 2 idle CPU cores. Expected: a squared error of 0.015 per pixel on the test digits.
"""

from vdm_jax.models.autoencoder import Autoencoder
from vdm_jax.networks.autoencoder import AutoencoderConfig

CONFIG = Autoencoder(
    data="digits",
    network=AutoencoderConfig(
        architecture="conv", latent=16, width=32, blocks=1, multipliers=(1, 2), groups=8, dropout=0.1
    ),
    steps=3_000,
    batch_size=32,
    learning_rate=2e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    weight_decay=1e-2,
    b2=0.99,
    ema_decay=0.995,
    eval_batch_size=360,
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
