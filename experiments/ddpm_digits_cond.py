"""A DDPM of the handwritten digits that is told which digit: for guidance.

    make train EXP=ddpm_digits_cond
    make sample EXP=ddpm_digits_cond ARGS="--label 3 --guidance 2 --sampler dpmpp_2m --steps 15"

One label in ten is hidden in training, so that the network knows the digits without it too. The bound is that of
P(x | label); `make eval` has that of P(x), and how many drawn digits a classifier takes for what they should be.

Cost: three minutes on 2 idle CPU cores.

Source: Ho & Salimans 2022, arXiv:2207.12598.
"""

from dataclasses import replace

from experiments import ddpm_digits
from vdm_jax.models.sampling import Sampling

CONFIG = replace(
    ddpm_digits.CONFIG,
    network=replace(ddpm_digits.CONFIG.network, num_classes=10),
    sampling=Sampling(sampler="dpmpp_2m", steps=20, guidance=2.0),
    num_samples=100,
)
