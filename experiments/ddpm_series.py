"""A DDPM of series: floating-point numbers at regular times, in one or more channels.

    make train EXP=ddpm_series ARGS="--data series.npy"           # float (N, L, C), L a multiple of 4

Channels are standardized. The network is the U-Net of images with convolutions along time. The report has nats in the
units of the data, and nats per dimension of the standardized data; `samples.png` has curves beside those of the test
data. The default data are damped oscillations, a Gaussian process whose density is known.

Cost: five minutes on 2 CPU cores. Expected: a bound of 28.6 nats, where the entropy is 27.5 (docs/results.md).

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from vdm_jax.models.real_valued import SeriesDDPM
from vdm_jax.models.sampling import Sampling
from vdm_jax.networks.unet import UNetConfig

CONFIG = SeriesDDPM(
    data="oscillations",
    network=UNetConfig(
        channels=32,
        multipliers=(1, 2, 2),
        blocks=1,
        groups=8,
        attention_resolutions=(),
        dropout=0.0,
        embedding="log_snr",
    ),
    steps=3_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=200,
    lr_schedule="cosine",
    ema_decay=0.999,
    noise_schedule="log_snr",
    log_snr_max=10.0,
    log_snr_min=-6.0,
    time_sampling="low_discrepancy",
    sampling=Sampling(sampler="dpmpp_2m", steps=50),
    eval_batch_size=500,
    eval_terms=50,
    num_samples=64,
    log_every=500,
    picture_every=0,
)
