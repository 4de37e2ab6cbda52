"""An incomplete, damaged or read-only compilation cache costs a compilation, nothing else."""

import random
import time

import pytest

from tests.faults.harness import OPTIONS, RunningProcess, assert_same_run, train

pytestmark = pytest.mark.slow
MOMENTS = 5


def entries(cache):
    return sorted(path for path in cache.glob("*-cache") if path.is_file())


def cached(tmp_path, name="run"):
    """Train with a separate cache; then rename the run to `tiny`."""
    output = train(tmp_path / name, *OPTIONS, experiment="cached", environment=place(tmp_path))
    (tmp_path / name / "cached").rename(tmp_path / name / "tiny")
    return output


def place(tmp_path):
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}


def truncate(data, moments):
    return data[: moments.randrange(len(data))]


def garbage(data, moments):
    return moments.randbytes(len(data))


def nothing(data, moments):
    return b""


def flip(data, moments):
    data, bit = bytearray(data), moments.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@pytest.mark.parametrize("damage", [truncate, garbage, nothing, flip])
def test_damaged_entries(tmp_path, whole, damage):
    cached(tmp_path, "first")
    moments = random.Random(0)
    good = {path: path.read_bytes() for path in entries(tmp_path / "cache")}
    assert len(good) >= 3
    for number in range(3):
        for path, data in good.items():
            path.write_bytes(damage(data, moments))
        cached(tmp_path, str(number))
        assert_same_run(tmp_path / str(number), whole)


def test_sigkill_while_compiling(tmp_path, whole):
    moments = random.Random(0)
    for _ in range(MOMENTS):
        had = len(entries(tmp_path / "cache"))
        process = RunningProcess(
            tmp_path / "run", "--num-samples", "0", *OPTIONS, experiment="cached", environment=place(tmp_path)
        )
        process.until(lambda had=had: len(entries(tmp_path / "cache")) > had)
        time.sleep(moments.uniform(0.0, 0.2))
        process.kill()
    cached(tmp_path)
    assert_same_run(tmp_path / "run", whole)


def test_a_read_only_cache(tmp_path, whole):
    (tmp_path / "cache").write_text("a file where the folder should be")
    cached(tmp_path)
    assert_same_run(tmp_path / "run", whole)
