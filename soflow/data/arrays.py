"""Data sets in memory: arrays of one's own, and scikit-learn's handwritten digits."""

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from soflow.data.order import epoch_order
from soflow.data.source import DataError, Source, checked_labels

DIGITS_HELD_OUT_PER_CLASS = 36
_DIGITS_SPLIT_SEED = 0


class ArraySource(Source):
    """Images and labels in memory: images (N, C, H, W), labels (N,) integers.

    Images are finite numbers, trained on as they are (the recipes are made for -1 to 1), or uint8, of which 0 to 255
    become -1 to 1. num_classes defaults to the largest label plus one. Raises DataError for other shapes or types, and
    for NaN and infinity.
    """

    in_memory = True

    def __init__(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray, num_classes: int | None = None
    ) -> None:
        images = torch.as_tensor(images)
        pixels = images.dtype == torch.uint8
        if images.ndim != 4 or len(images) == 0 or not (pixels or images.is_floating_point()):
            raise DataError(
                f"images: got {tuple(images.shape)} {images.dtype}, expected (N, C, H, W) of a floating-point type or "
                "uint8, N at least 1"
            )
        self.images = (images if pixels else images.to(torch.float32)).contiguous()
        if not pixels and not torch.isfinite(self.images).all():
            bad = torch.nonzero(~torch.isfinite(self.images.flatten(1)).all(1)).flatten()
            raise DataError(
                f"images: {len(bad)} hold NaN or Inf, the first is number {int(bad[0])}, expected finite values"
            )
        self.labels = checked_labels(torch.as_tensor(labels).numpy(), len(self.images), num_classes, "labels")
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        _, channels, height, width = self.images.shape
        self.image_shape = self.stored_shape = (channels, height, width)
        self.stored_dtype = self.images.dtype
        contents = hashlib.sha256(f"{tuple(self.images.shape)} {self.num_classes}".encode())
        contents.update(self.images.numpy().tobytes())
        contents.update(self.labels.numpy().tobytes())
        self.fingerprint = contents.hexdigest()[:16]

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Write the images `indices` to `out`."""
        np.take(self.images.numpy(), indices, axis=0, out=out, mode="clip")

    def moments(self, stored: Tensor) -> tuple[Tensor, None]:
        """Return the images themselves, fp32; they have no standard deviation."""
        if stored.dtype == torch.uint8:
            return to_training_range(stored), None
        return stored.clone(), None


def to_training_range(pixels: Tensor) -> Tensor:
    """Return pixels / 127.5 - 1, fp32: uint8 from 0 to 255 becomes -1 to 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


class DigitsSource(ArraySource):
    """scikit-learn's handwritten digits: 1,797 real images (1, 8, 8) in [-1, 1], 10 classes.

    'held_out' has 36 images of every class, chosen once and for all; 'train' has the other 1,437.
    """

    def __init__(self, split: Literal["train", "held_out"]) -> None:
        # Imported here, because it takes a second that no other source needs.
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = epoch_order(len(digits.target), _DIGITS_SPLIT_SEED, 0)
        by_class = [order[digits.target[order] == label] for label in range(10)]
        part = slice(None, DIGITS_HELD_OUT_PER_CLASS) if split == "held_out" else slice(DIGITS_HELD_OUT_PER_CLASS, None)
        rows = np.sort(np.concatenate([members[part] for members in by_class]))
        super().__init__((digits.images[rows, None] / 8 - 1).astype(np.float32), digits.target[rows], num_classes=10)
