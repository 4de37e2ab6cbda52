"""Sampling: from noise back to data. One file a sampler, one call for all, one compiled scan.

    sampler(denoiser, key, x_T, schedule, prediction_type="eps", clip=None, snapshots=0, ...) -> Samples

    ancestral, ancestral_learned    draws of the reverse kernel                                    T steps (SAM-2)
    ddim                            the same denoiser with less noise, down to none                fewer
    heun                            the probability-flow ODE, by Euler's or Heun's steps
    dpmpp                           its exponential integrator of second order, or the SDE's
    predictor_corrector             a step down, and Langevin steps at the level reached
    replacement                     inpainting: the known part drawn anew at every level
    adaptive                        the ODE by diffrax, with steps as long as the tolerance allows

`schedule` is any discrete schedule; `schedule.subsequence(...)` with `discrete_schedules.uniform_steps`, `log_snr_uniform_steps` or `karras_steps`
takes fewer of its levels. Samplers that add no noise take the key too, and it may be None.

`clip` bounds every predicted x_0: pass clip=1.0 for images on [-1, 1]. Without it an eps or score prediction is divided
by alpha, which is near 0 at the noisiest levels (above all those of `schedules.Cosine`), and multiplies the network's
error; samplers warn where the first step does so by more than a factor of 20.
"""

from vdm_jax.samplers.adaptive import adaptive
from vdm_jax.samplers.ancestral import ancestral, ancestral_learned
from vdm_jax.samplers.chain import Samples, Trajectory
from vdm_jax.samplers.ddim import ddim, ddim_inverse
from vdm_jax.samplers.dpmpp import dpmpp
from vdm_jax.samplers.heun import heun
from vdm_jax.samplers.predictor_corrector import predictor_corrector
from vdm_jax.samplers.repaint import repaint

__all__ = [
    "Samples",
    "Trajectory",
    "adaptive",
    "ancestral",
    "ancestral_learned",
    "ddim",
    "ddim_inverse",
    "dpmpp",
    "heun",
    "predictor_corrector",
    "repaint",
]
