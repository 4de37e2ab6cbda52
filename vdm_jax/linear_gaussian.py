"""Linear autoencoders, where every optimum is known: principal components, and a VAE that is probabilistic PCA.

    x = W z + b + sqrt(v) eps,   z ~ N(0, I)      so      x ~ N(b, W W^T + v I)

Data are vectors: N examples of D numbers, codes of k. Ask in float64 (`jax.enable_x64`) where digits matter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm_jax.closed_form import dot
from vdm_jax.gaussian import LOG_2PI, Normal, _root
from vdm_jax.types import Scalar

Vector = Float[Array, " D"]
Vectors = Float[Array, "N D"]
Codes = Float[Array, "N k"]


class PrincipalComponents(NamedTuple):
    """The principal components of a data set: its best linear autoencoder of every size (AE-1).

    Fields:
        mean: shape (D,).
        variances: eigenvalues of the covariance (over N, not N - 1), the largest first, shape (D,).
        directions: unit vectors, one a column, shape (D, D).
    """

    mean: Vector
    variances: Vector
    directions: Float[Array, "D D"]

    def encode(self, x: Vectors, k: int) -> Codes:
        """The first k coordinates, shape (N, k)."""
        return dot(x - self.mean[None], self.directions[:, :k])

    def decode(self, z: Codes) -> Vectors:
        """The point in the first k directions, shape (N, D)."""
        return self.mean[None] + dot(z, self.directions[:, : z.shape[1]].T)

    def discarded(self, k: int) -> Scalar:
        """The mean squared error of k coordinates: the sum of the other eigenvalues."""
        return self.variances[k:].sum()


def principal_components(x: Vectors) -> PrincipalComponents:
    """The mean of a data set, and the eigenvectors of its covariance (AE-1).

    Source: Baldi & Hornik 1989, "Neural networks and principal component analysis".
    """
    mean = x.mean(0)
    variances, directions = jnp.linalg.eigh(dot((x - mean[None]).T, x - mean[None]) / x.shape[0])
    return PrincipalComponents(mean, variances[::-1], directions[:, ::-1])


class LinearGaussianModel(NamedTuple):
    """p(x|z) = N(W z + b, v I): the decoder of a linear-Gaussian VAE, and all that follows from it (VAE-1, VAE-9).

    Fields:
        weights: W, shape (D, k).
        shift: b, shape (D,).
        var: v > 0, a scalar.
    """

    weights: Float[Array, "D k"]
    shift: Vector
    var: Scalar

    def decode(self, z: Codes) -> Vectors:
        """W z + b, shape (N, D): what `likelihood` reads."""
        return dot(z, self.weights.T) + self.shift[None]

    def likelihood(self, mean: Vector) -> Normal:
        """p(x|z) of one example."""
        return Normal(mean, var=self.var)

    def log_prob(self, x: Vector) -> Scalar:
        """log p(x) = log N(x; b, W W^T + v I) of one example in nats, exactly."""
        root = jnp.linalg.cholesky(dot(self.weights, self.weights.T) + self.var * jnp.eye(x.size, dtype=x.dtype))
        white = jax.scipy.linalg.solve_triangular(root, x - self.shift, lower=True)
        return -0.5 * (jnp.sum(white**2) + x.size * LOG_2PI) - jnp.log(jnp.diagonal(root)).sum()

    def posterior(self, x: Vectors) -> tuple[Codes, Float[Array, "k k"]]:
        """Mean (N, k) and covariance (k, k) of p(z|x) = N(S W^T (x - b) / v, S), S = (I + W^T W / v)^-1.

        Source: Tipping & Bishop 1999, "Probabilistic principal component analysis".
        """
        covariance = jnp.linalg.inv(self._precision())
        return dot(dot(x - self.shift[None], self.weights) / self.var, covariance), covariance

    def encoder(self, x: Vectors) -> Normal:
        """The best q(z|x) of independent z: the posterior's mean, and the inverse diagonal of its precision.

        The posterior itself where the columns of W are orthogonal. Fields (N, k): a `vae.EncoderFn`.

        Source: Lucas et al. 2019, arXiv:1911.02469.
        """
        mean, _ = self.posterior(x)
        return Normal(mean, var=jnp.broadcast_to(1.0 / jnp.diagonal(self._precision()), mean.shape))

    def _precision(self) -> Float[Array, "k k"]:
        inner = dot(self.weights.T, self.weights) / self.var
        return inner + jnp.eye(inner.shape[0], dtype=inner.dtype)


def probabilistic_pca(x: Vectors, k: int) -> LinearGaussianModel:
    """The likeliest linear-Gaussian VAE of k < D codes, in closed form (VAE-9).

        W = U_k (Lambda_k - v I)^(1/2),   v = the mean of the D - k smallest eigenvalues

    Any rotation of its codes is as likely; this one's posteriors are independent.

    Raises:
        ValueError: k outside 1..D - 1.

    Source: Tipping & Bishop 1999, "Probabilistic principal component analysis".
    """
    if not 1 <= k < x.shape[1]:
        raise ValueError(f"k is {k}: codes of 1 to D - 1 = {x.shape[1] - 1} numbers leave any noise to fit")
    principal = principal_components(x)
    var = principal.variances[k:].mean()
    signal = jnp.maximum(principal.variances[None, :k] - var, 0.0)  # rounding may leave less than none
    return LinearGaussianModel(principal.directions[:, :k] * _root(signal), principal.mean, var)


def maximum_likelihood_decoder(q: Normal, x: Vectors) -> LinearGaussianModel:
    """argmax over W, b, v of sum_n E_q(z|x_n) log N(x_n; W z + b, v I): variational EM's M-step (VAE-6, VAE-9).

    Least squares of x on z, with the variance of z under q counted in; q without variance gives the fit of pairs.

    Args:
        q: the encoder's law of all examples, fields (N, k).
        x: the examples, shape (N, D).

    Source: Tipping & Bishop 1999, appendix B.
    """
    z, spread = q.mean - q.mean.mean(0)[None], jnp.broadcast_to(q.var, q.mean.shape).mean(0)
    centred, count = x - x.mean(0)[None], x.shape[0]
    second = dot(z.T, z) / count + jnp.diag(spread)
    weights = jnp.linalg.solve(second, dot(z.T, centred) / count).T
    residual = jnp.square(centred - dot(z, weights.T)).sum(1).mean() + jnp.sum(spread * jnp.square(weights).sum(0))
    return LinearGaussianModel(weights, x.mean(0) - dot(weights, q.mean.mean(0)), residual / x.shape[1])
