import numpy as np
from PIL import Image

from vdm_jax.training.pictures import GAP, grid, save, square


def test_images_are_enlarged_without_blurring_and_laid_out_in_order():
    images = np.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8, 1).astype(np.uint8) % 17
    sheet = grid(images, levels=17)
    assert sheet.shape == (2 * (48 + GAP) + GAP, 3 * (48 + GAP) + GAP, 1)
    for row in range(2):
        for column in range(3):
            top, left = row * 50 + GAP, column * 50 + GAP
            tile = sheet[top : top + 48, left : left + 48]
            expected = np.round(images[row, column] * (255 / 16)).astype(np.uint8)
            assert (tile == expected.repeat(6, axis=0).repeat(6, axis=1)).all()


def test_large_images_keep_their_size_and_colours():
    images = np.random.RandomState(0).randint(0, 256, (1, 1, 64, 64, 3)).astype(np.uint8)
    assert (grid(images, 256)[GAP:-GAP, GAP:-GAP] == images[0, 0]).all()


def test_square_keeps_the_order_and_fills_up_with_black():
    images = np.arange(1, 6).reshape(5, 1, 1, 1).astype(np.uint8)
    assert square(images)[..., 0, 0, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_png_holds_the_grid(tmp_path):
    for channels in (1, 3):
        images = np.random.RandomState(1).randint(0, 17, (2, 2, 8, 8, channels)).astype(np.uint8)
        save(tmp_path / "new" / "grid.png", images, 17)
        read = np.asarray(Image.open(tmp_path / "new" / "grid.png")).reshape(102, 102, channels)
        assert (read == grid(images, 17)).all()
