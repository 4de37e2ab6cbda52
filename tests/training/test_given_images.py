"""Images that a user gives to a trained model: which are read, which are refused and how."""

import numpy as np
import pytest
from PIL import Image

from vdm_jax.training.data import given_images
from vdm_jax.training.experiment import DataSpec
from vdm_jax.training.runtime.errors import UserError

SPEC = DataSpec("gray", (4, 6, 1), 256, 3, 10, 10)
X = np.random.RandomState(0).randint(256, size=(3, 4, 6, 1)).astype(np.uint8)


def save(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)


def values(given):
    return given.examples.take(np.arange(len(given.examples)))


def test_arrays(tmp_path):
    np.save(tmp_path / "x.npy", X[..., 0].astype(np.int64))
    given = given_images.read(str(tmp_path / "x.npy"), SPEC)
    np.testing.assert_array_equal(values(given)["image"], X)
    assert (given.names, given.labeled) == (["0", "1", "2"], False)
    np.savez(tmp_path / "x.npz", other=X[:1], x=X, y=np.array([2, 0, 1]))
    given = given_images.read(str(tmp_path / "x.npz"), SPEC)
    assert (values(given)["label"].tolist(), given.labeled) == ([2, 0, 1], True)
    np.savez(tmp_path / "one.npz", images=X)
    assert not given_images.read(str(tmp_path / "one.npz"), SPEC).labeled
    points = DataSpec("moons", (2,), 0, 0, 10, 10)
    np.save(tmp_path / "points.npy", np.array([[0.5, 1.5]]))
    given = given_images.read(str(tmp_path / "points.npy"), points)
    assert values(given)["image"].dtype == np.float32


def test_image_files(tmp_path):
    (tmp_path / "numbers").mkdir()
    for name, pixels in zip(("1/b.png", "1/a.png", "2/c.tiff"), X, strict=True):
        save(tmp_path / "numbers" / name, pixels)
    given = given_images.read(str(tmp_path / "numbers"), SPEC)
    assert given.names == ["1/a.png", "1/b.png", "2/c.tiff"]
    np.testing.assert_array_equal(values(given)["image"], X[[1, 0, 2]])
    assert values(given)["label"].tolist() == [1, 1, 2]
    (tmp_path / "numbers/1").rename(tmp_path / "numbers/cat")
    assert not given_images.read(str(tmp_path / "numbers"), SPEC).labeled  # the order of names is not known here
    one = given_images.read(str(tmp_path / "numbers/2/c.tiff"), SPEC)
    np.testing.assert_array_equal(values(one)["image"], X[2:])
    assert (one.names, one.labeled) == ([str(tmp_path / "numbers/2/c.tiff")], False)
    resized = given_images.read(str(tmp_path / "numbers/2/c.tiff"), SPEC._replace(shape=(2, 2, 3)), 2)
    assert values(resized)["image"].shape == (1, 2, 2, 3)


@pytest.mark.parametrize(
    ("save_as", "array", "message"),
    [
        ("a.npy", X[:, :3], r"an example is 3x6x1, and images of gray are 4x6x1"),
        ("a.npy", X[0, :, :, 0], r"an example is 6, and images of gray are 4x6x1"),
        ("a.npy", np.float32(X), r"type float32: images of gray are integers 0 .. 255"),
        ("a.npy", X.astype(np.int32) + 256, r"example 0 contains \d+, not a pixel value in 0 .. 255"),
        ("a.npy", -X.astype(np.int32), r"example 0 contains -\d+, not a pixel value"),
        ("a.npy", X[:0], r"has no examples"),
        ("a.npz", {"x": X, "y": np.array([0, 1, 3])}, r"example 2 has label 3; gray has 3 classes \(0..2\)"),
        ("a.npz", {"x": X, "y": np.array([0, 1])}, r"the labels y must be integers of shape \(3,\)"),
        ("a.npz", {"one": X, "two": X}, r"has the arrays one, two: name the examples x"),
        ("a.png", X[0, :3], r"a.png: an example is 3x6x1, and images of gray are 4x6x1"),
        ("a.png", b"nothing", r"a.png cannot be read: "),
        ("a.npy", b"nothing", r"a.npy cannot be read: "),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, save_as, array, message):
    path = tmp_path / save_as
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif isinstance(array, dict):
        np.savez(path, **array)
    elif path.suffix == ".png":
        save(path, array)
    else:
        np.save(path, array)
    with pytest.raises(UserError, match=message):
        given_images.read(str(path), SPEC)


def test_missing_files_and_wrong_kinds(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.png: there is no such file or folder"):
        given_images.read(str(tmp_path / "nothing.png"), SPEC)
    with pytest.raises(UserError, match="contains no images"):
        given_images.read(str(tmp_path), SPEC)
    save(tmp_path / "a.png", X[0])
    with pytest.raises(UserError, match=r"the model is of points \(2,\), not of images"):
        given_images.read(str(tmp_path / "a.png"), DataSpec("moons", (2,), 0, 0, 10, 10))
    np.save(tmp_path / "nan.npy", np.array([[0.5, np.nan]]))
    with pytest.raises(UserError, match="example 0 contains nan, not a finite number"):
        given_images.read(str(tmp_path / "nan.npy"), DataSpec("moons", (2,), 0, 0, 10, 10))
