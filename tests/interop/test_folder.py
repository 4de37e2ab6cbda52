"""Reading and writing of diffusers folders."""

import json
import os
import pickle
import struct

import numpy as np
import pytest

from tests.interop.reference import TINY, random_tensors
from tests.interop.test_schedulers import GOOGLE
from tests.training.bits import assert_same_bits
from vdm_jax import interop
from vdm_jax.interop import Scheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(TINY)


@pytest.fixture(scope="module")
def expected(tensors):
    return interop.from_tensors(*interop.from_unet_config(TINY), tensors)


@pytest.fixture
def folder(tmp_path, tensors):
    """A `UNet2DModel` folder with a scheduler, written by hand."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(GOOGLE))
    (tmp_path / WEIGHTS).write_bytes(by_hand(tensors))
    return tmp_path


def by_hand(tensors):
    """A safetensors file: the header's length in 8 bytes, the header in JSON, the arrays in little endian."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        raw = value.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_folder_is_read(folder, expected):
    got = interop.load(folder)
    assert (got.network, got.shape) == interop.from_unet_config(TINY)
    assert got.scheduler == interop.from_scheduler_config(GOOGLE)
    assert_same_bits(got.params, expected)


def test_a_bare_file_is_read(folder, expected, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    bare = (folder / WEIGHTS).rename(elsewhere / "weights.safetensors")
    got = interop.load(bare, folder / "config.json")
    assert_same_bits(got.params, expected)
    assert got.scheduler is None
    with pytest.raises(ValueError, match=r"config.json does not exist: .* \(config\)"):
        interop.load(bare)


@pytest.mark.parametrize("scheduler", [None, Scheduler(100, "squaredcos_cap_v2", prediction_type="v")])
def test_a_saved_folder_loads_to_the_same_bits(folder, tensors, tmp_path_factory, scheduler):
    loaded, pipeline = interop.load(folder)._replace(scheduler=scheduler), tmp_path_factory.mktemp("new") / "pipeline"
    interop.save(pipeline, loaded)
    again = interop.load(pipeline)
    assert again[:2] == loaded[:2]
    assert again.scheduler == scheduler
    assert_same_bits(again.params, loaded.params)
    unet = pipeline if scheduler is None else pipeline / "unet"
    data = (unet / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}  # diffusers insists on it
    assert header.keys() == tensors.keys()
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        assert (entry["dtype"], tuple(entry["shape"])) == ("F32", tensors[name].shape)
        assert data[begin:end] == tensors[name].tobytes()
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        interop.save(pipeline, loaded)


def test_a_damaged_file_is_refused(folder):
    good = (folder / WEIGHTS).read_bytes()
    for cut in (0, 4, 8, 100, len(good) // 2, len(good) - 1):
        (folder / WEIGHTS).write_bytes(good[:cut])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            interop.load(folder)
    (folder / WEIGHTS).write_bytes(good + b"\0")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        interop.load(folder)
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        interop.load(folder)


def test_no_flipped_bit_of_the_header_passes_for_other_weights(folder, expected):
    """With a flipped bit, a file is refused or has the same weights."""
    good, passed = (folder / WEIGHTS).read_bytes(), 0
    (length,) = struct.unpack("<Q", good[:8])
    for place in range(0, 8 + length, 97):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        (folder / WEIGHTS).write_bytes(bytes(bad))
        try:
            got = interop.load(folder)
        except ValueError:
            continue
        passed += 1
        assert_same_bits(got.params, expected)
    assert passed < 5  # the metadata is not used


def test_a_flipped_bit_of_a_saved_file_is_detected(folder, tmp_path_factory):
    new = tmp_path_factory.mktemp("new") / "unet"
    interop.save(new, interop.load(folder)._replace(scheduler=None))
    good = bytearray((new / WEIGHTS).read_bytes())
    good[-3] ^= 1  # the last number, in the seventh digit: no other check detects it
    (new / WEIGHTS).write_bytes(bytes(good))
    with pytest.raises(ValueError, match=r"SHA-256 in diffusion_pytorch_model.safetensors.sha256: copy it again"):
        interop.load(new)


class Bomb:
    """Its pickle runs a command when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_refused_unread(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(folder / "ran")))
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=r"is a pickle.*safe_serialization=True"):
            interop.load(path)
    assert not (folder / "ran").exists()


def test_a_pickle_named_as_safetensors_is_not_run(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(folder / "ran")))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        interop.load(folder)
    assert not (folder / "ran").exists()


def test_missing_files_are_named(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"nowhere does not exist: name a folder or a .safetensors file"):
        interop.load(folder / "nowhere")
    with pytest.raises(ValueError, match=f"does not contain {WEIGHTS}: name a folder"):
        interop.load(tmp_path_factory.mktemp("empty"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON .*: copy it again"):
        interop.load(folder)


def test_half_precision_is_refused_with_the_remedy(folder, tensors):
    from safetensors.numpy import save

    (folder / WEIGHTS).write_bytes(save({name: value.astype(np.float16) for name, value in tensors.items()}))
    with pytest.raises(ValueError, match=r"model.float\(\)\) \(\d+\): conv_in.bias float16"):
        interop.load(folder)
