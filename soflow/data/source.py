"""What every data set is to the feeders: samples in the form they are stored in, and how these become moments."""

import abc

import numpy as np
import torch
from torch import Tensor

# More than any data set has: a label beyond is damage, and the table of its network would fill the memory.
MAX_CLASSES = 2**20


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file or field, what it holds and what was expected."""


class Source(abc.ABC):
    """A data set that is read by sample number.

    image_shape: (C, H, W) of what the network sees.  num_classes: labels are 0 .. num_classes - 1.
    fingerprint: short hash of the contents, by which a resumed run knows its data set.
    labels: (N,) int64, on the CPU.  stored_shape, stored_dtype: a sample as `gather` gives it.
    in_memory: whether all of it is, so that a feeder may as well keep it on the device.
    finite: whether every stored value is known to be; otherwise the feeders watch for NaN and infinity.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str
    labels: Tensor
    stored_shape: tuple[int, ...]
    stored_dtype: torch.dtype
    in_memory = False
    finite = True

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Write the stored samples `indices`, (B,) int64, to `out`, (B, *stored_shape), in that order.

        Touches host memory only and runs in a thread of its own. Raises DataError for what cannot be read.
        """

    @abc.abstractmethod
    def moments(self, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and standard deviation (None: exact), (B, C, H, W) fp32, of stored samples on any device.

        A training sample is x_0 = mean + std * noise. The memory of `stored` is free to change after.
        """

    def verify(self) -> None:
        """Read everything and compare it with the hashes there are; raise DataError for the first difference."""
        return None  # what is in memory was checked when it was made

    def describe(self) -> dict[str, str]:
        """Return what the data set says of itself beyond its size, name to text."""
        return {}

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return mean, standard deviation (or None) and labels, (B,) int64, of the samples `indices`, on the CPU."""
        stored = torch.empty((len(indices), *self.stored_shape), dtype=self.stored_dtype)
        self.gather(indices, stored.numpy())
        return *self.moments(stored), self.labels[torch.from_numpy(np.array(indices, dtype=np.int64))]


def checked_labels(labels: np.ndarray, count: int, num_classes: int | None, where: str) -> Tensor:
    """Return `labels` as (count,) int64; DataError unless they are integers from 0 to num_classes - 1.

    num_classes: at most MAX_CLASSES, which None stands for.
    """
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: got {labels.shape} {labels.dtype}, expected ({count},) of an integer type")
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise DataError(f"{where}: got {num_classes} classes, expected 1 to {MAX_CLASSES}")
    largest = (MAX_CLASSES if num_classes is None else num_classes) - 1
    bad = np.flatnonzero((labels < 0) | (labels > largest))
    if len(bad):
        raise DataError(
            f"{where}: label number {bad[0]} is {labels[bad[0]]}, expected 0 to {largest} ({len(bad)} such labels)"
        )
    return torch.from_numpy(labels.astype(np.int64))
