"""Checkpoints: what was saved comes back, or an error says which file is wrong; and the official format.

Run as a script, this file is the process that the fault tests limit or kill: `test_checkpoint.py TEST FOLDER`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from soflow import checkpoint
from soflow.checkpoint import (
    CheckpointError,
    Snapshots,
    Writer,
    drop_later,
    infer_dit_shape,
    infer_unet_shape,
    is_unet,
    load,
    load_official,
    load_profiles,
    newest,
    save,
    save_official,
    saved_steps,
    steps,
)
from soflow.checkpoint import files as checkpoint_files
from soflow.models import DIT_PRESETS, build_network

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = GOLDEN / "official_checkpoint_tiny.pt"
OFFICIAL_MODELS = json.loads((GOLDEN / "official_models.json").read_text())
FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json", "MANIFEST.json"]


def write(root: Path, step: int, numel: int = 5, keep_last: int = 0, keep_every: int = 0) -> Path:
    """A checkpoint whose every number is its step."""
    full = torch.full((numel,), float(step))
    optimizer = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": full}}, "param_groups": [{"lr": step}]}
    kept = {"keep_last": keep_last, "keep_every": keep_every}
    return save(root, step, model={"w": full}, ema={"w": full}, optimizer=optimizer, meta={"at": step}, **kept)


def is_whole(folder: Path, step: int) -> bool:
    found = load(folder)
    state = found.optimizer["state"][0]
    tensors = [found.model["w"], found.ema["w"], state["step"], state["exp_avg"]]
    return found.step == found.meta["at"] == step and all(bool((tensor == step).all()) for tensor in tensors)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run_as_script(test: str, folder: Path) -> None:
    command = [sys.executable, __file__, test, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same(found: object, expected: object) -> None:
    """Equal in type, structure and order, tensors in dtype, shape and every bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == expected


# ---------------------------------------------------------------- what was saved comes back


def test_every_kind_of_tensor_survives(tmp_path: Path):
    flat = torch.randn(24)
    tensors = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float64": torch.randn(4, dtype=torch.float64),
        "int64 scalar": torch.tensor(7),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "whole": flat,
        "same memory": flat.view(4, 6),
        "part of it": flat[3:7],
        "transposed": flat.view(4, 6).t(),
        "strided": flat[::5],
        "expanded": flat[:1].expand(6),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    folder = save(tmp_path, 3, model=tensors, ema={"tied": flat, "twice": flat}, optimizer={}, meta={})
    found = load(folder)
    for name, tensor in expected.items():
        assert_same(found.model[name], tensor)
    assert found.model.keys() == expected.keys()
    assert_same(found.ema, {"tied": flat, "twice": flat})


def test_optimizer_and_meta_survive_to_the_bit(tmp_path: Path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        network(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    meta = {"config": {"optim": {"lr": 1e-4, "betas": [0.9, 0.99], "clip_norm": None}}, "sums": {"loss": 0.1 + 0.2}}
    weights = network.state_dict()
    found = load(save(tmp_path, 3, model=weights, ema=weights, optimizer=optimizer.state_dict(), meta=meta))
    assert_same(found.optimizer, optimizer.state_dict())
    assert found.meta == meta
    torch.optim.AdamW(network.parameters()).load_state_dict(found.optimizer)


def test_meta_keeps_numbers_that_are_not_finite(tmp_path: Path):
    folder = save(tmp_path, 1, model={}, ema={}, optimizer={}, meta={"sum": float("nan"), "peak": float("inf")})
    assert str(load(folder).meta) == str({"sum": float("nan"), "peak": float("inf")})


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "checkpoints", 1, model={}, ema={}, optimizer={}, meta={"path": tmp_path})
    assert names(tmp_path) == set()


def test_a_save_leaves_the_step_folder_and_latest(tmp_path: Path):
    root = tmp_path / "checkpoints"
    folder = write(root, 1000)
    assert folder == root / "step-00001000"
    assert names(root) == {"step-00001000", "LATEST"}
    assert (root / "LATEST").read_text() == "step-00001000\n"
    assert names(folder) == set(FILES)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    write(root, 123456789)
    assert (root / "LATEST").read_text() == "step-123456789\n"
    assert newest(root) == root / "step-123456789"


def test_the_same_step_is_replaced(tmp_path: Path):
    write(tmp_path, 5)
    nan = {"w": torch.tensor(float("nan"))}
    save(tmp_path, 5, model=nan, ema=nan, optimizer={}, meta={"again": True})
    assert names(tmp_path) == {"step-00000005", "LATEST"}
    assert load(tmp_path / "step-00000005").meta == {"again": True}


def test_retention_keeps_the_newest_and_every_later_step(tmp_path: Path):
    for step in (10, 20, 30, 90):
        write(tmp_path, step)
    write(tmp_path, 40, keep_last=2)
    assert names(tmp_path) == {"step-00000030", "step-00000040", "step-00000090", "LATEST"}
    write(tmp_path, 50, keep_last=1)
    assert names(tmp_path) == {"step-00000050", "step-00000090", "LATEST"}


def test_milestones_are_kept_besides_the_newest(tmp_path: Path):
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step, keep_last=2, keep_every=20)
    # 30 is one of the two newest that are no milestones
    assert names(tmp_path) == {"step-00000020", "step-00000030", "step-00000040", "step-00000050", "LATEST"}
    write(tmp_path, 60, keep_last=1, keep_every=20)
    # 50 is the newest that is none
    assert names(tmp_path) == {*(f"step-000000{step}" for step in (20, 40, 50, 60)), "LATEST"}


# ---------------------------------------------------------------- saving beside the training


def begin(writer: Writer, step: int, value: float = 0.0) -> None:
    tensors = {"w": torch.full((3,), value)}
    writer.start(step, ready=lambda: None, model=tensors, ema=tensors, optimizer={}, meta={})


def test_a_writer_saves_what_it_is_given_and_says_so(tmp_path: Path):
    saved: list[Path] = []
    with Writer(tmp_path, 1, 4, saved.append) as writer:
        for step in (4, 5, 6):
            writer.wait()
            begin(writer, step, float(step))
    assert saved == [tmp_path / f"step-0000000{step}" for step in (4, 5, 6)]
    assert names(tmp_path) == {"step-00000004", "step-00000006", "LATEST"}
    assert load(saved[-1]).model["w"].tolist() == [6.0] * 3


def test_a_writer_waits_for_the_copies_and_leaves_the_training_alone(tmp_path: Path):
    copied, started = threading.Event(), threading.Event()
    tensors = {"w": torch.zeros(3)}
    with Writer(tmp_path, 0, 0, lambda path: None) as writer:

        def ready() -> None:
            started.set()
            assert copied.wait(20)

        writer.start(1, ready=ready, model=tensors, ema=tensors, optimizer={}, meta={})
        assert started.wait(20)
        assert not writer.failed
        assert names(tmp_path) == set()
        copied.set()
        writer.wait()
        assert names(tmp_path) == {"step-00000001", "LATEST"}


def test_an_error_of_a_writer_is_seen_at_once_and_raised_once(tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    with Writer(tmp_path / "file", 0, 0, lambda path: None) as writer:
        begin(writer, 1)
        deadline = time.monotonic() + 20
        while not writer.failed:
            assert time.monotonic() < deadline
        with pytest.raises(CheckpointError, match="cannot save the checkpoint: .*file"):
            writer.wait()
        writer.wait()
    with (
        pytest.raises(CheckpointError, match="cannot save the checkpoint"),
        Writer(tmp_path / "file", 0, 0, lambda path: None) as writer,
    ):
        begin(writer, 1)


def test_an_error_of_the_training_comes_before_that_of_a_writer(tmp_path: Path):
    (tmp_path / "file").write_text("kept")

    def fail_while_writing() -> None:
        with Writer(tmp_path / "file", 0, 0, lambda path: None) as writer:
            begin(writer, 1)
            raise KeyError("more important")

    with pytest.raises(KeyError, match="more important"):
        fail_while_writing()


def test_a_snapshot_is_a_copy_in_memory_that_is_used_again():
    snapshots = Snapshots()
    weight = torch.arange(6.0).view(2, 3).t()
    first = snapshots.take("w", weight)
    weight.zero_()
    assert first.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert snapshots.take("w", weight) is first
    assert first.eq(0).all()
    assert snapshots.take("w", torch.zeros(4)).shape == (4,)
    snapshots.mark()
    snapshots.ready()


def test_tensors_that_are_alone_in_their_memory_are_not_copied():
    flat = torch.zeros(4)
    alone = torch.zeros(2, 2)
    separated = checkpoint.files.separate(
        {"flat": flat, "view": flat.view(2, 2), "part": torch.zeros(9)[:3], "a": alone}
    )
    assert separated["a"].data_ptr() == alone.data_ptr()
    assert len({tensor.data_ptr() for tensor in separated.values()}) == 4
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in separated.values())
    assert separated["flat"].data_ptr() != flat.data_ptr()


# ---------------------------------------------------------------- newest


def test_later_folders_are_dropped_sound_or_not_the_highest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    (folders[3] / "MANIFEST.json").write_text("damaged")
    assert drop_later(tmp_path, 4) == []
    assert (tmp_path / "LATEST").exists()
    renamed = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: renamed.append(path) or rename(path, to))
    assert drop_later(tmp_path, 2) == renamed == [folders[3], folders[2]]
    assert list(saved_steps(tmp_path)) == [1, 2]
    assert not (tmp_path / "LATEST").exists()
    write(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir())[1:] == [f"step-0000000{step}" for step in (1, 2, 5)]


def test_newest_does_not_rely_on_latest(tmp_path: Path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "LATEST").write_text("step-00000020\n")
    assert newest(tmp_path) == tmp_path / "step-00000100"
    (tmp_path / "LATEST").unlink()
    assert newest(tmp_path) == tmp_path / "step-00000100"


def test_leftovers_are_ignored_and_cleaned_at_the_next_save(tmp_path: Path):
    first = write(tmp_path, 1)
    shutil.copytree(first, tmp_path / "step-00000002.tmp")
    shutil.copytree(first, tmp_path / "step-00000003.old.tmp")
    (tmp_path / "best").mkdir()
    assert newest(tmp_path) == first
    write(tmp_path, 2)
    assert names(tmp_path) == {"step-00000001", "step-00000002", "LATEST", "best"}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_newest_walks_back(tmp_path: Path, file: str, damage: str):
    good = write(tmp_path, 1)
    bad = write(tmp_path, 2)
    DAMAGES[damage](bad / file)
    with pytest.raises(CheckpointError) as raised:
        load(bad)
    message = str(raised.value)
    if file != "MANIFEST.json":
        recorded = json.loads((bad / "MANIFEST.json").read_text())["files"][file]
        assert message.startswith(str(bad / file) + ": ")
        assert str(recorded["sha256" if damage == "flipped" else "size"]) in message or damage == "missing"
    elif damage != "flipped":
        assert message.startswith(str(bad / file) + ": ")
    warnings: list[str] = []
    assert newest(tmp_path, warnings.append) == good
    assert warnings == [f"passed over a damaged checkpoint: {message}"]
    assert is_whole(good, 1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_does_not_let_us_read_is_not_taken_for_damaged(tmp_path: Path, monkeypatch, number: int):
    """A training would go on from the one before, and delete it."""
    write(tmp_path, 1)
    bad = write(tmp_path, 2)
    real = steps.fingerprint

    def refuse(path: Path) -> dict:
        if path == bad / "ema.safetensors":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(steps, "fingerprint", refuse)
    with pytest.raises(CheckpointError, match=rf"ema\.safetensors: cannot be read: {os.strerror(number)}"):
        newest(tmp_path)


def test_what_is_no_folder_is_not_taken_for_no_checkpoints(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "disk that is not there")
    for name, error in (("file", NotADirectoryError), ("link", FileNotFoundError)):
        for read_names in (newest, saved_steps):
            with pytest.raises(error, match=name):
                read_names(tmp_path / name)


def test_a_step_folder_that_lies_elsewhere_is_unlinked(tmp_path: Path):
    elsewhere = write(tmp_path, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    write(tmp_path, 2, keep_last=1)
    (tmp_path / "step-00000003.tmp").write_text("no folder")
    write(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == {"elsewhere", "step-00000004", "LATEST"}
    assert is_whole(elsewhere, 1)


def test_newest_is_none_when_all_are_damaged(tmp_path: Path):
    flip_bit(write(tmp_path, 1) / "model.safetensors")
    with pytest.warns(UserWarning, match="model.safetensors: sha256 "):
        assert newest(tmp_path) is None


def test_no_flipped_bit_of_the_manifest_is_trusted(tmp_path: Path):
    generator = random.Random(0)
    folder = write(tmp_path, 1)
    manifest = folder / "MANIFEST.json"
    content = manifest.read_bytes()
    for position, byte in enumerate(content):
        flipped = bytearray(content)
        flipped[position] ^= 1 << generator.randrange(8)
        manifest.write_bytes(flipped)
        if chr(byte).isspace() and chr(flipped[position]).isspace():
            continue
        with pytest.raises(CheckpointError):
            load(folder)


def rewrite(folder: Path, file: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest: what other software, or an attacker, could have written."""
    (folder / file).write_bytes(content)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][file] = checkpoint.files.fingerprint(folder / file)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    rewrite(folder, "meta.json", json.dumps({"format_version": 2, "step": 2, "meta": {}}).encode())
    assert newest(tmp_path) == folder
    with pytest.raises(CheckpointError, match="checkpoint format 2, expected at most 1"):
        load(folder)


@pytest.mark.parametrize("content", [b"[]", b'{"step": 1}', b'{"format_version": "x", "step": 1, "meta": {}}', b"\xff"])
def test_meta_of_other_software_is_refused(tmp_path: Path, content: bytes):
    folder = write(tmp_path, 1)
    rewrite(folder, "meta.json", content)
    with pytest.raises(CheckpointError, match=r"meta\.json: expected format_version, step and meta"):
        load(folder)


def test_weights_of_other_software_are_refused(tmp_path: Path):
    folder = write(tmp_path, 1)
    rewrite(folder, "model.safetensors", b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    "files",
    [
        '{"files": {}}',
        '{"files": []}',
        '{"files": {"meta.json": 1}}',
        "{}",
        "[]",
        '{"files": {"../step-1/meta.json": {}}}',
    ],
)
def test_a_manifest_that_lists_nothing_is_refused(tmp_path: Path, files: str):
    folder = write(tmp_path, 1)
    (folder / "MANIFEST.json").write_text(files)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: damaged"):
        load(folder)


def test_a_manifest_without_a_needed_file_or_with_one_elsewhere_is_refused(tmp_path: Path):
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    entry = manifest["files"].pop("ema.safetensors")
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lists no ema\.safetensors"):
        load(folder)
    manifest["files"]["../step-00000001/ema.safetensors"] = entry
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="expected names of files in this folder"):
        load(folder)


def test_further_averages_are_kept_by_their_width(tmp_path: Path):
    profiles = {0.05: {"w": torch.ones(3)}, 0.0001: {"w": torch.zeros(3)}}
    folder = save(tmp_path, 1, model={}, ema={}, optimizer={}, meta={}, profiles=profiles)
    assert names(folder) == {*FILES, "ema-0.05.safetensors", "ema-0.0001.safetensors"}
    found = load(folder).profiles
    assert found.keys() == profiles.keys()
    for width, tensors in profiles.items():
        assert_same(found[width], tensors)
    file = folder / "ema-0.05.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"ema-0\.05\.safetensors: sha256"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"ema-0\.05\.safetensors: sha256"):
        load_profiles(folder)


def test_profiles_are_read_without_the_rest(tmp_path: Path):
    folder = save(tmp_path, 1, model={}, ema={}, optimizer={}, meta={"a": 1}, profiles={0.05: {"w": torch.ones(3)}})
    for name in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        (folder / name).unlink()
    meta, profiles = load_profiles(folder)
    assert meta == {"a": 1}
    assert torch.equal(profiles[0.05]["w"], torch.ones(3))
    (folder / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"meta\.json: cannot be read"):
        load_profiles(folder)


def test_a_renamed_step_folder_is_refused(tmp_path: Path):
    write(tmp_path, 1).rename(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="holds step 1, expected step 2"):
        load(tmp_path / "step-00000002")
    (tmp_path / "step-00000002").rename(tmp_path / "best")
    assert is_whole(tmp_path / "best", 1)


def test_a_path_that_is_no_step_folder_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: cannot be read: No such file"):
        load(tmp_path)


# ---------------------------------------------------------------- faults while saving


def test_all_is_synced_before_a_rename_makes_it_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(path, target)

    def recorded_replace(path: Path, target: Path) -> None:
        events.append(("rename", target.name))
        replace(path, target)

    write(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write(tmp_path, 2, keep_last=1)
    assert sorted(events[:5]) == sorted(("sync", file) for file in FILES)
    assert events[5:] == [
        ("sync", "step-00000002.tmp"),
        ("rename", "step-00000002"),
        ("sync", tmp_path.name),
        ("sync", "LATEST.tmp"),
        ("rename", "LATEST"),
        ("sync", tmp_path.name),
        ("rename", "step-00000001.old.tmp"),
    ]


def test_what_is_dropped_stays_dropped_when_the_power_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, 9)
    synced = []
    monkeypatch.setattr(steps, "sync", lambda path: synced.append((path, names(path))))
    drop_later(tmp_path, 3)
    assert synced == [(tmp_path, {"step-00000009.old.tmp"})]


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    for root in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"cannot save the checkpoint: .*file") as raised:
            write(root, 1)
        assert str(root / "step-00000001") in str(raised.value)
        assert isinstance(raised.value.__cause__, OSError)
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_folder_that_is_gone_does_not_come_back_without_its_configuration(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write(tmp_path / "gone" / "checkpoints", 1)
    assert not names(tmp_path)


def test_a_full_disk_is_named_and_harms_nothing(tmp_path: Path):
    run_as_script("full_disk", tmp_path)


def full_disk(folder: Path) -> None:
    """Save under many limits of the file size, so that every write of every file is once the one that fails."""
    root = folder / "checkpoints"
    first = write(root, 1)
    optimizer = {"state": {k: {"exp_avg": torch.ones(50, 50), "step": torch.tensor(1.0)} for k in range(3)}}
    meta = {"x": "y" * 30_000}
    causes = set()
    for limit in range(0, 40_000, 797):
        for weights in ({}, {"w": torch.zeros(3000)}):
            with size_limit(limit):
                error = refusal(save, root, 2, model=weights, ema={}, optimizer=optimizer, meta=meta)
            if error is None:
                assert limit > 30_000
                shutil.rmtree(root / "step-00000002")
            else:
                assert str(error).startswith(f"{root / 'step-00000002'}: cannot save the checkpoint: ")
                assert "File too large" in str(error)
                causes.add(type(error.__cause__))
            assert names(root) == {"step-00000001", "LATEST"}
    assert causes == {OSError, SafetensorError}
    assert is_whole(first, 1)

    official = vars(load_official(OFFICIAL))
    export = folder / "export.pt"
    export.write_text("kept")
    with size_limit(300_000):
        error = refusal(save_official, export, **official)
    assert f"{export}: cannot save the checkpoint: [Errno 27] File too large" in str(error)
    assert export.read_text() == "kept"
    assert names(folder) == {"checkpoints", "export.pt"}


@contextlib.contextmanager
def size_limit(limit: int) -> Iterator[None]:
    """Inside, no file grows beyond `limit` bytes: to the writer, the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refusal(call: Callable, *arguments, **keywords) -> CheckpointError | None:
    try:
        call(*arguments, **keywords)
    except CheckpointError as error:
        return error
    return None


def test_kill_9_at_any_moment_of_a_save(tmp_path: Path):
    run_as_script("kill_9", tmp_path)


def kill_9(folder: Path) -> None:
    """Kill a process before every file operation of a save, then at random moments of many saves."""
    fsync, os.fsync = os.fsync, lambda descriptor: None  # slow, and no matter here: kill -9 loses no written data
    moments = 0
    while killed_at(folder / str(moments), moments):
        moments += 1
    assert moments > 20
    os.fsync = fsync
    root = folder / "random"
    write(root, 1)
    for seed in range(10):
        reported = killed_after(root, random.Random(seed).uniform(0, 0.06))
        step = verified(root, {reported, reported + 1})
        write(root, step + 1, keep_last=2)
        assert names(root) == {f"step-{step:08d}", f"step-{step + 1:08d}", "LATEST"}


def verified(root: Path, allowed: set[int]) -> int:
    """The step that a resumed run would start from: whole, allowed, and found without a complaint."""
    warnings: list[str] = []
    found = newest(root, warnings.append)
    assert found is not None
    assert warnings == []
    step = load(found).step
    assert step in allowed, (step, allowed)
    assert is_whole(found, step)
    return step


def killed_at(root: Path, moment: int) -> bool:
    """Whether a save that replaces step 2 and deletes step 1 was killed before file operation number `moment`.

    Checks that either step is whole then, and that the next save cleans up.
    """
    write(root, 1)
    write(root, 2)
    operations = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal operations
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
            if operations == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        write(root, 2, numel=1000, keep_last=1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    killed = code != 0
    verified(root, {1, 2} if killed else {2})
    write(root, 3, keep_last=1)
    assert names(root) == {"step-00000003", "LATEST"}
    return killed


def killed_after(root: Path, seconds: float) -> int:
    """Kill a process that saves step after step; returns the last step whose save it saw return."""
    reader, writer = os.pipe()
    first = load(newest(root)).step + 1
    child = os.fork()
    if child == 0:
        for step in range(first, first + 100_000):
            write(root, step, numel=100_000, keep_last=2)
            os.write(writer, step.to_bytes(8, "little"))
    os.close(writer)
    reports = os.read(reader, 8)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while report := os.read(reader, 8):
        reports = report
    os.close(reader)
    return int.from_bytes(reports, "little")


# ---------------------------------------------------------------- the official format


class Payload:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def content() -> dict:
    return torch.load(OFFICIAL, weights_only=True)


def test_official_checkpoint_loads_without_the_prefix(content: dict):
    found = load_official(OFFICIAL)
    assert (found.step, found.epochs) == (1, 0)
    assert_same(found.optimizer, content["optimizer"])
    for weights, key in ((found.model, "model"), (found.ema, "ema_model")):
        assert_same(OrderedDict((f"network.{name}", tensor) for name, tensor in weights.items()), content[key])


def test_official_export_equals_what_was_imported(tmp_path: Path, content: dict):
    found = load_official(OFFICIAL)
    save_official(tmp_path / "export.pt", **vars(found))
    assert names(tmp_path) == {"export.pt"}
    assert_same(torch.load(tmp_path / "export.pt", weights_only=True), content)
    assert_same(vars(load_official(tmp_path / "export.pt")), vars(found))


def test_official_export_holds_no_more_than_its_tensors(tmp_path: Path):
    flat = torch.randn(100_000)
    save_official(tmp_path / "a.pt", model={"w": flat[:5]}, ema={"w": flat[5:10]}, optimizer={}, step=1, epochs=0)
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_official_export_where_it_cannot_be_written(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"cannot save the checkpoint: .*No such file or directory"):
        save_official(tmp_path / "nowhere" / "a.pt", model={}, ema={}, optimizer={}, step=1, epochs=0)


@pytest.mark.parametrize("key", ["model", "ema_model", "optimizer", "finished_steps", "finished_epochs"])
def test_official_file_with_a_missing_or_wrong_entry_is_refused(tmp_path: Path, content: dict, key: str):
    torch.save({**content, key: "text"}, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=f"{key} is a str, expected"):
        load_official(tmp_path / "wrong.pt")
    del content[key]
    torch.save(content, tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match=f"missing.pt: no key '{key}'"):
        load_official(tmp_path / "missing.pt")


def test_official_file_with_other_names_or_values_is_refused(tmp_path: Path, content: dict):
    path = tmp_path / "other.pt"
    wrong = torch.zeros(1, device="meta"), torch.zeros(1).to_sparse(), torch.zeros(1, dtype=torch.int64), 1.0
    for weights in ({"pos_embed": torch.zeros(1)}, {3: torch.zeros(1)}, *({"network.pos_embed": w} for w in wrong)):
        torch.save({**content, "ema_model": weights}, path)
        with pytest.raises(
            CheckpointError,
            match=r"ema_model\[.*\], expected dense floating-point tensors under names that start with 'network\.'",
        ):
            load_official(path)
    torch.save({**content, "optimizer": {"state": {}}}, path)
    with pytest.raises(CheckpointError, match="optimizer has no list 'param_groups'"):
        load_official(path)
    torch.save([content], path)
    with pytest.raises(CheckpointError, match="got list, expected the dict of an official checkpoint"):
        load_official(path)


def test_a_malicious_official_file_is_refused_and_nothing_is_executed(tmp_path: Path, content: dict):
    torch.save({**content, "optimizer": Payload(tmp_path / "executed")}, tmp_path / "zip.pt")
    torch.save(
        {**content, "model": Payload(tmp_path / "executed")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    for name, message in (("zip", "refused, .*mkdir"), ("old", "expected a file written"), ("plain", "not a zip file")):
        with pytest.raises(CheckpointError, match=message):
            load_official(tmp_path / f"{name}.pt")
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "executed").exists()


def test_a_malicious_optimizer_file_is_refused_and_nothing_is_executed(tmp_path: Path):
    folder = write(tmp_path, 1)
    torch.save(Payload(tmp_path / "executed"), tmp_path / "payload")
    rewrite(folder, "optimizer.pt", (tmp_path / "payload").read_bytes())
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: refused, .*mkdir"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_file_names_are_only_names(tmp_path: Path):
    path = tmp_path / "__import__('os').mkdir('executed').pt"
    shutil.copy(OFFICIAL, path)
    assert load_official(path).step == 1
    assert names(tmp_path) == {path.name}


def test_a_damaged_official_file_never_gives_other_numbers(tmp_path: Path):
    generator = random.Random(0)
    official = OFFICIAL.read_bytes()
    expected = vars(load_official(OFFICIAL))
    path = tmp_path / "damaged.pt"
    refused = 0
    for _ in range(100):
        damaged = bytearray(official)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        if refusal(load_official, path) is None:
            assert_same(vars(load_official(path)), expected)
        else:
            refused += 1
    assert refused > 80
    for size in (0, 1, 100, len(official) // 2, len(official) - 1):
        path.write_bytes(official[:size])
        with pytest.raises(CheckpointError, match=r"damaged\.pt: File is not a zip file"):
            load_official(path)


def test_a_missing_official_file_or_a_folder_is_refused(tmp_path: Path):
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_official(path)


# ---------------------------------------------------------------- the shape of a DiT


@pytest.mark.parametrize("name", [name for name in OFFICIAL_MODELS if name.startswith("DiT")])
def test_shape_of_the_official_sizes(name: str):
    recorded = OFFICIAL_MODELS[name]
    with torch.device("meta"):
        weights = {key: torch.zeros(shape) for key, shape in recorded["state_dict"].items()}
        for block in range(recorded["depth"]):
            blocks = {key.replace("blocks.0.", f"blocks.{block}."): value for key, value in weights.items()}
            weights = {**weights, **blocks}
    expected = {key: recorded[key] for key in ("patch_size", "hidden_size", "depth", "num_heads")}
    fixed = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "mlp_ratio": 4.0}
    assert infer_dit_shape(weights) == {**fixed, **expected}


def test_shape_of_the_golden_checkpoint_builds_its_network():
    weights = load_official(OFFICIAL).ema
    with pytest.raises(CheckpointError, match=r"num_heads: got nothing, .*patch_size 2, hidden_size 32 and depth 1"):
        infer_dit_shape(weights)
    shape = infer_dit_shape(weights, num_heads=2)
    assert (shape["input_size"], shape["in_channels"], shape["num_classes"], shape["depth"]) == (8, 4, 10, 1)
    build_network("DiT", **shape).load_state_dict(weights, strict=True)


@pytest.mark.parametrize("change", [{"depth": 11}, {"patch_size": 8}])
def test_the_heads_of_no_official_size_are_not_guessed_by_its_width(change: dict[str, int]):
    with torch.device("meta"):
        weights = build_network("DiT", **{**DIT_PRESETS["DiT-B/4"], **change}).state_dict()
    with pytest.raises(CheckpointError, match="num_heads: got nothing, expected a number"):
        infer_dit_shape(weights)


def test_shape_with_an_odd_mlp_and_without_classes():
    # 15 / 11 is rounded down, and int(11 * (15 / 11)) would be 14
    arguments = {"input_size": 9, "in_channels": 1, "num_classes": 0, "patch_size": 3, "hidden_size": 44, "depth": 2}
    network = build_network("DiT", **arguments, num_heads=11, mlp_ratio=60.5 / 44)
    shape = infer_dit_shape(network.state_dict(), num_heads=11)
    assert {key: shape[key] for key in arguments} == arguments
    build_network("DiT", **shape).load_state_dict(network.state_dict(), strict=True)


@pytest.mark.parametrize(
    "name", ["pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"]
)
def test_weights_of_another_network_are_refused(name: str):
    weights = load_official(OFFICIAL).ema
    with pytest.raises(CheckpointError, match=rf"{name}: got \[7\], expected the parameter of a DiT"):
        infer_dit_shape({**weights, name: torch.zeros(7)}, num_heads=2)
    del weights[name]
    with pytest.raises(CheckpointError, match=f"{name}: got nothing, expected the parameter of a DiT"):
        infer_dit_shape(weights, num_heads=2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x_embedder.proj.weight", (0, 1, 2, 2)),
        ("y_embedder.embedding_table.weight", (0, 32)),
        ("pos_embed", (1, 0, 32)),
    ],
)
def test_empty_weights_are_refused(name: str, shape: tuple[int, ...]):
    weights = load_official(OFFICIAL).ema
    with pytest.raises(CheckpointError, match=rf"{name}: got \[.*\], expected .* dimensions, none of them 0"):
        infer_dit_shape({**weights, name: torch.zeros(shape)}, num_heads=2)


def test_positions_that_form_no_square_are_refused():
    weights = load_official(OFFICIAL).ema
    with pytest.raises(CheckpointError, match="pos_embed: got 15 tokens, expected a square number"):
        infer_dit_shape({**weights, "pos_embed": torch.zeros(1, 15, 32)}, num_heads=2)


# ---------------------------------------------------------------- the shape of a U-Net


def test_shape_of_the_official_unet():
    with torch.device("meta"):
        weights = {key: torch.zeros(shape) for key, shape in OFFICIAL_MODELS["UNet"]["state_dict"].items()}
    assert is_unet(weights)
    assert infer_unet_shape(weights) == {
        "input_size": 32,
        "in_channels": 3,
        "num_classes": 0,
        "model_channels": 128,
        "channel_mult": (2, 2, 2),
        "num_blocks": 4,
        "attn_resolutions": (16,),
    }
    with torch.device("meta"):
        build_network("UNet", **infer_unet_shape(weights)).load_state_dict(weights, strict=True)


@pytest.mark.parametrize("attending", [(), (8, 2)])
def test_shape_of_a_unet_of_one_block(attending: tuple[int, ...]):
    shape = {"input_size": 8, "in_channels": 1, "num_classes": 0, "model_channels": 8, "channel_mult": (1, 3, 2)}
    shape |= {"num_blocks": 1, "attn_resolutions": attending}
    weights = build_network("UNet", **shape).state_dict()
    assert infer_unet_shape(weights) == shape
    assert not is_unet(load_official(OFFICIAL).ema)
    del weights["enc.4x4_block0.conv0.weight"]
    with pytest.raises(CheckpointError, match=r"enc.4x4_block0.conv0.weight: got nothing, expected the .* of a U-Net"):
        infer_unet_shape(weights)
    with pytest.raises(CheckpointError, match=r"^enc: got no resolution, expected names such as"):
        infer_unet_shape({"enc.first": torch.zeros(1)})


# ---------------------------------------------------------------- replacing


def test_replacing_is_all_or_nothing(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), checkpoint.replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with checkpoint.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == {"file"}


def test_nothing_is_written_by_two_at_once(tmp_path: Path):
    path = tmp_path / "file"
    with checkpoint.replacing(path) as partial:
        partial.write_text("first")
        with pytest.raises(OSError, match="something else is writing it") as refused, checkpoint.replacing(path):
            pytest.fail("let a second one in")
        assert refused.value.filename == str(path)
    assert path.read_text() == "first"
    assert names(tmp_path) == {"file"}


def test_who_has_finished_leaves_the_file_of_the_next_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, synced = tmp_path / "file", []

    def sync_and_begin_the_next(what: Path) -> None:
        synced.append(what)
        if what == tmp_path and len(synced) == 2:
            with checkpoint.replacing(path) as partial:
                partial.write_text("second")

    monkeypatch.setattr(checkpoint_files, "sync", sync_and_begin_the_next)
    with checkpoint.replacing(path) as partial:
        partial.write_text("first")
    assert path.read_text() == "second"
    assert names(tmp_path) == {"file"}


def test_a_file_that_was_renamed_meanwhile_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, flock = tmp_path / "file", fcntl.flock

    def finished_by_another(file: object, operation: int) -> None:
        flock(file, operation)
        (tmp_path / "file.tmp").rename(path)

    monkeypatch.setattr(fcntl, "flock", finished_by_another)
    with pytest.raises(OSError, match="something else is writing it"), checkpoint.replacing(path):
        pytest.fail("wrote what another has finished")
    assert names(tmp_path) == {"file"}


def test_a_disk_without_room_for_a_byte_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as refused, checkpoint.replacing(tmp_path / "file"):
        pytest.fail("wrote to a full disk")
    assert refused.value.filename == str(tmp_path / "file")
    assert names(tmp_path) == set()


def test_locks_that_keep_out_their_own_process_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As those of SMB do, which refuse what is written through another descriptor than the one that holds them."""
    path, held, write = tmp_path / "file", [], Path.write_bytes

    def refuse_while_held(file: Path, content: bytes) -> int:
        if content and held[-1] != fcntl.LOCK_UN:
            raise PermissionError(13, "Permission denied", str(file))
        return write(file, content)

    monkeypatch.setattr(fcntl, "flock", lambda file, operation: held.append(operation))
    monkeypatch.setattr(Path, "write_bytes", refuse_while_held)
    with checkpoint.replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"full_disk": full_disk, "kill_9": kill_9}[sys.argv[1]](Path(sys.argv[2]))


def test_a_snapshot_has_the_type_of_its_tensor():
    snapshots = Snapshots()
    for dtype in (torch.float32, torch.float64):
        third = torch.tensor([1 / 3], dtype=dtype)
        assert snapshots.take("a", third).dtype == dtype
        assert torch.equal(snapshots.take("a", third), third)
