"""An energy-based model of points in the plane, trained by contrastive divergence.

    make train EXP=ebm_2d ARGS="--data moons"                     # two_modes, eight_modes, moons or spiral

`energy.png` has the learned and the exact log-density, `langevin.png` chains on the learned one. In two dimensions Z is
a sum over a grid, so the likelihood is known; `excess_nats` is the KL divergence from the data distribution.
`--objective sliced`, `implicit` and `finite_difference` train by score matching instead, without chains.

Cost: two minutes on 2 idle CPU cores. Expected: `excess_nats` of 0.02 on moons (docs/results.md).

Source: Hinton 2002; Nijkamp et al. 2019, arXiv:1904.09770; Song & Kingma 2021, arXiv:2101.03288.
"""

from vdm_jax.models.energy_2d import Energy2D

CONFIG = Energy2D(
    data="moons",
    steps=4_000,
    batch_size=256,
    learning_rate=1e-3,
    lr_schedule="cosine",
    ema_decay=0.995,
    eval_batch_size=2_000,
    num_samples=2_000,
    log_every=500,
    picture_every=0,
)
