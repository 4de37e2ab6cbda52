"""Damaged files of a data set: one message names the set, the split, the folder and the remedy; nothing is lost."""

import json

import numpy as np
import pytest

from tests.training import shards
from tests.training.bits import assert_same_bits
from vdm_jax.training import loop
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.data import batches, sources
from vdm_jax.training.data.spec import DataOptions
from vdm_jax.training.runtime.errors import UserError

NAME, SIDE = "tiny_set", 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A prepared set in TFDS_DATA_DIR."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(loop.batching, "images_per_second", lambda *_, **__: 1.0)  # it would meet the damage first
    return shards.write(tmp_path / "tfds", NAME, train=64, test=16, side=SIDE)


def read_all():
    found = sources.load(NAME)
    return found.train.take(np.arange(len(found.train)))


def image(side=SIDE):
    return np.zeros((side, side), np.uint8)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def bit_flipped(path):
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 4  # start of the second block
    path.write_bytes(broken)


def missing(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def records(*contents):
    return lambda path: shards.write_records(path, list(contents) * 32)


def test_a_whole_set_is_read(folder):
    batch = read_all()
    assert (batch["image"] == np.arange(64, dtype=np.uint8)[:, None, None, None]).all()
    assert (batch["label"] == np.arange(64) % 10).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "1 files are missing, such as tiny_set-train.array_record-00001-of-00002"),
        (a_folder, "1 files are missing"),
        (lambda path: path.write_bytes(b""), "should be at least 64KB"),
        (lambda path: path.write_bytes(bytes(2**17)), "Corrupted"),
        (cut, "Invalid"),
        (bit_flipped, "Corrupted"),
        (records(b"\xff\xff\xff"), "Wire format"),
        (records(shards.example(b"no PNG", 1)), "cannot identify image"),
        (records(shards.record(image(SIDE + 1), 1)), r"\(9, 9, 1\), not uint8 \(8, 8, 1\)"),
        (records(shards.record(image(), 10)), "label 10 of 10 classes"),
        (records(), ""),
    ],
)
def test_a_damaged_shard_is_named_with_its_remedy(folder, damage, message):
    damage(folder / shards.shard(NAME, "train", 1, 2))
    with pytest.raises(
        UserError, match=rf"(?s)'train' of the data set 'tiny_set' .*{folder}: .*{message}.*prepare the"
    ):
        read_all()


@pytest.mark.parametrize(
    ("name", "content"), [("features.json", "{"), ("dataset_info.json", "{"), ("features.json", "[" * 9_999)]
)
def test_a_damaged_description_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=r"(?s)The data set 'tiny_set' cannot be .*prepare"):
        sources.load(NAME)


@pytest.mark.parametrize("module", ["antigravity", "tests.training.bomb", "tensorflow_datasets_evil"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_description_runs_no_code(folder, module, legacy):
    """TFDS imports whatever module a features.json names."""
    described = (
        {"type": f"{module}.X", "content": {}} if legacy else shards.features() | {"pythonClassName": f"{module}.X"}
    )
    (folder / "features.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=rf"names the class '{module}\.X', which is not part of TensorFlow Datasets"):
        sources.load(NAME)


OWN_FEATURE = """
from tensorflow_datasets.core.features import Image

class Negative(Image):
    def decode_example_np(self, example):
        return 255 - super().decode_example_np(example)
"""


def test_code_of_an_own_builder_runs_when_it_is_trusted(folder, tmp_path, monkeypatch):
    (tmp_path / "own_feature_of_a_test.py").write_text(OWN_FEATURE)
    monkeypatch.syspath_prepend(tmp_path)
    described = shards.features(SIDE)
    described["featuresDict"]["features"]["image"]["pythonClassName"] = "own_feature_of_a_test.Negative"
    (folder / "features.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"untrusted code.* if that class is your own, give --trust-data-code"):
        sources.load(NAME)
    found = sources.load(NAME, DataOptions(trust_data_code=True))
    np.testing.assert_array_equal(found.train.take(np.arange(64))["image"][:, 0, 0, 0], 255 - np.arange(64))


@pytest.mark.slow
def test_damage_found_in_training_loses_nothing(folder, tiny):
    """The run ends with the message, and resumes to the same bits once the file is restored."""
    options = {"data": NAME, "steps": 6, "batch_size": 8, "eval_batch_size": 8, "checkpoint_every": 1, "keep": 9}
    whole = loop.train(tiny(**options, workdir=str(folder.parent / "whole")))
    order = batches.ShuffledBatches(64, 8, tiny(**options).config.seed)
    (bad, first) = next((i, 32 * (i // 32)) for i in order[3])  # of the fourth batch
    path = folder / shards.shard(NAME, "train", first // 32, 2)
    good = path.read_bytes()
    content = [shards.record(np.full((SIDE, SIDE), i, np.uint8), i % 10) for i in range(first, first + 32)]
    content[bad - first] = shards.example(b"no PNG", 1)
    shards.write_records(path, content)
    run = tiny(**options)
    with pytest.raises(UserError, match=r"'train' of the data set 'tiny_set' cannot be read"):
        loop.train(run)
    with Checkpoints(run.folder / "checkpoints", keep=9) as checkpoints:
        assert checkpoints.latest == 3
    path.write_bytes(good)
    assert_same_bits(loop.train(tiny(**options)).state, whole.state)
