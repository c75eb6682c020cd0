"""The writer of latents: several of one folder at once, what a kill leaves behind, and what the disk refuses."""

import fcntl
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from soflow.data import DataError, LatentSource, latent_writer
from soflow.data.latent_writer import BadFile, LatentWriter, Plan, save_array

ROWS = 3


def plan(num_shards: int = 2) -> Plan:
    return Plan(
        num_shards=num_shards, num_classes=2, shape=(2, 4, 4), dtype="float16", contents="abc", remarks={"flip": False}
    )


def write(writer: LatentWriter, number: int, value: float = 1.0) -> None:
    writer.write_shard(number, np.full((ROWS, 2, 4, 4), value, dtype=np.float16), [0, 1, 0], [])


def values(root: Path) -> set[float]:
    """The values in a folder, which must be finished, whole, and without anything left over."""
    source = LatentSource(root)
    source.verify()
    assert not (root / "parts").exists()
    assert not (root / "plan.json").exists()
    assert not list(root.glob("*.tmp"))
    return set(np.concatenate([np.load(path).ravel() for path in root.glob("latents-*.npy")]).tolist())


@contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """A process that does `work`; killed at the end, if it still runs."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit
        time.sleep(0.005)


def slow_save(mark: Path) -> Callable[[Path, np.ndarray], None]:
    """`save_array` that stops in the middle of the file, once it has made the file `mark`."""

    def save(path: Path, array: np.ndarray) -> None:
        save_array(path, array)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        mark.touch()
        time.sleep(0.5)
        with path.open("ab") as file:
            file.write(whole[len(whole) // 2 :])

    return save


def slowly(monkeypatch: pytest.MonkeyPatch, mark: Path, work: Callable[[], object]) -> Callable[[], None]:
    """`work` with `slow_save`, for a process of its own."""

    def run() -> None:
        monkeypatch.setattr(latent_writer, "save_array", slow_save(mark))
        work()

    return run


def test_a_shard_that_two_write_at_once_is_of_one_of_them(tmp_path, monkeypatch):
    root = tmp_path / "latents"
    writer = LatentWriter(root, plan(1))
    first = slowly(monkeypatch, tmp_path / "mark", lambda: write(writer, 0, 1.0))

    with child(first) as process:
        wait_for(tmp_path / "mark")
        write(writer, 0, 2.0)
        assert writer.finish(max_bad=0) == []
        assert values(root) == {1.0}
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert values(root) == {1.0}


def test_a_shard_of_a_killed_writer_is_taken_over(tmp_path, monkeypatch):
    root = tmp_path / "latents"
    writer = LatentWriter(root, plan(1))
    first = slowly(monkeypatch, tmp_path / "mark", lambda: write(writer, 0, 1.0))

    with child(first):
        wait_for(tmp_path / "mark")
    write(writer, 0, 2.0)
    assert writer.finish(max_bad=0) == []
    assert values(root) == {2.0}


def test_two_that_finish_at_once_do_it_once(tmp_path, monkeypatch):
    root = tmp_path / "latents"
    writer = LatentWriter(root, plan(1))
    write(writer, 0)
    first = slowly(monkeypatch, tmp_path / "mark", lambda: writer.finish(max_bad=0))

    with child(first) as process:
        wait_for(tmp_path / "mark")
        assert writer.finish(max_bad=0) == []
        assert values(root) == {1.0}
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert values(root) == {1.0}


def test_a_shard_that_comes_after_the_end_changes_nothing(tmp_path):
    first, second = LatentWriter(tmp_path, plan(1)), LatentWriter(tmp_path, plan(1))
    write(first, 0, 1.0)
    assert first.finish(max_bad=0) == []
    write(second, 0, 2.0)
    assert second.finish(max_bad=0) == []
    assert values(tmp_path) == {1.0}


@pytest.mark.parametrize(
    ("act", "held", "waits"),
    [("write", fcntl.LOCK_SH, False), ("write", fcntl.LOCK_EX, True), ("finish", fcntl.LOCK_SH, True)],
)
def test_who_finishes_a_folder_is_alone_in_it_and_writers_of_shards_are_not(act, held, waits, tmp_path):
    writer = LatentWriter(tmp_path, plan(1))
    work = {"write": lambda: write(writer, 0), "finish": lambda: writer.finish(max_bad=0)}[act]
    thread = threading.Thread(target=work)
    with (tmp_path / ".lock").open("a+") as other:
        fcntl.flock(other, held)
        thread.start()
        thread.join(0.3 if waits else 10.0)
        assert thread.is_alive() == waits
        assert bool(list(tmp_path.glob("latents-*"))) != waits
    thread.join()
    assert writer.missing() == ([] if act == "write" else [0])


def test_a_kill_after_the_manifest_is_cleaned_up_by_the_next(tmp_path, monkeypatch):
    writer = LatentWriter(tmp_path, plan(1))
    write(writer, 0)

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_clean", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.finish(max_bad=0)
    assert (tmp_path / "manifest.json").exists()
    assert (tmp_path / "parts").exists()
    assert LatentWriter(tmp_path, plan(1)).finished
    assert values(tmp_path) == {1.0}


def test_a_kill_while_the_plan_is_written_is_gone_on_from(tmp_path):
    (tmp_path / "plan.json.tmp").write_bytes(b"{")
    writer = LatentWriter(tmp_path, plan(1))
    write(writer, 0)
    assert writer.finish(max_bad=0) == []
    assert values(tmp_path) == {1.0}


def test_a_shard_whose_files_are_all_bad_is_empty(tmp_path):
    writer = LatentWriter(tmp_path, plan(3))
    bad = [BadFile("cat/1.png", "no image")]
    for number in (0, 2):
        write(writer, number)
    writer.write_shard(1, np.zeros((0, 2, 4, 4), dtype=np.float16), [], bad)
    with pytest.raises(DataError, match="1 files could not be encoded, expected at most 0"):
        writer.finish(max_bad=0)
    assert writer.finish(max_bad=1) == bad
    source = LatentSource(tmp_path)
    source.verify()
    mean, _, labels = source.read(np.arange(len(source)))
    assert mean.shape == (2 * ROWS, 1, 4, 4)
    assert labels.tolist() == [0, 1, 0, 0, 1, 0]


def test_a_folder_without_a_good_file_is_refused(tmp_path):
    writer = LatentWriter(tmp_path, plan(1))
    writer.write_shard(0, np.zeros((0, 2, 4, 4), dtype=np.float16), [], [BadFile("cat/1.png", "no image")])
    with pytest.raises(DataError, match=r"bad_files.jsonl: every file is in it, expected one that can be encoded"):
        writer.finish(max_bad=100)


def test_a_full_disk_is_named_with_the_file(tmp_path):
    writer = LatentWriter(tmp_path, plan(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, limits[1]))
    try:
        with pytest.raises(DataError, match=r"latents-00000.npy: cannot be written: File too large"):
            write(writer, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("latents*"))
    write(writer, 0)
    writer.finish(max_bad=0)
    assert values(tmp_path) == {1.0}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/latents: cannot be written: Not a directory"):
        LatentWriter(tmp_path / "file" / "latents", plan(1))


@pytest.mark.parametrize("stored", ["float16", "float32", "int32"])
def test_arrays_are_saved_as_numpy_saves_them(stored, tmp_path):
    array = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(stored)
    for number, saved in enumerate((array, array[:0], array[0, 0])):
        save_array(tmp_path / f"{number}.ours", saved)
        np.save(tmp_path / f"{number}.npy", saved)
        assert (tmp_path / f"{number}.ours").read_bytes() == (tmp_path / f"{number}.npy").read_bytes()


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"contents": ' + b"[" * 100_000])
def test_damaged_files_are_named(name, text, tmp_path):
    LatentWriter(tmp_path, plan(1))
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=name):
        LatentWriter(tmp_path, plan(1))


def test_damaged_parts_and_lists_are_named(tmp_path):
    writer = LatentWriter(tmp_path, plan(1))
    write(writer, 0)
    part = tmp_path / "parts" / "00000.json"
    whole = part.read_bytes()
    part.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"parts/00000.json: "):
        writer.finish(max_bad=0)
    part.write_bytes(whole)
    writer.finish(max_bad=0)
    line = json.dumps({"path": "cat/1.png", "reason": "no image"})
    (tmp_path / "bad_files.jsonl").write_text(f"{line}\nbad\n")
    with pytest.raises(DataError, match=r"bad_files.jsonl: line 2: "):
        writer.finish(max_bad=0)
