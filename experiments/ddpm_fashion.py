"""A DDPM on Fashion-MNIST: `ddpm_mnist` on another data set, with random mirroring.

    make train EXP=ddpm_fashion                                   # reads TFDS_DATA_DIR, or downloads

Cost: as `ddpm_mnist`. Not trained in full.

Source: Xiao et al. 2017, arXiv:1708.07747 (the data).
"""

from dataclasses import replace

from . import ddpm_mnist

CONFIG = replace(ddpm_mnist.CONFIG, data="fashion_mnist", flip=True)
