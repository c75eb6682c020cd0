"""Latents of a VAE, from a folder in the format of `soflow.data.manifest`."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from soflow.data.manifest import (
    LABELS,
    Manifest,
    check_hash,
    check_size,
    map_array,
    read_manifest,
    shard_name,
)
from soflow.data.source import DataError, Source, checked_labels

LATENT_SCALE = 0.18215
"""What the latents of the Stable Diffusion VAE are multiplied with: x_0 = 0.18215 (mean + std * noise)."""


def latent_moments(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation times LATENT_SCALE, (B, C, H, W) fp32, of stored latents (B, 2 C, H, W)."""
    scaled = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
    mean, std = scaled.copy_(stored).mul_(LATENT_SCALE).chunk(2, dim=1)
    return mean, std


class LatentSource(Source):
    """A folder of VAE posteriors, memory-mapped; its moments are times LATENT_SCALE.

    Everything but the contents of the shards is checked here, and `verify` checks those too. Raises DataError with the
    path and the manifest entry at fault.
    """

    finite = False

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest, self._text = read_manifest(self.root)
        self.num_classes = self.manifest.num_classes
        channels, height, width = self.stored_shape = self.manifest.shape
        self.stored_dtype = getattr(torch, self.manifest.dtype)
        self.image_shape = (channels // 2, height, width)
        self.fingerprint = hashlib.sha256(self._text).hexdigest()[:16]
        self._files = [self.root / shard_name(number) for number in range(len(self.manifest.shards))]
        self._starts = np.cumsum([0] + [shard.count for shard in self.manifest.shards])
        self._shards = [self._open_shard(number) for number in range(len(self._files))]
        self.labels = self._open_labels()

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Write mean and standard deviation as stored, (B, 2 C, H, W), to `out`.

        Raises DataError when a shard that is read changed its size since it was opened.
        """
        assert np.all((indices >= 0) & (indices < len(self))), f"sample numbers outside 0 .. {len(self) - 1}"
        # Sorted, and in one gather per shard: the fastest way to read a memory map, and it releases the GIL.
        positions = np.argsort(indices, kind="stable")
        ordered = indices[positions]
        bounds = np.searchsorted(ordered, self._starts)
        for number, shard in enumerate(self._shards):
            low, high = bounds[number], bounds[number + 1]
            if low < high:
                # Reading a map beyond the end of a file that was truncated meanwhile kills the process (bus error).
                check_size(self._files[number], f"shards[{number}]", self.manifest.shards[number])
                out[positions[low:high]] = shard[ordered[low:high] - self._starts[number]]

    def moments(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, both times LATENT_SCALE."""
        return latent_moments(stored)

    def verify(self) -> None:
        """Compare every shard with its SHA-256, and look for NaN and infinity (a minute per 100 GB at best).

        Raises DataError for the first shard at fault.
        """
        for number, (path, entry) in enumerate(zip(self._files, self.manifest.shards, strict=True)):
            check_hash(path, f"shards[{number}]", entry)
            for row, sample in enumerate(self._shards[number]):
                if not np.isfinite(sample).all():
                    raise DataError(f"{path}: row {row} holds NaN or infinity, expected finite latents")

    def describe(self) -> dict[str, str]:
        """Return format, shards and the further keys of the manifest."""
        known = {field.name for field in msgspec.structs.fields(Manifest)} | {"version"}
        remarks = {key: value for key, value in msgspec.json.decode(self._text).items() if key not in known}
        size = sum(entry.bytes for entry in self.manifest.shards)
        stored = f"{' x '.join(map(str, self.stored_shape))} {self.manifest.dtype}"
        return {"stored": f"{stored}, {len(self._files)} shards, {size / 2**30:.2f} GiB"} | {
            key: value if isinstance(value, str) else msgspec.json.encode(value).decode()
            for key, value in remarks.items()
        }

    def _open_shard(self, number: int) -> np.ndarray:
        entry, where = self.manifest.shards[number], f"shards[{number}]"
        shard = map_array(self._files[number], entry, where)
        shape, dtype = (entry.count, *self.manifest.shape), np.dtype(self.manifest.dtype)
        if shard.shape != shape or shard.dtype != dtype:
            got = f"{shard.shape} {shard.dtype}"
            raise DataError(f"{self._files[number]}: got {got}, expected {shape} {dtype} (manifest entry {where})")
        return shard

    def _open_labels(self) -> Tensor:
        path, entry = self.root / LABELS, self.manifest.labels
        labels = map_array(path, entry, "labels")
        check_hash(path, "labels", entry)
        return checked_labels(labels, self.manifest.n, self.num_classes, str(path))
