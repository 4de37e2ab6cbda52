"""Kingma et al.'s model of CIFAR-10 with augmentation: twice as wide, attention after every block, a learned schedule.

    make train EXP=vdm_cifar_aug ARGS="--network.dtype bfloat16"  # TFDS_DATA_DIR, or downloaded with the tfds extra

Training images are mirrored, turned by multiples of 90 degrees and have their colour channels swapped, at random.

Cost: made for many accelerators. 100 million steps at most, of 1,024 images; `--accumulate` splits a batch.
Expected: 2.49 bits/dim with EMA, as published (Table 1).

Source: Kingma et al. 2021, arXiv:2107.00630, section 6 and appendix B.
"""

from dataclasses import replace

from experiments import vdm_cifar

CONFIG = replace(
    vdm_cifar.CONFIG,
    flip=True,
    rotate=True,
    swap_channels=True,
    network=replace(vdm_cifar.CONFIG.network, channels=256, attention_resolutions=(32,), dropout=0.05),
    schedule_features=1024,
    steps=100_000_000,
    batch_size=1024,
)
