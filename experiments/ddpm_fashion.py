"""A DDPM on Fashion-MNIST: the MNIST recipe on harder images of the same shape, mirrored at random.

    make train EXP=ddpm_fashion                                   # TFDS_DATA_DIR, or downloaded with the tfds extra

Cost: as `ddpm_mnist`. Expected: see docs/results.md for what was measured.

Source: Xiao et al. 2017, arXiv:1708.07747 (the data).
"""

from dataclasses import replace

from experiments import ddpm_mnist

CONFIG = replace(ddpm_mnist.CONFIG, data="fashion_mnist", flip=True)
