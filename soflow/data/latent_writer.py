"""Write a folder of latents, shard by shard: resumable, by several processes at once, never half a file.

Shard k is `latents-k.npy` and, while the folder is unfinished, `parts/k.json`: what of the manifest and of the labels
is known when it is written. Whoever finds all parts there makes the manifest of them, which finishes the folder.
Of two that write one shard, the first has written it: `parts/k.lock` is held by one of them. `.lock` is shared by all
that write shards and held alone by the one that finishes.
"""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from soflow.checkpoint import replacing
from soflow.data.manifest import (
    LABELS,
    MANIFEST,
    FileEntry,
    Manifest,
    decode_json,
    file_entry,
    manifest_text,
    shard_name,
)
from soflow.data.source import DataError

BAD_FILES = "bad_files.jsonl"
PLAN = "plan.json"


class BadFile(msgspec.Struct, frozen=True):
    """A file that is not in the data set, and why."""

    path: str
    reason: str


class Part(msgspec.Struct, frozen=True):
    """A written shard, its labels and the files it left out."""

    entry: FileEntry
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


class _Finished(msgspec.Struct):
    contents: str | None = None


class LatentWriter:
    """Writes the shards of one plan to `root`; raises DataError for a folder of another plan, or what the disk does."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self.plan = plan
        self.parts = root / "parts"
        self._manifest = root / MANIFEST
        with _refusing_disk(root):
            root.mkdir(parents=True, exist_ok=True)
        with self._lock(".lock", fcntl.LOCK_EX):
            self._require_same_plan()
            if self.finished:
                self._clean()  # whoever wrote the manifest may have been killed before it did

    @property
    def finished(self) -> bool:
        """Whether the manifest is written."""
        return self._manifest.exists()

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        return [] if self.finished else [k for k in range(self.plan.num_shards) if not self._part(k).exists()]

    def write_shard(self, number: int, latents: np.ndarray, labels: Sequence[int], bad: Sequence[BadFile]) -> None:
        """Write shard `number` unless it is there: latents (count, 2 C, H, W) of the plan's dtype, finite, and labels.

        A shard may be empty: every file of it was bad.
        """
        assert latents.shape == (len(labels), *self.plan.shape), latents.shape
        assert latents.dtype == np.dtype(self.plan.dtype), latents.dtype
        with self._lock(".lock", fcntl.LOCK_SH):
            if self.finished:
                return
            with _refusing_disk(self.parts):
                self.parts.mkdir(exist_ok=True)
            with self._lock(f"parts/{number:05d}.lock", fcntl.LOCK_EX):
                if self._part(number).exists():
                    return
                with _replacing(self.root / shard_name(number)) as partial:
                    save_array(partial, latents)
                    entry = file_entry(partial, len(latents))
                with _replacing(self._part(number)) as partial:
                    partial.write_bytes(msgspec.json.encode(Part(entry, list(labels), list(bad))))

    def finish(self, max_bad: int) -> list[BadFile] | None:
        """Write labels, manifest and list of bad files if every shard is there; return the bad files, None if not yet.

        Raises DataError where more than `max_bad` files are bad, or all of them; the shards stay as they are.
        """
        with self._lock(".lock", fcntl.LOCK_EX):
            if self.finished:
                return read_bad_files(self.root)
            if self.missing():
                return None
            paths = [self._part(number) for number in range(self.plan.num_shards)]
            parts = [decode_json(path.read_bytes(), Part, str(path)) for path in paths]
            bad = [file for part in parts for file in part.bad]
            listing = self.root / BAD_FILES
            if bad:
                with _replacing(listing) as partial:
                    partial.write_bytes(b"".join(msgspec.json.encode(file) + b"\n" for file in bad))
            if len(bad) > max_bad:
                raise DataError(
                    f"{listing}: {len(bad)} files could not be encoded, expected at most {max_bad} (max_bad)"
                )
            labels = np.array([label for part in parts for label in part.labels], dtype=np.int32)
            if not len(labels):
                raise DataError(f"{listing}: every file is in it, expected one that can be encoded")
            with _replacing(self.root / LABELS) as partial:
                save_array(partial, labels)
                label_entry = file_entry(partial, len(labels))
            manifest = Manifest(
                n=len(labels),
                num_classes=self.plan.num_classes,
                shape=self.plan.shape,
                dtype=self.plan.dtype,
                labels=label_entry,
                shards=[part.entry for part in parts],
            )
            with _replacing(self._manifest) as partial:
                partial.write_bytes(manifest_text(manifest, self.plan.remarks | {"contents": self.plan.contents}))
            self._clean()
            return bad

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:05d}.json"

    def _clean(self) -> None:
        if self.parts.exists():
            for file in self.parts.iterdir():
                file.unlink()
            self.parts.rmdir()
        (self.root / PLAN).unlink(missing_ok=True)

    def _require_same_plan(self) -> None:
        path = self.root / PLAN
        if self.finished:
            contents = decode_json(self._manifest.read_bytes(), _Finished, str(self._manifest)).contents
            if contents != self.plan.contents:
                raise DataError(f"{self._manifest}: got a finished folder of other contents; choose another folder")
        elif path.exists():
            theirs = _fields(decode_json(path.read_bytes(), Plan, str(path)))
            ours = _fields(msgspec.json.decode(msgspec.json.encode(self.plan), type=Plan))
            differences = [f"{key}: {theirs.get(key)!r}, {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
            if differences:
                raise DataError(
                    f"{path}: got the unfinished folder of another plan (there, here): {'; '.join(differences)}; "
                    "choose another folder"
                )
        # The temporary file is of a process that was killed while it wrote the plan.
        elif any(file.name not in (".lock", f"{PLAN}.tmp") for file in self.root.iterdir()):
            raise DataError(f"{self.root}: got a folder with other files in it, expected an empty or new one")
        else:
            with _replacing(path) as partial:
                partial.write_bytes(msgspec.json.format(msgspec.json.encode(self.plan), indent=1))

    @contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        path = self.root / name
        with _refusing_disk(path):
            file = path.open("a+")  # network file systems share a lock only of a file that can be read
            fcntl.flock(file, kind)
        with file:
            yield


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a contiguous array as .npy under exactly this name; np.save would add its suffix."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # np.lib.format.write_array would not say why the disk refuses


def read_bad_files(root: Path) -> list[BadFile]:
    """Return what `bad_files.jsonl` of a folder of latents lists; nothing where there is none."""
    path = root / BAD_FILES
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return [decode_json(line, BadFile, f"{path}: line {number}") for number, line in enumerate(lines, start=1)]


def _fields(plan: Plan) -> dict[str, Any]:
    fields = msgspec.structs.asdict(plan)
    return fields | fields.pop("remarks")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with _refusing_disk(path), replacing(path) as partial:
        yield partial


@contextmanager
def _refusing_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
