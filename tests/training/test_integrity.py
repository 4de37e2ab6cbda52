import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vdm_jax.training.integrity import Corrupted, summarize, with_digest, without_digest
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


def test_every_flipped_bit_is_detected():
    whole = summarize(ARRAYS).checksum
    seen = {whole}
    for place, x in enumerate(ARRAYS):
        for bit in range(8 * x.nbytes):
            seen.add(summarize([*ARRAYS[:place], with_bit_flipped(x, bit), *ARRAYS[place + 1 :]]).checksum)
    assert len(seen) == 1 + sum(8 * x.nbytes for x in ARRAYS)


def test_swapped_numbers_are_detected():
    assert summarize(jnp.asarray([1.0, 2.0])) != summarize(jnp.asarray([2.0, 1.0]))
    assert summarize([jnp.ones(2), jnp.zeros(2)]) != summarize([jnp.zeros(2), jnp.ones(2)])


def test_the_checksum_does_not_depend_on_the_number_of_devices():
    mesh, x = make_mesh(8), jax.random.normal(jax.random.key(0), (16, 24))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), (None, "batch")))
    for sharding in (replicated(mesh), rows, columns):
        assert summarize(jax.device_put(x, sharding)) == summarize(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_single_number_that_is_not_finite_is_detected(dtype, bad):
    good = {"w": jnp.zeros((3, 3), dtype), "step": jnp.asarray(3)}
    assert summarize(good).finite
    assert not summarize({**good, "w": good["w"].at[1, 2].set(bad)}).finite


def test_notes_are_returned_unless_they_have_changed():
    notes = {"step": 3, "seconds": 0.1 + 0.2, "config": {"a": [1, None]}}
    written = with_digest(notes)
    assert without_digest(written) == notes
    others = [{**written, "step": 4}, notes, {**written, "more": 1}, {**written, "digest": "0"}]
    others.append({name: value for name, value in written.items() if name != "seconds"})
    for other in others:
        with pytest.raises(Corrupted):
            without_digest(other)
