"""What a data set on disk is, holds and says of itself."""

from pathlib import Path

import torch

from soflow.config import DataConfig
from soflow.data.cifar10 import PUBLISHED_SHA256
from soflow.data.image_folder import shorten
from soflow.data.latent_writer import PLAN, read_bad_files
from soflow.data.manifest import MANIFEST
from soflow.data.source import DataError, Source


def guess_config(path: Path, image_size: int) -> DataConfig:
    """Return the section `data` that opens what lies at `path`; image_size: side of the crop, for a folder of images.

    What looks like nothing else is taken for a folder of images. Raises DataError where there is nothing.
    """
    if (path / MANIFEST).is_file():
        return DataConfig(source="latents", root=str(path))
    if (path / PLAN).is_file():
        raise DataError(
            f"{path}: got an unfinished folder of latents, expected {MANIFEST}: finish it by the same command"
        )
    if path.suffix in (".hdf5", ".h5") or (path.is_dir() and any(path.glob("*.hdf5"))):
        return DataConfig(source="hdf5", root=str(path))
    unpacked = ("cifar-10-batches-bin", "cifar-10-batches-py")
    if path.name in PUBLISHED_SHA256 or any((path / name).exists() for name in (*PUBLISHED_SHA256, *unpacked)):
        return DataConfig(source="cifar10", root=str(path))
    if not path.exists():
        raise DataError(f"{path}: expected a data set, but: no such file or folder")
    return DataConfig(source="images", root=str(path), image_size=image_size)


def describe_source(source: Source, path: Path) -> list[str]:
    """Return lines that say what an open data set holds."""
    counts = torch.bincount(source.labels, minlength=source.num_classes)
    empty = torch.nonzero(counts == 0).flatten().tolist()
    classes = f"{source.num_classes}, of {int(counts.min())} to {int(counts.max())} samples"
    if empty:
        classes += f"; none of {shorten(list(map(str, empty)))}"
    lines = {
        "samples": str(len(source)),
        "shape": " x ".join(map(str, source.image_shape)),
        "classes": classes,
        "fingerprint": source.fingerprint,
    }
    lines |= {("names" if name == "classes" else name): text for name, text in source.describe().items()}
    bad = read_bad_files(path) if path.is_dir() else []
    if bad:
        lines["left out"] = f"{len(bad)} files, see bad_files.jsonl; the first is {bad[0].path}: {bad[0].reason}"
    return [f"{name:<14}{text}" for name, text in lines.items()]
