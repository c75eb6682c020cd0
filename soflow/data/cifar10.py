"""CIFAR-10 from its published archives, binary or python, or from what was unpacked of the binary one.

Nothing is unpacked to disk and no code of a pickle runs: expected members are read by name, up to a size, and the
python batches go through an unpickler that knows arrays, lists and bytes only, after the hash of their archive was
compared: NumPy crashes on arrays whose pickles were changed.
"""

import codecs
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from soflow.data.arrays import ArraySource
from soflow.data.manifest import file_sha256
from soflow.data.source import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SHAPE = (3, 32, 32)
ROW_BYTES = 3 * 32 * 32

# Source: https://www.cs.toronto.edu/~kriz/cifar.html
PUBLISHED_SHA256 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
_MEMBERS = {
    "cifar-10-binary.tar.gz": [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)],
    "cifar-10-python.tar.gz": [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)],
}
_MEMBER_LIMIT = 2**26  # twice a batch of 10,000 images

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # as the published batches name it
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class Cifar10Source(ArraySource):
    """The 50,000 training images of CIFAR-10, (3, 32, 32), kept as uint8.

    root: an archive, or a folder with one (binary before python) or with what the binary one unpacks to. Raises
    DataError for an archive of another SHA-256 than the published one, and for batches that are no batches.
    """

    def __init__(self, root: str | Path) -> None:
        read, name = _find(Path(root))
        decode = _decode_binary if name == "cifar-10-binary.tar.gz" else _decode_python
        batches = [decode(read(member), f"{root}: {member}") for member in _MEMBERS[name]]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        super().__init__(images, labels, num_classes=len(CLASSES))

    def describe(self) -> dict[str, str]:
        """Return the names of the classes."""
        return {"classes": ", ".join(CLASSES)}


def _find(root: Path) -> tuple[Callable[[str], bytes], str]:
    """Return a function that reads a member, and the name of the archive it is a member of."""
    for name, members in _MEMBERS.items():
        if root.is_file() and root.name == name:
            return _open_archive(root), name
        if name == "cifar-10-binary.tar.gz" and (root / members[0]).is_file():
            return lambda member: _read_limited((root / member).open("rb"), root / member), name
        if (root / name).is_file():
            return _open_archive(root / name), name
    if (root / "cifar-10-batches-py").exists():
        raise DataError(f"{root}: got cifar-10-batches-py, which has no hash, expected cifar-10-python.tar.gz")
    raise DataError(
        f"{root}: expected {' or '.join(_MEMBERS)}, or a folder with one of them or what the binary one unpacks to"
    )


def _open_archive(path: Path) -> Callable[[str], bytes]:
    got, expected = file_sha256(path), PUBLISHED_SHA256[path.name]
    if got != expected:
        raise DataError(f"{path}: got SHA-256 {got}, expected {expected}, the published one")

    def read(member: str) -> bytes:
        try:
            with tarfile.open(path, "r:gz") as archive:
                file = archive.extractfile(member)
                if file is None:
                    raise DataError(f"{path}: {member}: got no regular file, expected one")
                return _read_limited(file, f"{path}: {member}")
        except KeyError as error:
            raise DataError(f"{path}: got no member {member}, expected one") from error
        except tarfile.TarError as error:
            raise DataError(f"{path}: expected a tar archive, but: {error}") from error

    return read


def _read_limited(file: Any, where: object) -> bytes:
    with file:
        content: bytes = file.read(_MEMBER_LIMIT + 1)
    if len(content) > _MEMBER_LIMIT:
        raise DataError(f"{where}: got more than {_MEMBER_LIMIT} bytes, expected a batch of 10,000 images")
    return content


def _decode_binary(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (1 + ROW_BYTES):
        raise DataError(f"{where}: got {len(content)} bytes, expected a multiple of {1 + ROW_BYTES}")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + ROW_BYTES)
    return rows[:, 1:].reshape(-1, *IMAGE_SHAPE), rows[:, 0]


def _decode_python(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError) as error:
        raise DataError(f"{where}: expected a batch of the python version, but: {error}") from error
    data, labels = (batch.get(key) if isinstance(batch, dict) else None for key in (b"data", b"labels"))
    if (
        not isinstance(data, np.ndarray)
        or not isinstance(labels, list)
        or data.dtype != np.uint8
        or not labels
        or data.shape != (len(labels), ROW_BYTES)
    ):
        raise DataError(f"{where}: expected a dictionary of data, (N, {ROW_BYTES}) uint8, and a list of N labels")
    return data.reshape(-1, *IMAGE_SHAPE), np.array(labels)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch needs")
        return _ALLOWED[module, name]
