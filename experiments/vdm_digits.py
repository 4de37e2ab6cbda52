"""A variational diffusion model on scikit-learn's 8 x 8 handwritten digits, for a laptop's CPU.

    make train EXP=vdm_digits

The loss is the variational bound for T -> infinity. The noise schedule is learned with the network: its end points
minimize the bound, its shape the variance of the loss. The network returns a logit for each of a pixel's 17 values.
Together with the Gaussian likelihood of x_t they define a categorical distribution of the pixel, whose mean is x_hat.

Cost: three to four minutes on 2 idle CPU cores. Expected: 1.71 bits/dim on the test digits (docs/results.md).

Source: Kingma et al. 2021, arXiv:2107.00630, scaled down.
"""

from dataclasses import replace

from vdm_jax.models.likelihood_report import LikelihoodReport
from vdm_jax.models.vdm import VDM

from . import ddpm_digits

CONFIG = VDM(
    data="digits",
    network=replace(ddpm_digits.CONFIG.network, dropout=0.2),
    head="categorical",
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
    likelihood_report=LikelihoodReport(terms=50),
    log_every=100,
    checkpoint_every=500,
    picture_every=1_000,
)
