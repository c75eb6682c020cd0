"""A folder of images becomes a folder of latents: decode, crop, encode, write shards; resumable, by several processes.

Process `rank` of `world_size` writes the shards k = rank modulo world_size. Processes share nothing but the folder:
each may be killed and started again, and the one that finds every shard written finishes the folder.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from soflow.data.arrays import to_training_range
from soflow.data.crop import center_crop
from soflow.data.decode import Decoder
from soflow.data.image_folder import Listing
from soflow.data.latent_writer import BadFile, LatentWriter, Plan
from soflow.data.source import DataError
from soflow.vae import Vae


@dataclass(frozen=True)
class EncodeSettings:
    """What is made of the images.

    image_size: side of the crop.  flip: whether every image is followed by its mirror image.
    dtype: of mean and standard deviation.  shard_bytes: size of a shard, at most.
    """

    image_size: int = 256
    flip: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    shard_bytes: int = 2**30


class Encoder:
    """Encodes the images of `listing` to the folder `root`; made again with the same arguments, it goes on.

    Raises DataError for a folder of another plan, and where the crop does not fit the VAE.
    """

    def __init__(
        self, listing: Listing, root: Path, vae: Vae, decode: Decoder, settings: EncodeSettings, device: torch.device
    ) -> None:
        if settings.image_size % vae.reduction:
            raise DataError(f"size: got {settings.image_size}, expected a multiple of {vae.reduction} for {vae.name}")
        self.listing = listing
        self.vae = vae
        self.decode = decode
        self.settings = settings
        self.device = device
        side = settings.image_size // vae.reduction
        shape = (2 * vae.channels, side, side)
        sample_bytes = int(np.prod(shape)) * np.dtype(settings.dtype).itemsize
        self.copies = 2 if settings.flip else 1
        self.files_per_shard = max(1, settings.shard_bytes // (sample_bytes * self.copies))
        vae_sha256 = vae.weights_sha256()
        remarks = {
            "encoder": vae.name,
            "vae_sha256": vae_sha256,
            "crop": f"ADM {settings.image_size}",
            "flip": settings.flip,
            "classes": list(listing.classes),
        }
        contents = f"{listing.fingerprint} {vae_sha256} {settings} {self.files_per_shard}"
        self.writer = LatentWriter(
            root,
            Plan(
                num_shards=-(-len(listing.paths) // self.files_per_shard),
                num_classes=len(listing.classes),
                shape=shape,
                dtype=settings.dtype,
                contents=hashlib.sha256(contents.encode()).hexdigest()[:16],
                remarks=remarks,
            ),
        )

    def run(
        self,
        batch_size: int,
        max_bad: int,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int], object] = lambda files: None,
    ) -> list[BadFile] | None:
        """Encode what is missing of this process's shards; return the bad files once all shards are there, else None.

        progress: called with a number of files done, those of earlier calls first.
        Raises DataError where more than `max_bad` files are bad.
        """
        missing = set(self.writer.missing())
        mine = range(rank, self.writer.plan.num_shards, world_size)
        progress(sum(len(self.files(number)) for number in mine if number not in missing))
        for number in mine:
            if number in missing:
                self._encode_shard(number, batch_size, progress)
        return self.writer.finish(max_bad)

    def files(self, number: int) -> range:
        """Return the numbers of the files of a shard."""
        first = number * self.files_per_shard
        return range(first, min(first + self.files_per_shard, len(self.listing.paths)))

    def _encode_shard(self, number: int, batch_size: int, progress: Callable[[int], object]) -> None:
        files = self.files(number)
        latents = np.empty((len(files) * self.copies, *self.writer.plan.shape), dtype=self.settings.dtype)
        labels: list[int] = []
        bad: list[BadFile] = []
        batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
        for batch, crops in zip(batches, self._load_ahead(batches), strict=True):
            good = [(index, crop) for index, crop in zip(batch, crops, strict=True) if not isinstance(crop, str)]
            bad += [BadFile(self.listing.paths[i], c) for i, c in zip(batch, crops, strict=True) if isinstance(c, str)]
            if good:
                encoded = self._encode(torch.stack([crop for _, crop in good]))
                for (index, _), rows in zip(good, encoded, strict=True):
                    if np.isfinite(rows).all():
                        latents[len(labels) : len(labels) + self.copies] = rows
                        labels += [self.listing.labels[index]] * self.copies
                    else:
                        bad.append(BadFile(self.listing.paths[index], f"its latents are not finite in {rows.dtype}"))
            progress(len(batch))
        self.writer.write_shard(number, latents[: len(labels)], labels, bad)

    def _load_ahead(self, batches: Sequence[range]) -> Iterator[list[Tensor | str]]:
        """Read, decode and crop a batch while the one before is encoded."""
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
            following: Future[list[Tensor | str]] | None = None
            for number, batch in enumerate(batches):
                current = following or loader.submit(self._load, batch)
                following = loader.submit(self._load, batches[number + 1]) if number + 1 < len(batches) else None
                yield current.result()

    def _load(self, batch: Sequence[int]) -> list[Tensor | str]:
        contents = [(self.listing.root / self.listing.paths[index]).read_bytes() for index in batch]
        size = self.settings.image_size
        return [out if isinstance(out, str) else center_crop(out, size) for out in self.decode(contents)]

    def _encode(self, crops: Tensor) -> np.ndarray:
        """Mean and standard deviation, (B, copies, 2 C, H, W), of crops (B, S, S, 3) uint8."""
        images = to_training_range(crops.to(self.device)).permute(0, 3, 1, 2)
        views = torch.stack((images, images.flip(3)), dim=1) if self.settings.flip else images[:, None]
        mean, std = self.vae.encode(views.flatten(0, 1).contiguous())
        moments = torch.cat((mean, std), dim=1).to(getattr(torch, self.settings.dtype))
        return moments.unflatten(0, (len(crops), self.copies)).cpu().numpy()
