"""The variational view of diffusion models, as pure functions: from autoencoders to diffusion.

Index of equations: catalogue entry -> what it says -> function. `docs/derivations.md` adds the test of each.

Levels and schedules (FWD-6, FWD-7)
    alpha, sigma, lambda of x_t ............................ noise_levels.NoiseLevel, noise_levels.level_from_log_snr
    s < t and the log-SNR lost between them ................ noise_levels.Step, noise_levels.step_from_log_snr
    one level for every example of a batch ................. noise_levels.broadcast_to_batch
    noise or signal above 0, or an error ................... noise_levels.check_positive
    continuous t in [0, 1] ................................. schedules.LinearBeta, Cosine, Sigmoid, LinearLogSNR,
                                                             VarianceExploding, LearnedSchedule
    noise from t_0 on, or an error ......................... schedules.check_noise_at_start
    t of a log-SNR ......................................... schedules.time_from_log_snr
    steps 0..T, fewer steps ................................ discrete_schedules.TabulatedSchedule, discretize, linear_betas, uniform_steps
    T steps of a schedule being learned, and back .......... discrete_schedules.DiscretizedSchedule, discrete_schedules.InterpolatedSchedule
    beta as variance, beta as deviation, gamma ............. discrete_schedules.from_betas, from_standard_deviations, from_gammas;
                                                             to_betas, to_standard_deviations, to_gammas
The normal law (ELBO-6, VAE-4, VAE-5)
    N(mean, var), KL ....................................... gaussian.Normal, gaussian.kl, gaussian.variance_kl
    N(0, I); whether a prior p(x_T) is a valid one ......... gaussian.STANDARD_NORMAL, gaussian.check_prior
Autoencoders (AE-1 .. AE-3)
    ||x - Dec(Enc(x))||^2, and with noise going in ......... autoencoder.reconstruction_error,
                                                             autoencoder.denoising_reconstruction_error
    how far from the data .................................. autoencoder.nearest_distance
    principal components, where all is linear .............. linear_gaussian.PrincipalComponents, linear_gaussian.principal_components
Variational autoencoders (VAE-1 .. VAE-12)
    -E log p(x|z) + KL(q(z|x) || p(z)) ..................... vae.bound, vae.VAEBound
    its terms .............................................. vae.reconstruction_nll, vae.kl_to_prior, vae.kl_monte_carlo
    q(z|x) of a batch; -log p(x|z) of an output ............ vae.encode, vae.check_posterior; vae.output_nll
    z = mu + sigma eps, or the score function .............. vae.reparameterized_sample, vae.score_function_surrogate
    -log 1/K sum_k p(x, z_k) / q(z_k|x) .................... vae.importance_weighted_bound, vae.importance_weighted_average
    KL = I(x; z) + KL(q(z) || p(z)) ........................ vae.kl_decomposition, vae.aggregated_posterior_log_prob
    E_q(x|z)[x], the blur .................................. vae.optimal_mean_decoder
    variational EM; probabilistic PCA, where it ends ....... vae.variational_em; linear_gaussian.LinearGaussianModel, maximum_likelihood_decoder,
                                                             probabilistic_pca
Hierarchical VAEs (HVAE-1 .. HVAE-5)
    levels from the bottom up, from the top down ........... hvae.bottom_up, hvae.top_down; hvae.Hierarchy
    the bound, level by level .............................. hvae.bound, hvae.importance_weighted_bound
    free bits, KL warm-up .................................. hvae.free_bits_objective, hvae.kl_warm_up
    KL, active units, information of every level ........... hvae.collapse_diagnostics
    from the prior; from the upper levels .................. hvae.sample, hvae.sample_decoder_output, hvae.reconstruct
The forward process (FWD-1 .. FWD-5)
    q(x_t | x_0) ........................................... forward.marginal
    x_t = alpha x_0 + sigma eps ............................ forward.add_noise
    q(x_t | x_s) ........................................... forward.transition
Its posterior (POST-1 .. POST-6, POST-8)
    q(x_s | x_r, x_t) for r < s < t ........................ forward.bridge
    q(x_s | x_t, x_0) ...................................... forward.posterior, forward.posterior_variance
    by the noise, by the score, as an interpolation ........ forward.posterior_from_eps, posterior_from_score,
                                                             posterior_coefficients
Parameterisations (PAR-1, PAR-2)
    what a network should predict .......................... parameterization.prediction_target
    x_0 <-> eps <-> v <-> score ............................ parameterization.to_x_0, to_eps, to_v, to_score, convert
    a denoiser at a level, as a score ...................... parameterization.ScoreFromDenoiser
Decoders p(x | z_0) (ELBO-5)
    N, discretised N, Kingma et al.'s categorical (VDM-2) .. gaussian.Normal, likelihoods.DiscretizedGaussian,
                                                             likelihoods.Categorical
    two values, a mixture of discretised logistics ......... likelihoods.Bernoulli, likelihoods.LogisticMixture
    log mass of N(0, 1) in an interval ..................... likelihoods.log_interval_probability
    0..levels-1 <-> [-1, 1] ................................ likelihoods.normalize, likelihoods.denormalize
    whether x is among the values .......................... likelihoods.on_grid
    log p(x) of a distribution returned by a callable ...... likelihoods.evaluate_log_prob
The bound (ELBO-1 .. ELBO-10, ELBO-12, ELBO-13)
    log p(x_0:T) - log q(x_1:T | x_0) ...................... path_bounds.joint_log_ratio
    prior + reconstruction + sum of consistency terms ...... path_bounds.consistency_bound
    prior + reconstruction + sum of diffusion terms ........ elbo.bound, elbo.DiffusionBound
    the same of any reverse process ........................ elbo.assemble_bound
    KL(q(x_T | x_0) || p(x_T)), -E log p(x_0 | x_1) ........ elbo.prior_kl, elbo.reconstruction_nll
    log p(x_0 | x_1) of a batch ............................ elbo.decoder_log_prob
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), its weights ..... elbo.diffusion_kl, elbo.diffusion_weight
    T -> infinity: the integral, its weights ............... elbo.continuous_bound, elbo.diffusion_rate
    the diffusion term, slice by slice of time ............. elbo.diffusion_curve
    ||target - prediction||^2 .............................. elbo.denoising_error
    bits per dimension ..................................... elbo.bits_per_dim
What one trains (ELBO-10, ELBO-11, SAM-1)
    L_simple, weighted, L_DDPM ............................. losses.simple_loss, denoising_loss, ddpm_loss
    the bound with a schedule being learned (VDM-1) ........ vdm.vdm_loss
When (TIME-1 .. TIME-3)
    independent, spread, antithetic; steps ................. time_sampling.uniform_times, time_sampling.to_timesteps, time_sampling.sample_timesteps
    importance sampling, its proposals ..................... time_sampling.importance_sample, LossSecondMoments, timestep_proposal, geometric_variance_proposal
With what weight (WEIGHT-1, WEIGHT-2)
    1/2 int w(lambda) E ||eps - eps_hat||^2 dlambda ........ weightings.weighted_bound
    w of the literature .................................... weightings.likelihood, cosine, v_prediction, edm, p2, min_snr,
                                                             sigmoid, uniform_time
    as a mixture of bounds of noisy data ................... weightings.elbo_mixture
The reverse step's variance (VAR-1 .. VAR-4)
    between beta~ and beta, learned ........................ reverse_variance.interpolated_variance, variance_fraction,
                                                             evaluate_variance
    its divergence, its bound .............................. reverse_variance.reverse_step_kl, reverse_variance.learned_variance_bound
    L_vlb, L_hybrid ........................................ reverse_variance.vlb_loss, reverse_variance.hybrid_loss
    the best there is, and its limits ...................... reverse_variance.optimal_variance, analytic_variance, eps_second_moment,
                                                             variance_bounds
Energies (EBM-1 .. EBM-4)
    log p = -E - log Z, log Z .............................. energy.log_density, energy.log_partition
    -grad E, and log p from it along a path ................ energy.score, energy.line_integral
    E_data grad E - E_model grad E ......................... energy.contrastive_divergence, energy.ContrastiveDivergence
Score matching (SM-1 .. SM-5)
    1/2 ||s - grad log p||^2 ............................... score_matching.explicit
    1/2 ||s||^2 + div s; along random directions ........... score_matching.implicit, sliced, finite_difference
    1/2 ||s - grad log q(y|x)||^2; at a level .............. score_matching.denoising, denoising_at
    tr J, exact or E v^T J v ............................... divergence.value_and_divergence, directions, check_trace
Langevin dynamics (LAN-1 .. LAN-3)
    x + eta grad log p + sqrt(2 eta) xi .................... langevin.langevin_kernel, langevin.ula
    accepted or refused .................................... langevin.mala
    from much noise to little; at one level ................ langevin.annealed_langevin, check_decreasing_noise, langevin_corrector
Tweedie's formula (TW-1 .. TW-3)
    E[x_0 | x_t], Cov[x_0 | x_t] by the score .............. tweedie.posterior_mean, posterior_covariance,
                                                             posterior_variance, covariance_operator
    cumulants in other exponential families ................ tweedie.cumulants, normal_base, poisson_base, gamma_base
Stein's unbiased risk estimate (SURE-1 .. SURE-3)
    ||D(y) - y||^2 - D sigma^2 + 2 sigma^2 div D ........... sure.sure
    a threshold chosen by it ............................... sure.soft_threshold, sure.sure_threshold
Sampling (SAM-2 .. SAM-4)
    x_{t-1} ~ p(x_{t-1} | x_t), t = T..1 ................... samplers.ancestral, samplers.ancestral_learned
    the same with less noise, and back to x_T .............. samplers.ddim, samplers.ddim_inverse
    the probability-flow ODE, first order to second ........ samplers.heun, samplers.dpmpp, samplers.adaptive
    with Langevin steps; with a part known ................. samplers.predictor_corrector, samplers.repaint
    fewer steps, where they matter ......................... discrete_schedules.uniform_steps, log_snr_uniform_steps, karras_steps
Guidance
    by labels, a classifier, a measurement ................. guidance.ClassifierFreeGuidance, ClassifierGuidance, ReconstructionGuidance
Likelihood (LIK-1 .. LIK-5)
    -log 1/K sum_k p(x_0:T) / q(x_1:T | x_0) ............... path_bounds.importance_weighted_bound
    log p(x) along the probability-flow ODE, and back ...... probability_flow.drift, probability_flow.log_likelihood, probability_flow.sample
    where that ODE is singular, or an error ................ probability_flow.check_nonsingular
    P(x) of a density over bins ............................ dequantization.dequantized_bound, Uniform, TruncatedNormal
    P(x) by the first latent ............................... dequantization.latent_dequantization_bound
Worlds where everything is known (POST-7, PAR-3)
    normal, mixture, a data set, pixels .................... closed_form.gaussian, low_rank, mixture, empirical, independent_pixels
    q(x_t), q(x_s | x_t) over the data ..................... closed_form.marginal, closed_form.reverse_transition
    E[target | x_t], in a network's place .................. closed_form.optimal_prediction, closed_form.OptimalDenoiser, OptimalDecoder
    E f(x) with its error .................................. information.quadrature, information.monte_carlo
    h(x), I(x_0; x_t), E ||x_0 - E[x_0 | x_t]||^2 .......... information.entropy, mutual_information, mmse
    the bound of the best model, T steps and T -> infinity . information.optimal_bound, optimal_bound_limit
How good samples are, by features of them and of real examples
    mean and covariance of a stream, in float64 ............ metrics.moments, Moments
    ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^1/2) ...... metrics.frechet_distance, frechet_distance_extrapolated
    E k(x, x') + E k(y, y') - 2 E k(x, y), unbiased ........ metrics.kernel_distance
    k-nearest-neighbour precision and recall ............... metrics.precision_recall

Kernels take ONE example of any shape and scalar levels (`jax.vmap` makes batches) and return a `gaussian.Normal`;
bounds, losses and samplers take a batch and a denoiser, `denoiser(x_t, level) -> prediction` (`types.Denoiser`).
Randomness comes in as a key. `vdm_jax.networks` has Flax networks to put in the denoiser's place, `vdm_jax.training`
trains them, and `vdm_jax.interop` reads and writes the weights of diffusers' U-Nets.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdm_jax import (
        autoencoder,
        closed_form,
        closures,
        compilation,
        dequantization,
        discrete_schedules,
        divergence,
        elbo,
        energy,
        forward,
        gaussian,
        guidance,
        hvae,
        information,
        interop,
        langevin,
        likelihoods,
        linear_gaussian,
        losses,
        metrics,
        models,
        networks,
        noise_levels,
        parameterization,
        path_bounds,
        probability_flow,
        reverse_variance,
        samplers,
        schedules,
        score_matching,
        sure,
        time_sampling,
        training,
        tweedie,
        types,
        vae,
        vdm,
        weightings,
    )

__version__ = "0.1.0"

# Modules are imported on first use: `import vdm_jax; vdm_jax.elbo.bound`.
__all__ = [
    "autoencoder",
    "closed_form",
    "closures",
    "compilation",
    "dequantization",
    "discrete_schedules",
    "divergence",
    "elbo",
    "energy",
    "forward",
    "gaussian",
    "guidance",
    "hvae",
    "information",
    "interop",
    "langevin",
    "likelihoods",
    "linear_gaussian",
    "losses",
    "metrics",
    "models",
    "networks",
    "noise_levels",
    "parameterization",
    "path_bounds",
    "probability_flow",
    "reverse_variance",
    "samplers",
    "schedules",
    "score_matching",
    "sure",
    "time_sampling",
    "training",
    "tweedie",
    "types",
    "vae",
    "vdm",
    "weightings",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"vdm_jax.{name}")
    raise AttributeError(f"module 'vdm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
