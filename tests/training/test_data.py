import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.derivations.check import assert_mean
from vdm_jax.training.config import TrainConfig
from vdm_jax.training.data import batches, sources, tfds_images
from vdm_jax.training.data.augmentation import augmentations, flip_half, rotate, swap_channels
from vdm_jax.training.data.planes import PLANES
from vdm_jax.training.run import check_data_kind
from vdm_jax.training.runtime.errors import UserError

needs_tfds = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="set TFDS_DATA_DIR to prepared data sets")


def numbered(size, batch=4, seed=0, flip=False):
    """An iterator over 3 x 2 images whose pixels are their index."""
    records = [
        {"image": np.full((3, 2, 1), i, np.uint8) + np.array([[[0], [100]]], np.uint8), "label": i} for i in range(size)
    ]
    return batches.train_iterator(sources.Images(records, (3, 2, 1)), batch, seed, [flip_half] if flip else [])


def labels(iterator, batches):
    return np.concatenate([next(iterator)["label"] for _ in range(batches)])


def test_digits_split_is_fixed_and_complete():
    from sklearn.datasets import load_digits

    digits = sources.load("digits")
    assert digits.spec[:6] == ("digits", (8, 8, 1), 17, 10, 1437, 360)
    train, test = (images.take(np.arange(len(images))) for images in digits[1:])
    both = np.concatenate([train["image"], test["image"]])
    assert sorted(x.tobytes() for x in both) == sorted(x.astype(np.uint8).tobytes() for x in load_digits().images)
    assert test["label"][:8].tolist() == sources.load("digits").test.take(np.arange(8))["label"].tolist()
    assert train["image"].dtype == np.uint8
    assert train["label"].dtype == np.int32
    assert train["image"].max() == 16


def test_digits_are_the_same_where_scikit_learn_keeps_them_elsewhere(monkeypatch):
    rows = sources._digit_rows()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert (sources._digit_rows() == rows).all()
    assert rows.dtype == np.uint8


def test_every_epoch_holds_every_example_once_in_a_new_order():
    epochs = labels(numbered(10), 15).reshape(6, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_depends_on_the_seed_and_on_nothing_else():
    assert (labels(numbered(50, seed=3), 20) == labels(numbered(50, seed=3), 20)).all()
    assert (labels(numbered(50, seed=3), 20) != labels(numbered(50, seed=4), 20)).any()


def test_state_resumes_exactly_flips_included():
    iterator = numbered(10, flip=True)
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(9)]
    resumed = numbered(10, flip=True)
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        again = next(resumed)
        assert (again["image"] == batch["image"]).all()
        assert (again["label"] == batch["label"]).all()


def test_half_of_the_images_are_mirrored_and_the_others_unchanged():
    iterator = numbered(100, batch=100, flip=True)
    batch = next(iterator)
    left, right = batch["image"][:, 0, 0, 0].astype(int), batch["image"][:, 0, 1, 0].astype(int)
    mirrored = left > right
    assert (np.minimum(left, right) == batch["label"]).all()
    assert (np.abs(left - right) == 100).all()
    assert 30 < mirrored.sum() < 70
    assert (mirrored != (next(iterator)["image"][:, 0, 0, 0] >= 100)).any()


def test_images_are_decoded_once_and_rightly_by_many_threads():
    decoded = []

    class Slow(list):
        def __getitem__(self, i):
            decoded.append(i)
            return super().__getitem__(i)

    records = Slow({"image": np.full((2, 2, 1), i, np.uint8), "label": i} for i in range(100))
    images = sources.Images(records, (2, 2, 1))
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(images.take, [np.arange(100)] * 8))
    assert all((batch["image"][:, 0, 0, 0] == np.arange(100)).all() for batch in batches)
    before = len(decoded)
    assert (images.take(np.arange(100))["label"] == np.arange(100)).all()
    assert len(decoded) == before


def test_a_set_too_big_for_ram_gives_the_same_batches(monkeypatch):
    records = [{"image": np.full((2, 2, 1), i, np.uint8), "label": i} for i in range(9)]
    small = sources.Images(records, (2, 2, 1)).take(np.array([3, 1, 8]))
    monkeypatch.setattr(sources, "RAM_LIMIT", 1)
    big = sources.Images(records, (2, 2, 1))
    assert not big.fits_in_memory
    assert all((big.take(np.array([3, 1, 8]))[name] == small[name]).all() for name in small)
    monkeypatch.setattr(sources, "RAM_LIMIT", 9 * 4)
    fits = [sources.Images(records, (2, 2, 1), kind).fits_in_memory for kind in (np.uint8, np.uint16)]
    assert fits == [True, False]


def test_unknown_set_names_the_nearest():
    with pytest.raises(UserError, match=r"Unknown data set 'fashion_mnit'. Did you mean fashion_mnist"):
        sources.load("fashion_mnit")


def test_absent_set_without_tensorflow_names_both_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds_images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)mnist.*needs TensorFlow.*TFDS_DATA_DIR.*pip install.*--data digits"):
        sources.load("mnist")


def test_no_network_names_both_remedies(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    def fail(self, **_):
        raise ConnectionError("Failed to resolve host")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds_images.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(
        UserError, match=r"(?s)mnist.*Failed to resolve host.*TFDS_DATA_DIR.*pip install.*--data digits"
    ):
        sources.load("mnist")


def test_a_set_without_images_of_one_size_is_refused(monkeypatch):
    for image in ({}, {"image": types.SimpleNamespace(shape=(None, None, 3))}):
        builder = types.SimpleNamespace(name="odd", info=types.SimpleNamespace(features=image))
        monkeypatch.setattr(tfds_images, "_builder", lambda name, builder=builder: builder)
        with pytest.raises(UserError, match="'odd' does not contain images of a fixed size"):
            sources.load("odd")


def test_a_set_that_even_its_description_needs_tensorflow_for(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(UserError, match=r"(?s)titanic.*needs TensorFlow.*TFDS_DATA_DIR.*--data digits"):
        sources.load("titanic")


@needs_tfds
@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))]
)
def test_real_sets_are_read_without_tensorflow(name, shape):
    real = sources.load(name)
    assert (real.spec.shape, real.spec.levels, real.spec.num_classes) == (shape, 256, 10)
    batch = next(batches.train_iterator(real.train, 64, 0, [flip_half]))
    assert batch["image"].shape == (64, *shape)
    assert batch["image"].max() > 200
    assert len(set(batch["label"].tolist())) > 5
    assert "tensorflow" not in sys.modules


def turned(augment, images, seed=0):
    return augment(images, np.random.default_rng(seed).random((len(images), images.shape[-1])))


def test_rotations_are_the_four_and_equally_often():
    images = np.broadcast_to(np.arange(18, dtype=np.uint8).reshape(3, 3, 2), (4000, 3, 3, 2))
    quarters = [np.rot90(images[0], k) for k in range(4)]
    counts = [sum(np.array_equal(image, quarter) for image in turned(rotate, images)) for quarter in quarters]
    assert sum(counts) == 4000
    assert max(abs(count - 1000) for count in counts) < 4 * (4000 * 3 / 16) ** 0.5


def test_channels_come_in_every_order_equally_often():
    images = np.broadcast_to(np.array([1, 2, 3], np.uint8), (6000, 2, 2, 3))
    swapped = turned(swap_channels, images)
    assert (swapped == swapped[:, :1, :1]).all()  # one order for a whole image
    orders, counts = np.unique(swapped[:, 0, 0], axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 1000).max() < 4 * (6000 * 5 / 36) ** 0.5


def test_options_select_the_augmentations_and_each_is_random_by_itself():
    assert augmentations(flip=True, rotation=True, channels=True) == [flip_half, rotate, swap_channels]
    assert augmentations(flip=False, rotation=False, channels=False) == []
    records = [{"image": np.arange(4, dtype=np.uint8).reshape(2, 2, 1), "label": 0}] * 400
    batch = next(batches.train_iterator(sources.Images(records, (2, 2, 1)), 400, 0, [flip_half, flip_half]))
    mirrored = (batch["image"][:, 0, 0, 0] == 1).sum()
    assert 120 < mirrored < 280  # two flips with the same random numbers would undo each other


@pytest.mark.parametrize("name", PLANES)
def test_points_have_the_moments_of_their_distribution(name):
    plane = PLANES[name]()
    np.testing.assert_allclose(plane.weights.sum(), 1.0, rtol=1e-12)
    points = sources.load(name).test.take(np.arange(10_000))["image"]
    assert points.dtype == np.float32
    assert np.abs(points).max() < 2.2
    mean = plane.weights @ plane.means
    assert_mean(points, mean)
    apart = plane.means - mean
    assert_mean((points - mean) ** 2, plane.weights @ (apart**2 + plane.variances[:, None]))
    assert_mean(np.prod(points - mean, axis=1), plane.weights @ np.prod(apart, axis=1))


def test_points_are_the_same_each_time_and_test_points_are_others():
    first, again = sources.load("moons"), sources.load("moons")
    few = np.arange(100)
    np.testing.assert_array_equal(first.train.take(few)["image"], again.train.take(few)["image"])
    assert not np.any(first.train.take(few)["image"] == first.test.take(few)["image"])
    assert (len(first.train), len(first.test), first.spec.noun) == (50_000, 10_000, "points")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("images", {"data": "moons"}, r"--data moons has points of shape \(2,\): .* needs images.* Use --data digits"),
        ("planes", {"data": "digits"}, "--data digits .* needs points in the plane. Use --data two_modes"),
        ("vectors", {"data": "digits"}, r"--data digits .* needs vectors. Use --data .* \(N, D\), or two_modes"),
        ("series", {"data": "moons"}, r"--data moons .* needs series. Use --data .* \(N, L, C\)"),
        ("vectors", {"data": "moons", "flip": True}, "--flip, .* apply to images, not to points"),
    ],
)
def test_data_of_another_kind_are_refused(kind, options, message):
    config = type("Recipe", (TrainConfig,), {"data_kind": kind})(**options)
    with pytest.raises(UserError, match=message):
        check_data_kind("mine", config, sources.load(config.data))
