import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.training.keys import PURPOSES, stream
from vdm_jax.training.state import moving_average


def test_average_has_geometric_weights():
    decay, values = 0.8, np.linspace(-1.0, 2.0, 12, dtype=np.float32)
    ema = jnp.asarray(values[0])
    for value in values[1:]:
        ema = moving_average(ema, jnp.asarray(value), decay)
    age = np.arange(11)[::-1]
    expected = decay**11 * values[0] + np.sum((1 - decay) * decay**age * values[1:])
    np.testing.assert_allclose(ema, expected, rtol=1e-6)


def test_average_of_constants_is_exactly_constant():
    params = {"a": jax.random.normal(jax.random.key(0), (1000,))}
    ema = params
    for _ in range(50):
        ema = jax.jit(moving_average, static_argnums=2)(ema, params, 0.9999)
    assert (ema["a"] == params["a"]).all()


def test_zero_decay_is_the_parameters_themselves():
    assert float(moving_average(jnp.float32(5.0), jnp.float32(0.5), 0.0)) == 0.5


def test_streams_of_keys_never_meet():
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
