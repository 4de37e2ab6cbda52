import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax.training.keys import PURPOSES, stream
from vdm_jax.training.state import moving_average


@functools.partial(jax.jit, static_argnums=(0, 1))
def weights(number, decay, first=0):
    """The weight of each set of parameters in the average after this many updates, the initial ones first.

    The parameters of update i are the i-th unit vector, so that the average is the vector of weights.
    """
    units = jnp.eye(number + 1)

    def update(ema, n):
        return moving_average(ema, units[n + 1], decay, first + n), None

    return jax.lax.scan(update, units[0], jnp.arange(number))[0]


def test_late_in_a_run_the_average_has_the_plain_geometric_weights():
    for decay in (0.8, 0.99, 0.9999):
        late = math.ceil((10 * decay - 1) / (1 - decay))  # (1 + n) / (10 + n) exceeds the decay from here on
        expected = np.append(decay**11, (1 - decay) * decay ** np.arange(11.0)[::-1])
        for first in (late, 1_000_000, 2**31 - 1 - 11):
            np.testing.assert_allclose(weights(11, decay, first), expected, rtol=2e-6)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_the_average_s_weights_sum_to_one(decay):
    for number in (1, 10, 400):
        assert math.fsum(np.asarray(weights(number, decay), np.float64)) == pytest.approx(1.0, abs=3e-7)


def test_while_the_decay_warms_up_the_weights_are_ratios_of_binomial_coefficients():
    # (1 - d_(j-1)) d_j ... d_(N-1) with d_n = (1 + n) / (10 + n)
    for number in (1, 3, 37):
        exact = [math.comb(j + 8, 8) / math.comb(number + 9, 9) for j in range(number + 1)]
        assert sum(exact) == pytest.approx(1.0, abs=1e-15)
        np.testing.assert_allclose(weights(number, 0.9999), exact, rtol=1e-5)


def test_after_400_updates_at_a_large_decay_the_initial_parameters_weigh_nothing():
    assert 0.9999**400 > 0.96  # of the average without warm-up
    assert float(weights(400, 0.9999)[0]) < 1e-17
    late = np.asarray(weights(400, 0.9999), np.float64)
    assert late @ np.arange(401.0) == pytest.approx(400 - 400 / 10, rel=1e-3)  # the mean age is a tenth of the run


def test_average_of_constants_is_exactly_constant():
    params = {"a": jax.random.normal(jax.random.key(0), (1000,))}
    ema = params
    for n in (*range(50), 10**6):
        ema = jax.jit(moving_average, static_argnums=2)(ema, params, 0.9999, n)
    assert (ema["a"] == params["a"]).all()


def test_zero_decay_is_the_parameters_themselves():
    for n in (0, 1000):
        assert float(moving_average(jnp.float32(5.0), jnp.float32(0.5), 0.0, n)) == 0.5


def test_streams_of_keys_are_distinct():
    def descendants(key):
        folded = [jax.random.fold_in(key, i) for i in range(20)]
        return [key, *folded, *jax.random.split(key, 20)]

    keys = {
        (seed, purpose): {np.asarray(jax.random.key_data(k)).tobytes() for k in descendants(stream(seed, purpose))}
        for seed in (0, 1)
        for purpose in PURPOSES
    }
    everything = list(keys.values())
    assert len(set().union(*everything)) == sum(map(len, everything))
