"""Checkpoints that survive kill -9, a full disk and flipped bits; and the official SoFlow `.pt` format.

A run keeps `<root>/step-00001000/` with model.safetensors, ema.safetensors, optimizer.pt, meta.json and MANIFEST.json
(size and SHA-256 of the other four). Such a folder appears by one rename of a complete, synced `step-00001000.tmp/`;
folders that end in `.tmp` are leftovers of an interrupted save. `<root>/LATEST` names the last folder written: a hint
for people and scripts, which nothing here relies on. Pickles are read with weights_only=True, never otherwise.
"""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from soflow.models import DIT_PRESETS

FORMAT_VERSION = 1

MODEL, EMA, OPTIMIZER, META = "model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"
MANIFEST = "MANIFEST.json"
LATEST = "LATEST"

OFFICIAL_PREFIX = "network."

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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns: the state after `step` finished optimizer steps, all tensors on the CPU."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]  # as torch.optim.Optimizer.state_dict() gave it
    meta: dict[str, Any]  # as given to `save`, after one trip through JSON


@dataclass(frozen=True, kw_only=True)
class OfficialCheckpoint:
    """An official `.pt` file; parameter names without the 'network.' prefix, all tensors on the CPU."""

    step: int
    epochs: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]


class DiTShape(TypedDict):
    """The arguments of `build_network("DiT", ...)`."""

    input_size: int
    in_channels: int
    num_classes: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block writes there replaces `path`, whole, synced, or not at all.

    Raises what the block raises, and OSError: `path` is then as it was, and the temporary file is gone.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def save(
    root: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep_last: int = 0,
) -> Path:
    """Write `root`/step-`step` completely or not at all, then delete all but the newest `keep_last` (0 keeps all).

    Tensors of any device, dtype and stride are stored as they are, those that share memory once each; `meta` must be
    JSON, where NaN and infinities are allowed and come back. A folder of the same step is replaced; folders of later
    steps are left alone. Returns the step folder. Raises CheckpointError where the disk refuses: the folders that
    stood there before still do, and nothing partial is left.
    """
    folder = root / f"step-{step:08d}"
    partial = folder.with_name(folder.name + ".tmp")
    meta_text = json.dumps({"format_version": FORMAT_VERSION, "step": step, "meta": meta}, indent=1)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        partial.mkdir()
        save_file(_host_copy(model), partial / MODEL)
        save_file(_host_copy(ema), partial / EMA)
        _save_pickle(dict(optimizer), partial / OPTIMIZER)
        (partial / META).write_text(meta_text + "\n")
        files = {name: _fingerprint(partial / name) for name in (MODEL, EMA, OPTIMIZER, META)}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        mode = (partial / META).stat().st_mode
        for path in partial.iterdir():
            path.chmod(mode)  # safetensors makes its files readable by the owner only
            _sync(path)
        _sync(partial)

        replaced = _set_aside(folder) if folder.exists() else None
        partial.rename(folder)
        _sync(root)
        with replacing(root / LATEST) as latest:
            latest.write_text(folder.name + "\n")
        if replaced is not None:
            shutil.rmtree(replaced)
        if keep_last > 0:
            older = [path for number, path in _step_folders(root) if number < step]
            for path in older[keep_last - 1 :]:
                shutil.rmtree(_set_aside(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot save the checkpoint: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(path: Path) -> Checkpoint:
    """Return the checkpoint in the step folder `path`, every file verified against its manifest; never falls back.

    Raises CheckpointError naming the file, what was expected and what was found.
    """
    files = _verified_files(path)
    try:
        envelope = json.loads((path / META).read_text())
        version, step, meta = int(envelope["format_version"]), int(envelope["step"]), dict(envelope["meta"])
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path / META}: expected format_version, step and meta: {error!r}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, expected at most {FORMAT_VERSION}: a newer soflow wrote it"
        )
    missing = [name for name in (MODEL, EMA, OPTIMIZER) if name not in files]
    if missing:
        raise CheckpointError(f"{path / MANIFEST}: lists no {missing[0]}, expected {MODEL}, {EMA} and {OPTIMIZER}")
    number = _step_number(path)
    if number is not None and number != step:
        raise CheckpointError(f"{path}: holds step {step}, expected step {number} as the folder is called")
    return Checkpoint(
        step=step,
        model=_load_tensors(path / MODEL),
        ema=_load_tensors(path / EMA),
        optimizer=_load_pickle(path / OPTIMIZER),
        meta=meta,
    )


def newest(root: Path, warn: Callable[[str], None] = warnings.warn) -> Path | None:
    """Return the step folder of the highest step whose files match its manifest, or None where there is none.

    Every folder passed over on the way is reported through `warn`, with the file and what is wrong with it.
    """
    for _, folder in _step_folders(root):
        try:
            _verified_files(folder)
        except CheckpointError as error:
            warn(f"passed over a damaged checkpoint: {error}")
        else:
            return folder
    return None


def saved_steps(root: Path) -> dict[int, Path]:
    """Return the step folders below `root`, sound or not, by their number, the earliest first."""
    return dict(reversed(_step_folders(root)))


def load_official(path: Path) -> OfficialCheckpoint:
    """Return the content of an official `.pt` file, whose records are checked against their CRC-32 first.

    Raises CheckpointError for a file that is damaged, that pickles anything but tensors and plain values (nothing of it
    is executed), or that lacks a key of the official format.
    """
    content = _load_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}, expected the dict of an official checkpoint")
    optimizer = _official_entry(path, content, "optimizer", dict)
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(optimizer.get(key), kind):
            raise CheckpointError(
                f"{path}: optimizer has no {kind.__name__} {key!r}, expected a state_dict of torch.optim"
            )
    return OfficialCheckpoint(
        step=_official_entry(path, content, "finished_steps", int),
        epochs=_official_entry(path, content, "finished_epochs", int),
        model=_official_weights(path, content, "model"),
        ema=_official_weights(path, content, "ema_model"),
        optimizer=optimizer,
    )


def save_official(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    step: int,
    epochs: int,
) -> None:
    """Write the official `.pt` format; what `load_official` read comes back key for key and tensor for tensor.

    Parameter names are given without the 'network.' prefix. Raises CheckpointError where the disk refuses; a file that
    was there before is then untouched.
    """
    content = {
        "model": OrderedDict((OFFICIAL_PREFIX + name, tensor) for name, tensor in _host_copy(model).items()),
        "ema_model": OrderedDict((OFFICIAL_PREFIX + name, tensor) for name, tensor in _host_copy(ema).items()),
        "optimizer": dict(optimizer),
        "finished_steps": step,
        "finished_epochs": epochs,
    }
    try:
        with replacing(path) as partial:
            _save_pickle(content, partial)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot save the checkpoint: {error}") from error


def infer_dit_shape(weights: Mapping[str, Tensor], num_heads: int | None = None) -> DiTShape:
    """Return the shape of the DiT that holds `weights`, a state dict without the 'network.' prefix.

    The number of heads does not show in the weights: it is that of the official size with the same hidden_size, depth
    and patch_size, or else must be given. Raises CheckpointError naming the missing parameter.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in weights or weights[name].ndim != dimensions:
            found = list(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(f"{name}: got {found}, expected the parameter of a DiT, with {dimensions} dimensions")
        return weights[name].shape

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    _, num_tokens, _ = shape("pos_embed", 3)
    rows, _ = shape("y_embedder.embedding_table.weight", 2)
    mlp_size, _ = shape("blocks.0.mlp.fc1.weight", 2)
    grid_size = math.isqrt(num_tokens)
    if grid_size**2 != num_tokens:
        raise CheckpointError(f"pos_embed: got {num_tokens} tokens, expected a square number")
    mlp_ratio = mlp_size / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_size:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if num_heads is None:
        body = {"patch_size": patch_size, "hidden_size": hidden_size, "depth": depth}
        heads = {preset["num_heads"] for preset in DIT_PRESETS.values() if preset.items() >= body.items()}
        if len(heads) != 1:
            raise CheckpointError(
                f"num_heads: got nothing, expected a number, because no official size has patch_size {patch_size}, "
                f"hidden_size {hidden_size} and depth {depth}"
            )
        num_heads = heads.pop()
    return DiTShape(
        input_size=grid_size * patch_size,
        in_channels=in_channels,
        num_classes=rows - 1,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
    )


def _host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # copied always: neither format may see memory that tensors share, and torch.save would store all that a view is of
    return {
        name: tensor.detach().to(device="cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in tensors.items()
    }


def _save_pickle(value: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # torch.save covers the failed write with its own message about a file position
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _load_pickle(path: Path) -> Any:
    try:
        # torch.load takes flipped bits for numbers
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: record {damaged} does not match its CRC-32: the file is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: {error}, expected a file written by torch.save") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, expected only tensors and plain values: {error.__context__}"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _official_entry(path: Path, content: dict[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        raise CheckpointError(
            f"{path}: no key {key!r}, expected the official format; found {sorted(map(str, content))}"
        )
    if not isinstance(content[key], kind):
        raise CheckpointError(f"{path}: {key} is a {type(content[key]).__name__}, expected {kind.__name__}")
    return content[key]


def _official_weights(path: Path, content: dict[str, Any], key: str) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in _official_entry(path, content, key, dict).items():
        if not isinstance(name, str) or not name.startswith(OFFICIAL_PREFIX) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {key}[{name!r}], expected tensors under names that start with {OFFICIAL_PREFIX!r}"
            )
        weights[name.removeprefix(OFFICIAL_PREFIX)] = tensor
    return weights


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> Path:
    # deleted under a name that no reader looks at: an interrupted deletion never looks like a damaged checkpoint
    return folder.rename(folder.with_name(folder.name + ".old.tmp"))


def _step_number(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    # highest step first
    paths = root.iterdir() if root.is_dir() else ()
    numbered = [(number, path) for path in paths if (number := _step_number(path)) is not None]
    return sorted(numbered, reverse=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def _verified_files(folder: Path) -> list[str]:
    """The names that the manifest lists; raises CheckpointError unless every one of them is as it says."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, expected a checkpoint such as checkpoints/step-00001000")
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        recorded = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged, expected size and sha256 of each file") from error
    if META not in recorded or any(Path(name).name != name for name in recorded):
        raise CheckpointError(
            f"{folder / MANIFEST}: damaged, expected names of files in this folder, {META} among them"
        )
    for name, expected in recorded.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from error
        for key in ("size", "sha256"):
            if found[key] != expected[key]:
                raise CheckpointError(
                    f"{folder / name}: {key} {found[key]}, expected {expected[key]}: the file is damaged"
                )
    return list(recorded)
