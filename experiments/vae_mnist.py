"""A variational autoencoder of MNIST's 28 x 28 digits of 256 grey levels.

    make train EXP=vae_mnist                                      # TFDS_DATA_DIR, or downloaded with the tfds extra

`ARGS="--observation.law bernoulli --observation.binarize"` is the black and white MNIST of the literature, in nats.

Cost: minutes on a GPU; on two CPU cores some 2.9 steps of 64 images a second. Not trained to its end here yet.

Source: Kingma & Welling 2013, arXiv:1312.6114, with Salimans et al.'s mixture of logistics, arXiv:1701.05517.
"""

from vdm_jax.models.likelihood_options import LikelihoodOptions
from vdm_jax.models.vae import VAE
from vdm_jax.networks.autoencoder import AutoencoderConfig

CONFIG = VAE(
    data="mnist",
    network=AutoencoderConfig(
        architecture="conv", latent=32, width=32, blocks=1, multipliers=(1, 2, 4), groups=8, dropout=0.0
    ),
    observation=LikelihoodOptions(distribution="mixture", components=5),
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
