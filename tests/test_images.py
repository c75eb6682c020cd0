"""Pixels, grids and files of samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soflow import images


def test_to_uint8_rounds_as_the_official_sampler():
    values = torch.tensor([-1.5, -1.0, -0.004, 0.0, 0.5, 0.996, 1.0, 7.0])
    pixels = images.to_uint8(values.reshape(1, 1, 2, 4))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 2, 4, 1)
    assert pixels.ravel().tolist() == [0, 0, 127, 128, 191, 254, 255, 255]


def test_to_uint8_moves_channels_last():
    x = torch.stack([torch.full((2, 2), value) for value in (-1.0, 0.0, 1.0)])[None]
    assert images.to_uint8(x)[0, 1, 0].tolist() == [0, 128, 255]


def test_grid_places_images_row_by_row_between_borders():
    tiles = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, axis=1).repeat(2, axis=2)
    picture = images.grid(tiles, columns=2, min_side=2)
    w = images.BORDER_VALUE
    assert picture[..., 0].tolist() == [
        [w, w, w, w, w, w, w],
        [w, 0, 0, w, 1, 1, w],
        [w, 0, 0, w, 1, 1, w],
        [w, w, w, w, w, w, w],
        [w, 2, 2, w, w, w, w],
        [w, 2, 2, w, w, w, w],
        [w, w, w, w, w, w, w],
    ]


@pytest.mark.parametrize(("side", "enlarged"), [(8, 64), (30, 90), (64, 64), (256, 256)])
def test_grid_enlarges_small_images_to_whole_squares(side, enlarged):
    tile = np.random.default_rng(0).integers(0, 255, (1, side, side, 3), dtype=np.uint8)
    picture = images.grid(tile, columns=1)[1:-1, 1:-1]
    assert picture.shape == (enlarged, enlarged, 3)
    step = enlarged // side
    assert np.array_equal(picture.reshape(side, step, side, step, 3).transpose(0, 2, 1, 3, 4)[:, :, 0, 0], tile[0])
    assert np.array_equal(picture[step - 1 :: step, step - 1 :: step], tile[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_reads_back(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    images.save_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture).reshape(image.shape), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_has_three_channels_under_the_official_name(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 6, channels), dtype=np.uint8)
    images.save_npz(tmp_path / "a.npz", array)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        stored = archive["arr_0"]
    assert stored.dtype == np.uint8
    assert stored.shape == (4, 6, 6, 3)
    for channel in range(3):
        assert np.array_equal(stored[..., channel], array[..., channel % channels])


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    images.save_npz(path, np.zeros((1, 2, 2, 1), np.uint8))
    before = path.read_bytes()

    def fail_half_way(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(images.np, "savez", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        images.save_npz(path, np.ones((1, 2, 2, 1), np.uint8))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_require_writable_changes_nothing(tmp_path):
    path = tmp_path / "a.png"
    images.require_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    images.require_writable(path)
    assert path.read_bytes() == b"old"


def test_require_writable_refuses(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        images.require_writable(tmp_path / "nowhere" / "a.png")
    with pytest.raises(NotADirectoryError):
        images.require_writable(tmp_path / "file" / "a.png")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        images.require_writable(Path(tmp_path))
