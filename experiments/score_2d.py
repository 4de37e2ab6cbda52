"""A score model of points in the plane, at every noise level; the exact score is shown beside it.

    make train EXP=score_2d ARGS="--data moons"                   # two_modes, eight_modes, moons or spiral

`field.png` has the learned and the exact score at three noise levels. `langevin.png` has chains at the lowest noise
level, which stay in the mode where they start, and annealed chains of the same length, which reach all modes.
`--objective implicit` and `sliced` train without the added noise as a target, and converge to the same score.

Cost: a minute on 2 idle CPU cores. Expected: a score error of 0.0003 on two_modes (docs/results.md).

Source: Song & Ermon 2019, arXiv:1907.05600, sections 3 and 4.
"""

from vdm_jax.models.score_2d import Score2D

CONFIG = Score2D(
    data="two_modes",
    steps=5_000,
    batch_size=256,
    learning_rate=2e-3,
    lr_schedule="cosine",
    ema_decay=0.995,
    eval_batch_size=2_000,
    num_samples=2_000,
    log_every=500,
    picture_every=0,
)
