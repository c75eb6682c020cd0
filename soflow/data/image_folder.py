"""A folder of image files, one folder per class, decoded by Pillow and cropped as ADM does."""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from soflow.data.arrays import to_training_range
from soflow.data.crop import center_crop
from soflow.data.source import DataError, Source

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# of files whose results wait in memory
VERIFIED_AT_ONCE = 4096
# Whatever the suffix says, nothing else is decoded: for PostScript, Pillow would start Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")

# What Pillow raises for files that are no images, are damaged or are far too large.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Listing:
    """The image files of a folder: paths relative to it, in order, and the class of each.

    fingerprint: hash of paths and sizes.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    fingerprint: str


def list_images(root: str | Path) -> Listing:
    """Return the images of `root`/class/..., classes and paths in the order of their names; links are followed.

    Images are the files with a suffix of SUFFIXES. Raises DataError where a class has none, some lie beside the folders
    of the classes, a folder cannot be listed, a link leads nowhere or round, or a name is not UTF-8.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with a folder of images per class")
    entries = list(root.iterdir())
    for entry in entries:
        _require_target(entry)
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    beside = [entry.name for entry in entries if entry.suffix.lower() in SUFFIXES]
    if beside:
        raise DataError(f"{root}: got the image {min(beside)} beside the folders, expected a folder per class")
    paths: list[str] = []
    labels: list[int] = []
    contents = hashlib.sha256()
    for label, name in enumerate(classes):
        found = sorted(_walk(root / name))
        if not found:
            raise DataError(f"{root / name}: got no image, expected files of {', '.join(sorted(SUFFIXES))}")
        for path in found:
            relative = path.relative_to(root).as_posix()
            try:
                contents.update(f"{relative}\0{path.stat().st_size}\0".encode())
            except UnicodeEncodeError:
                raise DataError(f"{root}: got the name {relative!a}, expected names in UTF-8") from None
            except OSError as error:
                raise DataError(f"{path}: expected an image, but: {error.strerror}") from error
            paths.append(relative)
            labels.append(label)
    if not paths:
        raise DataError(f"{root}: got no folder, expected a folder of images per class")
    return Listing(root, tuple(classes), tuple(paths), tuple(labels), contents.hexdigest()[:16])


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        for path in [Path(parent, name) for name in folders + files]:
            # an image is looked at anyway, for its size
            if path.suffix.lower() in SUFFIXES and path.name not in folders:
                yield path
            else:
                _require_target(path)


def _require_target(path: Path) -> None:
    """Raise DataError for a link that leads nowhere, or to a folder that it lies in, which would be listed for ever."""
    if not path.is_symlink():
        return
    if not path.exists():
        raise DataError(f"{path}: got a link that leads nowhere, expected one to a file or folder")
    if any(path.samefile(above) for above in path.parents):
        raise DataError(f"{path}: got a link to a folder that it lies in, expected a tree of folders")


def open_image(content: bytes) -> Image.Image:
    """Return the image that a file of FORMATS holds, of which the header alone is read.

    Raises one of DECODE_ERRORS for other files, for 16 bits per channel, and for more pixels than Pillow allows.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"the file is none of {', '.join(FORMATS)}") from None
    # Pillow would cut 16 bits of grey off at 255: a white image.
    if any(str(tile[3]).endswith(";16B") for tile in image.tile):
        raise ValueError("got 16 bits per channel, expected 8")
    return image


def decode_image(content: bytes) -> np.ndarray:
    """Return the pixels of an image file, (H, W, 3) uint8, without regard to an EXIF orientation.

    Raises one of DECODE_ERRORS for what `open_image` refuses, and for what is no whole image.
    """
    with open_image(content) as image:
        return np.array(image.convert("RGB"))


class ImageFolderSource(Source):
    """Images of a folder (class = folder), cropped to (3, image_size, image_size), read anew in every epoch.

    Raises DataError naming the file that cannot be decoded, when it is read.
    """

    def __init__(self, root: str | Path, image_size: int) -> None:
        self.listing = list_images(root)
        self.image_size = image_size
        self.num_classes = len(self.listing.classes)
        self.labels = torch.tensor(self.listing.labels, dtype=torch.int64)
        self.stored_shape, self.stored_dtype = (image_size, image_size, 3), torch.uint8
        self.image_shape = (3, image_size, image_size)
        contents = f"{self.listing.fingerprint} {image_size}"
        self.fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Write the cropped images, (B, image_size, image_size, 3) uint8, to `out`."""
        for row, image in enumerate(self._pool.map(self._load, indices.tolist())):
            out[row] = image

    def moments(self, stored: Tensor) -> tuple[Tensor, None]:
        """Return the images, -1 to 1; they have no standard deviation."""
        return to_training_range(stored).permute(0, 3, 1, 2).contiguous(), None

    def verify(self) -> None:
        """Decode every image; raise DataError for the first that cannot be."""
        for first in range(0, len(self), VERIFIED_AT_ONCE):
            for _ in self._pool.map(self._load, range(first, min(first + VERIFIED_AT_ONCE, len(self)))):
                pass

    def describe(self) -> dict[str, str]:
        """Return the names of the first classes."""
        return {"classes": shorten(self.listing.classes)}

    def _load(self, index: int) -> np.ndarray:
        path = self.listing.root / self.listing.paths[index]
        try:
            pixels = decode_image(path.read_bytes())
        except DECODE_ERRORS as error:
            raise DataError(f"{path}: expected an image, but: {error}") from error
        return center_crop(torch.from_numpy(pixels), self.image_size).numpy()


def shorten(names: Sequence[str], limit: int = 10) -> str:
    """Return the first names of a list, and how many there are."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "")
