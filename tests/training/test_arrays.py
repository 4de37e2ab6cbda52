"""A user's own array files: every format gives the same examples, and what cannot be used is one message."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.training.bits import assert_same_bits
from vdm_jax.training import loop
from vdm_jax.training.data import arrays, sources, user_files
from vdm_jax.training.data.spec import DataOptions
from vdm_jax.training.evaluation.report import is_finished, write_report
from vdm_jax.training.run import newest_checkpoint
from vdm_jax.training.runtime.errors import UserError

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 7, (40, 3, 2)).astype(np.uint8)
LABELS = np.arange(40) % 4
SERIES = RANDOM.standard_normal((30, 5, 2))


def saved(path, **named):
    """Save arrays in the format of the path's suffix; returns the path as --data takes it."""
    if path.suffix == ".npy":
        np.save(path, *named.values())
    elif path.suffix == ".npz":
        np.savez(path, **named)
    else:
        save_file({name: np.ascontiguousarray(x) for name, x in named.items()}, path)
    return str(path)


def everything(images):
    return images.take(np.arange(len(images)))


@pytest.fixture(params=["in memory", "on the disk"])
def either_way(request, monkeypatch):
    """Data that fit in memory, and data that do not."""
    if request.param == "on the disk":
        monkeypatch.setattr(sources, "RAM_LIMIT", 1)
        monkeypatch.setattr(arrays, "CHECKED_AT_ONCE", 1)
        monkeypatch.setattr(arrays, "CHUNK", 7)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.usefixtures("either_way")
def test_every_example_is_read_once_from_every_format(tmp_path, suffix):
    named = {"x": IMAGES} if suffix == ".npy" else {"x": IMAGES, "y": LABELS}
    found = sources.load(saved(tmp_path / f"mine{suffix}", **named), DataOptions(test_share=0.25))
    assert found.spec[:6] == ("mine", (3, 2, 1), 7, 0 if suffix == ".npy" else 4, 30, 10)
    batches = [everything(images) for images in (found.train, found.test)]
    images, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label"))
    assert images.dtype == np.uint8
    rows = [int(np.flatnonzero((image[..., 0] == IMAGES).all(axis=(1, 2)))[0]) for image in images]
    assert sorted(rows) == list(range(40))
    assert rows[-10] + 9 < rows[-1]  # the split is random
    np.testing.assert_array_equal(labels, 0 if suffix == ".npy" else LABELS[rows])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.usefixtures("either_way")
def test_own_test_examples_are_kept_apart_and_in_order(tmp_path, suffix):
    named = {"x_train": SERIES[:20], "x_test": SERIES[20:], "y_train": LABELS[:20], "y_test": LABELS[:10]}
    found = sources.load(saved(tmp_path / f"waves{suffix}", **named))
    assert found.spec[:6] == ("waves", (5, 2), 0, 4, 20, 10)
    assert found.spec.noun == "series"
    for images, x, y in ((found.train, SERIES[:20], LABELS[:20]), (found.test, SERIES[20:], LABELS[:10])):
        batch = everything(images)
        assert batch["image"].dtype == np.float32
        np.testing.assert_array_equal(batch["image"], x.astype(np.float32))
        np.testing.assert_array_equal(batch["label"], y)


def test_vectors_of_any_floating_point_type_and_of_either_byte_order(tmp_path):
    for kind in ("<f2", ">f4", "<f8"):
        found = sources.load(saved(tmp_path / "table.npy", x=SERIES[:, :, 0].astype(kind)))
        assert (found.spec.shape, found.spec.levels, found.spec.noun) == ((5,), 0, "points")
        batch = everything(found.test)["image"]
        assert batch.dtype == np.dtype(np.float32)
        assert len(batch) == 3
        assert all((batch_row == SERIES[:, :, 0].astype(kind).astype("f4")).all(axis=1).any() for batch_row in batch)


@pytest.mark.parametrize(
    ("x", "levels", "dtype"),
    [
        (IMAGES > 3, 2, np.uint8),
        (IMAGES.astype(np.int64) * 40, 241, np.uint8),
        (IMAGES.astype(np.uint16) * 300, 1801, np.uint16),
        (np.full((4, 2, 2, 3), 255, np.uint8), 256, np.uint8),
    ],
)
def test_images_have_as_many_levels_as_values(tmp_path, x, levels, dtype):
    path = saved(tmp_path / "x.npy", x=x)
    found = sources.load(path)
    assert (found.spec.levels, found.train.take(np.arange(2))["image"].dtype) == (levels, dtype)
    assert sources.load(path, DataOptions(levels=4_000)).spec.levels == 4_000


def test_the_split_is_the_same_in_every_run_and_grows_with_its_share(tmp_path):
    path = saved(tmp_path / "table.npy", x=SERIES[:, 0])
    first, again = (everything(sources.load(path).test)["image"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    more = everything(sources.load(path, DataOptions(test_share=0.5)).test)["image"]
    assert (len(first), len(more)) == (3, 15)
    assert {x.tobytes() for x in first} < {x.tobytes() for x in more}


def with_value(x, value):
    x = x.copy()
    x[17, 1] = value
    return x


MISFITS = {
    "NaN": (with_value(SERIES, np.nan), "example 17 contains nan, which is not a finite float32"),
    "too large": (with_value(SERIES, 1e39), r"example 17 contains 1e\+39, which is not a finite float32"),
    "negative": (with_value(IMAGES.astype(int), -1), r"example 17 contains -1, which is not 0 \.\. 6"),
    "objects": (np.array([{}], dtype=object), "holds Python objects, which are never unpickled"),
    "text": (np.array([["a"]]), "<U1 of shape .* is neither integers"),
    "complex": (np.zeros((4, 2), complex), "complex128 of shape .* is neither integers"),
    "scalars": (SERIES[:, 0, 0], r"float64 of shape \(30,\) is neither"),
    "real images": (np.zeros((4, 2, 2, 3)), r"For images, save integers, such as \(255 \* x\)\.round"),
    "a table of integers": (IMAGES[:, 0], r"For vectors, save x\.astype\(np\.float32\)"),
    "channels first": (np.ones((4, 3, 8, 8), int), r"channels first. Save x\.transpose\(0, 2, 3, 1\)"),
    "nothing": (np.zeros((0, 3)), r"is empty: its shape is \(0, 3\)"),
    "black": (np.zeros((4, 2, 2), int), "the largest pixel value is 0, and images have"),
    "too many levels": (np.full((4, 2, 2), 70_000), "the largest pixel value is 70000"),
    "a single example": (SERIES[:1], "leaves 1 for testing and 0 for training: at least one of each"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_array_that_cannot_be_used_is_one_message(tmp_path, name):
    x, message = MISFITS[name]
    with pytest.raises(UserError, match=rf"{tmp_path}.*{message}|{message}"):
        sources.load(saved(tmp_path / "x.npy", x=x))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_of_an_array_larger_than_memory_are_checked_when_they_are_read(tmp_path, value, monkeypatch):
    monkeypatch.setattr(arrays, "CHECKED_AT_ONCE", 1)
    saved(tmp_path / "x.npz", x_train=with_value(SERIES, value), x_test=SERIES)
    _, train, _ = arrays.open_array(tmp_path / "x.npz", DataOptions())
    train.__getitems__(range(17))
    with pytest.raises(UserError, match=rf"example 17 contains {value}"):
        train.__getitems__(range(10, 20))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"a": SERIES, "b": SERIES}, "no array x; its arrays: a, b. Name them x_train and x_test"),
        ({"x_train": SERIES}, "no array x_test; its arrays: x_train"),
        ({"x_train": SERIES, "x_test": SERIES, "y_test": LABELS[:30]}, "no array y_train"),
        ({"x": SERIES, "y": LABELS}, r"labels y must be integers .* of shape \(30,\).* not int64 of shape \(40,\)"),
        ({"x": IMAGES, "y": LABELS - 1}, "labels y must be integers 0, 1, 2"),
        ({"x": IMAGES, "labels": LABELS / 2}, "labels labels must be integers"),
        ({"x_train": SERIES, "x_test": SERIES[:, :3]}, "training and test examples differ"),
        ({"x_train": SERIES, "x_test": np.ones((4, 5, 2), int)}, "training and test examples differ"),
        (
            {"x_train": IMAGES, "x_test": IMAGES, "y_train": LABELS % 2, "y_test": LABELS},
            "the test label 2 is the label of no training example",
        ),
    ],
)
def test_arrays_that_do_not_fit_together_are_one_message(tmp_path, named, message):
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(UserError, match=message):
            sources.load(saved(tmp_path / f"x{suffix}", **named))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no array", pickle.dumps([1, 2, 3]), bytes(200), "cut"])
def test_a_damaged_file_is_one_message(tmp_path, suffix, content):
    path = saved(tmp_path / f"x{suffix}", x=SERIES)
    (tmp_path / f"x{suffix}").write_bytes(
        (tmp_path / f"x{suffix}").read_bytes()[:-200] if content == "cut" else content
    )
    with pytest.raises(UserError, match=rf"--data {path} cannot be read: .*Save it again"):
        sources.load(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("./nothing", {}, "--data ./nothing: there is no such file or folder"),
        ("nothing.npy", {}, "--data nothing.npy: there is no such file or folder"),
        ("a/\0b", {}, "there is no such file or folder"),
        ("./\ud800", {}, "there is no such file or folder"),
        (__file__, {}, r"is neither a folder of images nor an array file \(.npy, .npz, .safetensors\)"),
        ("digits", {"levels": 3}, "--levels 3 does not apply to --data digits: remove it"),
        ("mnist", {"test_share": 0.2}, "--test-share 0.2 does not apply to --data mnist"),
    ],
)
def test_other_paths_and_options_that_do_not_apply_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        sources.load(name, DataOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "--levels 1: images have 2 to 65,536 gray levels"),
        ({"levels": 6}, r"contains 6, which is not 0 \.\. 5; check the data, or set --levels"),
        ({"test_share": 0.0}, "--test-share 0 of the 40 examples .* leaves 0 for testing"),
        ({"test_share": 0.999}, "leaves 40 for testing and 0 for training"),
    ],
)
def test_options_that_leave_no_data_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sources.load(saved(tmp_path / "x.npy", x=IMAGES), DataOptions(**options))


def test_a_fingerprint_covers_names_sizes_and_contents(tmp_path, monkeypatch):
    """Of many bytes it covers both ends of a file alone: here of more than 1,000, and 4 bytes at each end."""
    monkeypatch.setattr(user_files, "READ_WHOLE", 1_000)
    monkeypatch.setattr(user_files, "ENDS", 4)
    monkeypatch.setattr(user_files, "BLOCK", 7)
    monkeypatch.setattr(user_files, "NAMES", 2)

    def fingerprint(name="a", size=300, changed=None):
        """Of three files of this size, the first with a changed byte."""
        for each in (name, "b", "c"):
            content = bytearray(size)
            if each == name and changed is not None:
                content[changed] ^= 1
            (tmp_path / each).write_bytes(content)
        return user_files.fingerprint(tmp_path, [name, "b", "c"])

    assert fingerprint() == fingerprint()
    seen = [fingerprint(), fingerprint("d"), fingerprint(size=301), fingerprint(size=3), fingerprint(size=6)]
    seen += [fingerprint(changed=byte) for byte in (0, 3, 4, 150, 299)]
    seen += [fingerprint(size=400), *(fingerprint(size=400, changed=byte) for byte in (0, 3, 396, 399))]
    seen += [fingerprint(size=6, changed=byte) for byte in range(6)]
    assert len(set(seen)) == len(seen)
    assert fingerprint(size=400, changed=200) == fingerprint(size=400)


def test_changed_files_are_noticed(tmp_path, tiny, capsys):
    """A run is finished and resumed with its own files only, unless the user insists."""
    x = RANDOM.randint(0, 4, (40, 8, 8)).astype(np.uint8)
    path = saved(tmp_path / "x.npz", x=x, y=LABELS)
    options = {"data": path, "steps": 2, "batch_size": 4, "eval_batch_size": 4, "num_samples": 0}
    trained = loop.train(tiny(**options))
    write_report(tiny(**options), trained)
    assert_same_bits(newest_checkpoint(tiny(**options)).state, trained.state)
    assert is_finished(tiny(**options))
    assert "have changed" not in capsys.readouterr().out
    x[0, 0, 0] ^= 1
    saved(tmp_path / "x.npz", x=x, y=LABELS)
    assert not is_finished(tiny(**options))
    newest_checkpoint(tiny(**options))
    assert f"The files of --data {path} have changed since" in capsys.readouterr().out
    run = tiny(**{**options, "steps": 3})
    with pytest.raises(UserError, match=rf"--data {path}: its files have changed; restore them to resume\nUse .*fresh"):
        loop.train(run)
    loop.train(run, changed=True)
    assert int(loop.train(run).state.step) == 3  # from now on these are its files
