"""Linear-Gaussian models with known optima: PCA, the linear autoencoder, and probabilistic PCA, the linear VAE.

    x = W z + b + sqrt(v) eps,   z ~ N(0, I)      so      x ~ N(b, W W^T + v I)

Data are N vectors of D entries, with latents of k entries. Use float64 (`jax.enable_x64`) for accurate results.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.closed_form import matmul
from vdm_jax.gaussian import LOG_2PI, Normal, _root
from vdm_jax.types import Scalar

__all__ = [
    "LinearGaussianModel",
    "PrincipalComponents",
    "maximum_likelihood_decoder",
    "principal_components",
    "probabilistic_pca",
]

_Vector = Float[Array, " D"]
_Vectors = Float[Array, "N D"]
_Codes = Float[Array, "N k"]


class PrincipalComponents(NamedTuple):
    """The principal components of a data set, which are its optimal linear autoencoder for every k (AE-1).

    Fields:
        mean: shape (D,).
        variances: eigenvalues of the covariance (normalized by N, not N - 1), largest first, shape (D,).
        directions: unit eigenvectors as columns, shape (D, D).
    """

    mean: _Vector
    variances: _Vector
    directions: Float[Array, "D D"]

    def encode(self, x: _Vectors, k: int) -> _Codes:
        """The coordinates along the first k components, shape (N, k)."""
        return matmul(x - self.mean[None], self.directions[:, :k])

    def decode(self, z: _Codes) -> _Vectors:
        """The reconstruction from the first k components, shape (N, D)."""
        return self.mean[None] + matmul(z, self.directions[:, : z.shape[1]].T)

    def reconstruction_error(self, k: int) -> Scalar:
        """The mean squared error of k components: the sum of the other eigenvalues."""
        return self.variances[k:].sum()


def principal_components(x: _Vectors) -> PrincipalComponents:
    """The mean of a data set and the eigenvectors of its covariance (AE-1).

    Source: Baldi & Hornik 1989, "Neural networks and principal component analysis".
    """
    mean = x.mean(0)
    variances, directions = jnp.linalg.eigh(matmul((x - mean[None]).T, x - mean[None]) / x.shape[0])
    return PrincipalComponents(mean, variances[::-1], directions[:, ::-1])


class LinearGaussianModel(NamedTuple):
    """p(x|z) = N(W z + b, v I), the decoder of a linear-Gaussian VAE, with its likelihood and posterior (VAE-1, VAE-9).

    Fields:
        weights: W, shape (D, k).
        bias: b, shape (D,).
        var: v > 0, a scalar.
    """

    weights: Float[Array, "D k"]
    bias: _Vector
    var: Scalar

    def decode(self, z: _Codes) -> _Vectors:
        """W z + b, shape (N, D): the input of `likelihood`."""
        return matmul(z, self.weights.T) + self.bias[None]

    def likelihood(self, mean: _Vector) -> Normal:
        """p(x|z) of one example."""
        return Normal(mean, var=self.var)

    def log_prob(self, x: _Vector) -> Scalar:
        """log p(x) = log N(x; b, W W^T + v I) of one example in nats (exact)."""
        root = jnp.linalg.cholesky(matmul(self.weights, self.weights.T) + self.var * jnp.eye(x.size, dtype=x.dtype))
        white = jax.scipy.linalg.solve_triangular(root, x - self.bias, lower=True)
        return -0.5 * (jnp.sum(white**2) + x.size * LOG_2PI) - jnp.log(jnp.diagonal(root)).sum()

    def posterior(self, x: _Vectors) -> tuple[_Codes, Float[Array, "k k"]]:
        """Mean (N, k) and covariance (k, k) of p(z|x) = N(S W^T (x - b) / v, S), S = (I + W^T W / v)^-1.

        Source: Tipping & Bishop 1999, "Probabilistic principal component analysis".
        """
        covariance = jnp.linalg.inv(self._precision())
        return matmul(matmul(x - self.bias[None], self.weights) / self.var, covariance), covariance

    def encoder(self, x: _Vectors) -> Normal:
        """The optimal q(z|x) with a diagonal covariance: the posterior mean and the inverse diagonal of its precision.

        Equal to the posterior if the columns of W are orthogonal. Fields (N, k): a `vae.EncoderFn`.

        Source: Lucas et al. 2019, arXiv:1911.02469.
        """
        mean, _ = self.posterior(x)
        return Normal(mean, var=jnp.broadcast_to(1.0 / jnp.diagonal(self._precision()), mean.shape))

    def _precision(self) -> Float[Array, "k k"]:
        inner = matmul(self.weights.T, self.weights) / self.var
        return inner + jnp.eye(inner.shape[0], dtype=inner.dtype)


def probabilistic_pca(x: _Vectors, k: int) -> LinearGaussianModel:
    """The maximum-likelihood linear-Gaussian model with k < D latents, in closed form (VAE-9).

        W = U_k (Lambda_k - v I)^(1/2),   v = the mean of the D - k smallest eigenvalues

    The likelihood is invariant to rotations of z; this solution has independent posteriors.

    Raises:
        ValueError: k outside 1..D - 1.

    Source: Tipping & Bishop 1999, "Probabilistic principal component analysis".
    """
    if not 1 <= k < x.shape[1]:
        raise ValueError(f"k is {k}: it must be in 1..{x.shape[1] - 1} for data with D = {x.shape[1]} entries")
    principal = principal_components(x)
    var = principal.variances[k:].mean()
    signal = jnp.maximum(principal.variances[None, :k] - var, 0.0)  # negative only by rounding
    return LinearGaussianModel(principal.directions[:, :k] * _root(signal), principal.mean, var)


def maximum_likelihood_decoder(q: Normal, x: _Vectors) -> LinearGaussianModel:
    """argmax over W, b, v of sum_n E_q(z|x_n) log N(x_n; W z + b, v I), the M-step of variational EM (VAE-6, VAE-9).

    This is least squares of x on z, including the variance of z under q. With variance 0 it fits the pairs (x, z).

    Args:
        q: q(z|x_n) of all examples, fields (N, k).
        x: the examples, shape (N, D).

    Source: Tipping & Bishop 1999, appendix B.
    """
    z, variance = q.mean - q.mean.mean(0)[None], jnp.broadcast_to(q.var, q.mean.shape).mean(0)
    centered, count = x - x.mean(0)[None], x.shape[0]
    second = matmul(z.T, z) / count + jnp.diag(variance)
    weights = jnp.linalg.solve(second, matmul(z.T, centered) / count).T
    residual = jnp.square(centered - matmul(z, weights.T)).sum(1).mean() + jnp.sum(
        variance * jnp.square(weights).sum(0)
    )
    return LinearGaussianModel(weights, x.mean(0) - matmul(weights, q.mean.mean(0)), residual / x.shape[1])
