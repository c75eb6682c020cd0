"""Files that are written whole or not at all, and read without trusting them."""

import errno
import fcntl
import hashlib
import os
import pickle
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# what reading a file that is no archive, is damaged, or pickles more than tensors can raise
UNREADABLE = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or trusted; the message names the file and the cause."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block writes there replaces `path`, whole, synced, or not at all.

    Raises what the block raises, and OSError: `path` is then as it was, and the temporary file is gone. OSError as well
    where another process, or a block of this one, is writing it.
    """
    partial = path.with_name(path.name + ".tmp")
    with naming(path), partial.open("ab") as file:
        if not _lock(file, partial):
            raise OSError(errno.EBUSY, "something else is writing it", str(path))
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        # from here on the temporary file is that of the next
        sync(path.parent)


def _lock(file: BufferedWriter, path: Path) -> bool:
    """Return whether nobody else holds `file`, which was opened at `path`, and nobody will until it is closed.

    A file system without locks keeps nobody out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return True
    try:
        # renamed since, it is what another has finished
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return False
        path.write_bytes(b"\0")
        os.truncate(path, 0)
    except FileNotFoundError:
        return False
    except PermissionError:
        # SMB: such a lock keeps out all that is not `file`, this process included
        fcntl.flock(file, fcntl.LOCK_UN)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give what the system raises in the block the name `path`, if it has none: a full disk names no open file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` on the CPU, contiguous, each alone in its memory: copies, but for those that are so already.

    No format may see memory that tensors share, and torch.save would store all that a view is of.
    """
    shared = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    separated = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and shared[storage.data_ptr()] == 1
        if not (alone and tensor.device.type == "cpu" and tensor.is_contiguous()):
            tensor = tensor.to(device="cpu", memory_format=torch.contiguous_format, copy=True)
        separated[name] = tensor.detach()
    return separated


def save_pickle(value: dict[str, Any], path: Path) -> None:
    """Write what torch.save does; OSError with the reason where the disk refuses."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # torch.save covers the failed write with its own message about a file position
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; CheckpointError where it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def load_pickle(path: Path) -> Any:
    """Return the tensors, mapped from the file, and plain values that torch.save wrote; never anything else.

    Flipped bits are taken for numbers: `check_records` or a hash comes first. Raises CheckpointError.
    """
    with _refusing(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_records(path: Path) -> None:
    """Raise CheckpointError unless every record of a file of torch.save matches its CRC-32."""
    with _refusing(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: record {damaged} does not match its CRC-32: the file is damaged")


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: {error}, expected a file written by torch.save") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, expected only tensors and plain values: {error.__context__}"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def sync(path: Path) -> None:
    """Return when the contents of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path, like: Path) -> None:
    """Return when a folder of files is on the disk; who may read the file `like` may read them all."""
    mode = like.stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors makes its files readable by the owner only
        sync(path)
    sync(folder)


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}
