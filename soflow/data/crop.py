"""The centre crop of ADM, equal to Pillow's to the bit, in integer tensor arithmetic on any device.

ADM halves an image by a box filter while its smaller side is at least twice `size`, then brings the smaller side to
`size` by a bicubic filter, then cuts the centre. Pillow resizes uint8 images in two passes, rows first, with weights
of 22 fractional bits, and rounds to uint8 after each; so does this. Pillow 13 resizes some tall images columns first:
the reference is Pillow 12. Source: the ADM image loader's definition, and Pillow's Resample.c for the arithmetic.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_WEIGHT_BITS = 22


def center_crop(image: Tensor, size: int) -> Tensor:
    """Return the central (size, size, C) of an image (H, W, C) uint8 whose smaller side was brought to `size`."""
    height, width, _ = image.shape
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        image = _resize(image, height, width, _box, 0.5, slice(None), slice(None))
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    top, left = (height - size) // 2, (width - size) // 2
    rows, columns = slice(top, top + size), slice(left, left + size)
    return _resize(image, height, width, _bicubic, 2.0, rows, columns)


def _resize(
    image: Tensor,
    height: int,
    width: int,
    kernel: Callable[[np.ndarray], np.ndarray],
    support: float,
    rows: slice,
    columns: slice,
) -> Tensor:
    """Return rows and columns of `image` resized to (height, width); nothing outside of them is computed."""
    old_height, old_width, _ = image.shape
    if old_height == height:
        image = image[rows]
    else:
        tall = _weights(old_height, height, kernel, support, rows)
        # The first pass makes only the rows that the second reads: of 1 x 60,000 pixels it would make gigabytes.
        top = int(tall[0][0])
        image = image[top : int(tall[0][-1]) + tall[1].shape[1]]
    if old_width == width:
        image = image[:, columns]
    else:
        wide = _weights(old_width, width, kernel, support, columns)
        image = _resample(image.transpose(0, 1), *wide).transpose(0, 1)
    if old_height == height:
        return image.contiguous()
    return _resample(image, tall[0] - top, tall[1]).contiguous()


def _resample(image: Tensor, first: np.ndarray, weights: np.ndarray) -> Tensor:
    index = torch.from_numpy(first).to(image.device)
    factors = torch.from_numpy(weights).to(image.device)
    total = torch.full((len(first), *image.shape[1:]), 1 << (_WEIGHT_BITS - 1), dtype=torch.int32, device=image.device)
    last = image.shape[0] - 1
    for tap in range(weights.shape[1]):
        # Beyond the last pixel the weight is zero.
        pixels = image.index_select(0, (index + tap).clamp_(max=last))
        total.addcmul_(pixels.to(torch.int32), factors[:, tap, None, None])
    return (total >> _WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


def _weights(
    old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray], support: float, kept: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Return, per pixel kept, the first old pixel (kept,) int64 and the weights from there on (kept, taps) int32."""
    scale = old / new
    stretch = max(scale, 1.0)
    reach = support * stretch
    center = (np.arange(*kept.indices(new), dtype=np.float64) + 0.5) * scale
    # C truncates towards zero, and what is below zero is cut off.
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach + 0.5).astype(np.int64), old)
    taps = np.arange(math.ceil(reach) * 2 + 1, dtype=np.float64)
    weights = kernel((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    weights[taps >= (end - first)[:, None]] = 0.0
    # Summed one by one, as C does: another order rounds differently.
    sums = np.zeros(len(center))
    for tap in range(weights.shape[1]):
        sums += weights[:, tap]
    weights /= np.where(sums != 0.0, sums, 1.0)[:, None]
    rounded = weights * (1 << _WEIGHT_BITS) + np.where(weights < 0, -0.5, 0.5)
    return first, np.trunc(rounded).astype(np.int32)


def _box(x: np.ndarray) -> np.ndarray:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
