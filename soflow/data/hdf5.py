"""Latents in the official HDF5 file, `imagenet_latent.hdf5`: read for training, or converted to our format.

The file has the data sets `latents` (N, 2 C, H, W) float32, mean then standard deviation, `labels` (N,) int64, and the
scalars `amount` = N and `latent_size` = H = W. Source: the official latent_dataset.py.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from soflow.data.latent_writer import LatentWriter, Plan
from soflow.data.latents import latent_moments
from soflow.data.source import DataError, Source, checked_labels
from soflow.official_config import LATENTS_FILE

_ROWS_AT_ONCE = 1024


class Hdf5Source(Source):
    """An official HDF5 file of latents, or the folder with it; its moments are times LATENT_SCALE.

    num_classes: None takes the largest label plus one. Slower to read than our format: convert it.
    Raises DataError where h5py is not installed, for a file that is not one, or whose parts contradict each other.
    """

    finite = False

    def __init__(self, root: str | Path, num_classes: int | None = None) -> None:
        try:
            import h5py
        except ImportError as error:
            raise DataError(f"{root}: HDF5 files need the package h5py: pip install 'soflow[latents]'") from error
        self.path = Path(root) / LATENTS_FILE if Path(root).is_dir() else Path(root)
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: expected an HDF5 file of latents, but: {error}") from error
        names = ("latents", "labels", "amount", "latent_size")
        missing = [name for name in names if not isinstance(self._file.get(name), h5py.Dataset)]
        if missing:
            raise DataError(f"{self.path}: got no data set {missing[0]!r}, expected {', '.join(names)}")
        self._latents = self._file["latents"]
        # the shape of an empty data set is None
        shape: tuple[int, ...] = self._latents.shape or ()
        dtype = self._latents.dtype
        size, amount = self._number("latent_size"), self._number("amount")
        if len(shape) != 4 or shape[1] % 2 or shape != (amount, shape[1], size, size) or 0 in shape:
            raise DataError(
                f"{self.path}: latents: got {shape}, expected ({amount}, 2 C, {size}, {size}), none of them 0"
            )
        if dtype not in (np.float16, np.float32):
            raise DataError(f"{self.path}: latents: got {dtype}, expected float32 or float16")
        self.labels = checked_labels(self._whole("labels"), amount, num_classes, f"{self.path}: labels")
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.stored_shape, self.stored_dtype = tuple(shape[1:]), torch.float16 if dtype.itemsize == 2 else torch.float32
        self.image_shape = (shape[1] // 2, size, size)
        # Hashing 80 GB would take minutes: the labels and a few samples tell one data set from another.
        contents = hashlib.sha256(f"{shape} {dtype} {self.num_classes}".encode() + self.labels.numpy().tobytes())
        for index in (0, amount // 2, amount - 1):
            contents.update(self._read(np.array([index])).tobytes())
        self.fingerprint = contents.hexdigest()[:16]

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Write mean and standard deviation as stored to `out`."""
        # HDF5 wants ascending numbers without repetition.
        unique, positions = np.unique(indices, return_inverse=True)
        out[...] = self._read(unique)[positions]

    def moments(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, both times LATENT_SCALE."""
        return latent_moments(stored)

    def verify(self) -> None:
        """Read everything and look for NaN and infinity; the format has no hashes."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(self)))
            self.require_finite(rows, self._read(rows))

    def describe(self) -> dict[str, str]:
        """Return how the latents are stored."""
        return {"stored": f"{' x '.join(map(str, self.stored_shape))} {self._latents.dtype}, HDF5"}

    def require_finite(self, rows: np.ndarray, latents: np.ndarray) -> None:
        """Raise DataError unless `latents`, what the rows hold in some dtype, are finite."""
        finite = np.isfinite(latents).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            first = rows[int(np.argmin(finite))]
            raise DataError(
                f"{self.path}: latents: row {first} is not finite in {latents.dtype}, expected finite latents"
            )

    def _number(self, name: str) -> int:
        value = self._whole(name)
        if not isinstance(value, np.integer):
            raise DataError(f"{self.path}: {name}: got {value!r}, expected one whole number")
        return int(value)

    def _whole(self, name: str) -> Any:
        try:
            return self._file[name][()]
        except OSError as error:
            raise DataError(f"{self.path}: {name}: cannot be read: {error}") from error

    def _read(self, rows: np.ndarray) -> np.ndarray:
        try:
            return self._latents[rows]
        except OSError as error:
            raise DataError(f"{self.path}: rows {rows[0]} to {rows[-1]} cannot be read: {error}") from error


def convert_hdf5(
    source: Hdf5Source,
    root: Path,
    dtype: Literal["float16", "float32"],
    shard_bytes: int,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the samples of an official file to the folder `root` in our format; a second call continues the first.

    progress: called with the number of samples of every shard written. Raises DataError for values that are not finite
    in `dtype`, and for a folder of other contents.
    """
    sample_bytes = int(np.prod(source.stored_shape)) * np.dtype(dtype).itemsize
    per_shard = max(1, shard_bytes // sample_bytes)
    channels, height, width = source.stored_shape
    plan = Plan(
        num_shards=-(-len(source) // per_shard),
        num_classes=source.num_classes,
        shape=(channels, height, width),
        dtype=dtype,
        contents=hashlib.sha256(f"{source.fingerprint} {dtype} {per_shard}".encode()).hexdigest()[:16],
        remarks={"converted_from": source.path.name},
    )
    writer = LatentWriter(root, plan)
    for number in writer.missing():
        rows = np.arange(number * per_shard, min((number + 1) * per_shard, len(source)))
        latents = np.empty((len(rows), *source.stored_shape), dtype=dtype)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[start : start + _ROWS_AT_ONCE]
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinity, which is refused below
                latents[start : start + len(chunk)] = source._read(chunk)
            source.require_finite(chunk, latents[start : start + len(chunk)])
        writer.write_shard(number, latents, source.labels[torch.from_numpy(rows)].tolist(), [])
        progress(len(rows))
    writer.finish(max_bad=0)
