"""The checkpoints of a run: one folder per saved step, with a manifest of hashes.

A run keeps `<root>/step-00001000/` with model.safetensors, ema.safetensors, a file like ema-0.05.safetensors for each
further average (here a profile of sigma_rel 0.05), optimizer.pt, meta.json and MANIFEST.json (size and SHA-256 of the
others). Such a folder appears by one rename of a complete, synced `step-00001000.tmp/`; folders that end in `.tmp` are
leftovers of an interrupted save. `<root>/LATEST` names the last folder written: a hint for people and scripts, which
nothing here relies on. Pickles are read with weights_only=True, never otherwise. All tensors are whole, however many
processes trained them and however they shared them out.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from soflow.checkpoint.files import (
    CheckpointError,
    fingerprint,
    load_pickle,
    load_tensors,
    replacing,
    save_pickle,
    separate,
    sync,
    sync_folder,
)

FORMAT_VERSION = 1

MODEL, EMA, OPTIMIZER, META = "model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"
PROFILE = "ema-{}.safetensors"
MANIFEST = "MANIFEST.json"
LATEST = "LATEST"

NO_PROFILES: Mapping[float, Mapping[str, Tensor]] = {}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns: the state after `step` finished optimizer steps, all tensors on the CPU."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    profiles: dict[float, dict[str, Tensor]]  # further averages, by their sigma_rel
    optimizer: dict[str, Any]  # as torch.optim.Optimizer.state_dict() gave it
    meta: dict[str, Any]  # as given to `save`, after one trip through JSON


def save(
    root: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    meta: Mapping[str, Any],
    profiles: Mapping[float, Mapping[str, Tensor]] = NO_PROFILES,
    keep_last: int = 0,
    keep_every: int = 0,
) -> Path:
    """Write `root`/step-`step` completely or not at all, then delete all but the newest `keep_last` (0 keeps all).

    Steps that `keep_every` divides do not count and are never deleted (0: there are none). Tensors of any device, dtype
    and stride are stored as they are, those that share memory once each; `meta` must be JSON, where NaN and infinities
    are allowed and come back. A folder of the same step is replaced; folders of later steps are left alone. Returns the
    step folder. Raises CheckpointError where the disk refuses: the folders that stood there before still do, and
    nothing partial is left. The folder of `root` must exist.
    """
    folder = root / f"step-{step:08d}"
    partial = folder.with_name(folder.name + ".tmp")
    meta_text = json.dumps({"format_version": FORMAT_VERSION, "step": step, "meta": meta}, indent=1)
    try:
        # not its parents: a run folder that is gone would come back without its configuration
        root.mkdir(exist_ok=True)
        delete_leftovers(root)
        partial.mkdir()
        save_file(separate(model), partial / MODEL)
        save_file(separate(ema), partial / EMA)
        for sigma_rel, profile in profiles.items():
            save_file(separate(profile), partial / PROFILE.format(sigma_rel))
        save_pickle(dict(optimizer), partial / OPTIMIZER)
        (partial / META).write_text(meta_text + "\n")
        names = (MODEL, EMA, *map(PROFILE.format, profiles), OPTIMIZER, META)
        files = {name: fingerprint(partial / name) for name in names}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        sync_folder(partial, like=partial / META)

        replaced = _set_aside(folder) if folder.exists() else None
        partial.rename(folder)
        sync(root)
        with replacing(root / LATEST) as latest:
            latest.write_text(folder.name + "\n")
        if replaced is not None:
            _delete(replaced)
        if keep_last > 0:
            older = [path for number, path in _step_folders(root) if number < step and not _is_kept(number, keep_every)]
            for path in older[keep_last - (not _is_kept(step, keep_every)) :]:
                _delete(_set_aside(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot save the checkpoint: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(path: Path) -> Checkpoint:
    """Return the checkpoint in the step folder `path`, every file verified against its manifest; never falls back.

    Raises CheckpointError naming the file, what was expected and what was found.
    """
    verify(path)
    return read(path)


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in the step folder `path`, which was verified before; its tensors are mapped from files.

    Raises CheckpointError for what does not belong together, such as another step or a newer format.
    """
    files = _recorded_files(path)
    step, meta = _read_meta(path)
    missing = [name for name in (MODEL, EMA, OPTIMIZER) if name not in files]
    if missing:
        raise CheckpointError(f"{path / MANIFEST}: lists no {missing[0]}, expected {MODEL}, {EMA} and {OPTIMIZER}")
    return Checkpoint(
        step=step,
        model=load_tensors(path / MODEL),
        ema=load_tensors(path / EMA),
        profiles={sigma_rel: load_tensors(path / name) for sigma_rel, name in _profiles(files).items()},
        optimizer=load_pickle(path / OPTIMIZER),
        meta=meta,
    )


def load_profiles(path: Path) -> tuple[dict[str, Any], dict[float, dict[str, Tensor]]]:
    """Return meta and profiles of the checkpoint in the step folder `path`, verified; no other file of it is opened.

    Raises CheckpointError as `load` does.
    """
    files = _recorded_files(path)
    profiles = _profiles(files)
    _require_intact(path, {name: files[name] for name in (META, *profiles.values())})
    _, meta = _read_meta(path)
    return meta, {sigma_rel: load_tensors(path / name) for sigma_rel, name in profiles.items()}


def newest(root: Path, warn: Callable[[str], None] = warnings.warn) -> Path | None:
    """Return the step folder of the highest step whose files match its manifest, or None where there is none.

    Every folder passed over on the way is reported through `warn`, with the file and what is wrong with it. Raises
    CheckpointError or OSError for what is there but cannot be read: it may be sound.
    """
    for _, folder in _step_folders(root):
        try:
            verify(folder)
        except CheckpointError as error:
            # a training that went on from an older one would delete it
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            warn(f"passed over a damaged checkpoint: {error}")
        else:
            return folder
    return None


def drop_later(root: Path, step: int) -> list[Path]:
    """Set the folders of steps after `step`, sound or not, aside, where no reader looks; the next `save` deletes them.

    Returns what they were called. Raises OSError where the disk refuses; the earlier of them may then still be there.
    """
    later = [path for number, path in _step_folders(root) if number > step]
    # the highest first: wherever this is interrupted, the newest that is left is older than what was the newest
    for path in later:
        _set_aside(path)
    if later:
        (root / LATEST).unlink(missing_ok=True)
        sync(root)
    return later


def delete_leftovers(root: Path) -> None:
    """Delete what an interrupted `save`, or `drop_later`, left in `root`; only for who saves there."""
    for pattern in ("step-*.tmp", LATEST + ".tmp"):
        for leftover in root.glob(pattern):
            _delete(leftover)


def saved_steps(root: Path) -> dict[int, Path]:
    """Return the step folders below `root`, sound or not, by their number, the earliest first."""
    return dict(reversed(_step_folders(root)))


def _set_aside(folder: Path) -> Path:
    # deleted under a name that no reader looks at: an interrupted deletion never looks like a damaged checkpoint
    return folder.rename(folder.with_name(folder.name + ".old.tmp"))


def _delete(path: Path) -> None:
    try:
        # a step folder may be a link: to another disk, where somebody moved it
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        # rmtree names the file without its folder
        raise OSError(error.errno, f"cannot be deleted: {error.strerror}", str(path)) from error


def _step_number(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def _is_kept(step: int, keep_every: int) -> bool:
    return keep_every > 0 and step % keep_every == 0


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    # highest step first
    try:
        paths = list(root.iterdir())
    except FileNotFoundError:
        # a link to a disk that is not there does not say that there are none
        if root.is_symlink():
            raise
        paths = []
    numbered = [(number, path) for path in paths if (number := _step_number(path)) is not None]
    return sorted(numbered, reverse=True)


def verify(folder: Path) -> None:
    """Raise CheckpointError, naming the file, unless all files of the step folder are as its manifest says."""
    _require_intact(folder, _recorded_files(folder))


def _require_intact(folder: Path, recorded: Mapping[str, Mapping[str, Any]]) -> None:
    for name, expected in recorded.items():
        try:
            found = fingerprint(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from error
        for key in ("size", "sha256"):
            if found[key] != expected[key]:
                raise CheckpointError(
                    f"{folder / name}: {key} {found[key]}, expected {expected[key]}: the file is damaged"
                )


def _read_meta(path: Path) -> tuple[int, dict[str, Any]]:
    try:
        envelope = json.loads((path / META).read_text())
        version, step, meta = int(envelope["format_version"]), int(envelope["step"]), dict(envelope["meta"])
    except OSError as error:
        raise CheckpointError(f"{path / META}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path / META}: expected format_version, step and meta: {error!r}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, expected at most {FORMAT_VERSION}: a newer soflow wrote it"
        )
    number = _step_number(path)
    if number is not None and number != step:
        raise CheckpointError(f"{path}: holds step {step}, expected step {number} as the folder is called")
    return step, meta


def _profiles(names: Iterable[str]) -> dict[float, str]:
    # no width is so small that Python writes it with an exponent
    found = ((name, re.fullmatch(r"ema-(0\.\d+)\.safetensors", name)) for name in names)
    return {float(match[1]): name for name, match in found if match}


def _recorded_files(folder: Path) -> dict[str, dict[str, Any]]:
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
    return recorded
