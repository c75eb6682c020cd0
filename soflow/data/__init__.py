"""Training data: sources, the order in which their samples are drawn, and feeders that bring these to the device."""

from soflow.config import DataConfig
from soflow.data.arrays import DIGITS_HELD_OUT_PER_CLASS, ArraySource, DigitsSource
from soflow.data.cifar10 import Cifar10Source
from soflow.data.feeder import Feeder, Rows, open_feeder
from soflow.data.hdf5 import Hdf5Source, convert_hdf5
from soflow.data.image_folder import ImageFolderSource
from soflow.data.latents import LATENT_SCALE, LatentSource
from soflow.data.order import BatchOrder, batch_indices, epoch_order, splitmix64
from soflow.data.source import DataError, Source

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


def open_source(config: DataConfig) -> Source:
    """Open the data set that the section `data` of a configuration names. Raises DataError when it is unusable."""
    if config.source == "digits":
        return DigitsSource("train")
    assert config.root is not None, "DataConfig lets no source but digits go without a root"
    if config.source == "images":
        assert config.image_size is not None, "DataConfig lets no images go without a size"
        return ImageFolderSource(config.root, config.image_size)
    sources = {"latents": LatentSource, "hdf5": Hdf5Source, "cifar10": Cifar10Source}
    return sources[config.source](config.root)
