"""A denoising autoencoder of the handwritten digits: `ae_digits`, whose encoder sees them in noise.

    make train EXP=dae_digits

Cost: a minute on 2 idle CPU cores.
"""

from dataclasses import replace

from experiments import ae_digits

CONFIG = replace(ae_digits.CONFIG, sigma=0.5)
