"""Decoders p(x | z_0): the law of the data given the last latent.

Each is a NamedTuple with `log_prob(x)`, in nats and summed over one example, and `sample(key)`. A Gaussian decoder is
`gaussian.Normal` itself. The others live on quantised data: `levels` values, evenly spaced on [-1, 1].
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy import special
from jax.scipy.special import erfc
from jaxtyping import Array, Float, Integer

from vdm_jax.gaussian import LOG_2PI
from vdm_jax.levels import Level
from vdm_jax.types import Key, Real, Scalar, X

_ROOT_HALF = float(np.sqrt(0.5))
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)


@runtime_checkable
class Likelihood(Protocol):
    """A law of one example: `gaussian.Normal`, or one of those below."""

    def log_prob(self, x: X) -> Scalar: ...


def to_unit(values: Integer[Array, "*x"], levels: int) -> X:
    """Quantised data 0..levels-1 as numbers on [-1, 1], in the default float dtype."""
    return values.astype(jax.dtypes.canonicalize_dtype(np.float64)) * (2.0 / (levels - 1)) - 1.0


def from_unit(x: X, levels: int) -> Integer[Array, "*x"]:
    """The nearest quantised value 0..levels-1 of numbers on [-1, 1]; outside, the nearest end."""
    return jnp.clip(jnp.round((x + 1.0) * (0.5 * (levels - 1))), 0, levels - 1).astype(jnp.int32)


class DiscretizedGaussian(NamedTuple):
    """P(x) = integral of N(mean, scale^2) over the bin of x; the edge bins reach to infinity (ELBO-5).

    The bin of a value v is v +- 1/(levels - 1). The `levels` masses sum to 1 for any mean and scale.

    Fields:
        mean: shape (*x).
        scale: standard deviation, scalar or (*x), positive.
        levels: number of values on [-1, 1], at least 2.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 13.
    """

    mean: X
    scale: X
    levels: int

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x on the grid of [-1, 1], shape (*x)."""
        return jnp.sum(self._log_mass(from_unit(x, self.levels)))

    def log_masses(self) -> Float[Array, "*x levels"]:
        """The log-probability of every value, shape (*x, levels)."""
        index = jnp.arange(self.levels)
        masses = jax.vmap(lambda i: self._log_mass(jnp.full(self.mean.shape, i)))(index)
        return jnp.moveaxis(masses, 0, -1)

    def sample(self, key: Key) -> X:
        """A draw on the grid: the normal's, rounded to its bin. Shape (*x)."""
        z = self.mean + self.scale * jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return to_unit(from_unit(z, self.levels), self.levels).astype(z.dtype)

    def _log_mass(self, index: Integer[Array, "*x"]) -> X:
        # In units of half a bin every value and edge is an integer, so neighbouring bins share their edge exactly.
        unit = 1.0 / ((self.levels - 1) * self.scale)
        middle = -_from_value(self.mean, index, self.levels) * unit
        mass = jnp.where(index == 0, _log_cdf(middle + unit), log_interval(middle, 2.0 * unit))
        return jnp.where(index == self.levels - 1, _log_cdf(unit - middle), mass)


class Categorical(NamedTuple):
    """Kingma et al.'s decoder: every value of a pixel by its Gaussian likelihood of z_0 alone (ELBO-5).

        P(x_i) proportional to e^logit N(z_i; alpha_0 x_i, sigma_0^2),  x_i among `levels` values on [-1, 1]

    With a network's logits in the place of zeros it is that network's law of each pixel given z_t, at any level, and
    its `mean` a prediction of x_0 that knows which values there are.

    Fields:
        z: the least noisy latent, shape (*x).
        level: its level, scalars, sigma > 0.
        levels: number of values, at least 2.
        logits: prior log-weight of every value, shape (*x, levels); None is all alike.

    Source: Kingma et al. 2021, arXiv:2107.00630, equation 8 and appendix B.
    """

    z: X
    level: Level
    levels: int
    logits: Float[Array, "*x levels"] | None = None

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x on the grid of [-1, 1], shape (*x)."""
        index = from_unit(x, self.levels)[..., None]
        return jnp.sum(jnp.take_along_axis(self.log_masses(), index, axis=-1))

    def log_masses(self) -> Float[Array, "*x levels"]:
        """The log-probability of every value, shape (*x, levels)."""
        # Squares relative to the nearest value's: their large common part would round away the differences. In units
        # of half a bin z - alpha v is (z - v) + (1 - alpha) v, and a step between values is 2 alpha.
        nearest = from_unit(self.z, self.levels)
        lost = -jnp.expm1(self.level.log_alpha) * (2 * nearest - (self.levels - 1)).astype(self.z.dtype)
        offset = (_from_value(self.z, nearest, self.levels) + lost)[..., None]
        between = jnp.arange(self.levels, dtype=nearest.dtype).reshape((1,) * self.z.ndim + (-1,)) - nearest[..., None]
        far = 2.0 * self.level.alpha * between.astype(self.z.dtype)
        unit = 1.0 / ((self.levels - 1) * self.level.sigma)
        likelihood = -0.5 * (far * unit) * ((far - 2.0 * offset) * unit)
        return jax.nn.log_softmax(likelihood if self.logits is None else likelihood + self.logits, axis=-1)

    def mean(self) -> X:
        """The expectation of x, shape (*x)."""
        # No matrix product: on an accelerator its default precision would not do.
        values = jnp.broadcast_to(_grid(self.levels, self.z.dtype), (*self.z.shape, self.levels))
        return jnp.sum(jnp.exp(self.log_masses()) * values, axis=-1)

    def sample(self, key: Key) -> X:
        """A draw on the grid, shape (*x)."""
        index = jax.random.categorical(key, self.log_masses(), axis=-1)
        return _grid(self.levels, self.z.dtype)[index]


class Bernoulli(NamedTuple):
    """P(x_i) = sigmoid(x_i logit_i): the decoder of binary data, whose two values are -1 and 1.

    Fields:
        logits: log-odds of 1, shape (*x).

    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix C.1.
    """

    logits: X

    def log_prob(self, x: X) -> Scalar:
        """log P(x) in nats, a scalar; x of -1 and 1, shape (*x).

        Raises:
            ValueError: x has other values. Where x is traced (jit, vmap) nobody can look: the result is NaN.
        """
        binary = jnp.abs(x) == 1.0
        if not isinstance(x, Tracer) and not np.all(np.abs(np.asarray(x)) == 1.0):
            raise ValueError(
                "a Bernoulli decoder takes values -1 and 1 only: binarise x, to_unit(values, 2) of 0 and 1"
            )
        return jnp.sum(jax.nn.log_sigmoid(jnp.where(binary, x, jnp.nan) * self.logits))

    def log_masses(self) -> Float[Array, "*x 2"]:
        """The log-probability of -1 and of 1, shape (*x, 2)."""
        return jax.nn.log_sigmoid(jnp.stack([-self.logits, self.logits], axis=-1))

    def mean(self) -> X:
        """The expectation of x, tanh(logit / 2), shape (*x)."""
        return jnp.tanh(0.5 * self.logits)

    def sample(self, key: Key) -> X:
        """A draw of -1 and 1, shape (*x)."""
        one = jax.random.bernoulli(key, jax.nn.sigmoid(self.logits))
        return jnp.where(one, 1.0, -1.0).astype(self.logits.dtype)


class LogisticMixture(NamedTuple):
    """PixelCNN++'s decoder: in every pixel a mixture of K discretised logistics, its channels one after the other.

        P(x) = sum_k pi_k prod_c integral of Logistic(m_ck, s_ck) over the bin of x_c,   pi = softmax(logits)
        m_ck = means_ck + sum_{j < c} coefficients_cjk x_j

    A channel's mean is moved by the true values of the pixel's earlier channels, so P is normalised for any
    coefficients, and they are taken as they are: Salimans et al. pass a network's output through tanh first. The bin
    of a value v is v +- 1/(levels - 1); the edge bins reach to infinity.

    Fields:
        logits: log-weights of the components, shape (*pixels, K).
        means: for x of shape (*pixels, C), shape (*pixels, C, K).
        log_scales: shape (*pixels, C, K), between -70 and 70: beyond, scales leave float32.
        levels: number of values on [-1, 1], at least 2.
        coefficients: shape (*pixels, C (C - 1) / 2, K), of the pairs (c, j) = (1, 0), (2, 0), (2, 1), (3, 0), ...;
            None: a component's channels are independent.

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
            ValueError: as many coefficients as C channels have pairs are needed, and there are not.
        """
        index = from_unit(x, self.levels)
        unit = jnp.exp(-self.log_scales) / (self.levels - 1)  # half a bin, in scales
        middle, first = self._from_means(index) * unit, index[..., None] == 0
        masses = _log_logistic(middle, unit, first, index[..., None] == self.levels - 1)
        joint = jax.nn.log_softmax(self.logits, axis=-1) + jnp.sum(masses, axis=-2)
        return jnp.sum(special.logsumexp(joint, axis=-1))

    def sample(self, key: Key) -> X:
        """A draw on the grid, shape (*pixels, C): each pixel's component, then its channels in order, each rounded.

        Raises:
            ValueError: as `log_prob`.
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
            drawn = mean[..., c] + jnp.sum(coefficients[..., _pairs(c)] * x[..., :c], axis=-1)
            x = x.at[..., c].set(to_unit(from_unit(drawn, self.levels), self.levels).astype(x.dtype))
        return x

    def _from_means(self, index: Integer[Array, "*pixels c"]) -> Float[Array, "*pixels c k"]:
        # (x_c - m_ck) (levels - 1), in half bins, to the last digit, as `_from_value` has it: x is an integer there,
        # and the upper halves of means and coefficients make a sum that is exact before it cancels.
        x = (2 * index - (self.levels - 1)).astype(self.means.dtype)
        (high, low), (upper, lower) = _halves(self.means), _halves(self._coefficients())
        exact = x[..., None] - (self.levels - 1) * high - _regression(upper, x)
        return exact - ((self.levels - 1) * low + _regression(lower, x))

    def _coefficients(self) -> Float[Array, "*pixels pairs k"]:
        *pixels, channels, components = self.means.shape
        pairs = _pairs(channels).start
        if self.coefficients is None:
            return jnp.zeros((*pixels, pairs, components), self.means.dtype)
        if self.coefficients.shape[-2] != pairs:
            raise ValueError(
                f"{channels} channels have {pairs} pairs, each with its coefficient: got {self.coefficients.shape[-2]}"
            )
        return self.coefficients


def _grid(levels: int, dtype) -> Float[Array, " levels"]:
    return jnp.linspace(-1.0, 1.0, levels, dtype=dtype)


def _from_value(x: X, index: Integer[Array, "*x"], levels: int) -> X:
    """(x - v) (levels - 1): how far x lies from value number `index`, in half bins, to the last digit.

    A product with levels - 1 would round before the difference cancels; with the upper half of x's digits it is exact.
    """
    high, low = _halves(x)
    centre = (2 * index - (levels - 1)).astype(x.dtype)
    return ((levels - 1) * high - centre) + (levels - 1) * low


def _halves(x: Real) -> tuple[Real, Real]:
    """x as a multiple of 2^-11, whose products with small integers are exact, and the rest."""
    high = jnp.round(x * 2.0**11) / 2.0**11
    return high, x - high


def _pairs(channel: int) -> slice:
    """Where among the pairs (1, 0), (2, 0), (2, 1), ... those of `channel` with the earlier ones are."""
    return slice(channel * (channel - 1) // 2, channel * (channel + 1) // 2)


def _regression(coefficients: Float[Array, "*p pairs k"], x: Float[Array, "*p c"]) -> Float[Array, "*p c k"]:
    # sum_{j < c} coefficients_cj x_j
    channels = range(x.shape[-1])
    return jnp.stack([jnp.sum(coefficients[..., _pairs(c), :] * x[..., :c, None], axis=-2) for c in channels], axis=-2)


def _log_logistic(middle: Real, half: Real, first: Array, last: Array) -> Real:
    """The log-mass of a logistic between m - h and m + h, or up to infinity on either side.

        sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b))

    Every logarithm is negative, so nothing cancels; each is left out where its edge is at infinity.
    """
    below = jnp.where(last, 0.0, jax.nn.log_sigmoid(middle + half))
    above = jnp.where(first, 0.0, jax.nn.log_sigmoid(half - middle))
    return below + above + jnp.where(first | last, 0.0, _log1mexp(2.0 * half))


def _log1mexp(x: Real) -> Real:
    """log(1 - e^-x) for x > 0, right to the last digit from 0 to infinity."""
    small = x < 0.7
    near = jnp.log(-jnp.expm1(-jnp.where(small, x, 0.7)))
    return jnp.where(small, near, jnp.log1p(-jnp.exp(-jnp.where(small, 0.7, x))))


def log_interval(middle: X, width: Real) -> X:
    """log(Phi(m + w/2) - Phi(m - w/2)), right and differentiable from w -> 0 to the far tails.

    Three forms, none of which cancels where it is used: quadrature of the density over a narrow interval, the mass
    outside of one that holds 0, and else a difference scaled by the density at the near edge.
    """
    middle = -jnp.abs(middle)  # the law is symmetric: look at the lower tail
    low, high = middle - 0.5 * width, middle + 0.5 * width
    narrow, around = width * (1.0 - middle) < 1.0, high > 0.0
    # Each form is evaluated only where it is meant to be: elsewhere, at a safe point, lest its gradient overflow.
    quadrature = _log_quadrature(jnp.where(narrow, middle, 0.0), jnp.where(narrow, width, 0.5))
    tail = _log_tail(jnp.where(narrow | around, -1.5, middle), jnp.where(narrow | around, 1.0, width))
    outside = 0.5 * (erfc(_ROOT_HALF * high) + erfc(-_ROOT_HALF * low))
    centre = jnp.log1p(-jnp.where(around & ~narrow, outside, 0.0))
    return jnp.where(narrow, quadrature, jnp.where(around, centre, tail))


def _erfcx(x: X) -> X:
    """e^(x^2) erfc(x). Above the switch by its asymptotic series: JAX 0.10's returns 0 where erfc underflows."""
    switch = 8.0 if x.dtype == jnp.float32 else 25.0
    large = x > switch
    far = jnp.where(large, x, switch)
    series = jnp.polyval(jnp.asarray([-945.0, 105.0, -15.0, 3.0, -1.0, 1.0], x.dtype), 0.5 / far**2)
    return jnp.where(large, series / (far * float(np.sqrt(np.pi))), special.erfcx(jnp.where(large, 0.0, x)))


def _log_tail(middle: X, width: Real) -> X:
    # Phi(x) = exp(-x^2 / 2) _erfcx(-x / sqrt 2) / 2 at both edges, the density at the upper one taken out
    high, low = middle + 0.5 * width, middle - 0.5 * width
    scaled = _erfcx(-_ROOT_HALF * high) - jnp.exp(middle * width) * _erfcx(-_ROOT_HALF * low)
    return -0.5 * high**2 + jnp.log(0.5 * scaled)


def _log_quadrature(middle: X, width: Real) -> X:
    # exp(-(m + d)^2 / 2) = exp(-m^2 / 2) exp(-d (2 m + d) / 2), d = width * node / 2
    offsets = [0.5 * float(node) * width for node in _NODES]
    sums = [0.5 * float(w) * jnp.exp(-0.5 * d * (2.0 * middle + d)) for d, w in zip(offsets, _WEIGHTS, strict=True)]
    return jnp.log(width) - 0.5 * (middle**2 + LOG_2PI) + jnp.log(sum(sums[1:], sums[0]))


def _log_cdf(x: X) -> X:
    """log Phi(x). Unlike jax.scipy's, its gradient is right in the far lower tail too."""
    lower, upper = jnp.where(x < 0.0, x, 0.0), jnp.where(x < 0.0, 0.0, x)
    tail = -0.5 * lower**2 + jnp.log(0.5 * _erfcx(-_ROOT_HALF * lower))
    return jnp.where(x < 0.0, tail, jnp.log1p(-0.5 * erfc(_ROOT_HALF * upper)))
