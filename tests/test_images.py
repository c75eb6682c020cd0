"""Pixels, grids and files of samples."""

import resource
import tracemalloc
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_uint8_of_another_precision_rounds_once(dtype):
    values = torch.linspace(-1.1, 1.1, 192).view(1, 3, 8, 8).to(dtype)
    np.testing.assert_array_equal(images.to_uint8(values), images.to_uint8(values.float()))


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


def save_npz(path: Path, array: np.ndarray, batch: int = 3) -> None:
    with images.writing_npz(path, array.shape[:3]) as append:
        for start in range(0, len(array), batch):
            append(array[start : start + batch])


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_has_three_channels_under_the_official_name(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 6, channels), dtype=np.uint8)
    save_npz(tmp_path / "a.npz", array)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        stored = archive["arr_0"]
    assert stored.dtype == np.uint8
    assert stored.shape == (4, 6, 6, 3)
    for channel in range(3):
        assert np.array_equal(stored[..., channel], array[..., channel % channels])


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_to_the_byte_what_numpy_writes(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (40, 6, 6, channels), dtype=np.uint8)
    save_npz(tmp_path / "a.npz", array)
    np.savez(tmp_path / "b.npz", np.broadcast_to(array, (40, 6, 6, 3)))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_npz_needs_the_memory_of_a_batch(tmp_path):
    batch = np.zeros((64, 32, 32, 1), np.uint8)
    tracemalloc.start()
    try:
        with images.writing_npz(tmp_path / "a.npz", (64 * 64, 32, 32)) as append:
            for _ in range(64):
                append(batch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 64 * 3 * batch.nbytes
    assert peak < 4 * 3 * batch.nbytes


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, np.zeros((1, 2, 2, 1), np.uint8))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), images.writing_npz(path, (2, 2, 2)) as append:  # noqa: PT012
        append(np.ones((1, 2, 2, 1), np.uint8))
        raise KeyboardInterrupt
    with pytest.raises(AssertionError, match="1 of 2 images"), images.writing_npz(path, (2, 2, 2)) as append:
        append(np.ones((1, 2, 2, 1), np.uint8))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    path = tmp_path / "a.npz"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_npz(path, np.zeros((100, 16, 16, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


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
