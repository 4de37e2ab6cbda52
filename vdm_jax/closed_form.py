"""Worlds where everything is known: data laws whose noisy marginals, scores, denoisers and reverse kernels are exact.

`Gaussian`, `Mixture`, `Empirical` (a set of points) and `Independent` (a scalar law for every pixel) are closed under the
two operations a diffusion model is made of, at any `Level` of any schedule:

    law.affine(a, b, var)   the law of  a x + b + sqrt(var) eps
    law.posterior(x_t, level)   the law of  x_0 given x_t                              (conjugacy)

All else follows: the marginal q(x_t) is affine, the optimal denoiser is the mean of `given`, and the *unconditioned*
reverse kernel q(x_s | x_t) is affine after `given`, because q(x_s | x_t, x_0) is affine in x_0. `OptimalDenoiser`
stands wherever a network would. Expectations (entropy, MMSE, the optimal model's bound) are in `vdm_jax.information`.

Laws are pytrees of arrays over one example of shape (*x), D numbers in all; matrices are (D, D), of the example
flattened. `gaussian`, `low_rank`, `mixture`, `points` and `pixels` make them, in float64 on the host. Ask in float64
(`jax.enable_x64`) where digits matter: the questions themselves are ill-conditioned at high signal-to-noise.
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
from vdm_jax.types import Batch, Key, PredictionType, Real, Scalar, X, unknown_prediction_type

Numbers = ArrayLike | Sequence[Any]
Matrix = Float[Array, "D D"]
Weights = Float[Array, " K"]
Each = Float[Array, "K *v"]  # a value of any shape for every component
Average = Float[Array, "*v"]
dot = partial(jnp.matmul, precision="highest")  # the default is 1e-3 off on GPUs, 1e-2 on TPUs


@runtime_checkable
class Distribution(Protocol):
    """A law of one example, shape (*x), closed under noise and under conditioning on noisy data."""

    @property
    def mean(self) -> X: ...

    @property
    def variance(self) -> X: ...

    def covariance(self) -> Matrix: ...

    def sample(self, key: Key) -> X: ...

    def log_prob(self, x: X) -> Scalar: ...

    def pushforward(self, scale: Real, shift: X, var: Real) -> Any: ...

    def posterior(self, x_t: X, level: NoiseLevel) -> Any: ...


class Gaussian(NamedTuple):
    """N(mean, Sigma) with Sigma = B diag(variances) B^T + rest (I - B B^T), full or low rank.

    Fields:
        mean: shape (*x).
        basis: B, orthonormal columns, shape (D, R), R <= D.
        variances: the eigenvalues along the columns, shape (R,).
        rest: the eigenvalue of the D - R directions outside, a scalar; without meaning where R = D.
    """

    mean: X
    basis: Float[Array, "D R"]
    variances: Float[Array, " R"]
    rest: Scalar

    @property
    def variance(self) -> X:
        """The diagonal of Sigma, shape (*x)."""
        inside = jnp.square(self.basis)
        return (dot(inside, self.variances) + self._outside * (1.0 - inside.sum(-1))).reshape(self.mean.shape)

    def covariance(self) -> Matrix:
        """Sigma."""
        return self._matrix(self.variances, self.rest)

    def sample(self, key: Key) -> X:
        """A draw, shape (*x)."""
        return self.colour(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def colour(self, z: X) -> X:
        """mean + Sigma^(1/2) z: standard normal noise z, shape (*x), as a draw."""
        return self.mean + self._apply(_root(self.variances), _root(self.rest), z)

    def log_prob(self, x: X) -> Scalar:
        """log N(x; mean, Sigma) in nats; needs positive eigenvalues."""
        inside, outside = self._split(x - self.mean)
        squares = jnp.sum(inside**2 / self.variances) + jnp.sum(jnp.log(self.variances))
        if outside is not None:
            squares += jnp.sum(outside**2) / self.rest + (x.size - inside.size) * jnp.log(self.rest)
        return -0.5 * (squares + x.size * LOG_2PI)

    def score(self, x: X) -> X:
        """grad log N(x; mean, Sigma) = -Sigma^-1 (x - mean)."""
        return -self._apply(1.0 / self.variances, 1.0 / self.rest, x - self.mean)

    def score_jacobian(self, x: X) -> Matrix:
        """The Hessian of log N: -Sigma^-1, whatever x."""
        del x
        return -self._matrix(1.0 / self.variances, 1.0 / self.rest)

    def entropy(self) -> Scalar:
        """-E log N in nats."""
        outside = self._outside_count * jnp.log(jnp.where(self._outside_count > 0, self.rest, 1.0))
        return 0.5 * (jnp.sum(jnp.log(self.variances)) + outside + self.mean.size * (1.0 + LOG_2PI))

    def pushforward(self, scale: Real, shift: X, var: Real) -> "Gaussian":
        """The law of scale x + shift + sqrt(var) eps: N(scale mean + shift, scale^2 Sigma + var I)."""
        grown = scale**2 * self.variances + var, scale**2 * self.rest + var
        return Gaussian(scale * self.mean + shift, self.basis, *grown)

    def posterior(self, x_t: X, level: NoiseLevel) -> "Gaussian":
        """The law of x_0 given x_t = alpha x_0 + sigma eps: the regression of x_0 on x_t. Needs sigma > 0.

        N( mean + alpha Sigma M^-1 (x_t - alpha mean),  sigma^2 Sigma M^-1 ),   M = alpha^2 Sigma + sigma^2 I
        """
        alpha, noise = level.alpha, level.sigma**2
        shrunk, rest = (v / (alpha**2 * v + noise) for v in (self.variances, self.rest))
        mean = self.mean + alpha * self._apply(shrunk, rest, x_t - alpha * self.mean)
        return Gaussian(mean, self.basis, noise * shrunk, noise * rest)

    @property
    def _outside_count(self) -> int:
        return self.basis.shape[0] - self.basis.shape[1]

    @property
    def _outside(self) -> Scalar:
        return self.rest if self._outside_count else jnp.zeros_like(self.rest)

    def _split(self, y: X):
        """y in the basis, shape (R,), and what lies outside of it, (D,); None where the basis is complete.

        Not the rounding that a complete basis would leave: little variance outside would blow it up.
        """
        y = y.reshape(-1)
        inside = dot(self.basis.T, y)
        return inside, y - dot(self.basis, inside) if self._outside_count else None

    def _apply(self, inside: Float[Array, " R"], outside: Scalar, y: X) -> X:
        """f(Sigma) y, given f of the eigenvalues."""
        within, without = self._split(y)
        result = dot(self.basis, inside * within)
        return (result if without is None else result + outside * without).reshape(y.shape)

    def _matrix(self, inside: Float[Array, " R"], outside: Scalar) -> Matrix:
        matrix = dot(self.basis * inside[None, :], self.basis.T)
        if not self._outside_count:
            return matrix
        return matrix + outside * (jnp.eye(self.basis.shape[0], dtype=matrix.dtype) - dot(self.basis, self.basis.T))


class Mixture(NamedTuple):
    """sum_k w_k N(m_k, Sigma_k).

    Fields:
        log_weights: log w_k, shape (K,), which sum to 1.
        components: a `Gaussian` whose fields have a leading axis K.
    """

    log_weights: Weights
    components: Gaussian

    @property
    def mean(self) -> X:
        """E x, shape (*x)."""
        return _average(self.log_weights, self.components.mean)

    @property
    def variance(self) -> X:
        """Var x of every number, shape (*x)."""
        between = jax.vmap(lambda m: jnp.square(m - self.mean))(self.components.mean)
        return _average(self.log_weights, _each(lambda c: c.variance, self.components) + between)

    def covariance(self) -> Matrix:
        """Cov x: what the components have within, and between them."""
        within = _average(self.log_weights, _each(Gaussian.covariance, self.components))
        return within + _scatter(self.log_weights, self.components.mean, self.mean)

    def sample(self, key: Key) -> X:
        """A draw, shape (*x)."""
        key_k, key_x = jax.random.split(key)
        k = jax.random.categorical(key_k, self.log_weights)
        return jax.tree.map(lambda leaf: leaf[k], self.components).sample(key_x)

    def log_prob(self, x: X) -> Scalar:
        """The log-density in nats."""
        return jax.nn.logsumexp(self._log_terms(x))

    def score(self, x: X) -> X:
        """grad log p(x): the components' scores, averaged by their share in x."""
        return _average(jax.nn.log_softmax(self._log_terms(x)), _each(lambda c: c.score(x), self.components))

    def score_jacobian(self, x: X) -> Matrix:
        """The Hessian of log p: the components' own, and the scatter of their scores."""
        shares = jax.nn.log_softmax(self._log_terms(x))
        scores = _each(lambda c: c.score(x), self.components)
        within = _average(shares, _each(lambda c: c.score_jacobian(x), self.components))
        return within + _scatter(shares, scores, _average(shares, scores))

    def pushforward(self, scale: Real, shift: X, var: Real) -> "Mixture":
        """The law of scale x + shift + sqrt(var) eps."""
        return Mixture(self.log_weights, _each(lambda c: c.pushforward(scale, shift, var), self.components))

    def posterior(self, x_t: X, level: NoiseLevel) -> "Mixture":
        """The law of x_0 given x_t: each component's, weighted by its share in x_t. Needs sigma > 0."""
        shares = jax.nn.log_softmax(marginal(self, level)._log_terms(x_t))
        return Mixture(shares, _each(lambda c: c.posterior(x_t, level), self.components))

    def _log_terms(self, x: X) -> Weights:
        return self.log_weights + _each(lambda c: c.log_prob(x), self.components)


class Empirical(NamedTuple):
    """Finitely many points: x_i with probability w_i. The law of a data set, 8-bit images included.

    Fields:
        log_weights: log w_i, shape (K,), which sum to 1.
        points: x_i, shape (K, *x).
    """

    log_weights: Weights
    points: Each

    @property
    def mean(self) -> X:
        """E x, shape (*x)."""
        return _average(self.log_weights, self.points)

    @property
    def variance(self) -> X:
        """Var x of every number, shape (*x)."""
        return _average(self.log_weights, jax.vmap(lambda x: jnp.square(x - self.mean))(self.points))

    def covariance(self) -> Matrix:
        """Cov x."""
        return _scatter(self.log_weights, self.points, self.mean)

    def sample(self, key: Key) -> X:
        """One of the points."""
        return self.points[jax.random.categorical(key, self.log_weights)]

    def log_prob(self, x: X) -> Scalar:
        """The log-*probability* of x in nats: -inf for what is none of the points, to the bit."""
        same = jax.vmap(lambda point: jnp.all(point == x))(self.points)
        return jax.nn.logsumexp(jnp.where(same, self.log_weights, -jnp.inf))

    def entropy(self) -> Scalar:
        """-E log P in nats, for points that differ from each other."""
        weights = jnp.exp(self.log_weights)
        return -jnp.sum(weights * jnp.where(weights > 0.0, self.log_weights, 0.0))

    def pushforward(self, scale: Real, shift: X, var: Real) -> Mixture:
        """The law of scale x + shift + sqrt(var) eps: a mixture with a component a point."""
        count, dims = self.points.shape[0], self.points[0].size
        dtype = self.points.dtype
        empty = jnp.zeros((count, dims, 0), dtype), jnp.zeros((count, 0), dtype)
        spread = jnp.broadcast_to(jnp.asarray(var, dtype), (count,))
        centres = jax.vmap(lambda point: scale * point + shift)(self.points)
        return Mixture(self.log_weights, Gaussian(centres, *empty, spread))

    def posterior(self, x_t: X, level: NoiseLevel) -> "Empirical":
        """The law of x_0 given x_t: the same points by their share in x_t. Needs sigma > 0."""
        return Empirical(jax.nn.log_softmax(marginal(self, level)._log_terms(x_t)), self.points)


class Independent(NamedTuple):
    """Every number of x on its own: images of any size with an exact denoiser.

    Fields:
        distribution: a law of a scalar, each of its fields with leading axes (*x).
    """

    distribution: Any

    @property
    def mean(self) -> X:
        """E x, shape (*x)."""
        return self.each(lambda distribution: distribution.mean)

    @property
    def variance(self) -> X:
        """Var x of every number, shape (*x)."""
        return self.each(lambda distribution: distribution.variance)

    def covariance(self) -> Matrix:
        """Cov x, diagonal."""
        return jnp.diag(self.variance.reshape(-1))

    def sample(self, key: Key) -> X:
        """A draw, shape (*x)."""
        shape = self._shape
        keys = jax.random.split(key, shape) if shape else key
        return self.each(lambda distribution, k: distribution.sample(k), keys)

    def log_prob(self, x: X) -> Scalar:
        """The sum of the scalars' log-densities, or log-probabilities, in nats."""
        return jnp.sum(self.each(lambda distribution, value: distribution.log_prob(value), x))

    def score(self, x: X) -> X:
        """grad log p(x), shape (*x)."""
        return self.each(lambda distribution, value: distribution.score(value), x)

    def score_jacobian(self, x: X) -> Matrix:
        """The Hessian of log p, diagonal."""
        return jnp.diag(self.each(lambda distribution, value: distribution.score_jacobian(value)[0, 0], x).reshape(-1))

    def pushforward(self, scale: Real, shift: X, var: Real) -> "Independent":
        """The law of scale x + shift + sqrt(var) eps."""
        shift = jnp.broadcast_to(jnp.asarray(shift, self.mean.dtype), self._shape)
        return Independent(self.each(lambda distribution, value: distribution.pushforward(scale, value, var), shift))

    def posterior(self, x_t: X, level: NoiseLevel) -> "Independent":
        """The law of x_0 given x_t, number by number. Needs sigma > 0."""
        return Independent(self.each(lambda distribution, value: distribution.posterior(value, level), x_t))

    def each(self, function, *arrays):
        """`function(scalar law, *scalars)` for every number of the example, as an array of shape (*x)."""
        for _ in self._shape:
            function = jax.vmap(function)
        return function(self.distribution, *arrays)

    @property
    def _shape(self) -> tuple[int, ...]:
        if isinstance(self.distribution, Gaussian):
            return self.distribution.rest.shape
        return self.distribution.log_weights.shape[:-1]


def gaussian(mean: Numbers, covariance: Numbers) -> Gaussian:
    """N(mean, covariance).

    Args:
        mean: shape (*x).
        covariance: symmetric and positive semi-definite, shape (D, D), of the example flattened.

    Raises:
        ValueError: the covariance is of another shape, not symmetric, or has a negative eigenvalue.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if covariance.shape != (mean.size, mean.size) or not np.allclose(covariance, covariance.T):
        raise ValueError(f"the covariance of {mean.size} numbers must be symmetric and of shape {(mean.size,) * 2}")
    variances, basis = np.linalg.eigh(covariance)
    if variances.min() < -1e-10 * variances.max():
        raise ValueError(f"the covariance has the negative eigenvalue {variances.min():g}")
    return Gaussian(*_arrays(mean, basis, np.maximum(variances, 0.0), 0.0))


def low_rank(mean: Numbers, factor: Numbers, rest: float = 0.0) -> Gaussian:
    """N(mean, F F^T + rest I): data near a plane of R dimensions, probabilistic PCA's law.

    Args:
        mean: shape (*x).
        factor: F, shape (D, R), R <= D.
        rest: variance off the plane.

    Raises:
        ValueError: a factor of another shape, or a negative rest.

    Source: Tipping & Bishop 1999.
    """
    mean, factor = np.asarray(mean, np.float64), np.asarray(factor, np.float64)
    if factor.ndim != 2 or factor.shape[0] != mean.size or factor.shape[1] > mean.size or rest < 0:
        raise ValueError(f"a low-rank law needs a factor of shape ({mean.size}, R) and rest >= 0, got {factor.shape}")
    basis, scales, _ = np.linalg.svd(factor, full_matrices=False)
    return Gaussian(*_arrays(mean, basis, scales**2 + rest, rest))


def mixture(weights: Numbers, means: Numbers, covariances: Numbers) -> Mixture:
    """sum_k w_k N(m_k, Sigma_k).

    Args:
        weights: w_k, shape (K,), positive; they need not sum to 1.
        means: m_k, shape (K, *x).
        covariances: Sigma_k, shape (K, D, D), or variances of Sigma_k = v_k I, shape (K,).

    Raises:
        ValueError: a shape that does not fit, a weight that is not positive, or as `gaussian`.
    """
    means, covariances = np.asarray(means, np.float64), np.asarray(covariances, np.float64)
    log_weights = _log_weights(weights, means.shape[0])
    if covariances.shape[:1] != means.shape[:1]:
        raise ValueError(f"{means.shape[0]} means need as many covariances, got shape {covariances.shape}")
    if covariances.ndim == 1:
        covariances = covariances[:, None, None] * np.eye(means[0].size)
    components = [gaussian(m, c) for m, c in zip(means, covariances, strict=True)]
    return Mixture(log_weights, jax.tree.map(lambda *leaves: jnp.stack(leaves), *components))


def empirical(points: Numbers, weights: Numbers | None = None) -> Empirical:
    """The law of a data set: each of the points with its weight, or all alike.

    Args:
        points: shape (K, *x); 8-bit images as `likelihoods.normalize(images, 256)`.
        weights: shape (K,), positive; they need not sum to 1.

    Raises:
        ValueError: as many weights as points are needed, all positive.
    """
    (array,) = _arrays(points)
    return Empirical(_log_weights(np.ones(array.shape[0]) if weights is None else weights, array.shape[0]), array)


def independent_pixels(masses: Numbers) -> Independent:
    """Independent quantised numbers: each value 0..levels-1 of each pixel with its own probability.

    Args:
        masses: shape (*x, levels), not negative; those of a pixel need not sum to 1. Values stand evenly on [-1, 1],
            as `likelihoods.normalize` has them.

    Raises:
        ValueError: fewer than two levels, or masses that are negative or all 0.
    """
    masses = np.asarray(masses, np.float64)
    if masses.ndim == 0 or masses.shape[-1] < 2 or np.any(masses < 0) or not np.all(masses.sum(-1) > 0):
        raise ValueError("masses must be of shape (*x, levels), not negative, with a positive sum for every pixel")
    with np.errstate(divide="ignore"):
        (log_weights,) = _arrays(np.log(masses / masses.sum(-1, keepdims=True)))
    values = normalize(jnp.arange(masses.shape[-1]), masses.shape[-1])
    return Independent(Empirical(log_weights, jnp.broadcast_to(values, log_weights.shape)))


def marginal(distribution: Distribution, level: NoiseLevel) -> Any:
    """q(x_t), the law of alpha x_0 + sigma eps (FWD-2, over the data).

    Args:
        distribution: of x_0.
        level: scalars.

    Returns:
        A law with a density (sigma > 0): `sample`, `log_prob`, `score`, `score_jacobian`.
    """
    return distribution.pushforward(level.alpha, jnp.zeros_like(distribution.mean), level.sigma**2)


def reverse_transition(distribution: Distribution, x_t: X, step: Step) -> Any:
    """q(x_s | x_t), the reverse kernel that is *not* conditioned on x_0 (POST-7).

        x_s = c_1 x_t + c_2 x_0 + sigma eps  with  x_0 ~ p(x_0 | x_t)

    A Gaussian for Gaussian data, for others a mixture: near normal for a small step, many modes for a large one.

    Args:
        distribution: of x_0.
        x_t: noisy example, shape (*x).
        step: the levels s < t, scalars, s not clean.

    Source: Sohl-Dickstein et al. 2015, arXiv:1503.03585 (why the step must be small).
    """
    c_1, c_2, sigma = forward.posterior_coefficients(step)
    return distribution.posterior(x_t, step.t).pushforward(c_2, c_1 * x_t, sigma**2)


def optimal_prediction(distribution: Distribution, x_t: X, level: NoiseLevel, prediction_type: PredictionType) -> X:
    """What the best network answers: the conditional expectation of the target given x_t (ELBO-11, PAR-2, PAR-3).

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
    """The exact denoiser of a law, in a network's place: a `types.Denoiser`.

    Fields:
        distribution: of x_0.
        prediction_type: what it predicts.
    """

    distribution: Any
    prediction_type: PredictionType = field(default="eps", metadata={"static": True})

    def __call__(self, x_t: Batch, level: NoiseLevel) -> Batch:
        """`prediction` of a batch, shape (B, *x), at levels of shape (B,)."""
        return jax.vmap(lambda x, lv: optimal_prediction(self.distribution, x, lv, self.prediction_type))(x_t, level)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimalDecoder:
    """The exact decoder p(x_0 | x_1) of a law: an `elbo.DiffusionDecoder`, which reads x_1 alone.

    Fields:
        distribution: of x_0.
    """

    distribution: Any

    def __call__(self, x_hat: X, x_1: X, level: NoiseLevel) -> Any:
        """The law of x_0 given x_1."""
        del x_hat
        return self.distribution.posterior(x_1, level)


def _each(function, components):
    """A function of every component, stacked."""
    return jax.vmap(function)(components)


def _average(log_weights: Weights, values: Each) -> Average:
    return jnp.tensordot(jnp.exp(log_weights), values, axes=1, precision="highest")


def _scatter(log_weights: Weights, values: Each, centre: Average) -> Matrix:
    """sum_k w_k (v_k - centre) (v_k - centre)^T, flattened."""
    apart = jax.vmap(lambda value: (value - centre).reshape(-1))(values)
    return dot((apart * jnp.exp(log_weights)[:, None]).T, apart)


def _arrays(*values):
    """In the default dtype of the moment."""
    return [jnp.asarray(value, jax.dtypes.canonicalize_dtype(np.float64)) for value in values]


def _log_weights(weights: Numbers, count: int) -> Weights:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (count,) or not np.all(weights > 0):
        raise ValueError(f"{count} components need {count} positive weights, got shape {weights.shape}")
    return _arrays(np.log(weights / weights.sum()))[0]
