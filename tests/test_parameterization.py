"""Prediction types: definitions at hand-computed numbers, both ends of the noise, the errors.

Round trips and the score's meaning are in `derivations/test_parameterization.py`.
"""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.noise_levels import NoiseLevel
from vdm_jax.parameterization import convert, prediction_target, to_eps, to_score, to_v, to_x_0

PREDICTION_TYPES = ("x_0", "eps", "v", "score")
# alpha = 0.6, sigma = 0.8, x_0 = 2, eps = -1: x_t = 0.4, v = -2.2, score = 1.25, by hand
LEVEL = NoiseLevel(*(jnp.asarray(f) for f in (0.6, 0.8, np.log(0.6), np.log(0.8))))
X_0, EPS, X_T = (jnp.asarray([value]) for value in (2.0, -1.0, 0.4))
BY_HAND = {"x_0": 2.0, "eps": -1.0, "v": -2.2, "score": 1.25}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_by_hand(prediction_type):
    assert float(prediction_target(X_0, EPS, LEVEL, prediction_type)[0]) == pytest.approx(
        BY_HAND[prediction_type], rel=1e-6
    )


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("wanted", "function"), list(zip(PREDICTION_TYPES, (to_x_0, to_eps, to_v, to_score), strict=True))
)
def test_converters_by_hand(source, wanted, function):
    value = jnp.asarray([BY_HAND[source]])
    assert float(function(value, X_T, LEVEL, source)[0]) == pytest.approx(BY_HAND[wanted], rel=1e-5)
    assert np.array_equal(convert(value, X_T, LEVEL, source, wanted), function(value, X_T, LEVEL, source))


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
def test_converters_by_hand_where_the_variance_grows(source, wanted):
    # alpha = 1, sigma = 2, x_0 = 3, eps = -0.5: x_t = 2, v = -6.5, score = 0.25, by hand
    level = NoiseLevel(*(jnp.asarray(f) for f in (1.0, 2.0, 0.0, np.log(2.0))))
    by_hand = {"x_0": 3.0, "eps": -0.5, "v": -6.5, "score": 0.25}
    value = jnp.asarray([by_hand[source]])
    assert float(convert(value, jnp.asarray([2.0]), level, source, wanted)[0]) == pytest.approx(
        by_hand[wanted], rel=1e-6
    )
    assert float(prediction_target(jnp.asarray([3.0]), jnp.asarray([-0.5]), level, wanted)[0]) == by_hand[wanted]


def test_v_and_x_0_need_no_signal():
    silent = NoiseLevel(*(jnp.asarray(f) for f in (0.0, 1.0, -jnp.inf, 0.0)))  # x_t = eps, v = -x_0
    assert np.array_equal(prediction_target(X_0, EPS, silent, "v"), -X_0)
    assert np.array_equal(to_x_0(-X_0, EPS, silent, "v"), X_0)
    assert np.array_equal(to_eps(-X_0, EPS, silent, "v"), EPS)
    assert np.array_equal(to_eps(X_0, EPS, silent, "x_0"), EPS)
    assert np.array_equal(to_score(X_0, EPS, silent, "x_0"), -EPS)


def test_v_and_eps_need_no_noise():
    clean = NoiseLevel(*(jnp.asarray(f) for f in (1.0, 0.0, 0.0, -jnp.inf)))  # x_t = x_0, v = eps
    assert np.array_equal(prediction_target(X_0, EPS, clean, "v"), EPS)
    assert np.array_equal(to_x_0(EPS, X_0, clean, "v"), X_0)
    assert np.array_equal(to_x_0(EPS, X_0, clean, "eps"), X_0)
    assert np.array_equal(to_eps(EPS, X_0, clean, "v"), EPS)


def test_unknown_prediction_type_is_refused():
    # unwrapped, since the tests' run-time type checker would raise first
    message = "prediction_type 'noise'.*'x_0', 'eps', 'v' or 'score'"
    for function in (to_x_0, to_eps, to_v):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(function)(X_0, X_T, LEVEL, "noise")
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(prediction_target)(X_0, EPS, LEVEL, "noise")
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(convert)(X_0, X_T, LEVEL, "eps", "noise")
