"""A variational autoencoder of the handwritten digits, for a laptop's CPU.

    make train EXP=vae_digits

Pixels by a mixture of five logistics, sixteen latents. `make eval EXP=vae_digits` adds the bound of 1,000
importance-weighted draws.

Cost: under a minute on 2 idle CPU cores. Expected: 1.87 bits/dim on the test digits, 1.75 by 1,000 draws.

Source: Kingma & Welling 2013, arXiv:1312.6114.
"""

from experiments import ae_digits
from vdm_jax.models.likelihood_options import LikelihoodOptions
from vdm_jax.models.vae import VAE

CONFIG = VAE(
    data="digits",
    network=ae_digits.CONFIG.network,
    observation=LikelihoodOptions(distribution="mixture", components=5),
    steps=2_500,
    batch_size=32,
    learning_rate=2e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    weight_decay=1e-2,
    b2=0.99,
    ema_decay=0.995,
    kl_warmup_steps=500,
    eval_batch_size=360,
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
