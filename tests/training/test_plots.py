import numpy as np
from PIL import Image

from vdm_jax.training.evaluation.plots import GAP, arrange_in_square, grid, plot_panels, plot_paths, save_grid
from vdm_jax.training.experiment import Panel


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
    assert arrange_in_square(images)[..., 0, 0, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_png_holds_the_grid(tmp_path):
    for channels in (1, 3):
        images = np.random.RandomState(1).randint(0, 17, (2, 2, 8, 8, channels)).astype(np.uint8)
        save_grid(tmp_path / "new" / "grid.png", images, 17)
        read = np.asarray(Image.open(tmp_path / "new" / "grid.png")).reshape(102, 102, channels)
        assert (read == grid(images, 17)).all()


def dark(path):
    """Where a picture is dark blue or black: x to the right and y down, each in 0..1."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(float)
    inside = image[40:-40, 60:-20]
    rows, columns = np.nonzero(inside[..., 0] < 30)
    return columns / inside.shape[1], rows / inside.shape[0]


def test_a_plane_has_x_to_the_right_and_y_up(tmp_path):
    axis = np.linspace(-1.9, 1.9, 40)
    x = np.stack(np.meshgrid(axis, axis), axis=-1)
    height = -20.0 * ((x[..., 0] - 1.0) ** 2 + (x[..., 1] - 1.5) ** 2)
    right, down = dark(plot_panels(tmp_path / "one.png", {"a hill": Panel(x, height)}))
    assert 0.6 < right.mean() < 0.9
    assert 0.0 < down.mean() < 0.3


def test_chains_end_in_a_dot(tmp_path):
    chain = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [1.5, 1.2]])
    right, down = dark(plot_paths(tmp_path / "chain.png", chain[:, None], ""))
    assert 0.65 < right.mean() < 0.85
    assert 0.3 < down.mean() < 0.5
