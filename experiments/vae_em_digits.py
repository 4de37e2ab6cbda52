"""Variational EM on the handwritten digits: ten updates of the encoder, then ten of the decoder, in turn.

    make train EXP=vae_em_digits

The latent has two dimensions: `codes.png` plots the codes of the test images, `reconstructions.png` what the decoder
makes of them.

Cost: under a minute on 2 idle CPU cores. Expected: 2.2 bits/dim on the test digits.

Source: Neal & Hinton 1998; Kingma & Welling 2013, arXiv:1312.6114.
"""

from dataclasses import replace

from . import vae_digits

CONFIG = replace(
    vae_digits.CONFIG,
    network=replace(vae_digits.CONFIG.network, latent=2),
    alternate_every=10,
    b1=0.0,
    weight_decay=0.0,
    learning_rate=1e-3,
)
