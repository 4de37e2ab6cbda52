"""Decoder distributions p(x | z_0) of the data given the last latent.

Each is a pytree with `log_prob(x)`, in nats and summed over one example, and `sample(key)`. A Gaussian decoder is
`gaussian.Normal`. The others are distributions of quantized data: `levels` values, evenly spaced on [-1, 1]. For any
other x, `log_prob` raises a ValueError if x is concrete and is NaN if x is traced.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy import special
from jax.scipy.special import erfc
from jaxtyping import Array, Bool, Float, Integer

from vdm_jax.gaussian import LOG_2PI, _widened
from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.types import Key, Real, Scalar, X, at_least_float32, check_distribution, check_values

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiscretizedGaussian",
    "DiscretizedLogisticMixture",
    "Likelihood",
    "denormalize",
    "evaluate_log_prob",
    "log_interval_probability",
    "normalize",
    "on_grid",
]

_OFF_GRID = 2.0**-6  # in half bins: x is off the grid if it is farther from a value than this and than rounding
_ROOT_HALF = float(np.sqrt(0.5))
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


@runtime_checkable
class Likelihood(Protocol):
    """A distribution of one example: `gaussian.Normal`, or one of those below."""

    def log_prob(self, x: X) -> Scalar: ...


def evaluate_log_prob(distribution: Any, x: X, name: str) -> Scalar:
    """log p(x) of one example, from a distribution that a callable returned, checked.

    Args:
        distribution: what the callable returned.
        x: shape (*x).
        name: of the callable in messages.

    Returns:
        A scalar in nats, in float32 or a wider type.

    Raises:
        TypeError: not a distribution.
        ValueError: its shape differs from that of x, or log_prob does not return a scalar.
    """
    distribution = check_distribution(distribution, name, "log_prob")
    shape = getattr(getattr(distribution, "mean", x), "shape", x.shape)
    if hasattr(distribution, "sample"):
        shape = jax.eval_shape(lambda: distribution.sample(jax.random.key(0))).shape
    if shape != x.shape:  # they must not broadcast
        raise ValueError(
            f"the {name} returned a distribution of shape {shape} for x of shape {x.shape}: both must agree"
        )
    return check_values(distribution.log_prob(x), (), f"log_prob of the {name}")


def normalize(values: Array | np.ndarray, levels: int) -> X:
    """Convert quantized data 0..levels-1 to numbers on [-1, 1], in the default floating-point dtype.

    Args:
        values: integers or booleans, shape (*x).
        levels: number of values, at least 2.

    Raises:
        TypeError: the values are not integers.
        ValueError: the values are concrete and outside 0..levels-1. Traced values outside give NaN.
    """
    if not (jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == bool):
        raise TypeError(
            f"normalize takes integers 0..{levels - 1}, got {values.dtype}: convert whole numbers by .astype(int), "
            "and numbers x on [0, 1] by 2 * x - 1"
        )
    if not isinstance(values, Tracer) and not np.all((np.asarray(values) >= 0) & (np.asarray(values) < levels)):
        low, high = np.min(np.asarray(values)), np.max(np.asarray(values))
        raise ValueError(f"the values go from {low} to {high}: with levels={levels} they must be 0..{levels - 1}")
    x = values.astype(jax.dtypes.canonicalize_dtype(np.float64))
    return jnp.where((x >= 0) & (x <= levels - 1), x * (2.0 / (levels - 1)) - 1.0, jnp.nan)


def denormalize(x: X, levels: int) -> Integer[Array, "*x"]:
    """The nearest quantized value 0..levels-1 of numbers on [-1, 1]; numbers outside are clipped."""
    x = x.astype(at_least_float32(x.dtype))
    return jnp.clip(jnp.round((x + 1.0) * (0.5 * (levels - 1))), 0, levels - 1).astype(jnp.int32)


def on_grid(x: X, levels: int) -> Real:
    """1 for every number that is one of `levels` values on [-1, 1], up to rounding in its dtype, and NaN for any other.

    Multiply log-probabilities by it: those of numbers off the grid, and their gradients, become NaN.

    Args:
        x: shape (*x).
        levels: number of values, at least 2.

    Raises:
        ValueError: x is concrete and some numbers are off the grid.
    """
    if not isinstance(x, Tracer):
        with jax.ensure_compile_time_eval():
            bad = np.asarray(x)[~np.asarray(_is_value(jnp.asarray(x), levels))]
        if bad.size:
            raise ValueError(
                f"{bad.size} of {x.size} numbers are not among the {levels} values on [-1, 1], such as {bad[0]!s}: "
                f"compute x by normalize(values, {levels}) from integers 0..{levels - 1}"
            )
    return jnp.where(_is_value(x, levels), 1.0, jnp.nan)


def _is_value(x: X, levels: int) -> Bool[Array, "*x"]:
    rounding = 2.0 * float(jnp.finfo(x.dtype).eps) * (levels - 1)
    x = x.astype(at_least_float32(x.dtype))
    return jnp.abs(_from_value(x, denormalize(x, levels), levels)) <= min(max(_OFF_GRID, rounding), 0.5)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiscretizedGaussian:
    """P(x) = integral of N(mean, scale^2) over the bin of x; the edge bins extend to infinity (ELBO-5).

    The bin of a value v is v +- 1/(levels - 1). The `levels` masses sum to 1 for any mean and scale. The scale
    is a keyword, because `gaussian.Normal` takes a variance.

    Fields:
        mean: shape (*x).
        scale: standard deviation, scalar or (*x), positive.
        levels: number of values on [-1, 1], at least 2; static.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 13.
    """

    mean: Any  # arrays; JAX may put other objects in their place when it rebuilds a pytree
    _: KW_ONLY
    scale: Any
    levels: int = field(metadata={"static": True})

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x on the grid of [-1, 1], shape (*x).

        Raises:
            ValueError: as in `on_grid`.
        """
        return jnp.sum(on_grid(x, self.levels) * self._log_mass(denormalize(x, self.levels)))

    def log_masses(self) -> Float[Array, "*x levels"]:
        """The log-probability of every value, shape (*x, levels)."""
        index = jnp.arange(self.levels)
        masses = jax.vmap(lambda i: self._log_mass(jnp.full(self.mean.shape, i)))(index)
        return jnp.moveaxis(masses, 0, -1)

    def sample(self, key: Key) -> X:
        """A sample on the grid: a normal sample, rounded to its bin. Shape (*x)."""
        z = self.mean + self.scale * jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return _rounded(z, self.levels)

    def _log_mass(self, index: Integer[Array, "*x"]) -> X:
        # In half bins the value and its edges are integers. The distance of the mean from the nearer edge, small if the
        # mean is on it, is then as exact as that from the value.
        mean, scale = _widened(self.mean, self.scale)
        center = 2 * index - (self.levels - 1)
        apart = _from_integer(mean, center, self.levels)
        side = jnp.where(apart < 0.0, -1, 1)
        to_edge = -side * _from_integer(mean, center + side, self.levels)
        bins = (self.levels - 1) * scale
        first, last = index == 0, index == self.levels - 1
        # The only finite edge of a first or last bin may be the farther one.
        to_inner = jnp.where(first == (side > 0), to_edge, 1.0 + side * apart)
        closed = log_interval_probability(apart / bins, 2.0 / bins, to_edge / bins)
        return jnp.where(first | last, _log_cdf(to_inner / bins), closed)


class Categorical(NamedTuple):
    """Kingma et al.'s decoder: each pixel value in proportion to its Gaussian likelihood of z_0 (ELBO-5).

        P(x_i) proportional to e^logit N(z_i; alpha_0 x_i, sigma_0^2),  x_i among `levels` values on [-1, 1]

    With a network's logits it is the network's distribution of each pixel given z_t, at any level, and its `mean` is a
    prediction of x_0 that uses the set of possible values.

    Fields:
        z: the least noisy latent, shape (*x).
        level: its level, scalars, sigma > 0.
        levels: number of values, at least 2.
        logits: prior log-weight of every value, shape (*x, levels); None is uniform.

    Source: Kingma et al. 2021, arXiv:2107.00630, equation 8 and appendix B.
    """

    z: X
    level: NoiseLevel
    levels: int
    logits: Float[Array, "*x levels"] | None = None

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x on the grid of [-1, 1], shape (*x).

        Raises:
            ValueError: as in `on_grid`.
        """
        masses = jnp.take_along_axis(self.log_masses(), denormalize(x, self.levels)[..., None], axis=-1)
        return jnp.sum(on_grid(x, self.levels) * masses[..., 0])

    def log_masses(self) -> Float[Array, "*x levels"]:
        """The log-probability of every value, shape (*x, levels)."""
        # Squared distances relative to the nearest value's: their large common part would round away the differences.
        # In half bins, z - alpha v = (z - v) + (1 - alpha) v, and adjacent values are 2 alpha apart.
        (z,) = _widened(self.z)
        nearest = denormalize(z, self.levels)
        lost = -jnp.expm1(self.level.log_alpha) * (2 * nearest - (self.levels - 1)).astype(z.dtype)
        offset = (_from_value(z, nearest, self.levels) + lost)[..., None]
        between = jnp.arange(self.levels, dtype=nearest.dtype).reshape((1,) * z.ndim + (-1,)) - nearest[..., None]
        far = 2.0 * self.level.alpha * between.astype(z.dtype)
        unit = 1.0 / ((self.levels - 1) * self.level.sigma)
        likelihood = -0.5 * (far * unit) * ((far - 2.0 * offset) * unit)
        return jax.nn.log_softmax(likelihood if self.logits is None else likelihood + self.logits, axis=-1)

    def mean(self) -> X:
        """The expectation of x, shape (*x)."""
        # Not a matrix product, whose default precision on an accelerator is too low.
        masses = jnp.exp(self.log_masses())
        return jnp.sum(masses * jnp.broadcast_to(_grid(self.levels, masses.dtype), masses.shape), axis=-1)

    def sample(self, key: Key) -> X:
        """A sample on the grid, shape (*x)."""
        log_masses = self.log_masses()
        x = _grid(self.levels, self.z.dtype)[jax.random.categorical(key, log_masses, axis=-1)]
        return jnp.where(jnp.isnan(log_masses[..., 0]), jnp.nan, x)


class Bernoulli(NamedTuple):
    """P(x_i) = sigmoid(x_i logit_i): the decoder of binary data with values -1 and 1.

    Fields:
        logits: log-odds of 1, shape (*x).

    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix C.1.
    """

    logits: X

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x of -1 and 1, shape (*x).

        Raises:
            ValueError: x is concrete and has other values. For traced x (jit, vmap) the result is NaN.
        """
        x, logits = _widened(x, self.logits)
        binary = jnp.abs(x) == 1.0
        if not isinstance(x, Tracer) and not np.all(np.abs(np.asarray(x)) == 1.0):
            raise ValueError(
                "x has values other than -1 and 1, the only ones of a Bernoulli decoder: binarize the data to 0 and 1 "
                "and convert it by normalize(values, 2)"
            )
        return jnp.sum(jax.nn.log_sigmoid(jnp.where(binary, x, jnp.nan) * logits))

    def log_masses(self) -> Float[Array, "*x 2"]:
        """The log-probability of -1 and of 1, shape (*x, 2)."""
        return jax.nn.log_sigmoid(jnp.stack([-self.logits, self.logits], axis=-1))

    def mean(self) -> X:
        """The expectation of x, tanh(logit / 2), shape (*x)."""
        return jnp.tanh(0.5 * self.logits)

    def sample(self, key: Key) -> X:
        """A sample of -1 and 1, shape (*x)."""
        one = jax.random.bernoulli(key, jax.nn.sigmoid(self.logits))
        return jnp.where(jnp.isnan(self.logits), jnp.nan, jnp.where(one, 1.0, -1.0)).astype(self.logits.dtype)


class DiscretizedLogisticMixture(NamedTuple):
    """PixelCNN++'s decoder: a mixture of K discretized logistics per pixel, autoregressive over its channels.

        P(x) = sum_k pi_k prod_c integral of Logistic(m_ck, s_ck) over the bin of x_c,   pi = softmax(logits)
        m_ck = means_ck + sum_{j < c} coefficients_cjk x_j

    The mean of a channel depends on the true values of the pixel's earlier channels, so P is normalized for any
    coefficients. They are used without a transformation: Salimans et al. pass the network's output through tanh first.
    The bin of a value v is v +- 1/(levels - 1); the edge bins extend to infinity.

    Fields:
        logits: log-weights of the components, shape (*pixels, K).
        means: for x of shape (*pixels, C), shape (*pixels, C, K).
        log_scales: shape (*pixels, C, K), between -70 and 70: other scales are out of range in float32.
        levels: number of values on [-1, 1], at least 2.
        coefficients: shape (*pixels, C (C - 1) / 2, K), of the pairs (c, j) = (1, 0), (2, 0), (2, 1), (3, 0), ...;
            None: the channels of a component are independent.

    Source: Salimans et al. 2017, arXiv:1701.05517, equations 1 to 3.
    """

    logits: Float[Array, "*pixels k"]
    means: Float[Array, "*pixels c k"]
    log_scales: Float[Array, "*pixels c k"]
    levels: int
    coefficients: Float[Array, "*pixels pairs k"] | None = None

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x on the grid of [-1, 1], shape (*pixels, C).

        Raises:
            ValueError: as in `on_grid`, or the number of coefficients is not C (C - 1) / 2.
        """
        logits, log_scales = _widened(self.logits, self.log_scales)
        index = denormalize(x, self.levels)
        unit = jnp.exp(-log_scales) / (self.levels - 1)  # half a bin, in scales
        first, last = index[..., None] == 0, index[..., None] == self.levels - 1
        masses = _log_logistic(self._from_means(index, -1) * unit, self._from_means(index, 1) * unit, unit, first, last)
        joint = jax.nn.log_softmax(logits, axis=-1) + jnp.sum(on_grid(x, self.levels)[..., None] * masses, axis=-2)
        return jnp.sum(special.logsumexp(joint, axis=-1))

    def sample(self, key: Key) -> X:
        """A sample on the grid, shape (*pixels, C): the component of each pixel, then its channels in order, rounded.

        Raises:
            ValueError: as in `log_prob`.
        """
        by_component, by_channel = jax.random.split(key)
        chosen = jax.random.categorical(by_component, self.logits, axis=-1)[..., None, None]
        mean, log_scale, coefficients = (
            jnp.take_along_axis(field, chosen, axis=-1)[..., 0]
            for field in (self.means, self.log_scales, self._coefficients())
        )
        mean = mean + jnp.exp(log_scale) * jax.random.logistic(by_channel, mean.shape, mean.dtype)
        x = jnp.zeros_like(mean)
        for c in range(mean.shape[-1]):
            value = mean[..., c] + jnp.sum(coefficients[..., _pairs(c)] * x[..., :c], axis=-1)
            x = x.at[..., c].set(_rounded(value, self.levels))
        return x

    def _from_means(self, index: Integer[Array, "*pixels c"], side: int) -> Float[Array, "*pixels c k"]:
        # The bin's lower (-1) or upper (1) edge minus m_ck in half bins, to the last digit as in `_from_integer`: x and
        # its edges are integers, and products with the digits of means and coefficients are exact.
        means, coefficients = _widened(self.means, self._coefficients())
        x = (2 * index - (self.levels - 1)).astype(means.dtype)
        apart = x[..., None] + float(side)
        for mean, coefficient in zip(_digits(means, self.levels), _digits(coefficients, self.levels), strict=True):
            apart = apart - ((self.levels - 1) * mean + _regression(coefficient, x))
        return apart

    def _coefficients(self) -> Float[Array, "*pixels pairs k"]:
        *pixels, channels, components = self.means.shape
        pairs = _pairs(channels).start
        if self.coefficients is None:
            return jnp.zeros((*pixels, pairs, components), self.means.dtype)
        if self.coefficients.shape[-2] != pairs:
            raise ValueError(
                f"coefficients has {self.coefficients.shape[-2]} pairs of channels: {channels} channels have {pairs}"
            )
        return self.coefficients


def _grid(levels: int, dtype) -> Float[Array, " levels"]:
    return jnp.linspace(-1.0, 1.0, levels, dtype=dtype)


def _rounded(x: X, levels: int) -> X:
    """The nearest value on [-1, 1]; NaN stays NaN."""
    return jnp.where(jnp.isnan(x), x, normalize(denormalize(x, levels), levels).astype(x.dtype))


def _from_value(x: X, index: Integer[Array, "*x"], levels: int) -> X:
    """(x - v) (levels - 1): the distance of x from value number `index` in half bins, to the last digit."""
    return _from_integer(x, 2 * index - (levels - 1), levels)


def _from_integer(x: Real, half_bins: Array, levels: int) -> Real:
    """x (levels - 1) - half_bins: the distance of x from a value (parity of levels - 1) or an edge, in half bins.

    The product x (levels - 1) would round before the difference cancels; products with the digits of x are exact.
    """
    apart = -half_bins.astype(x.dtype)
    for digit in _digits(x, levels):
        apart = apart + (levels - 1) * digit
    return apart


def _digits(x: Real, levels: int) -> list[Real]:
    """x as a sum of parts, from large to small, whose products with integers up to `levels` are exact."""
    size = (levels - 1).bit_length()
    step = max(jnp.finfo(x.dtype).nmant - 4 - size, 5)  # bits per part; sums of products may reach 32
    digits = []
    for i in range(1, 1 + -(-(2 * size + 10) // step)):  # until the rounding of the rest is negligible
        digits.append(jnp.round(x * 2.0 ** (i * step)) / 2.0 ** (i * step))
        x = x - digits[-1]
    return [*digits, x]


def _pairs(channel: int) -> slice:
    """The positions of the pairs of `channel` with earlier channels among (1, 0), (2, 0), (2, 1), ..."""
    return slice(channel * (channel - 1) // 2, channel * (channel + 1) // 2)


def _regression(coefficients: Float[Array, "*p pairs k"], x: Float[Array, "*p c"]) -> Float[Array, "*p c k"]:
    # sum_{j < c} coefficients_cj x_j
    channels = range(x.shape[-1])
    return jnp.stack([jnp.sum(coefficients[..., _pairs(c), :] * x[..., :c, None], axis=-2) for c in channels], axis=-2)


def _log_logistic(low: Real, high: Real, half: Real, first: Array, last: Array) -> Real:
    """The log-mass of a logistic between two edges that are 2 half apart; the first and last bin extend to infinity.

        sigmoid(high) - sigmoid(low) = sigmoid(high) sigmoid(-low) (1 - e^(low - high))

    Every logarithm is negative, so nothing cancels; the factor of an edge at infinity is left out.
    """
    below = jnp.where(last, 0.0, jax.nn.log_sigmoid(high))
    above = jnp.where(first, 0.0, jax.nn.log_sigmoid(-low))
    return below + above + jnp.where(first | last, 0.0, _log1mexp(2.0 * half))


def _log1mexp(x: Real) -> Real:
    """log(1 - e^-x) for x > 0, accurate to the last digit from 0 to infinity."""
    small = x < 0.7
    near = jnp.log(-jnp.expm1(-jnp.where(small, x, 0.7)))
    return jnp.where(small, near, jnp.log1p(-jnp.exp(-jnp.where(small, 0.7, x))))


def log_interval_probability(middle: X, width: Real, near: Real | None = None) -> X:
    """log(Phi(m + w/2) - Phi(m - w/2)), accurate and differentiable from w -> 0 to the far tails.

    Three forms are used, each where it does not cancel: quadrature of the density over a narrow interval, the mass
    outside an interval that contains 0, and otherwise a difference scaled by the density at the near edge.

    Args:
        middle, width: m and w > 0, elementwise.
        near: w/2 - |m|, the distance of 0 inside the nearer edge, if it is known more precisely than by subtraction.
    """
    middle = -jnp.abs(middle)  # by symmetry, use the lower tail
    high = middle + 0.5 * width if near is None else near
    narrow, around = width * (1.0 - middle) < 1.0, high > 0.0
    # Where a form is not used it is evaluated at a safe point, so that its gradient does not overflow.
    quadrature = _log_quadrature(jnp.where(narrow, middle, 0.0), jnp.where(narrow, width, 0.5))
    safe = narrow | around
    tail = _log_tail(jnp.where(safe, -1.0, high), jnp.where(safe, 1.0, width))
    outside = 0.5 * (erfc(_ROOT_HALF * high) + erfc(_ROOT_HALF * (width - high)))
    center = jnp.log1p(-jnp.where(around & ~narrow, outside, 0.0))
    return jnp.where(narrow, quadrature, jnp.where(around, center, tail))


def _erfcx(x: X) -> X:
    """e^(x^2) erfc(x). For large x by its asymptotic series, since JAX 0.10's returns 0 where erfc underflows."""
    switch = 8.0 if x.dtype == jnp.float32 else 25.0
    large = x > switch
    far = jnp.where(large, x, switch)
    series = jnp.polyval(jnp.asarray([-945.0, 105.0, -15.0, 3.0, -1.0, 1.0], x.dtype), 0.5 / far**2)
    return jnp.where(large, series / (far * float(np.sqrt(np.pi))), special.erfcx(jnp.where(large, 0.0, x)))


def _log_tail(high: X, width: Real) -> X:
    # Phi(x) = exp(-x^2 / 2) _erfcx(-x / sqrt 2) / 2 at both edges, divided by the density at the upper one
    low = high - width
    scaled = _erfcx(-_ROOT_HALF * high) - jnp.exp(0.5 * (high + low) * width) * _erfcx(-_ROOT_HALF * low)
    return -0.5 * high**2 + jnp.log(0.5 * scaled)


def _log_quadrature(middle: X, width: Real) -> X:
    # exp(-(m + d)^2 / 2) = exp(-m^2 / 2) exp(-d (2 m + d) / 2), d = width * node / 2
    offsets = [0.5 * float(node) * width for node in _NODES]
    sums = [0.5 * float(w) * jnp.exp(-0.5 * d * (2.0 * middle + d)) for d, w in zip(offsets, _WEIGHTS, strict=True)]
    return jnp.log(width) - 0.5 * (middle**2 + LOG_2PI) + jnp.log(sum(sums[1:], sums[0]))


def _log_cdf(x: X) -> X:
    """log Phi(x). Unlike jax.scipy's, its gradient is accurate in the far lower tail."""
    lower, upper = jnp.where(x < 0.0, x, 0.0), jnp.where(x < 0.0, 0.0, x)
    tail = -0.5 * lower**2 + jnp.log(0.5 * _erfcx(-_ROOT_HALF * lower))
    return jnp.where(x < 0.0, tail, jnp.log1p(-0.5 * erfc(_ROOT_HALF * upper)))
