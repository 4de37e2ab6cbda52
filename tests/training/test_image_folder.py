"""A user's own folder of images: every layout and format gives the same bits, and bad input is one message."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.training.bits import assert_same_bits
from vdm_jax.training import loop
from vdm_jax.training.checkpoint import Checkpoints
from vdm_jax.training.data import batches, image_folder, sources
from vdm_jax.training.data.spec import DataOptions
from vdm_jax.training.runtime.errors import UserError

RANDOM = np.random.RandomState(0)
GRAY = RANDOM.randint(0, 256, (12, 6, 4)).astype(np.uint8)
COLOR = RANDOM.randint(0, 256, (12, 6, 4, 3)).astype(np.uint8)
EXACT = {"png": {}, "webp": {"lossless": True, "exact": True}, "tif": {}}
ORIENTATION = 0x0112  # tag of EXIF


def write(path, pixels, **options):
    """Write an image, and the folders above it; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def folder_of(root, images, name="{:02}.png"):
    """A folder of images; `name` is formatted with the number and the label of each."""
    for number, pixels in enumerate(images):
        write(root / name.format(number, number % 3), pixels)
    return str(root)


def everything(images):
    return images.take(np.arange(len(images)))


def load(path, **options):
    return sources.load(str(path), DataOptions(**options))


@pytest.mark.parametrize("suffix", EXACT)
@pytest.mark.parametrize("images", [GRAY, COLOR], ids=["gray", "color"])
def test_every_lossless_format_gives_the_bits_that_were_written(tmp_path, suffix, images):
    for split, part in (("train", images[:8]), ("test", images[8:])):
        for number, pixels in enumerate(part):
            write(tmp_path / split / f"{number}.{suffix}", pixels, **EXACT[suffix])
    found = load(tmp_path)
    color = images is COLOR
    channels = 3 if color or suffix == "webp" else 1  # WebP is always RGB
    assert found.spec[1:6] == ((6, 4, channels), 256, 0, 8, 4)
    for part, wanted in ((found.train, images[:8]), (found.test, images[8:])):
        batch = everything(part)
        pixels = wanted if color else wanted[..., None]
        np.testing.assert_array_equal(batch["image"], np.broadcast_to(pixels, (len(wanted), 6, 4, channels)))
        assert batch["image"].dtype == np.uint8
        assert not batch["label"].any()


def test_a_jpeg_is_nearly_what_was_written(tmp_path):
    smooth = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
    write(tmp_path / "a.jpg", smooth, quality=95)
    write(tmp_path / "b.JPEG", np.stack([smooth, smooth.T, 255 - smooth], axis=-1), quality=95, subsampling=0)
    assert np.abs(image_folder.decode(tmp_path / "a.jpg", 1, 0)[..., 0].astype(int) - smooth).max() < 6
    assert load(tmp_path).spec.shape == (8, 8, 3)
    assert load(tmp_path, channels=1).spec.shape == (8, 8, 1)


def test_subfolders_are_labels_and_numbers_are_in_their_order(tmp_path):
    for number, name in enumerate(["10", "2", "1", "2/deeper"]):
        for image in range(3):
            write(tmp_path / name / f"{image}.png", np.full((2, 2), 50 * number + image, np.uint8))
    found = load(tmp_path)
    assert found.spec.num_classes == 3
    batches = [everything(part) for part in (found.train, found.test)]
    labels = {int(x[0, 0, 0]): int(y) for batch in batches for x, y in zip(batch["image"], batch["label"], strict=True)}
    assert labels == {0: 2, 1: 2, 2: 2, 50: 1, 51: 1, 52: 1, 100: 0, 101: 0, 102: 0, 150: 1, 151: 1, 152: 1}


def test_a_split_is_the_same_every_time_whatever_order_the_files_were_written_in(tmp_path, monkeypatch):
    first = load(folder_of(tmp_path / "first", GRAY, "{1}/{0:02}.png"), test_share=0.25)
    for number in reversed(range(12)):
        write(tmp_path / f"second/{number % 3}/{number:02}.png", GRAY[number])
    monkeypatch.setattr(image_folder, "_files", backwards(image_folder._files))
    second = load(tmp_path / "second", test_share=0.25)
    assert first.spec[1:] == second.spec[1:]  # with the fingerprint
    assert (len(first.train), len(first.test)) == (9, 3)
    for one, other in ((first.train, second.train), (first.test, second.test)):
        for name, values in everything(one).items():
            np.testing.assert_array_equal(values, everything(other)[name])
    seen = [everything(part)["image"].tobytes() for part in (first.train, first.test)]
    ordered = np.concatenate([GRAY[label::3] for label in range(3)])
    assert sorted(b"".join(seen)) == sorted(ordered.tobytes())
    np.save(tmp_path / "ordered.npy", ordered)
    array = load(tmp_path / "ordered.npy", test_share=0.25, levels=256)
    assert [everything(part)["image"].tobytes() for part in (array.train, array.test)] == seen
    which = [int(np.flatnonzero((x[..., 0] == ordered).all(axis=(1, 2)))[0]) for x in everything(first.train)["image"]]
    assert which == sorted(which)


def backwards(files):
    return lambda *given: reversed(list(files(*given)))


def test_links_are_followed_and_hidden_and_other_files_ignored(tmp_path):
    folder_of(tmp_path / "elsewhere", GRAY[:4])
    root = tmp_path / "mine"
    folder_of(root / "train", GRAY[4:])
    (root / "test").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "again").symlink_to(root)  # a circle
    for name in ("train/.hidden.png", "train/.cache/a.png", "train/__MACOSX/a.png", "train/notes.txt", "val/a.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    found = load(root)
    assert (len(found.train), len(found.test), found.spec.num_classes) == (8, 4, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, suffix, orientation):
    """The corners of a picture that a camera stored turned or mirrored; EXIF says how to display it."""
    upright = np.full((32, 16), 128, np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[-8:, :8] = 0, 80, 200
    undo = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.T,
        6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, -1),
    }[orientation]  # fmt: skip
    stored = np.ascontiguousarray(undo(upright))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = write(tmp_path / f"a.{suffix}", stored, exif=exif, **({"quality": 95} if suffix == "jpg" else EXACT[suffix]))
    assert image_folder.header(path)[:2] == (16, 32)
    decoded = image_folder.decode(path, 1, 0)[..., 0]
    assert np.abs(decoded.astype(int) - upright).max() < 12


def test_images_are_cropped_to_the_central_square_and_resized_without_aliasing(tmp_path):
    stripes = np.tile(np.uint8([0, 255]), (40, 40))  # finer than the result can show
    wide = np.concatenate([np.full((40, 20), 255, np.uint8), stripes, np.full((40, 20), 255, np.uint8)], axis=1)
    path = write(tmp_path / "wide.png", wide)
    small = image_folder.decode(path, 1, 8)
    assert small.shape == (8, 8, 1)
    assert np.abs(small[:, 1:-1].astype(float) - 127.5).max() < 3  # nearest pixels would be 0 or 255
    tall = write(tmp_path / "tall.png", np.ascontiguousarray(wide.T))
    np.testing.assert_array_equal(image_folder.decode(tall, 1, 8)[..., 0], small[..., 0].T)
    pixels = RANDOM.randint(0, 256, (6, 9, 3)).astype(np.uint8)
    exact = write(tmp_path / "exact.png", pixels)
    np.testing.assert_array_equal(image_folder.decode(exact, 3, 6), pixels[:, 1:7])
    assert load(tmp_path, image_size=5).spec.shape == (5, 5, 3)


def test_palettes_bits_and_transparency_become_gray_or_rgb(tmp_path):
    gray = Image.fromarray(GRAY[0])
    gray.convert("P").save(tmp_path / "gray_palette.png")
    gray.convert("1").save(tmp_path / "bits.png")
    clear = np.zeros((6, 4, 2), np.uint8)
    clear[:3, :, 1] = 255
    write(tmp_path / "clear.png", clear)
    assert load(tmp_path).spec.shape == (6, 4, 1)
    np.testing.assert_array_equal(image_folder.decode(tmp_path / "gray_palette.png", 1, 0)[..., 0], GRAY[0])
    np.testing.assert_array_equal(image_folder.decode(tmp_path / "clear.png", 1, 0)[:, 0, 0], [0, 0, 0, 255, 255, 255])
    colors = Image.fromarray(COLOR[0]).quantize(4)
    colors.save(tmp_path / "palette.png")
    assert load(tmp_path).spec.shape == (6, 4, 3)
    decoded = image_folder.decode(tmp_path / "palette.png", 3, 0)
    np.testing.assert_array_equal(decoded, np.asarray(colors.convert("RGB")))


def test_images_are_decoded_once_and_their_type_is_found_without_decoding(tmp_path, monkeypatch):
    decoded = []
    load_pixels = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image) or load_pixels(image))
    for suffix in ("png", "jpg", "webp", "tif"):
        folder_of(tmp_path, GRAY, f"{{:02}}.{suffix}")
    found = load(tmp_path, test_share=0.25)
    assert decoded == []
    for _ in range(2):
        everything(found.train)
    assert len({id(image) for image in decoded}) == len(found.train) == 36


def damaged(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_a_damaged_image_is_named_and_left_out_only_when_asked(tmp_path, capsys):
    root = folder_of(tmp_path / "a", RANDOM.randint(0, 256, (12, 40, 40)).astype(np.uint8), "train/{:02}.png")
    write(tmp_path / "a/test/0.png", np.zeros((40, 40), np.uint8))
    whole = load(root).spec
    damaged(tmp_path / "a/train/07.png")  # its header is whole
    found = load(root)
    with pytest.raises(UserError, match=r"(?s)train/07.png cannot be read: .*--skip-unreadable.*--changed resumes"):
        everything(found.train)
    (tmp_path / "a/train/03.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 13 images in .*\n  .*train/03.png: .*\n.*--skip-unreadable"):
        load(root)
    found = load(root, skip_unreadable=True)
    assert "2 of 13 images" in (printed := capsys.readouterr().out)
    assert "train/03.png" in printed
    assert "train/07.png" in printed
    assert len(everything(found.train)["image"]) == 10
    assert found.spec.fingerprint != whole.fingerprint
    shutil.rmtree(tmp_path / "a/train")
    write(tmp_path / "a/train/0.png", np.zeros((40, 40), np.uint8))
    for name in ("train", "test"):
        (tmp_path / f"a/{name}/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 of 2 images .* cannot be read"):
        load(root, skip_unreadable=True)


def test_an_image_that_changes_while_it_is_used_is_named(tmp_path):
    found = load(folder_of(tmp_path, GRAY), test_share=0.5, levels=256)
    for number in range(12):
        write(tmp_path / f"{number:02}.png", GRAY[0][:3])
    with pytest.raises(UserError, match=r"png has shape \(3, 4, 1\), not \(6, 4, 1\): it has changed"):
        everything(found.train)


def many_folders(root):
    folder_of(root / "train", GRAY, "{1}/{0}.png")
    folder_of(root / "test", GRAY, "{1}x/{0}.png")


def unlabeled(root):
    folder_of(root, GRAY, "train/{1}/{0}.png")
    folder_of(root, GRAY, "test/{0}.png")


def sixteen_bits(root):
    write(root / "a.png", GRAY[0].astype(np.uint16))
    folder_of(root, GRAY)


BAD = {
    "nothing": (lambda root: root.mkdir(), {}, r"contains no images \(.png, .*\), but no files"),
    "no images": (lambda root: shutil.copytree(os.path.dirname(__file__), root, ignore=shutil.ignore_patterns("*.txt")),
                  {}, r"contains no images .*, but \d+ x .py"),
    "two sizes": (lambda root: (folder_of(root, GRAY), write(root / "b.png", GRAY[0][:5])), {},
                  r"differ in size, such as 00.png \(4x6\) and b.png \(4x5\). Give --image-size"),
    "no test": (lambda root: folder_of(root, GRAY, "train/{}.png"), {}, "has images in train/ and none in test/"),
    "no train": (lambda root: folder_of(root, GRAY, "test/{1}/{0}.png"), {}, "images in test/ and none in train/"),
    "other labels": (many_folders, {}, r"train/ and test/ are labels and differ: 0/, 0x/, 1/"),
    "no test labels": (unlabeled, {}, r"train/ and test/ are labels and differ: 0/, 1/, 2/"),
    "some labels": (lambda root: (folder_of(root, GRAY), folder_of(root, GRAY, "a/{}.png")), {},
                    r"into subfolders or none does, but there are 11.png and a/9.png"),
    "one image": (lambda root: folder_of(root, GRAY[:1]), {}, "of the 1 examples .* leaves 1 for testing and 0 for"),
    "sixteen bits": (sixteen_bits, {}, r"1 of 13 images(.|\n)*a.png: it has more than 8 bits per channel"),
    "levels": (lambda root: folder_of(root, GRAY), {"levels": 300}, "--levels 300: image files have 2 to 256"),
    "a share for nothing": (lambda root: (folder_of(root, GRAY, "train/{}.png"), folder_of(root, GRAY, "test/{}.png")),
                            {"test_share": 0.3}, "--test-share 0.3 does not apply to --data"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_used_is_one_message(tmp_path, name):
    make, options, message = BAD[name]
    make(tmp_path / "mine")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "mine", **options)


def test_values_beyond_the_levels_are_named(tmp_path):
    found = load(folder_of(tmp_path, GRAY), levels=17)
    with pytest.raises(UserError, match=r"\.png contains \d+, which is not below --levels 17"):
        everything(found.train)


def test_a_folder_with_the_name_of_a_set_is_a_path_only_with_a_separator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "digits", GRAY)
    folder_of(tmp_path / "cats", GRAY)
    folder_of(tmp_path / "cats/small", GRAY)
    assert sources.load("digits").spec.levels == 17
    for name in ("./digits", "digits/", str(tmp_path / "digits")):
        assert sources.load(name).spec[:2] == ("digits", (6, 4, 1))
    assert sources.load("cats/small").spec.name == "small"
    with pytest.raises(UserError, match=r"Unknown data set 'cats'.* For the folder of this name, write --data ./cats"):
        sources.load("cats")


def test_a_folder_of_pngs_trains_to_the_bits_of_the_digits(tmp_path, tiny):
    digits = sources.load("digits")
    for split, images in (("train", digits.train), ("test", digits.test)):
        batch = everything(images)
        for number, (pixels, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
            path = tmp_path / "png" / split / f"{label}/{number:04}.png"
            write(path, pixels[..., 0])
    # the order of the digits, by an array; that of the folder, sorted by label, by the folder
    order = np.argsort(everything(digits.train)["label"], kind="stable")
    arrays = {
        "x_train": everything(digits.train)["image"][order], "y_train": everything(digits.train)["label"][order],
        "x_test": everything(digits.test)["image"], "y_test": everything(digits.test)["label"],
    }  # fmt: skip
    np.savez(tmp_path / "sorted.npz", **arrays)
    options = {"steps": 3, "batch_size": 32, "num_samples": 0}
    png = loop.train(tiny(data=str(tmp_path / "png"), levels=17, workdir=str(tmp_path / "1"), **options))
    npz = loop.train(tiny(data=str(tmp_path / "sorted.npz"), workdir=str(tmp_path / "2"), **options))
    assert_same_bits(png.state, npz.state)
    assert tiny(data=str(tmp_path / "png"), levels=17).data.spec[1:6] == digits.spec[1:6]


def test_damage_found_in_training_loses_nothing(tmp_path, tiny):
    """The run ends with the message, and resumes to the same bits once the file is restored."""
    root = folder_of(tmp_path / "mine", RANDOM.randint(0, 256, (44, 8, 8)).astype(np.uint8), "train/{1}/{0:02}.png")
    folder_of(tmp_path / "mine", GRAY[:3].repeat(2, axis=2)[:, [0, 1, 2, 3, 4, 5, 0, 1]], "test/{1}/{0}.png")
    options = {"data": root, "steps": 5, "batch_size": 8, "checkpoint_every": 1, "keep": 9, "num_samples": 0}
    whole = loop.train(tiny(**options, workdir=str(tmp_path / "whole")))
    names = sorted(path for path in (tmp_path / "mine/train").rglob("*.png"))
    order = batches.ShuffledBatches(44, 8, 0)
    late, run = names[order[3][0]], tiny(**options)
    kept = late.read_bytes()
    damaged(late)
    with pytest.raises(UserError, match=f"{late} cannot be read"):
        loop.train(run)
    with Checkpoints(tmp_path / "tiny/checkpoints", keep=9) as checkpoints:
        assert checkpoints.latest == 3
    with pytest.raises(UserError, match="its files have changed"):
        loop.train(tiny(**options))
    late.write_bytes(kept)
    assert_same_bits(loop.train(tiny(**options, skip_unreadable=True)).state, whole.state)  # there are none
