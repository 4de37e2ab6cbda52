"""Distributions with closed-form answers: exact noisy marginals, scores, denoisers and reverse transitions.

`Gaussian`, `Mixture`, `Empirical` (a set of points) and `Independent` (a scalar distribution for every pixel) are
closed under the two operations that a diffusion model consists of, at any noise level of any schedule:

    distribution.pushforward(a, b, var)     the distribution of  a x + b + sqrt(var) eps
    distribution.posterior(x_t, level)      the distribution of  x_0 given x_t              (conjugacy)

Everything else follows. The marginal q(x_t) is a pushforward, and the optimal denoiser is the mean of the posterior.
The reverse transition q(x_s | x_t), *not* conditioned on x_0, is a pushforward of the posterior, because the mean of
q(x_s | x_t, x_0) is affine in x_0. `OptimalDenoiser` takes the place of a network. `linear_posterior` conditions on a
noisy linear measurement of x_0. Expectations (entropy, MMSE, the bound of the optimal model) are in
`vdm_jax.information`.

Distributions are pytrees of arrays over one example of shape (*x) with D entries; matrices have shape (D, D), for the
flattened example. `gaussian`, `low_rank`, `mixture`, `empirical` and `independent_pixels` create them, computing in
float64 on the host. Use float64 (`jax.enable_x64`) for accurate results at high signal-to-noise ratios, where posterior
quantities are ill-conditioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from vdm_jax import forward
from vdm_jax.gaussian import LOG_2PI, _root
from vdm_jax.likelihoods import normalize
from vdm_jax.noise_levels import NoiseLevel, Step
from vdm_jax.types import (
    Batch,
    Key,
    PredictionType,
    Real,
    Scalar,
    X,
    check_positive_scalar,
    check_scalar,
    unknown_prediction_type,
)

__all__ = [
    "Distribution",
    "Empirical",
    "Gaussian",
    "Independent",
    "Mixture",
    "OptimalDecoder",
    "OptimalDenoiser",
    "empirical",
    "gaussian",
    "independent_pixels",
    "linear_measurement",
    "linear_posterior",
    "low_rank",
    "marginal",
    "matmul",
    "mixture",
    "optimal_prediction",
    "reverse_transition",
]

_ArrayLike = ArrayLike | Sequence[Any]
_Matrix = Float[Array, "D D"]
_Operator = Float[Array, "M D"]
_Weights = Float[Array, " K"]
_Stacked = Float[Array, "K *v"]  # a value of any shape for every component
_Value = Float[Array, "*v"]
matmul = partial(jnp.matmul, precision="highest")  # relative errors of the default: 1e-3 on GPUs, 1e-2 on TPUs


@runtime_checkable
class Distribution(Protocol):
    """A distribution of one example, shape (*x), closed under affine maps with noise and under conditioning."""

    @property
    def mean(self) -> X: ...

    @property
    def variance(self) -> X: ...

    def covariance(self) -> _Matrix: ...

    def sample(self, key: Key) -> X: ...

    def log_prob(self, x: X) -> Scalar: ...

    def pushforward(self, scale: Real, shift: X, var: Real) -> Any: ...

    def posterior(self, x_t: X, level: NoiseLevel) -> Any: ...


class Gaussian(NamedTuple):
    """N(mean, Sigma) with Sigma = B diag(variances) B^T + residual_variance (I - B B^T), full or low rank.

    Fields:
        mean: shape (*x).
        basis: B, orthonormal columns, shape (D, R), R <= D.
        variances: the eigenvalues along the columns, shape (R,).
        residual_variance: the eigenvalue of the other D - R directions, a scalar; ignored if R = D.
    """

    mean: X
    basis: Float[Array, "D R"]
    variances: Float[Array, " R"]
    residual_variance: Scalar

    @property
    def variance(self) -> X:
        """The diagonal of Sigma, shape (*x)."""
        inside = jnp.square(self.basis)
        return (matmul(inside, self.variances) + self._outside * (1.0 - inside.sum(-1))).reshape(self.mean.shape)

    def covariance(self) -> _Matrix:
        """Sigma."""
        return self._matrix(self.variances, self.residual_variance)

    def sample(self, key: Key) -> X:
        """A sample, shape (*x)."""
        return self.reparameterize(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def reparameterize(self, z: X) -> X:
        """mean + Sigma^(1/2) z: the sample from standard normal noise z, shape (*x)."""
        return self.mean + self._apply(_root(self.variances), _root(self.residual_variance), z)

    def log_prob(self, x: X) -> Scalar:
        """log N(x; mean, Sigma) in nats; needs positive eigenvalues."""
        inside, outside = self._split(x - self.mean)
        squares = jnp.sum(inside**2 / self.variances) + jnp.sum(jnp.log(self.variances))
        if outside is not None:
            squares += jnp.sum(outside**2) / self.residual_variance + (x.size - inside.size) * jnp.log(
                self.residual_variance
            )
        return -0.5 * (squares + x.size * LOG_2PI)

    def score(self, x: X) -> X:
        """grad log N(x; mean, Sigma) = -Sigma^-1 (x - mean)."""
        return -self._apply(1.0 / self.variances, 1.0 / self.residual_variance, x - self.mean)

    def score_jacobian(self, x: X) -> _Matrix:
        """The Hessian of log N: -Sigma^-1 for every x."""
        del x
        return -self._matrix(1.0 / self.variances, 1.0 / self.residual_variance)

    def entropy(self) -> Scalar:
        """-E log N in nats."""
        outside = self._outside_count * jnp.log(jnp.where(self._outside_count > 0, self.residual_variance, 1.0))
        return 0.5 * (jnp.sum(jnp.log(self.variances)) + outside + self.mean.size * (1.0 + LOG_2PI))

    def pushforward(self, scale: Real, shift: X, var: Real) -> "Gaussian":
        """The distribution of scale x + shift + sqrt(var) eps: N(scale mean + shift, scale^2 Sigma + var I)."""
        variances = scale**2 * self.variances + var, scale**2 * self.residual_variance + var
        return Gaussian(scale * self.mean + shift, self.basis, *variances)

    def posterior(self, x_t: X, level: NoiseLevel) -> "Gaussian":
        """p(x_0 | x_t) for x_t = alpha x_0 + sigma eps, the regression of x_0 on x_t. Needs sigma > 0.

        N( mean + alpha Sigma M^-1 (x_t - alpha mean),  sigma^2 Sigma M^-1 ),   M = alpha^2 Sigma + sigma^2 I
        """
        alpha, noise = level.alpha, level.sigma**2
        shrunk, residual = (v / (alpha**2 * v + noise) for v in (self.variances, self.residual_variance))
        mean = self.mean + alpha * self._apply(shrunk, residual, x_t - alpha * self.mean)
        return Gaussian(mean, self.basis, noise * shrunk, noise * residual)

    @property
    def _outside_count(self) -> int:
        return self.basis.shape[0] - self.basis.shape[1]

    @property
    def _outside(self) -> Scalar:
        return self.residual_variance if self._outside_count else jnp.zeros_like(self.residual_variance)

    def _split(self, y: X):
        """Coordinates of y in the basis, shape (R,), and the residual, shape (D,), or None if the basis is complete.

        A complete basis would leave rounding errors as the residual, which division by a small variance would amplify.
        """
        y = y.reshape(-1)
        inside = matmul(self.basis.T, y)
        return inside, y - matmul(self.basis, inside) if self._outside_count else None

    def _apply(self, inside: Float[Array, " R"], outside: Scalar, y: X) -> X:
        """f(Sigma) y, given f of the eigenvalues."""
        within, without = self._split(y)
        result = matmul(self.basis, inside * within)
        return (result if without is None else result + outside * without).reshape(y.shape)

    def _matrix(self, inside: Float[Array, " R"], outside: Scalar) -> _Matrix:
        matrix = matmul(self.basis * inside[None, :], self.basis.T)
        if not self._outside_count:
            return matrix
        return matrix + outside * (jnp.eye(self.basis.shape[0], dtype=matrix.dtype) - matmul(self.basis, self.basis.T))


class Mixture(NamedTuple):
    """sum_k w_k N(m_k, Sigma_k).

    Fields:
        log_weights: log w_k, shape (K,), which sum to 1.
        components: a `Gaussian` whose fields have a leading axis K.
    """

    log_weights: _Weights
    components: Gaussian

    @property
    def mean(self) -> X:
        """E x, shape (*x)."""
        return _average(self.log_weights, self.components.mean)

    @property
    def variance(self) -> X:
        """Var x of every entry, shape (*x)."""
        between = jax.vmap(lambda m: jnp.square(m - self.mean))(self.components.mean)
        return _average(self.log_weights, _map_components(lambda c: c.variance, self.components) + between)

    def covariance(self) -> _Matrix:
        """Cov x, within and between the components."""
        within = _average(self.log_weights, _map_components(Gaussian.covariance, self.components))
        return within + _scatter(self.log_weights, self.components.mean, self.mean)

    def sample(self, key: Key) -> X:
        """A sample, shape (*x)."""
        key_k, key_x = jax.random.split(key)
        k = jax.random.categorical(key_k, self.log_weights)
        return jax.tree.map(lambda leaf: leaf[k], self.components).sample(key_x)

    def log_prob(self, x: X) -> Scalar:
        """The log-density in nats."""
        return jax.nn.logsumexp(self._log_terms(x))

    def score(self, x: X) -> X:
        """grad log p(x): the components' scores, averaged with their posterior weights given x."""
        return _average(jax.nn.log_softmax(self._log_terms(x)), _map_components(lambda c: c.score(x), self.components))

    def score_jacobian(self, x: X) -> _Matrix:
        """The Hessian of log p: the mean of the components' Hessians plus the scatter of their scores."""
        weights = jax.nn.log_softmax(self._log_terms(x))
        scores = _map_components(lambda c: c.score(x), self.components)
        within = _average(weights, _map_components(lambda c: c.score_jacobian(x), self.components))
        return within + _scatter(weights, scores, _average(weights, scores))

    def pushforward(self, scale: Real, shift: X, var: Real) -> "Mixture":
        """The distribution of scale x + shift + sqrt(var) eps."""
        return Mixture(self.log_weights, _map_components(lambda c: c.pushforward(scale, shift, var), self.components))

    def posterior(self, x_t: X, level: NoiseLevel) -> "Mixture":
        """p(x_0 | x_t): a mixture of the components' posteriors. Needs sigma > 0."""
        weights = jax.nn.log_softmax(marginal(self, level)._log_terms(x_t))
        return Mixture(weights, _map_components(lambda c: c.posterior(x_t, level), self.components))

    def _log_terms(self, x: X) -> _Weights:
        return self.log_weights + _map_components(lambda c: c.log_prob(x), self.components)


class Empirical(NamedTuple):
    """Finitely many points x_i with probabilities w_i: the empirical distribution of a data set, such as 8-bit images.

    Fields:
        log_weights: log w_i, shape (K,), which sum to 1.
        points: x_i, shape (K, *x).
    """

    log_weights: _Weights
    points: _Stacked

    @property
    def mean(self) -> X:
        """E x, shape (*x)."""
        return _average(self.log_weights, self.points)

    @property
    def variance(self) -> X:
        """Var x of every entry, shape (*x)."""
        return _average(self.log_weights, jax.vmap(lambda x: jnp.square(x - self.mean))(self.points))

    def covariance(self) -> _Matrix:
        """Cov x."""
        return _scatter(self.log_weights, self.points, self.mean)

    def sample(self, key: Key) -> X:
        """One of the points."""
        return self.points[jax.random.categorical(key, self.log_weights)]

    def log_prob(self, x: X) -> Scalar:
        """The log-*probability* of x in nats: -inf unless x equals one of the points exactly."""
        same = jax.vmap(lambda point: jnp.all(point == x))(self.points)
        return jax.nn.logsumexp(jnp.where(same, self.log_weights, -jnp.inf))

    def entropy(self) -> Scalar:
        """-E log P in nats, for distinct points."""
        weights = jnp.exp(self.log_weights)
        return -jnp.sum(weights * jnp.where(weights > 0.0, self.log_weights, 0.0))

    def pushforward(self, scale: Real, shift: X, var: Real) -> Mixture:
        """The distribution of scale x + shift + sqrt(var) eps: a mixture with one component for each point."""
        count, dims = self.points.shape[0], self.points[0].size
        dtype = self.points.dtype
        empty = jnp.zeros((count, dims, 0), dtype), jnp.zeros((count, 0), dtype)
        variances = jnp.broadcast_to(jnp.asarray(var, dtype), (count,))
        centers = jax.vmap(lambda point: scale * point + shift)(self.points)
        return Mixture(self.log_weights, Gaussian(centers, *empty, variances))

    def posterior(self, x_t: X, level: NoiseLevel) -> "Empirical":
        """p(x_0 | x_t): the same points with posterior weights. Needs sigma > 0."""
        return Empirical(jax.nn.log_softmax(marginal(self, level)._log_terms(x_t)), self.points)


class Independent(NamedTuple):
    """Independent entries: images of any size with an exact denoiser.

    Fields:
        distribution: a distribution of a scalar, whose fields have leading axes (*x).
    """

    distribution: Any

    @property
    def mean(self) -> X:
        """E x, shape (*x)."""
        return self.map_entries(lambda distribution: distribution.mean)

    @property
    def variance(self) -> X:
        """Var x of every entry, shape (*x)."""
        return self.map_entries(lambda distribution: distribution.variance)

    def covariance(self) -> _Matrix:
        """Cov x, diagonal."""
        return jnp.diag(self.variance.reshape(-1))

    def sample(self, key: Key) -> X:
        """A sample, shape (*x)."""
        shape = self._shape
        keys = jax.random.split(key, shape) if shape else key
        return self.map_entries(lambda distribution, k: distribution.sample(k), keys)

    def log_prob(self, x: X) -> Scalar:
        """The sum of the entries' log-densities, or log-probabilities, in nats."""
        return jnp.sum(self.map_entries(lambda distribution, value: distribution.log_prob(value), x))

    def score(self, x: X) -> X:
        """grad log p(x), shape (*x)."""
        return self.map_entries(lambda distribution, value: distribution.score(value), x)

    def score_jacobian(self, x: X) -> _Matrix:
        """The Hessian of log p, diagonal."""
        return jnp.diag(
            self.map_entries(lambda distribution, value: distribution.score_jacobian(value)[0, 0], x).reshape(-1)
        )

    def pushforward(self, scale: Real, shift: X, var: Real) -> "Independent":
        """The distribution of scale x + shift + sqrt(var) eps."""
        shift = jnp.broadcast_to(jnp.asarray(shift, self.mean.dtype), self._shape)
        return Independent(
            self.map_entries(lambda distribution, value: distribution.pushforward(scale, value, var), shift)
        )

    def posterior(self, x_t: X, level: NoiseLevel) -> "Independent":
        """p(x_0 | x_t), independent for every entry. Needs sigma > 0."""
        return Independent(self.map_entries(lambda distribution, value: distribution.posterior(value, level), x_t))

    def map_entries(self, function, *arrays):
        """`function(scalar distribution, *scalars)` for every entry of the example, as an array of shape (*x)."""
        for _ in self._shape:
            function = jax.vmap(function)
        return function(self.distribution, *arrays)

    @property
    def _shape(self) -> tuple[int, ...]:
        if isinstance(self.distribution, Gaussian):
            return self.distribution.residual_variance.shape
        return self.distribution.log_weights.shape[:-1]


def gaussian(mean: _ArrayLike, covariance: _ArrayLike) -> Gaussian:
    """N(mean, covariance).

    Args:
        mean: shape (*x).
        covariance: symmetric and positive semi-definite, shape (D, D), for the flattened example.

    Raises:
        ValueError: the covariance has another shape, is not symmetric, or has a negative eigenvalue.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if covariance.shape != (mean.size, mean.size) or not np.allclose(covariance, covariance.T):
        raise ValueError(f"covariance has shape {covariance.shape}: it must be symmetric, of shape {(mean.size,) * 2}")
    variances, basis = np.linalg.eigh(covariance)
    if variances.min() < -1e-10 * variances.max():
        raise ValueError(f"covariance has the eigenvalue {variances.min():g}: it must be positive semi-definite")
    return Gaussian(*_arrays(mean, basis, np.maximum(variances, 0.0), 0.0))


def low_rank(mean: _ArrayLike, factor: _ArrayLike, residual_variance: float = 0.0) -> Gaussian:
    """N(mean, F F^T + residual_variance I): data near an R-dimensional subspace, as in probabilistic PCA.

    Args:
        mean: shape (*x).
        factor: F, shape (D, R), R <= D.
        residual_variance: variance added in every direction, at least 0.

    Raises:
        ValueError: a factor of another shape, or a negative residual_variance.

    Source: Tipping & Bishop 1999.
    """
    mean, factor = np.asarray(mean, np.float64), np.asarray(factor, np.float64)
    if factor.ndim != 2 or factor.shape[0] != mean.size or factor.shape[1] > mean.size:
        raise ValueError(f"factor has shape {factor.shape}: it must be ({mean.size}, R) with R <= {mean.size}")
    if residual_variance < 0:
        raise ValueError(f"residual_variance is {residual_variance}: it must be at least 0")
    basis, scales, _ = np.linalg.svd(factor, full_matrices=False)
    return Gaussian(*_arrays(mean, basis, scales**2 + residual_variance, residual_variance))


def mixture(weights: _ArrayLike, means: _ArrayLike, covariances: _ArrayLike) -> Mixture:
    """sum_k w_k N(m_k, Sigma_k).

    Args:
        weights: w_k, shape (K,), positive; they need not sum to 1.
        means: m_k, shape (K, *x).
        covariances: Sigma_k, shape (K, D, D), or variances of Sigma_k = v_k I, shape (K,).

    Raises:
        ValueError: shapes that do not match, a weight that is not positive, or as `gaussian`.
    """
    means, covariances = np.asarray(means, np.float64), np.asarray(covariances, np.float64)
    log_weights = _log_weights(weights, means.shape[0])
    if covariances.shape[:1] != means.shape[:1]:
        raise ValueError(f"covariances has shape {covariances.shape}: pass one for each of {means.shape[0]} means")
    if covariances.ndim == 1:
        covariances = covariances[:, None, None] * np.eye(means[0].size)
    components = [gaussian(m, c) for m, c in zip(means, covariances, strict=True)]
    return Mixture(log_weights, jax.tree.map(lambda *leaves: jnp.stack(leaves), *components))


def empirical(points: _ArrayLike, weights: _ArrayLike | None = None) -> Empirical:
    """The empirical distribution of a data set: weighted points, by default with equal weights.

    Args:
        points: shape (K, *x); 8-bit images as `likelihoods.normalize(images, 256)`.
        weights: shape (K,), positive; they need not sum to 1.

    Raises:
        ValueError: the number of weights differs from the number of points, or a weight is not positive.
    """
    (array,) = _arrays(points)
    return Empirical(_log_weights(np.ones(array.shape[0]) if weights is None else weights, array.shape[0]), array)


def independent_pixels(masses: _ArrayLike) -> Independent:
    """Independent quantized pixels: a categorical distribution over 0..levels-1 for each pixel.

    Args:
        masses: shape (*x, levels), nonnegative; those of a pixel need not sum to 1. The values are evenly spaced on
            [-1, 1], as in `likelihoods.normalize`.

    Raises:
        ValueError: fewer than two levels, or masses that are negative or all 0.
    """
    masses = np.asarray(masses, np.float64)
    if masses.ndim == 0 or masses.shape[-1] < 2 or np.any(masses < 0) or not np.all(masses.sum(-1) > 0):
        raise ValueError(
            f"masses has shape {masses.shape}: it must be (*x, levels), nonnegative, of positive sum for every pixel"
        )
    with np.errstate(divide="ignore"):
        (log_weights,) = _arrays(np.log(masses / masses.sum(-1, keepdims=True)))
    values = normalize(jnp.arange(masses.shape[-1]), masses.shape[-1])
    return Independent(Empirical(log_weights, jnp.broadcast_to(values, log_weights.shape)))


def marginal(distribution: Distribution, level: NoiseLevel) -> Any:
    """q(x_t), the distribution of alpha x_0 + sigma eps for x_0 ~ q(x_0) (FWD-2).

    Args:
        distribution: of x_0.
        level: scalars.

    Returns:
        A distribution with a density (for sigma > 0): `sample`, `log_prob`, `score`, `score_jacobian`.
    """
    return distribution.pushforward(level.alpha, jnp.zeros_like(distribution.mean), level.sigma**2)


def reverse_transition(distribution: Distribution, x_t: X, step: Step) -> Any:
    """q(x_s | x_t), the reverse transition that is *not* conditioned on x_0 (POST-7).

        x_s = c_1 x_t + c_2 x_0 + sigma eps  with  x_0 ~ p(x_0 | x_t)

    A Gaussian for Gaussian data, otherwise a mixture: close to normal for small steps, multimodal for large ones.

    Args:
        distribution: of x_0.
        x_t: noisy example, shape (*x).
        step: the levels s < t, scalars, with noise at s.

    Source: Sohl-Dickstein et al. 2015, arXiv:1503.03585 (why the step must be small).
    """
    c_1, c_2, sigma = forward.posterior_coefficients(step)
    return distribution.posterior(x_t, step.t).pushforward(c_2, c_1 * x_t, sigma**2)


def linear_measurement(distribution: Distribution, operator: Any, noise_variance: ArrayLike) -> Any:
    """p(y) of a noisy linear measurement y = A x_0 + sqrt(noise_variance) eps; its `log_prob` is the evidence of y.

        N(A mean, A Sigma A^T + noise_variance I)    for every component of Gaussian or mixture data

    Args:
        distribution: of x_0; a `Gaussian`, a `Mixture` or an `Empirical`.
        operator: A, a matrix of shape (M, D), or a linear map of batches (B, *x) -> (B, *y), as in
            `guidance.ReconstructionGuidance`.
        noise_variance: a positive scalar.

    Returns:
        A distribution of y, shape (*y), or (M,) for a matrix: a Gaussian, or a mixture.

    Raises:
        ValueError: a matrix of another shape, or a noise_variance that is not one positive number.
        TypeError: another kind of distribution, such as `Independent`.
    """
    matrix, shape = _operator_matrix(distribution, operator)
    noise_variance = _checked_noise(noise_variance, matrix)
    match distribution:
        case Gaussian():
            return _gaussian_measurement(distribution, matrix, shape, noise_variance)
        case Mixture(log_weights, components):
            return Mixture(
                log_weights,
                _map_components(lambda c: _gaussian_measurement(c, matrix, shape, noise_variance), components),
            )
        case Empirical(log_weights, points):
            clean = jax.vmap(lambda point: matmul(matrix, point.reshape(-1)).reshape(shape))(points)
            return Empirical(log_weights, clean).pushforward(
                jnp.ones((), clean.dtype), jnp.zeros(shape, clean.dtype), noise_variance
            )
    raise _no_linear_measurement(distribution)


def linear_posterior(distribution: Distribution, operator: Any, y: ArrayLike, noise_variance: ArrayLike) -> Any:
    """The exact p(x_0 | y) of a noisy linear measurement y = A x_0 + sqrt(noise_variance) eps (conjugacy).

        Gaussian     N( mean + Sigma A^T S^-1 (y - A mean),  Sigma - Sigma A^T S^-1 A Sigma ),
                     S = A Sigma A^T + noise_variance I
        Mixture      each component's posterior; its weight times its evidence N(y; A m_k, S_k)
        Empirical    the same points; their weights times N(y; A x_i, noise_variance I)

    `OptimalDenoiser(linear_posterior(...))` is the denoiser that a guided one approximates, and `linear_measurement`
    has the evidence p(y). The posterior of a Gaussian has a full basis and costs O(D^3). It is differentiable in y, but
    not in the operator and Sigma.

    Args:
        distribution: of x_0; a `Gaussian`, a `Mixture` or an `Empirical`.
        operator: A, a matrix of shape (M, D), or a linear map of batches (B, *x) -> (B, *y), as in
            `guidance.ReconstructionGuidance`.
        y: one measurement, shape (*y), or (M,) for a matrix.
        noise_variance: a positive scalar.

    Returns:
        A distribution of x_0 of the same kind.

    Raises:
        ValueError: a matrix or y of another shape, or a noise_variance that is not one positive number.
        TypeError: another kind of distribution, such as `Independent`, whose entries would become dependent.

    Source: Bishop 2006, "Pattern recognition and machine learning", section 2.3.3.
    """
    matrix, shape = _operator_matrix(distribution, operator)
    noise_variance = _checked_noise(noise_variance, matrix)
    if jnp.shape(y) != shape:  # it must not broadcast
        raise ValueError(f"y has shape {jnp.shape(y)}, but the operator returns {shape}: pass y of that shape")
    y = jnp.asarray(y, matrix.dtype)
    match distribution:
        case Gaussian():
            return _gaussian_posterior(distribution, matrix, y, noise_variance)
        case Mixture(_, components):
            weights = jax.nn.log_softmax(linear_measurement(distribution, matrix, noise_variance)._log_terms(y.ravel()))
            return Mixture(
                weights, _map_components(lambda c: _gaussian_posterior(c, matrix, y, noise_variance), components)
            )
        case Empirical(_, points):
            weights = jax.nn.log_softmax(linear_measurement(distribution, matrix, noise_variance)._log_terms(y.ravel()))
            return Empirical(weights, points)
    raise _no_linear_measurement(distribution)


def optimal_prediction(distribution: Distribution, x_t: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """The optimal network output: the conditional expectation of the target given x_t (ELBO-11, PAR-2, PAR-3).

        x_0: E[x_0 | x_t]    score: grad log q(x_t)    eps: -sigma score    v: alpha eps - sigma x_0

    Args:
        distribution: of x_0.
        x_t: noisy example, shape (*x).
        level: scalars, sigma > 0.
        prediction_type: what is predicted.

    Raises:
        ValueError: unknown prediction_type.
    """
    if prediction_type not in ("x_0", "eps", "v", "score"):
        raise unknown_prediction_type(prediction_type)
    x_0 = distribution.posterior(x_t, level).mean
    score = marginal(distribution, level).score(x_t)
    eps = -level.sigma * score
    return {"x_0": x_0, "score": score, "eps": eps, "v": level.alpha * eps - level.sigma * x_0}[prediction_type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimalDenoiser:
    """The optimal denoiser of a distribution, a `types.Denoiser` in place of a network.

    Fields:
        distribution: of x_0.
        prediction_type: what it predicts.
    """

    distribution: Any
    prediction_type: PredictionType = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """`optimal_prediction` for a batch, shape (B, *x), at levels of shape (B,)."""
        return jax.vmap(lambda x, lv: optimal_prediction(self.distribution, x, lv, self.prediction_type))(x_t, level)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimalDecoder:
    """The exact decoder p(x_0 | x_1) of a distribution: an `elbo.DiffusionDecoder` that ignores x_hat.

    Fields:
        distribution: of x_0.
    """

    distribution: Any

    def __call__(self, x_hat: X, x_1: X, level: NoiseLevel) -> Any:
        """p(x_0 | x_1)."""
        del x_hat
        return self.distribution.posterior(x_1, level)


def _operator_matrix(distribution: Any, operator: Any) -> tuple[_Operator, tuple[int, ...]]:
    """A, shape (M, D), and the shape of y."""
    mean = distribution.mean
    if not callable(operator):
        matrix = jnp.asarray(operator, mean.dtype)
        if matrix.ndim != 2 or matrix.shape[1] != mean.size:
            raise ValueError(f"operator has shape {matrix.shape}: it must be (M, {mean.size}), or a linear map")
        return matrix, matrix.shape[:1]
    columns = jnp.asarray(operator(jnp.eye(mean.size, dtype=mean.dtype).reshape(mean.size, *mean.shape)))
    return columns.reshape(mean.size, -1).T, columns.shape[1:]


def _whitened(prior: Gaussian, matrix: _Operator):
    """Sigma^(1/2), and the singular value decomposition of A Sigma^(1/2), with all D right singular vectors."""
    root = prior._matrix(_root(prior.variances), _root(prior.residual_variance))
    left, scales, right = jnp.linalg.svd(matmul(matrix, root), full_matrices=True)
    return root, left[:, : scales.size], scales, right


def _gaussian_measurement(
    prior: Gaussian, matrix: _Operator, shape: tuple[int, ...], noise_variance: Scalar
) -> Gaussian:
    _, left, scales, _ = _whitened(prior, matrix)
    mean = matmul(matrix, prior.mean.reshape(-1)).reshape(shape)
    return Gaussian(mean, left, scales**2 + noise_variance, noise_variance)


def _gaussian_posterior(prior: Gaussian, matrix: _Operator, y: X, noise_variance: Scalar) -> Gaussian:
    """For x_0 = mean + Sigma^(1/2) z, the posterior of z is diagonal in the right singular vectors.

    Its standard deviations come from singular values of factors, with twice the digits that the eigenvalues of a
    difference of covariances would have.
    """
    root, left, scales, right = _whitened(prior, matrix)
    total = scales**2 + noise_variance
    coordinates = scales / total * matmul(left.T, y.reshape(-1) - matmul(matrix, prior.mean.reshape(-1)))
    mean = prior.mean + matmul(root, matmul(right[: scales.size].T, coordinates)).reshape(prior.mean.shape)
    deviations = jnp.ones(right.shape[0], right.dtype).at[: scales.size].set(jnp.sqrt(noise_variance / total))
    basis, deviations, _ = jnp.linalg.svd(matmul(root, right.T * deviations[None, :]), full_matrices=False)
    return Gaussian(mean, basis, deviations**2, jnp.zeros_like(prior.residual_variance))


def _checked_noise(noise_variance: Any, matrix: _Operator) -> Scalar:
    check_scalar("noise_variance", noise_variance)
    check_positive_scalar("noise_variance", noise_variance)
    return jnp.asarray(noise_variance, matrix.dtype)


def _no_linear_measurement(distribution: Any) -> TypeError:
    return TypeError(
        f"no closed form for a linear measurement of {type(distribution).__name__} data: use closed_form.gaussian, "
        "low_rank, mixture or empirical; entries measured one by one are `posterior`, with alpha = 1"
    )


def _map_components(function, components):
    """The values of a function for every component, stacked."""
    return jax.vmap(function)(components)


def _average(log_weights: _Weights, values: _Stacked) -> _Value:
    return jnp.tensordot(jnp.exp(log_weights), values, axes=1, precision="highest")


def _scatter(log_weights: _Weights, values: _Stacked, center: _Value) -> _Matrix:
    """sum_k w_k (v_k - center) (v_k - center)^T, flattened."""
    deviations = jax.vmap(lambda value: (value - center).reshape(-1))(values)
    return matmul((deviations * jnp.exp(log_weights)[:, None]).T, deviations)


def _arrays(*values):
    """Arrays in the current default float dtype."""
    return [jnp.asarray(value, jax.dtypes.canonicalize_dtype(np.float64)) for value in values]


def _log_weights(weights: _ArrayLike, count: int) -> _Weights:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (count,) or not np.all(weights > 0):
        raise ValueError(f"weights has shape {weights.shape}: pass {count} positive values, one for each component")
    return _arrays(np.log(weights / weights.sum()))[0]
