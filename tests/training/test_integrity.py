import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vdm_jax.training.integrity import Damaged, look, sealed, unsealed
from vdm_jax.training.runtime.devices import make_mesh, replicated

ARRAYS = [
    jnp.asarray([[1.0, -0.0], [3e-45, 2.5]]),
    jnp.asarray([1.0, 2.0], jnp.bfloat16),
    jnp.asarray(7, jnp.int32),
    jnp.asarray([3, 0, 255], jnp.uint8),
]


def with_bit_flipped(x, bit):
    raw = bytearray(np.asarray(x).tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    return jnp.asarray(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))


def test_every_flipped_bit_shows():
    whole = look(ARRAYS).checksum
    seen = {whole}
    for place, x in enumerate(ARRAYS):
        for bit in range(8 * x.nbytes):
            seen.add(look([*ARRAYS[:place], with_bit_flipped(x, bit), *ARRAYS[place + 1 :]]).checksum)
    assert len(seen) == 1 + sum(8 * x.nbytes for x in ARRAYS)


def test_numbers_in_each_others_place_show():
    assert look(jnp.asarray([1.0, 2.0])) != look(jnp.asarray([2.0, 1.0]))
    assert look([jnp.ones(2), jnp.zeros(2)]) != look([jnp.zeros(2), jnp.ones(2)])


def test_devices_do_not_matter():
    mesh, x = make_mesh(8), jax.random.normal(jax.random.key(0), (16, 24))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), (None, "batch")))
    for sharding in (replicated(mesh), rows, columns):
        assert look(jax.device_put(x, sharding)) == look(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_single_number_that_is_not_finite_shows(dtype, bad):
    good = {"w": jnp.zeros((3, 3), dtype), "step": jnp.asarray(3)}
    assert look(good).finite
    assert not look({**good, "w": good["w"].at[1, 2].set(bad)}).finite


def test_what_was_sealed_comes_back_and_what_was_changed_does_not():
    notes = {"step": 3, "seconds": 0.1 + 0.2, "config": {"a": [1, None]}}
    written = sealed(notes)
    assert unsealed(written) == notes
    others = [{**written, "step": 4}, notes, {**written, "more": 1}, {**written, "seal": "0"}]
    others.append({name: value for name, value in written.items() if name != "seconds"})
    for other in others:
        with pytest.raises(Damaged):
            unsealed(other)
