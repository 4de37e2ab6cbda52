"""The normal distribution, which every kernel of a diffusion model returns, and its KL divergence."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vdm_jax.compilation import ARGUMENT_CHECKS
from vdm_jax.types import Key, Real, Scalar, X, at_least_float32, check_scalar

__all__ = [
    "LOG_2PI",
    "STANDARD_NORMAL",
    "Normal",
    "Prior",
    "check_prior",
    "kl",
    "variance_kl",
]

LOG_2PI = float(np.log(2 * np.pi))
# Taylor coefficients of (e^y - 1 - y) / y^2 = sum_k y^k / (k + 2)!, enough for float64 on |y| <= 1/2.
_SERIES = tuple(1 / float(np.prod(np.arange(1.0, k + 3))) for k in range(14))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Normal:
    """N(mean, var I) or N(mean, diag var) over one example: `Normal(mean, var=...)`.

    The variance is a keyword, because other libraries and `likelihoods.DiscretizedGaussian` take a standard deviation.

    Fields:
        mean: shape (*x). A scalar, as in `STANDARD_NORMAL`, is enough for `log_prob` and `kl`.
        var: variance, a scalar or shape (*x). Zero is a point mass, which can be sampled.
    """

    mean: Any  # arrays; JAX may put other objects in their place when it rebuilds a pytree
    _: KW_ONLY
    var: Any

    def sample(self, key: Key) -> X:
        """mean + sqrt(var) eps with eps ~ N(0, I), the reparameterized sample of VAE-5. Returns shape (*x)."""
        return self.mean + _root(self.var) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, x: X) -> Scalar:
        """log N(x; mean, var) in nats, summed over the example: a scalar, in float32 or wider. Needs var > 0."""
        x, mean, var = _widened(x, self.mean, self.var)
        return -0.5 * jnp.sum((x - mean) ** 2 / var + jnp.log(var) + LOG_2PI)

    def entropy(self) -> Scalar:
        """-E log N = 1/2 sum(1 + log(2 pi var)) in nats: a scalar."""
        mean, var = _widened(self.mean, self.var)
        return 0.5 * jnp.sum(jnp.broadcast_to(1.0 + LOG_2PI + jnp.log(var), mean.shape))

    def astype(self, dtype: Any) -> "Normal":
        """The same distribution, with both fields as arrays of this dtype."""
        return Normal(jnp.asarray(self.mean, dtype), var=jnp.asarray(self.var, dtype))


STANDARD_NORMAL = Normal(0.0, var=1.0)
"""N(0, I) over examples of any shape, for `log_prob` and `kl`."""

Prior = Annotated[Normal, "scalar fields"]
"""p(x_T): a `Normal` with a scalar mean and a scalar variance, the same for every dimension."""


def check_prior(name: str, prior: Any) -> None:
    """Refuse a prior that is not a `Normal` with scalar fields and a positive variance; traced values are not checked.

    Raises:
        TypeError: not a `Normal`. ValueError: a field has a shape, or the variance is concrete and not positive.
    """
    if not isinstance(prior, Normal):
        raise TypeError(
            f"{name} is a {type(prior).__name__}: it must be a gaussian.Normal, such as Normal(0.0, var=4.0)"
        )
    check_scalar(f"{name}.mean", prior.mean)
    check_scalar(f"{name}.var", prior.var)
    if not isinstance(prior.var, Tracer) and not np.asarray(prior.var) > 0:
        raise ValueError(f"{name}.var is {prior.var}: it is a variance and must be positive")


ARGUMENT_CHECKS[Prior] = check_prior


def _widened(*arrays: Any) -> list[jax.Array]:
    """The arrays in one floating-point type, float32 or wider."""
    dtype = at_least_float32(*arrays)
    return [jnp.asarray(array, dtype) for array in arrays]


def _root(x: Real | float) -> Real:
    """sqrt(x) with slope 0 at 0: the infinite slope, times a cotangent of 0, would be NaN."""
    return jnp.where(x == 0.0, 0.0, jnp.sqrt(jnp.where(x == 0.0, 1.0, x)))


def variance_kl(log_ratio: Real) -> Real:
    """KL(N(0, e^y) || N(0, 1)) = (e^y - 1 - y) / 2 of one dimension, for the *logarithm* y of the variance ratio.

    Elementwise, in nats. As y -> 0 the value is y^2 / 4 and the formula cancels, so a series is used for |y| < 1/2.

    Source: the scalar case of Kingma & Welling 2013, arXiv:1312.6114, appendix B.
    """
    small = jnp.abs(log_ratio) < 0.5
    y = jnp.where(small, log_ratio, 0.0)
    series = jnp.polyval(jnp.asarray(_SERIES[::-1], y.dtype), y) * y**2
    y = jnp.where(small, 1.0, log_ratio)
    return 0.5 * jnp.where(small, series, jnp.expm1(y) - y)


def kl(p: Normal, q: Normal) -> Scalar:
    """KL(p || q) of two normals in nats, summed over the example (ELBO-6, VAE-4).

        KL = 1/2 sum[ (mu_p - mu_q)^2 / v_q + v_p / v_q - 1 - log(v_p / v_q) ]

    For equal variances it is ||mu_p - mu_q||^2 / (2 v).

    Args:
        p, q: normals over the same shape (*x), with positive variances. The mean of q may be a scalar.

    Returns:
        A scalar.

    Source: Kingma & Welling 2013, arXiv:1312.6114.
    """
    mean_p, var_p, mean_q, var_q = _widened(p.mean, p.var, q.mean, q.var)
    excess = (var_p - var_q) / var_q  # exact for close variances, and so is its log1p
    close = jnp.abs(excess) < 0.5
    log_ratio = jnp.where(close, jnp.log1p(jnp.where(close, excess, 0.0)), jnp.log(var_p / var_q))
    return jnp.sum(0.5 * (mean_p - mean_q) ** 2 / var_q + variance_kl(log_ratio))
