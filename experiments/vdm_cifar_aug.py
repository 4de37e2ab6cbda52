"""Kingma et al.'s CIFAR-10 model with augmentation: 256 channels, attention after every block, a learned schedule.

    make train EXP=vdm_cifar_aug ARGS="--network.dtype bfloat16"  # reads TFDS_DATA_DIR, or downloads

Training images are mirrored, rotated by multiples of 90 degrees and have their color channels permuted, at random.

Cost: at most 100 million steps of 1,024 images; needs many accelerators. `--accumulate` splits a batch.
Expected: 2.49 bits/dim with EMA, as published (Table 1). Not trained in full.

Source: Kingma et al. 2021, arXiv:2107.00630, section 6 and appendix B.
"""

from dataclasses import replace

from . import vdm_cifar

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
