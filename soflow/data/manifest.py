"""The manifest of a folder of latents, and what it promises of the files beside it.

A folder of latents holds `manifest.json`, `labels.npy` and the shards `latents-00000.npy`, `latents-00001.npy`, ...:

    manifest.json   {"version": 1, "n": samples, "num_classes": classes, "shape": [2 C, H, W], "dtype": "float16" or
                    "float32", "labels": {"count", "bytes", "sha256"}, "shards": [{"count", "bytes", "sha256"}, ...]};
                    further keys, such as encoder, are allowed and part of the fingerprint
    labels.npy      (n,) of an integer type, each from 0 to num_classes - 1
    latents-*.npy   (count, 2 C, H, W): the mean of the VAE's posterior in the first C channels, its standard deviation
                    in the others, both as the VAE gives them (before the factor `LATENT_SCALE`)
"""

import tokenize
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np

from soflow.checkpoint.files import fingerprint
from soflow.data.source import MAX_CLASSES, DataError

MANIFEST = "manifest.json"
LABELS = "labels.npy"
MANIFEST_VERSION = 1
# what numpy raises for a header that is damaged: it is parsed as Python
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    tokenize.TokenError,
)
_T = TypeVar("_T")


class FileEntry(msgspec.Struct, frozen=True):
    """One .npy file: its rows, its size in bytes and its SHA-256."""

    count: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(msgspec.Struct, frozen=True):
    """The keys of manifest.json that a reader needs."""

    n: Annotated[int, msgspec.Meta(ge=1)]
    num_classes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CLASSES)]
    shape: tuple[
        Annotated[int, msgspec.Meta(ge=2, multiple_of=2)],
        Annotated[int, msgspec.Meta(ge=1)],
        Annotated[int, msgspec.Meta(ge=1)],
    ]
    dtype: Literal["float16", "float32"]
    labels: FileEntry
    shards: Annotated[list[FileEntry], msgspec.Meta(min_length=1)]


class _Version(msgspec.Struct):
    version: int


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"latents-{number:05d}.npy"


def read_manifest(root: Path) -> tuple[Manifest, bytes]:
    """Return the manifest of the folder `root`, and its text; DataError where it is missing or contradicts itself."""
    path = root / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: expected the manifest of a folder of latents, as soflow encode makes one of images and soflow "
            f"convert of the official HDF5 file, but: {error.strerror}"
        ) from error
    version = decode_json(text, _Version, str(path)).version
    if version != MANIFEST_VERSION:
        raise DataError(f"{path}: version: got {version}, expected {MANIFEST_VERSION}")
    manifest = decode_json(text, Manifest, str(path))
    for where, count in (
        ("labels.count", manifest.labels.count),
        ("the counts in shards", sum(shard.count for shard in manifest.shards)),
    ):
        if count != manifest.n:
            raise DataError(f"{path}: {where}: got {count}, expected n, which is {manifest.n}")
    return manifest, text


def decode_json(text: bytes, kind: type[_T], where: str) -> _T:
    """Return JSON as a `kind`; DataError, whose message begins with `where`, for what is none."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error


def manifest_text(manifest: Manifest, remarks: dict[str, Any]) -> bytes:
    """Return the text of manifest.json: `manifest`, and the further keys `remarks`."""
    fields = {"version": MANIFEST_VERSION} | msgspec.to_builtins(manifest) | remarks
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def file_entry(path: Path, count: int) -> FileEntry:
    """Return the entry of the file `path`, which holds `count` rows."""
    return FileEntry(count=count, bytes=path.stat().st_size, sha256=file_sha256(path))


def check_size(path: Path, where: str, entry: FileEntry) -> None:
    """Raise DataError unless the file `path` is there and as large as its manifest entry, called `where`, says."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: expected the file of manifest entry {where}, but: {error.strerror}") from error
    if size != entry.bytes:
        raise DataError(f"{path}: got {size} bytes, expected {entry.bytes} (manifest entry {where})")


def check_hash(path: Path, where: str, entry: FileEntry) -> None:
    """Raise DataError unless the file `path` has the SHA-256 that its manifest entry, called `where`, says."""
    got = file_sha256(path)
    if got != entry.sha256:
        raise DataError(f"{path}: got SHA-256 {got}, expected {entry.sha256} (manifest entry {where})")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return str(fingerprint(path)["sha256"])


def map_array(path: Path, entry: FileEntry, where: str) -> np.ndarray:
    """Return the .npy file `path`, memory-mapped and read-only; DataError unless it is one of its entry's size."""
    check_size(path, where, entry)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except _UNREADABLE as error:
        raise DataError(f"{path}: expected a .npy file of numbers (manifest entry {where}), but: {error}") from error
