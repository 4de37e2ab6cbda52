"""A variational diffusion model on scikit-learn's 8 x 8 handwritten digits, for a laptop's CPU.

    make train EXP=vdm_digits

The bound itself is the loss, as T -> infinity, and the noise schedule is learned with the network: its end points on
the bound, its shape for the least noise in the loss. The network gives a logit for each of the 17 values of a pixel,
which with the Gaussian likelihood of x_t makes a law of the pixel; its mean is x_hat.

Cost: three to four minutes on 2 idle CPU cores. Expected: 1.71 bits/dim on the test digits (docs/results.md).

Source: Kingma et al. 2021, arXiv:2107.00630, scaled down.
"""

from dataclasses import replace

from experiments import ddpm_digits
from vdm_jax.models.likelihood_rows import LikelihoodRows
from vdm_jax.models.vdm import VDM

CONFIG = VDM(
    data="digits",
    network=replace(ddpm_digits.CONFIG.network, dropout=0.2),
    head="values",
    gamma_0=-8.0,
    gamma_1=4.0,
    schedule_features=64,
    steps=8_000,
    batch_size=32,
    learning_rate=4e-3,
    warmup_steps=100,
    lr_schedule="cosine",
    grad_clip=0.0,
    weight_decay=1e-2,
    b2=0.99,
    ema_decay=0.998,
    eval_batch_size=360,
    eval_terms=50,
    ledger=LikelihoodRows(terms=50),
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
