"""Training data: the order in which samples are drawn, and the sources they are read from.

The order is a pure function of (number of samples, seed, step), in integer arithmetic: it is the same on every platform
and for every number of processes, so resuming a run needs no state but the step.

A folder of latents holds `manifest.json`, `labels.npy` and the shards `latents-00000.npy`, `latents-00001.npy`, ...:

    manifest.json   {"version": 1, "n": samples, "num_classes": classes, "shape": [2 C, H, W], "dtype": "float16" or
                    "float32", "labels": {"count", "bytes", "sha256"}, "shards": [{"count", "bytes", "sha256"}, ...]};
                    further keys (encoder, crop, flip) are allowed and part of the fingerprint
    labels.npy      (n,) of an integer type, each from 0 to num_classes - 1
    latents-*.npy   (count, 2 C, H, W): the mean of the VAE's posterior in the first C channels, its standard deviation
                    in the others, both as the VAE gives them (before the factor LATENT_SCALE)
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from soflow.config import DataConfig

LATENT_SCALE = 0.18215
"""What the latents of the Stable Diffusion VAE are multiplied with: x_0 = 0.18215 (mean + std * noise)."""

MANIFEST_VERSION = 1

DIGITS_HELD_OUT_PER_CLASS = 36
_DIGITS_SPLIT_SEED = 0


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file or field, what it holds and what was expected."""


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Return the SplitMix64 hash of every element, a bijection of the 64-bit integers: uint64 in, uint64 out.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Two, so that the batches around the end of an epoch need no second sort.
@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation argsort(splitmix64(i xor key(seed, epoch))) of 0 .. num_samples - 1, (num_samples,) int64.

    The array is read-only, because it is kept for the next call.
    """
    # Arrays of one element: NumPy warns when scalars wrap around, never when arrays do.
    key = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    order = np.argsort(splitmix64(np.arange(num_samples, dtype=np.uint64) ^ key), kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the samples of the global batch of the 0-based `step`, (batch_size,) int64.

    Every epoch has num_samples // batch_size whole batches of its own order; the rest of that order is dropped.
    Raises DataError when there are fewer samples than a batch holds.
    """
    steps_per_epoch = num_samples // batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"train.batch_size: got {batch_size}, expected at most the {num_samples} samples of the data set"
        )
    epoch, position = divmod(step, steps_per_epoch)
    return epoch_order(num_samples, seed, epoch)[position * batch_size : (position + 1) * batch_size]


class Source(Protocol):
    """A data set that is read by sample number.

    image_shape: (C, H, W) of what the network sees.  num_classes: labels are 0 .. num_classes - 1.
    fingerprint: short hash of the contents, by which a resumed run knows its data set.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return mean (B, C, H, W) float32, standard deviation alike or None, and labels (B,) int64, in that order.

        A training sample is x_0 = mean + std * noise, and the mean itself where there is no standard deviation.
        """
        ...


class ArraySource:
    """Images and labels in memory. images: (N, C, H, W), finite, training range [-1, 1]; labels: (N,) integers.

    num_classes defaults to the largest label plus one. Raises DataError for other shapes, types or values.
    """

    def __init__(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray, num_classes: int | None = None
    ) -> None:
        self.images = torch.as_tensor(images)
        raw_labels = torch.as_tensor(labels)
        if self.images.ndim != 4 or len(self.images) == 0 or not self.images.is_floating_point():
            shape, dtype = tuple(self.images.shape), self.images.dtype
            raise DataError(
                f"images: got {shape} {dtype}, expected (N, C, H, W) of a floating-point type, N at least 1"
            )
        self.images = self.images.to(torch.float32)
        if not torch.isfinite(self.images).all():
            bad = torch.nonzero(~torch.isfinite(self.images.flatten(1)).all(1)).flatten()
            raise DataError(
                f"images: {len(bad)} hold NaN or Inf, the first is number {int(bad[0])}, expected finite values"
            )
        self.labels = _checked_labels(raw_labels.numpy(), len(self.images), num_classes, "labels")
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        _, channels, height, width = self.images.shape
        self.image_shape = (channels, height, width)
        contents = hashlib.sha256(f"{tuple(self.images.shape)} {self.num_classes}".encode())
        contents.update(self.images.contiguous().numpy().tobytes())
        contents.update(self.labels.numpy().tobytes())
        self.fingerprint = contents.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> tuple[Tensor, None, Tensor]:
        """Return images (B, C, H, W) float32, None and labels (B,) int64."""
        # A copy, because the order it is a view of is read-only, which torch does not know.
        rows = torch.from_numpy(np.array(indices, dtype=np.int64))
        return self.images[rows], None, self.labels[rows]


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


class _FileEntry(msgspec.Struct, frozen=True):
    count: Annotated[int, msgspec.Meta(ge=1)]
    bytes: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Version(msgspec.Struct):
    version: int


class _Manifest(msgspec.Struct, frozen=True):
    n: int
    num_classes: Annotated[int, msgspec.Meta(ge=1)]
    shape: tuple[
        Annotated[int, msgspec.Meta(ge=2, multiple_of=2)],
        Annotated[int, msgspec.Meta(ge=1)],
        Annotated[int, msgspec.Meta(ge=1)],
    ]
    dtype: Literal["float16", "float32"]
    labels: _FileEntry
    shards: Annotated[list[_FileEntry], msgspec.Meta(min_length=1)]


class LatentSource:
    """A folder of VAE posteriors, memory-mapped (the format is above); `read` gives mean and std times LATENT_SCALE.

    Everything but the contents of the shards is checked here, and `verify` checks those too. Raises DataError with the
    path and the manifest entry at fault.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        path = self.root / "manifest.json"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: expected the manifest of a folder of latents, but: {error.strerror}") from error
        self._manifest = _parse_manifest(text, path)
        self.num_classes = self._manifest.num_classes
        channels, height, width = self._manifest.shape
        self.image_shape = (channels // 2, height, width)
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]
        self._files = [self.root / f"latents-{number:05d}.npy" for number in range(len(self._manifest.shards))]
        self._starts = np.cumsum([0] + [shard.count for shard in self._manifest.shards])
        self._shards = [self._open_shard(number) for number in range(len(self._files))]
        self._labels = self._open_labels()
        self._reads_left = len(self)

    def __len__(self) -> int:
        return self._manifest.n

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and std (B, C, H, W) float32, both times LATENT_SCALE, and labels (B,) int64.

        Raises DataError when a shard changed its size since it was opened (looked at once per epoch).
        """
        assert np.all((indices >= 0) & (indices < len(self))), f"sample numbers outside 0 .. {len(self) - 1}"
        self._check_sizes_once_per_epoch(len(indices))
        # Sorted, and in one gather per shard: the fastest way to read a memory map, and it releases the GIL.
        positions = np.argsort(indices, kind="stable")
        ordered = indices[positions]
        bounds = np.searchsorted(ordered, self._starts)
        latents = np.empty((len(indices), *self._manifest.shape), dtype=self._manifest.dtype)
        for number, shard in enumerate(self._shards):
            low, high = bounds[number], bounds[number + 1]
            if low < high:
                latents[positions[low:high]] = shard[ordered[low:high] - self._starts[number]]
        scaled = torch.from_numpy(latents).to(torch.float32).mul_(LATENT_SCALE)
        mean, std = scaled.chunk(2, dim=1)
        return mean, std, self._labels[torch.from_numpy(np.array(indices, dtype=np.int64))]

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the manifest (reads everything: a minute per 100 GB at best).

        Raises DataError for the first shard that differs.
        """
        for number, (path, entry) in enumerate(zip(self._files, self._manifest.shards, strict=True)):
            _check_hash(path, f"shards[{number}]", entry)

    def _open_shard(self, number: int) -> np.ndarray:
        entry, where = self._manifest.shards[number], f"shards[{number}]"
        shard = _map_array(self._files[number], entry, where)
        shape, dtype = (entry.count, *self._manifest.shape), np.dtype(self._manifest.dtype)
        if shard.shape != shape or shard.dtype != dtype:
            got = f"{shard.shape} {shard.dtype}"
            raise DataError(f"{self._files[number]}: got {got}, expected {shape} {dtype} (manifest entry {where})")
        return shard

    def _open_labels(self) -> Tensor:
        path, entry = self.root / "labels.npy", self._manifest.labels
        labels = _map_array(path, entry, "labels")
        _check_hash(path, "labels", entry)
        return _checked_labels(labels, len(self), self.num_classes, str(path))

    def _check_sizes_once_per_epoch(self, reads: int) -> None:
        # Reading a map beyond the end of a file that was truncated meanwhile kills the process (bus error).
        self._reads_left -= reads
        if self._reads_left <= 0:
            self._reads_left = len(self)
            for number, (path, entry) in enumerate(zip(self._files, self._manifest.shards, strict=True)):
                _check_size(path, f"shards[{number}]", entry)


def open_source(config: DataConfig) -> Source:
    """Open the data set that the section `data` of a configuration names. Raises DataError when it is unusable."""
    if config.source == "digits":
        return DigitsSource("train")
    assert config.root is not None, "DataConfig lets no source but digits go without a root"
    return LatentSource(config.root)


def _checked_labels(labels: np.ndarray, count: int, num_classes: int | None, where: str) -> Tensor:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{where}: got {labels.shape} {labels.dtype}, expected ({count},) of an integer type")
    largest = int(labels.max()) if num_classes is None else num_classes - 1
    bad = np.flatnonzero((labels < 0) | (labels > largest))
    if len(bad):
        raise DataError(
            f"{where}: label number {bad[0]} is {labels[bad[0]]}, expected 0 to {largest} ({len(bad)} such labels)"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _parse_manifest(text: bytes, path: Path) -> _Manifest:
    try:
        version = msgspec.json.decode(text, type=_Version).version
        if version != MANIFEST_VERSION:
            raise DataError(f"{path}: version: got {version}, expected {MANIFEST_VERSION}")
        manifest = msgspec.json.decode(text, type=_Manifest)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: {error}") from error
    for where, count in (
        ("labels.count", manifest.labels.count),
        ("the counts in shards", sum(s.count for s in manifest.shards)),
    ):
        if count != manifest.n:
            raise DataError(f"{path}: {where}: got {count}, expected n, which is {manifest.n}")
    return manifest


def _check_size(path: Path, where: str, entry: _FileEntry) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: expected the file of manifest entry {where}, but: {error.strerror}") from error
    if size != entry.bytes:
        raise DataError(f"{path}: got {size} bytes, expected {entry.bytes} (manifest entry {where})")


def _check_hash(path: Path, where: str, entry: _FileEntry) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != entry.sha256:
        raise DataError(f"{path}: got SHA-256 {digest.hexdigest()}, expected {entry.sha256} (manifest entry {where})")


def _map_array(path: Path, entry: _FileEntry, where: str) -> np.ndarray:
    _check_size(path, where, entry)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a .npy file of numbers (manifest entry {where}), but: {error}") from error
