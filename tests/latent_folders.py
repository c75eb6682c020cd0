"""Small folders of latents, and the official HDF5 file, for the tests of several modules."""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SHAPE = (8, 4, 4)
COUNTS = (5, 7, 4)


def write_npy(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an array and return its manifest entry."""
    np.save(path, array)
    contents = path.read_bytes()
    return {"count": len(array), "bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def random_latents(n: int, stored: str = "float16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Return n latents, mean and standard deviation, the latter above 0."""
    latents = np.random.default_rng(0).standard_normal((n, *shape))
    latents[:, shape[0] // 2 :] = np.abs(latents[:, shape[0] // 2 :])
    return latents.astype(stored)


def write_latents(
    root: Path,
    stored: str = "float16",
    counts: tuple[int, ...] = COUNTS,
    sample: tuple[int, ...] = SHAPE,
    **changes: Any,
) -> np.ndarray:
    """Write a folder of latents, with keys of the manifest changed, and return the latents; labels are i modulo 3."""
    root.mkdir(exist_ok=True)
    n = sum(counts)
    latents = random_latents(n, stored, sample)
    ends = np.cumsum(counts)
    manifest = {
        "version": 1,
        "n": n,
        "num_classes": 3,
        "shape": sample,
        "dtype": stored,
        "vae": "sd-vae-ft-mse",
        "labels": write_npy(root / "labels.npy", np.arange(n, dtype=np.int32) % 3),
        "shards": [
            write_npy(root / f"latents-{k:05d}.npy", latents[end - count : end])
            for k, (count, end) in enumerate(zip(counts, ends, strict=True))
        ],
    }
    (root / "manifest.json").write_text(json.dumps(manifest | changes))
    return latents


def rewrite_manifest(root: Path, **changes: Any) -> None:
    """Change keys of a manifest."""
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_hdf5(path: Path, n: int = 16, **changes: Any) -> np.ndarray:
    """Write an official HDF5 file of n latents, with data sets changed (None: left out), and return the latents."""
    latents = random_latents(n, "float32")
    data = {"latents": latents, "labels": np.arange(n) % 3, "amount": np.int64(n), "latent_size": np.int64(SHAPE[1])}
    with h5py.File(path, "w") as file:
        for name, value in (data | changes).items():
            if value is not None:
                file.create_dataset(name, data=value)
    return latents
