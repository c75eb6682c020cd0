"""Training data: sources, the order in which their samples are drawn, and feeders that bring these to the device."""

import numpy as np
import torch

from soflow.config import DataConfig
from soflow.data.arrays import DIGITS_HELD_OUT_PER_CLASS, ArraySource, DigitsSource
from soflow.data.cifar10 import Cifar10Source
from soflow.data.feeder import Feeder, Rows, open_feeder
from soflow.data.hdf5 import Hdf5Source, convert_hdf5
from soflow.data.image_folder import ImageFolderSource
from soflow.data.latents import LATENT_SCALE, LatentSource
from soflow.data.order import BatchOrder, batch_indices, epoch_order, splitmix64
from soflow.data.source import DataError, Source, checked_labels

__all__ = [
    "DIGITS_HELD_OUT_PER_CLASS",
    "LATENT_SCALE",
    "ArraySource",
    "BatchOrder",
    "Cifar10Source",
    "DataError",
    "DigitsSource",
    "Feeder",
    "Hdf5Source",
    "ImageFolderSource",
    "LatentSource",
    "Rows",
    "Source",
    "batch_indices",
    "convert_hdf5",
    "epoch_order",
    "open_feeder",
    "open_source",
    "splitmix64",
]


def open_source(config: DataConfig, own: Source | None = None) -> Source:
    """Open the data set that the section `data` of a configuration names, or return `own` where it says own.

    Raises DataError when it is unusable, and where `own` is missing or not asked for.
    """
    if own is not None:
        if config.source != "own":
            raise DataError(f"data.source: got {config.source!r}, expected 'own', because a source was handed over")
        _require_usable(own, config.augment_p)
        return own
    if config.source == "own":
        raise DataError(
            "data.source: got 'own' and no source, expected Trainer(config, processes, source=...) in Python "
            "(docs/extending.md): no command can open it"
        )
    if config.source == "digits":
        return DigitsSource("train")
    assert config.root is not None, "DataConfig lets no other source go without a root"
    if config.source == "images":
        assert config.image_size is not None, "DataConfig lets no images go without a size"
        return ImageFolderSource(config.root, config.image_size)
    sources = {"latents": LatentSource, "hdf5": Hdf5Source, "cifar10": Cifar10Source}
    return sources[config.source](config.root)


def _require_usable(own: Source, augment_p: float) -> None:
    """Raise DataError unless labels and first sample are what a Source promises."""
    checked_labels(own.labels.numpy(), len(own), own.num_classes, "labels of the source")
    mean, std, _ = own.read(np.zeros(1, dtype=np.int64))
    for name, moment in (("mean", mean), ("standard deviation", std)):
        if moment is not None and (moment.shape != (1, *own.image_shape) or moment.dtype != torch.float32):
            raise DataError(
                f"{name} of the source: got {tuple(moment.shape)} {moment.dtype}, expected {(1, *own.image_shape)} "
                "torch.float32, one sample of its image_shape"
            )
    if std is not None and augment_p > 0:
        raise DataError(f"data.augment_p: got {augment_p}, expected 0, because the source has standard deviations")
