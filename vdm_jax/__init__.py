"""Diffusion models as variational inference, in JAX: each equation is implemented as a pure, tested function.

Index: each line gives an equation and the function that computes it. Labels in parentheses refer to the entries of
`docs/derivations.md`, which lists the tests of each.

Noise levels and schedules (FWD-6, FWD-7)
    alpha, sigma, log-SNR at time t ........................ noise_levels.NoiseLevel, level_from_log_snr
    a step from t to s < t and its drop in log-SNR ......... noise_levels.Step, step_from_log_snr
    broadcast a level over a batch ......................... noise_levels.broadcast_to_batch
    check that signal or noise is positive ................. noise_levels.check_positive
    continuous schedules, t in [0, 1] ...................... schedules.LinearBeta, Cosine, Sigmoid, LinearLogSNR,
                                                             VarianceExploding, ContinuousSchedule
    learned noise schedule ................................. schedules.LearnedSchedule
    inverse of a schedule: t from log-SNR .................. schedules.time_from_log_snr
    check that a schedule has noise at t_0 ................. schedules.check_noise_at_start
    discrete schedules, t = 0..T ........................... discrete_schedules.TabulatedSchedule, linear_betas
    discretize a continuous schedule into T steps .......... discrete_schedules.discretize, DiscretizedSchedule
    interpolate a discrete schedule ........................ discrete_schedules.InterpolatedSchedule
    conversion from and to beta or gamma ................... discrete_schedules.from_betas, from_standard_deviations,
                                                             from_gammas, to_betas, to_standard_deviations, to_gammas
    fewer sampling steps (timestep spacing) ................ discrete_schedules.uniform_steps, log_snr_uniform_steps,
                                                             karras_steps
The normal distribution (ELBO-6, VAE-4, VAE-5)
    N(mean, var): sample, log-density, KL divergence ....... gaussian.Normal, kl, variance_kl
    N(0, I); check of a prior p(x_T) ....................... gaussian.STANDARD_NORMAL, check_prior
Autoencoders (AE-1 .. AE-3)
    ||x - Dec(Enc(x))||^2 .................................. autoencoder.reconstruction_error
    denoising autoencoder .................................. autoencoder.denoising_reconstruction_error
    distance to the nearest training example ............... autoencoder.nearest_distance
    PCA, the optimal linear autoencoder .................... linear_gaussian.PrincipalComponents, principal_components
Variational autoencoders (VAE-1 .. VAE-12)
    negative ELBO: -E log p(x|z) + KL(q(z|x) || p(z)) ...... vae.bound, VAEBound
    reconstruction and KL terms ............................ vae.reconstruction_nll, output_nll, kl_to_prior,
                                                             kl_monte_carlo
    q(z|x) of an encoder, checked .......................... vae.encode, check_posterior
    reparameterization z = mu + sigma eps .................. vae.reparameterized_sample
    score-function (REINFORCE) gradient .................... vae.reinforce_surrogate
    importance-weighted bound (IWAE) ....................... vae.importance_weighted_bound, importance_weighted_average
    ELBO surgery: KL = I(x; z) + KL(q(z) || p(z)) .......... vae.kl_decomposition, aggregated_posterior_log_prob
    optimal decoder mean E_q(x|z)[x], blur ................. vae.optimal_mean_decoder
    variational EM ......................................... vae.variational_em,
                                                             linear_gaussian.maximum_likelihood_decoder
    probabilistic PCA, linear VAE .......................... linear_gaussian.probabilistic_pca, LinearGaussianModel
Hierarchical VAEs (HVAE-1 .. HVAE-5)
    top-down (ladder) and bottom-up inference .............. hvae.top_down, bottom_up, Hierarchy
    negative ELBO with one KL term per latent layer ........ hvae.bound, HierarchicalBound
    importance-weighted bound .............................. hvae.importance_weighted_bound
    free bits, KL annealing ................................ hvae.free_bits_objective, kl_warm_up
    posterior collapse: KL, active units, information ...... hvae.collapse_diagnostics
    sampling ............................................... hvae.sample, sample_decoder_output
    reconstruction from the upper layers ................... hvae.reconstruct
Forward process (FWD-1 .. FWD-5)
    marginal q(x_t | x_0) .................................. forward.marginal
    noisy example x_t = alpha x_0 + sigma eps .............. forward.add_noise
    transition q(x_t | x_s) ................................ forward.transition
Posterior of the forward process (POST-1 .. POST-6, POST-8)
    q(x_s | x_t, x_0) ...................................... forward.posterior, posterior_variance
    as a function of eps, of the score, as coefficients .... forward.posterior_from_eps, posterior_from_score,
                                                             posterior_coefficients
    bridge q(x_s | x_r, x_t), r < s < t .................... forward.bridge
Parameterizations of the network output (PAR-1, PAR-2)
    training target of x_0, eps, v or score prediction ..... parameterization.prediction_target
    conversion x_0 <-> eps <-> v <-> score ................. parameterization.convert, to_x_0, to_eps, to_v, to_score
    score function of a denoiser at a level ................ parameterization.ScoreFromDenoiser
    network that takes a timestep 0..T-1 ................... parameterization.from_timesteps
Decoders p(x|z_0) and quantized data (ELBO-5)
    discretized Gaussian (Ho et al.) ....................... likelihoods.DiscretizedGaussian
    categorical (Kingma et al., VDM-2) ..................... likelihoods.Categorical
    Bernoulli, mixture of discretized logistics ............ likelihoods.Bernoulli, DiscretizedLogisticMixture
    log-probability of an interval under N(0, 1) ........... likelihoods.log_interval_probability
    integers 0..levels-1 <-> [-1, 1] ....................... likelihoods.normalize, denormalize
    check that x is on the grid of values .................. likelihoods.on_grid
    checked log p(x) of a returned distribution ............ likelihoods.evaluate_log_prob
Variational bound of diffusion models (ELBO-1 .. ELBO-10, ELBO-12, ELBO-13)
    negative ELBO with T steps ............................. elbo.bound, DiffusionBound, assemble_bound
    negative ELBO in continuous time, T -> infinity ........ elbo.continuous_bound
    prior term KL(q(x_T | x_0) || p(x_T)) .................. elbo.prior_kl
    reconstruction term -E log p(x_0 | x_1) ................ elbo.reconstruction_nll, decoder_log_prob
    diffusion term KL(q(x_s | x_t, x_0) || p(x_s | x_t)) ... elbo.diffusion_kl, denoising_error
    weights of the diffusion term, discrete, continuous .... elbo.diffusion_weight, continuous_diffusion_weight
    diffusion term by log-SNR .............................. elbo.diffusion_curve
    bits per dimension ..................................... elbo.bits_per_dim
    consistency terms along whole paths .................... path_bounds.consistency_bound
    log p(x_0:T) / q(x_1:T | x_0) of a path ................ path_bounds.joint_log_ratio
Training losses (ELBO-10, ELBO-11, SAM-1)
    L_simple, weighted denoising loss, DDPM loss ........... losses.simple_loss, denoising_loss, ddpm_loss
    VDM loss with a learned schedule (VDM-1) ............... vdm.vdm_loss
Time sampling (TIME-1 .. TIME-3)
    independent, low-discrepancy, antithetic times ......... time_sampling.independent_times, low_discrepancy_times,
                                                             antithetic_times, sample_times
    discrete timesteps ..................................... time_sampling.to_timesteps, sample_timesteps
    importance sampling of timesteps ....................... time_sampling.importance_sample, LossSecondMomentSampler,
                                                             timestep_proposal, geometric_variance_proposal
Loss weightings (WEIGHT-1, WEIGHT-2)
    1/2 int w(lambda) E ||eps - eps_hat||^2 dlambda ........ weightings.weighted_bound
    weightings of the literature ........................... weightings.likelihood, cosine, v_prediction, edm, p2,
                                                             min_snr, sigmoid, uniform_in_time
    monotonic weighting as a mixture of ELBOs .............. weightings.as_elbo_mixture
Variance of the reverse process (VAR-1 .. VAR-4)
    learned reverse variance (improved DDPM) ............... reverse_variance.interpolated_variance, variance_fraction,
                                                             evaluate_variance, split_learned_range
    its KL and bound ....................................... reverse_variance.reverse_step_kl, learned_variance_bound
    L_vlb, L_hybrid ........................................ reverse_variance.vlb_loss, hybrid_loss
    optimal variance (Analytic-DPM) and its bounds ......... reverse_variance.optimal_variance, analytic_dpm_variance,
                                                             eps_second_moment, variance_bounds
Energy-based models (EBM-1 .. EBM-4)
    log p = -E - log Z, partition function ................. energy.log_density, log_partition
    score -grad E; log p from a score by a line integral ... energy.score, line_integral
    contrastive divergence ................................. energy.contrastive_divergence, ContrastiveDivergence
Score matching (SM-1 .. SM-5)
    explicit: 1/2 ||s - grad log p||^2 ..................... score_matching.explicit
    implicit: 1/2 ||s||^2 + div s; sliced .................. score_matching.implicit, sliced, finite_difference
    denoising score matching ............................... score_matching.denoising, denoising_at_level
    divergence of a field; Hutchinson trace estimator ...... divergence.value_and_divergence, hutchinson_probes,
                                                             check_trace
Langevin dynamics (LAN-1 .. LAN-3)
    x + eta grad log p + sqrt(2 eta) xi: ULA ............... langevin.ula, langevin_kernel
    Metropolis-adjusted Langevin algorithm (MALA) .......... langevin.mala
    annealed Langevin dynamics ............................. langevin.annealed_langevin, check_decreasing_noise
    corrector of predictor-corrector sampling .............. langevin.langevin_corrector
Tweedie's formula (TW-1 .. TW-3)
    E[x_0 | x_t] from the score ............................ tweedie.posterior_mean
    Cov[x_0 | x_t] from the score and its Jacobian ......... tweedie.posterior_covariance, posterior_variance,
                                                             covariance_operator
    cumulants in exponential families ...................... tweedie.cumulants, normal_base, poisson_base, gamma_base
Stein's unbiased risk estimate (SURE-1 .. SURE-3)
    ||D(y) - y||^2 - D sigma^2 + 2 sigma^2 div D ........... sure.sure
    SureShrink: soft thresholding .......................... sure.soft_threshold, sure_threshold
Sampling (SAM-2 .. SAM-4)
    ancestral sampling (DDPM), learned variance ............ samplers.ancestral, ancestral_learned
    DDIM, DDIM inversion ................................... samplers.ddim, ddim_inverse
    probability-flow ODE: Euler, Heun (EDM), adaptive ...... samplers.euler, heun, adaptive
    DPM-Solver++(2M) for the ODE, for the SDE .............. samplers.dpmpp_2m, dpmpp_2m_sde
    predictor-corrector .................................... samplers.predictor_corrector
    inpainting by RePaint .................................. samplers.repaint
    twisted sequential Monte Carlo, its resampling ......... samplers.twisted_smc, systematic_resampling
Guidance and conditional generation
    classifier-free guidance, classifier guidance .......... guidance.ClassifierFreeGuidance, ClassifierGuidance
    inverse problems: reconstruction guidance (PiGDM) ...... guidance.ReconstructionGuidance, LinearMeasurement
    exact p(x_0 | y) of any likelihood, many particles ..... samplers.twisted_smc
Likelihood evaluation (LIK-1 .. LIK-5)
    importance-weighted bound over paths ................... path_bounds.importance_weighted_bound
    log-likelihood by the probability-flow ODE ............. probability_flow.log_likelihood, drift
    sampling by the probability-flow ODE, with log-density . probability_flow.sample, sample_with_log_prob
    latents of the ODE, interpolation through them ......... probability_flow.encode, interpolate,
                                                             spherical_interpolation
    check that the ODE is nonsingular ...................... probability_flow.check_nonsingular
    uniform, variational, truncated dequantization ......... dequantization.dequantized_bound, Uniform, TruncatedNormal
    P(x) with the latent z_0 as dequantization ............. dequantization.latent_dequantization_bound
Distributions with closed-form answers (POST-7, PAR-3)
    normal, mixture, data set, independent pixels .......... closed_form.gaussian, low_rank, mixture, empirical,
                                                             independent_pixels
    q(x_t), q(x_s | x_t) of the data distribution .......... closed_form.marginal, reverse_transition
    p(y), p(x_0 | y) of a noisy linear measurement ......... closed_form.linear_measurement, linear_posterior
    optimal denoiser E[target | x_t], optimal decoder ...... closed_form.optimal_prediction, OptimalDenoiser,
                                                             OptimalDecoder
    expectations with their errors ......................... information.quadrature, monte_carlo
    entropy, mutual information, MMSE (I-MMSE) ............. information.entropy, mutual_information, mmse
    bound of the optimal model, T steps, T -> infinity ..... information.optimal_bound, optimal_bound_limit
Sample quality
    mean and covariance of a stream of features ............ metrics.moments, Moments
    Fréchet distance (FID with Inception features) ......... metrics.frechet_distance, frechet_distance_extrapolated
    kernel distance (MMD, KID) ............................. metrics.kernel_distance
    precision and recall ................................... metrics.precision_recall

Functions of distributions and levels act on ONE example of any shape and scalar levels, and return a `gaussian.Normal`;
use `jax.vmap` for batches. Bounds, losses and samplers take a batch and a denoiser (`types.Denoiser`),
`denoiser(x_t, level) -> prediction`. Random functions take a key. `vdm_jax.networks` has Flax networks to use as
denoisers, `vdm_jax.models` combines networks and equations, `vdm_jax.training` trains them, and `vdm_jax.interop`
imports and exports the weights of diffusers' U-Nets.
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
