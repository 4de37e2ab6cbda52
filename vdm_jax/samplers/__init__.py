"""Samplers: from x_T ~ p(x_T) to a sample x_0. One file a sampler, one signature, one compiled scan.

    sampler(denoiser, key, x_T, schedule, prediction_type="eps", clip=None, snapshots=0, ...) -> Samples

    ancestral               samples of the reverse transitions, with a fixed variance (DDPM)
    ancestral_learned       the same with a learned variance (improved DDPM)
    ddim                    DDIM: the noise of a step is scaled by eta; eta = 0 is deterministic
    ddim_inverse            DDIM inversion: from x_0 to x_T
    euler, heun             the probability-flow ODE, first and second order, with optional churn (EDM)
    dpmpp_2m                DPM-Solver++(2M): the probability-flow ODE, second order, one evaluation a step
    dpmpp_2m_sde            SDE-DPM-Solver++(2M): the reverse SDE, second order, one evaluation a step
    predictor_corrector     ancestral steps, each followed by Langevin steps
    repaint                 inpainting by RePaint
    twisted_smc             conditional samples with weights, exact for many particles (Twisted Diffusion Sampler)
    adaptive                the probability-flow ODE with adaptive step sizes (diffrax)

`schedule` is a discrete schedule. For fewer steps pass `schedule.subsequence(...)` with the indices of
`discrete_schedules.uniform_steps`, `log_snr_uniform_steps` or `karras_steps`. Deterministic samplers accept key=None.

`clip` bounds every predicted x_0: pass clip=1.0 for images in [-1, 1]. Without it, an eps or score prediction is
divided by alpha. At the noisiest levels alpha is close to 0, above all with `schedules.Cosine`, so errors of the
network are amplified; the samplers warn if the first step amplifies them by more than a factor of 20.
"""

from vdm_jax.samplers.adaptive import adaptive
from vdm_jax.samplers.ancestral import ancestral, ancestral_learned
from vdm_jax.samplers.chain import Samples, Trajectory
from vdm_jax.samplers.ddim import ddim, ddim_inverse
from vdm_jax.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde
from vdm_jax.samplers.euler import euler
from vdm_jax.samplers.heun import heun
from vdm_jax.samplers.predictor_corrector import predictor_corrector
from vdm_jax.samplers.repaint import repaint
from vdm_jax.samplers.twisted import Particles, systematic_resampling, twisted_smc

__all__ = [
    "Particles",
    "Samples",
    "Trajectory",
    "adaptive",
    "ancestral",
    "ancestral_learned",
    "ddim",
    "ddim_inverse",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "euler",
    "heun",
    "predictor_corrector",
    "repaint",
    "systematic_resampling",
    "twisted_smc",
]
