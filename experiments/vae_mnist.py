"""A variational autoencoder of MNIST's 28 x 28 digits with 256 gray levels.

    make train EXP=vae_mnist                                      # reads TFDS_DATA_DIR, or downloads

`ARGS="--likelihood.distribution bernoulli --likelihood.binarize"` trains on binarized MNIST, as much of the literature
does.

Cost: minutes on a GPU; about 2.9 steps of 64 images per second on two CPU cores. Not trained in full.

Source: Kingma & Welling 2013, arXiv:1312.6114, with Salimans et al.'s mixture of logistics, arXiv:1701.05517.
"""

from vdm_jax.models.pixel_likelihood import PixelLikelihood
from vdm_jax.models.vae import VAE
from vdm_jax.networks.autoencoder import AutoencoderConfig

CONFIG = VAE(
    data="mnist",
    network=AutoencoderConfig(
        architecture="conv", latent=32, width=32, blocks=1, multipliers=(1, 2, 4), groups=8, dropout=0.0
    ),
    likelihood=PixelLikelihood(distribution="mixture", components=5),
    steps=30_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=500,
    lr_schedule="cosine",
    weight_decay=1e-2,
    ema_decay=0.999,
    kl_warmup_steps=2_000,
    eval_batch_size=500,
    checkpoint_every=1_000,
    picture_every=2_000,
)
