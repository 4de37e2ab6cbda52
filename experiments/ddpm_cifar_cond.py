"""A class-conditional DDPM on CIFAR-10, for classifier-free guidance: `ddpm_cifar` with labels.

    make train EXP=ddpm_cifar_cond                                # reads TFDS_DATA_DIR, or downloads
    make sample EXP=ddpm_cifar_cond ARGS="--label 3 --guidance-scale 2 --sampler dpmpp_2m --steps 20"

Cost: as `ddpm_cifar`, days on a GPU. Not trained in full.

Source: Ho et al. 2020, arXiv:2006.11239; Ho & Salimans 2022, arXiv:2207.12598.
"""

from dataclasses import replace

from . import ddpm_cifar

CONFIG = replace(
    ddpm_cifar.CONFIG,
    network=replace(ddpm_cifar.CONFIG.network, num_classes=10),
    num_samples=100,
)
