"""The crop against Pillow, which is asked for one axis at a time: Pillow 12 then gives what it gives for both."""

import tracemalloc

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from soflow.data.crop import center_crop

PILLOW_12 = int(PIL.__version__.split(".")[0]) < 13


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, whole: bool) -> Image.Image:
    if whole:
        return image.resize(size, resample)
    return image.resize((size[0], image.size[1]), resample).resize(size, resample)


def adm_crop(pixels: np.ndarray, size: int, whole: bool = False) -> np.ndarray:
    """ADM's definition; whole: by the very calls of ADM, else each resize as two of one axis."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = resize(image, (image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX, whole)
    scale = size / min(image.size)
    new_size = (round(image.size[0] * scale), round(image.size[1] * scale))
    cropped = np.array(resize(image, new_size, Image.Resampling.BICUBIC, whole))
    top, left = (cropped.shape[0] - size) // 2, (cropped.shape[1] - size) // 2
    return cropped[top : top + size, left : left + size]


def cases(count: int) -> list[tuple[int, int, int]]:
    """Heights, widths and crops: odd and even, smaller than the crop and up to eleven times as large."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        size = (16, 31, 64)[number % 3]
        height, width = np.exp(rng.uniform(np.log(0.4 * size), np.log((11, 6, 4)[number % 3] * size), 2)).astype(int)
        found.append((int(height), int(width), size))
    return found


def pixels(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 10007 + width)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Black and white too: there the bicubic filter leaves the range and is cut off.
    return noise if width % 2 else np.where(noise > 127, 255, 0).astype(np.uint8)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def test_crop_equals_pillow_on_240_sizes():
    sizes = cases(240)
    assert len(set(sizes)) >= 200
    assert sum(height % 2 and width % 2 for height, width, _ in sizes) >= 40
    for height, width, size in sizes:
        image = pixels(height, width)
        np.testing.assert_array_equal(
            center_crop(torch.from_numpy(image), size).numpy(),
            adm_crop(image, size),
            err_msg=str((height, width, size)),
        )


@pytest.mark.skipif(not PILLOW_12, reason="Pillow 13 resizes some tall images columns first")
def test_crop_equals_the_calls_of_adm_on_pillow_12():
    for height, width, size in cases(240):
        image = pixels(height, width)
        np.testing.assert_array_equal(
            center_crop(torch.from_numpy(image), size).numpy(), adm_crop(image, size, whole=True)
        )


def test_crop_of_the_right_size_is_the_image():
    image = torch.from_numpy(pixels(16, 16))
    assert torch.equal(center_crop(image, 16), image)


def test_crop_needs_no_contiguous_image():
    image = torch.from_numpy(pixels(40, 50))
    assert torch.equal(center_crop(image.flip(0), 16), center_crop(image.flip(0).contiguous(), 16))


@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000), (700, 16), (15, 700), (70, 2999), (2999, 70)])
def test_crop_of_a_narrow_image_equals_pillow(shape):
    image = pixels(*shape)
    np.testing.assert_array_equal(center_crop(torch.from_numpy(image), 16).numpy(), adm_crop(image, 16))


@pytest.mark.parametrize("shape", [(1_000_000, 1), (1, 1_000_000)])
def test_crop_of_a_narrow_image_takes_no_more_memory_than_the_crop(shape):
    image = torch.zeros((*shape, 3), dtype=torch.uint8)
    tracemalloc.start()
    try:
        with LargestTensor() as largest:
            crop = center_crop(image, 256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert crop.shape == (256, 256, 3)
    assert peak < 2**20
    assert largest.elements <= 2 * 256 * 256 * 3
