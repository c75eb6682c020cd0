import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from soflow.data import Cifar10Source, DataError, cifar10, open_source
from soflow.data.inspect import guess_config

ROWS = 4


def batches() -> list[tuple[np.ndarray, list[int]]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, (ROWS, 3072), dtype=np.uint8), rng.integers(0, 10, ROWS).tolist()) for _ in range(5)]


def binary(data: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate((np.array(labels, dtype=np.uint8)[:, None], data), axis=1).tobytes()


def python(data: np.ndarray, labels: list[int]) -> bytes:
    """As the published batches: protocol 2, the keys bytes."""
    return pickle.dumps({b"batch_label": b"x", b"labels": labels, b"data": data, b"filenames": [b"a.png"]}, protocol=2)


WRITERS: dict[str, tuple[str, Callable[[np.ndarray, list[int]], bytes]]] = {
    "cifar-10-binary.tar.gz": ("cifar-10-batches-bin/data_batch_{}.bin", binary),
    "cifar-10-python.tar.gz": ("cifar-10-batches-py/data_batch_{}", python),
}


def write_archive(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, extra: dict[str, bytes] | None = None
) -> Path:
    """Write a small archive, declared to be the published one; `extra` members come last and replace by name."""
    member, encode = WRITERS[name]
    files = {member.format(k + 1): encode(*batch) for k, batch in enumerate(batches())} | (extra or {})
    path = folder / name
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.setitem(cifar10.PUBLISHED_SHA256, name, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def assert_is_the_set(source: Cifar10Source) -> None:
    data = np.concatenate([data for data, _ in batches()]).reshape(-1, 3, 32, 32)
    assert (len(source), source.image_shape, source.num_classes) == (5 * ROWS, (3, 32, 32), 10)
    mean, std, labels = source.read(np.array([7, 0]))
    assert std is None
    np.testing.assert_allclose(mean.numpy(), data[[7, 0]] / 127.5 - 1, atol=1e-6)
    assert labels.tolist() == [batches()[1][1][3], batches()[0][1][0]]


@pytest.mark.parametrize("name", WRITERS)
def test_archives_are_read(name, tmp_path, monkeypatch):
    path = write_archive(tmp_path, name, monkeypatch)
    assert_is_the_set(Cifar10Source(path))
    assert_is_the_set(Cifar10Source(tmp_path))
    assert sorted(tmp_path.iterdir()) == [path]


def unpack(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_archive(folder, name, monkeypatch)
    (folder / "there").mkdir()
    with tarfile.open(path) as archive:
        archive.extractall(folder / "there", filter="data")
    return folder / "there"


def test_what_the_binary_archive_unpacks_to_is_read(tmp_path, monkeypatch):
    assert_is_the_set(Cifar10Source(unpack("cifar-10-binary.tar.gz", tmp_path, monkeypatch)))


def test_what_the_python_archive_unpacks_to_is_not_unpickled(tmp_path, monkeypatch):
    """NumPy's arrays are not safe to unpickle: a changed byte is a crash, and the batches alone have no hash."""
    there = unpack("cifar-10-python.tar.gz", tmp_path, monkeypatch)
    config = guess_config(there, 32)
    assert config.source == "cifar10"
    with pytest.raises(DataError, match=r"got cifar-10-batches-py, which has no hash, expected cifar-10-python.tar.gz"):
        open_source(config)
    (tmp_path / "cifar-10-python.tar.gz").rename(there / "cifar-10-python.tar.gz")
    assert_is_the_set(Cifar10Source(there))


def test_both_versions_are_the_same_data_set(tmp_path, monkeypatch):
    prints = {Cifar10Source(write_archive(tmp_path, name, monkeypatch)).fingerprint for name in WRITERS}
    assert len(prints) == 1


def test_published_hashes_are_asked_for(tmp_path, monkeypatch):
    path = write_archive(tmp_path, "cifar-10-binary.tar.gz", monkeypatch)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"binary.tar.gz: got SHA-256 .*, expected c4a38c50.*, the published one"):
        Cifar10Source(path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


@pytest.mark.parametrize(
    "payload", [Payload(), {b"data": Payload(), b"labels": [1]}, {b"data": np.array([Payload()], dtype=object)}]
)
def test_a_pickle_with_a_payload_is_refused_and_not_run(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    member = "cifar-10-batches-py/data_batch_3"
    path = write_archive(tmp_path, "cifar-10-python.tar.gz", monkeypatch, {member: pickle.dumps(payload, protocol=2)})
    with pytest.raises(DataError, match=rf"{member}: expected a batch .* it names posix.mkdir, which no batch needs"):
        Cifar10Source(path)
    assert not (tmp_path / "payload-was-run").exists()


@pytest.mark.parametrize("name", WRITERS)
def test_members_outside_the_folder_are_left_alone(name, tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    path = write_archive(inner, name, monkeypatch, {"../outside": b"x", "/tmp/soflow-outside": b"x"})
    assert_is_the_set(Cifar10Source(path))
    assert sorted(tmp_path.rglob("*")) == [inner, path]
    assert not Path("/tmp/soflow-outside").exists()


def test_a_link_in_the_place_of_a_batch_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    monkeypatch.setitem(cifar10.PUBLISHED_SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="data_batch_1.bin"):
        Cifar10Source(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cifar-10-binary.tar.gz", b"x" * 3072, r"got 3072 bytes, expected a multiple of 3073"),
        ("cifar-10-binary.tar.gz", b"", r"got 0 bytes"),
        ("cifar-10-binary.tar.gz", bytes([10]) + b"x" * 3072, r"labels: label number 0 is 10, expected 0 to 9"),
        ("cifar-10-python.tar.gz", b"not a pickle", r"expected a batch of the python version"),
        ("cifar-10-python.tar.gz", pickle.dumps([1, 2]), r"expected a dictionary of data"),
        (
            "cifar-10-python.tar.gz",
            python(np.zeros((2, 3071), dtype=np.uint8), [1, 2]),
            r"expected a dictionary of data",
        ),
        ("cifar-10-python.tar.gz", python(np.zeros((2, 3072)), [1, 2]), r"expected a dictionary of data"),
    ],
)
def test_batches_that_are_none_are_refused(name, content, message, tmp_path, monkeypatch):
    first = WRITERS[name][0].format(1)
    with pytest.raises(DataError, match=message):
        Cifar10Source(write_archive(tmp_path, name, monkeypatch, {first: content}))


def test_a_member_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_MEMBER_LIMIT", 1000)
    with pytest.raises(DataError, match="got more than 1000 bytes"):
        Cifar10Source(write_archive(tmp_path, "cifar-10-binary.tar.gz", monkeypatch))


def test_a_folder_without_it_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected cifar-10-binary.tar.gz or cifar-10-python.tar.gz, or a folder"):
        Cifar10Source(tmp_path)


def test_images_are_kept_as_bytes(tmp_path, monkeypatch):
    assert Cifar10Source(write_archive(tmp_path, "cifar-10-binary.tar.gz", monkeypatch)).stored_dtype == torch.uint8
