"""Write a folder of latents, shard by shard: resumable, by several processes at once, never half a file.

Shard k is `latents-k.npy` and, while the folder is unfinished, `parts/k.json`: what of the manifest and of the labels
is known when it is written. Whoever finds all parts there makes the manifest of them, which finishes the folder.
"""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from soflow.checkpoint import replacing
from soflow.data.manifest import LABELS, MANIFEST, FileEntry, Manifest, file_entry, manifest_text, shard_name
from soflow.data.source import DataError

BAD_FILES = "bad_files.jsonl"
_PLAN = "plan.json"


class BadFile(msgspec.Struct, frozen=True):
    """A file that is not in the data set, and why."""

    path: str
    reason: str


class Part(msgspec.Struct, frozen=True):
    """A written shard (`entry` None: every file of it was bad), its labels and the files it left out."""

    entry: FileEntry | None
    labels: list[int]
    bad: list[BadFile]


class Plan(msgspec.Struct, frozen=True):
    """What a folder will hold; an unfinished one is continued only by the same plan.

    num_shards: parts to write.  contents: identifies the samples and their order.  remarks: further manifest keys.
    """

    num_shards: int
    num_classes: int
    shape: tuple[int, int, int]
    dtype: Literal["float16", "float32"]
    contents: str
    remarks: dict[str, Any]


class LatentWriter:
    """Writes the shards of one plan to `root`; raises DataError for a folder of another plan, or what the disk does."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self.plan = plan
        self.parts = root / "parts"
        self._manifest = root / MANIFEST
        root.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._require_same_plan()

    @property
    def finished(self) -> bool:
        """Whether the manifest is written."""
        return self._manifest.exists()

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        return [] if self.finished else [k for k in range(self.plan.num_shards) if not self._part(k).exists()]

    def write_shard(self, number: int, latents: np.ndarray, labels: Sequence[int], bad: Sequence[BadFile]) -> None:
        """Write shard `number`: latents (count, 2 C, H, W) of the plan's dtype, finite, and their labels."""
        assert latents.shape == (len(labels), *self.plan.shape), latents.shape
        assert latents.dtype == np.dtype(self.plan.dtype), latents.dtype
        entry = None
        if len(latents):
            path = self.root / shard_name(number)
            with replacing(path) as partial:
                save_array(partial, latents)
                entry = file_entry(partial, len(latents))
        self.parts.mkdir(exist_ok=True)
        with replacing(self._part(number)) as partial:
            partial.write_bytes(msgspec.json.encode(Part(entry, list(labels), list(bad))))

    def finish(self, max_bad: int) -> list[BadFile] | None:
        """Write labels, manifest and list of bad files if every shard is there; return the bad files, None if not yet.

        Raises DataError where more than `max_bad` files are bad, or all of them; the shards stay as they are.
        """
        with self._lock():
            if self.finished:
                return read_bad_files(self.root)
            if self.missing():
                return None
            parts = [msgspec.json.decode(self._part(k).read_bytes(), type=Part) for k in range(self.plan.num_shards)]
            bad = [file for part in parts for file in part.bad]
            listing = self.root / BAD_FILES
            if bad:
                with replacing(listing) as partial:
                    partial.write_bytes(b"".join(msgspec.json.encode(file) + b"\n" for file in bad))
            if len(bad) > max_bad:
                raise DataError(
                    f"{listing}: {len(bad)} files could not be encoded, expected at most {max_bad} (max_bad)"
                )
            entries = [part.entry for part in parts if part.entry is not None]
            if len(entries) < len(parts):
                raise DataError(f"{listing}: every file of a shard is in it, expected one that can be encoded")
            labels = np.array([label for part in parts for label in part.labels], dtype=np.int32)
            with replacing(self.root / LABELS) as partial:
                save_array(partial, labels)
                label_entry = file_entry(partial, len(labels))
            manifest = Manifest(
                n=len(labels),
                num_classes=self.plan.num_classes,
                shape=self.plan.shape,
                dtype=self.plan.dtype,
                labels=label_entry,
                shards=entries,
            )
            with replacing(self._manifest) as partial:
                partial.write_bytes(manifest_text(manifest, self.plan.remarks | {"contents": self.plan.contents}))
            for file in (*self.parts.iterdir(), self.root / _PLAN):
                file.unlink()
            self.parts.rmdir()
            return bad

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:05d}.json"

    def _require_same_plan(self) -> None:
        path = self.root / _PLAN
        if self.finished:
            theirs = msgspec.json.decode(self._manifest.read_bytes()).get("contents")
            if theirs != self.plan.contents:
                raise DataError(f"{self._manifest}: got a finished folder of other contents; choose another folder")
        elif path.exists():
            theirs, ours = msgspec.json.decode(path.read_bytes()), msgspec.json.decode(msgspec.json.encode(self.plan))
            differences = [f"{key}: {theirs.get(key)!r}, {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
            if differences:
                raise DataError(
                    f"{path}: got the unfinished folder of another plan (there, here): {'; '.join(differences)}; "
                    "choose another folder"
                )
        elif any(file.name != ".lock" for file in self.root.iterdir()):
            raise DataError(f"{self.root}: got a folder with other files in it, expected an empty or new one")
        else:
            with replacing(path) as partial:
                partial.write_bytes(msgspec.json.format(msgspec.json.encode(self.plan), indent=1))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy under exactly this name; np.save would add its suffix."""
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def read_bad_files(root: Path) -> list[BadFile]:
    """Return what `bad_files.jsonl` of a folder of latents lists; nothing where there is none."""
    path = root / BAD_FILES
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=BadFile) for line in path.read_bytes().splitlines()]
