"""A DDPM of vectors: a table of floating-point numbers, one example a row.

    make train EXP=ddpm_vectors ARGS="--data table.npy"           # float (N, D); by default points in the plane

Entries are standardized, so that one noise schedule fits all units. The report has nats in the units of the data, and
nats per dimension of the standardized data; `samples.png` has scatter plots of pairs of entries over the test data.

Cost: three minutes on 2 CPU cores. Expected on eight_modes: a bound of 0.74 nats, where the entropy is 0.68
(docs/results.md).

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from vdm_jax.models.real_valued import VectorDDPM
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.mlp import MLPConfig

CONFIG = VectorDDPM(
    data="eight_modes",
    network=MLPConfig(width=128, blocks=4),
    steps=10_000,
    batch_size=512,
    learning_rate=1e-3,
    warmup_steps=200,
    lr_schedule="cosine",
    ema_decay=0.999,
    noise_schedule="log_snr",
    log_snr_max=10.0,
    log_snr_min=-6.0,
    time_sampling="low_discrepancy",
    sampling=Sampling(sampler="dpmpp_2m", steps=50),
    eval_batch_size=2_000,
    eval_terms=50,
    num_samples=2_000,
    log_every=500,
    picture_every=0,
)
