"""Samples become pictures: uint8 pixels, grids, PNG and NPZ files that are either whole or not there."""

import errno
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from soflow.checkpoint import replacing

BORDER = 1
BORDER_VALUE = 255


def to_uint8(images: Tensor) -> np.ndarray:
    """Return clamp(127.5 x + 128, 0, 255), truncated to uint8, with the channels last.

    images: (N, C, H, W), any float type, pixels from -1 to 1.  Returns (N, H, W, C).  Source: the official sampler.
    """
    pixels = (127.5 * images.detach().float() + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images: np.ndarray, columns: int, min_side: int = 64) -> np.ndarray:
    """Lay images out row by row in `columns` columns, with a border of one pixel around and between them.

    images: (N, H, W, C) uint8, N >= 1; each pixel becomes a square, so that no image is smaller than `min_side`.
    Cells after the last image stay blank.  Returns (height, width, C) uint8.
    """
    count, height, width, channels = images.shape
    scale = -(-min_side // min(height, width))
    if scale > 1:
        images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    cell_height, cell_width = images.shape[1] + BORDER, images.shape[2] + BORDER
    rows = -(-count // columns)
    canvas = np.full((rows * cell_height + BORDER, columns * cell_width + BORDER, channels), BORDER_VALUE, np.uint8)
    for index, image in enumerate(images):
        top = index // columns * cell_height + BORDER
        left = index % columns * cell_width + BORDER
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def save_png(path: Path, image: np.ndarray) -> None:
    """Write one image, (H, W, 1 or 3) uint8, as PNG; an existing file is replaced only by a complete one."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


@contextmanager
def writing_npz(path: Path, shape: tuple[int, int, int]) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield what appends images, (n, H, W, 1 or 3) uint8, to the array `arr_0` of `path`, which FID evaluators read.

    shape: (N, H, W) of all of them together.  The bytes are those of numpy.savez, which would need all in memory.  Grey
    becomes three equal channels; an existing file is replaced only by a complete one, when the block has ended well.
    """
    shape_of_all = (*shape, 3)
    written = 0
    with replacing(path) as partial:
        with zipfile.ZipFile(partial, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape_of_all}
            np.lib.format.write_array_header_1_0(file, header)

            def append(images: np.ndarray) -> None:
                nonlocal written
                written += len(images)
                file.write(np.ascontiguousarray(np.broadcast_to(images, (len(images), *shape_of_all[1:]))).data)

            yield append
        assert written == shape[0], f"{written} of {shape[0]} images"


def require_writable(path: Path) -> None:
    """Raise OSError unless `path` can be created or replaced now: hours of sampling should not end at a typo."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write, it is a folder", str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
