"""Variational EM on the handwritten digits: encoder and decoder in turn, ten updates each, and a latent on a map.

    make train EXP=vae_em_digits

`codes.png` shows where the test images lie in the two latent numbers, `reconstructions.png` what those can say.

Cost: under a minute on 2 idle CPU cores. Expected: 2.2 bits/dim on the test digits, with two numbers an image.

Source: Neal & Hinton 1998; Kingma & Welling 2013, arXiv:1312.6114.
"""

from dataclasses import replace

from experiments import vae_digits

CONFIG = replace(
    vae_digits.CONFIG,
    network=replace(vae_digits.CONFIG.network, latent=2),
    turns=10,
    b1=0.0,
    weight_decay=0.0,
    learning_rate=1e-3,
)
